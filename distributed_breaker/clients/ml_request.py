"""One call of a model on its way: what it asks for, what became of it, and who is told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from math import inf
from typing import Any, NamedTuple, Protocol

from ..errors import CircuitBreakerOpenException

WAITING, RUNNING, DONE, LEFT = range(4)


class ModelOverloaded(CircuitBreakerOpenException):
    """The model is well and has no time for this call; the circuit counts nothing."""


class Engine(Protocol):
    """Runs a model."""

    hard: bool
    """Whether ``run`` ends in time by itself."""
    loading: bool
    """Whether there will be a model, and there is none yet."""
    version: str
    """Changes with the model."""

    def run(self, inputs: Any, seconds: float) -> Any:
        """The model's output; a hard engine raises InferenceTimeout after ``seconds``."""


class Bounds(NamedTuple):
    """Numbers of a queue.

    Attributes:
        calls: how many may wait.
        queue: seconds for which one may.
        batch: inputs in one run.
        wait: seconds that a run waits for further inputs.
    """

    calls: int = 100
    queue: float = 300.0
    batch: int = 32
    wait: float = 0.0


class Request:
    """One input for the model, and what became of it.

    Args:
        inputs: what the model takes.
        limit: seconds that the model may take.
        timeout: seconds for everything, waiting included; None: only the other bounds.
        priority: those of a higher one are run first.
    """

    __slots__ = (
        "_done",
        "began",
        "error",
        "finite",
        "future",
        "inputs",
        "limit",
        "nanoseconds",
        "output",
        "priority",
        "put_at",
        "run",
        "state",
        "timeout",
        "until",
    )

    def __init__(
        self, inputs: Any, limit: float, timeout: float | None = None, priority: int = 0
    ) -> None:
        self.inputs = inputs
        self.limit = limit
        self.timeout = timeout
        self.priority = priority
        self.state = WAITING
        self.put_at = self.began = 0.0
        self.until = inf
        self.run: Run | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.finite: bool | None = None
        """Whether all numbers of the output are; None: that was not looked at."""
        self.nanoseconds = 0
        """What the model took; what the caller waited, if it has left."""
        self.future: asyncio.Future[None] | None = None
        self._done = threading.Lock()
        self._done.acquire()

    @property
    def answered(self) -> bool:
        """Whether it has its output or its error."""
        return self.state == DONE


class Run:
    """One call of the model; without requests it is the queue's own, to learn something."""

    __slots__ = ("began", "learns", "left_behind", "requests", "until")

    def __init__(self, requests: list[Request], began: float, until: float) -> None:
        self.requests = requests
        self.began = began
        self.until = until
        self.learns = False  # whether inputs such as the first can be joined is yet unknown
        self.left_behind = False


def ring(wake: threading.Lock) -> None:
    """Wake the thread; twice is as good as once, and too early costs it a look."""
    try:  # noqa: SIM105 - what stands in place of it is still running when the thread wants to
        wake.release()
    except RuntimeError:
        pass


def wake_callers(requests: list[Request]) -> None:
    """Tell the callers that their requests are done."""
    if len(requests) == 1 and requests[0].future is None:
        requests[0]._done.release()
        return
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for request in requests:
        if request.future is None:
            request._done.release()
        else:
            loops.setdefault(request.future.get_loop(), []).append(request.future)
    for loop, futures in loops.items():
        with contextlib.suppress(RuntimeError):  # It is closed: nobody waits there.
            loop.call_soon_threadsafe(_set, futures)


def _set(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
