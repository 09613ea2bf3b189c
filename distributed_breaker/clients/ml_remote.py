"""One worker process with a model, as the application sees it, and what can come of a call."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .ml_channel import Broken, Channel, Gone, Late
from .ml_files import InferenceTimeout, ModelProblem
from .ml_host import connect, start_worker

SENDING = 5.0  # s for a first frame to be taken
LOADING = 660.0  # s until a worker has loaded its model; it ends itself a minute before
DYING = 1.0  # s that a process which has closed its connection may take to be gone


@dataclass(frozen=True)
class ModelSpec:
    """What a worker is to load, see ``ml_models.load_model``; all of it goes through JSON.

    Attributes:
        path: of the model's file.
        device: where it is to be.
        factory: ``"package.module:function"``, which makes the module that weights belong to.
        safe_globals: ``"package.module:Class"`` of each class that a pickle may use.
        most_bytes: that the model may take.
    """

    path: str
    device: str = "auto"
    factory: str | None = None
    safe_globals: tuple[str, ...] = ()
    most_bytes: int | None = None


class WorkerDied(Exception):
    """The process that runs the model has ended in the midst of a call, or has broken the rules.

    Attributes:
        out_of_memory: it was killed by somebody else, as the kernel does when memory runs out.
        begun: the call may be what has killed it; not: it only waited.
    """

    def __init__(self, message: str, *, out_of_memory: bool = False, begun: bool = True) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory
        self.begun = begun


class Left(Exception):
    """The worker has been replaced before the call began: ask the one that is there now."""


class RemoteError(Exception):
    """The model has raised an error, in its own process.

    Attributes:
        kind: the name of its class.
        message: the first line of what it says.
        out_of_memory: there was not enough memory, the host's or a GPU's.
    """

    def __init__(self, kind: str, message: str, out_of_memory: bool) -> None:
        super().__init__(kind, message, out_of_memory)
        self.kind, self.message, self.out_of_memory = kind, message, out_of_memory

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class Worker:
    """One process with a model, and the connection to it.

    Args:
        model: what it loads.
        shared: use the host's.
        most_bytes: of memory that it may have for itself.

    Raises:
        ModelProblem, OSError: it cannot be started.
    """

    def __init__(self, model: ModelSpec, shared: bool, most_bytes: int | None) -> None:
        self.about: dict[str, Any] = {}
        """What it tells of the model, once that is loaded."""
        self.pid = 0
        self.since = time.time()
        self.retires = False
        """It asks to be replaced, as it has taken too much memory."""
        self.usable = True
        """It can take another call: it is not in the midst of one."""
        self.overran = False
        """A call has taken longer than it may."""
        self._greeting = {"model": asdict(model), "most_bytes": most_bytes}
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._ended = False
        self._numbers = itertools.count(1)
        self._busy = threading.Lock()
        if shared:
            ours = connect(asdict(model), most_bytes)
        else:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    self._process = start_worker(theirs)
                except BaseException:
                    ours.close()
                    raise
            self.pid = self._process.pid
        self._channel = Channel(ours)

    def load(self) -> None:
        """Wait until the model is there.

        Raises:
            ModelProblem, WorkerDied, Left: it will not be.
        """
        with self._in_use():
            try:
                self._channel.send(self._greeting, time.monotonic() + SENDING)
                frame, about = self._channel.receive(time.monotonic() + LOADING)
            except (Gone, Late, Broken) as error:
                raise self._died(error) from None
        match frame, about:
            case {"problem": [str(where), str(why), str(remedy)]}, None:
                raise ModelProblem(where, why, remedy)
            case {"pid": int(pid)}, {"version": str()}:
                self.pid, self.about, self.since = self.pid or pid, about, time.time()
            case _:
                raise self._died(Broken("no greeting"))

    def call(self, inputs: Any, seconds: float) -> Any:
        """What the model makes of the inputs; see ``usable`` afterwards.

        Raises:
            InferenceTimeout, WorkerDied, RemoteError, Left
            TypeError, ValueError: the inputs cannot be sent.
        """
        deadline, number = time.monotonic() + seconds, next(self._numbers)
        with self._in_use():
            try:
                self._channel.send({"call": number, "deadline": deadline}, deadline, inputs)
                self.usable = False
                frame, outputs = self._channel.receive(deadline)
            except Late:
                self.overran = not self.usable
                raise InferenceTimeout(f"the model has not answered within {seconds:g} s") from None
            except (Gone, Broken) as error:
                self.usable = False
                begun = self._channel.marked() in (None, number)
                raise self._died(error, begun) from None
        match frame:
            case {"call": int(answered), "retires": bool(retires)} if answered == number:
                self.usable, self.retires = True, retires
            case _:
                raise self._died(Broken("no answer to the call"))
        match frame:
            case {"error": str(kind), "message": str(message), "out_of_memory": bool(memory)}:
                raise RemoteError(kind, message, memory)
        return outputs

    def alive(self) -> bool:
        """Whether it is there, as far as is known without asking it."""
        if self._ended or (self._process is not None and self._process.poll() is not None):
            return False
        return self._channel.alive()

    def retire(self) -> None:
        """End it as soon as no call is under way.  Safe to call twice."""
        self._killed = True
        self._settle()

    def kill(self) -> None:
        """End it now; a call that is under way raises WorkerDied.  A shared one is only left.

        This does not wait until it is gone, which takes some time; ``retire`` does.
        """
        self._killed = True
        if self._process is not None:
            self._process.kill()
        self._channel.hang_up()

    def abandon(self) -> None:
        """In a forked child: it is the parent's."""
        self._channel.abandon()
        if self._process is not None:
            self._process.returncode = 0  # so that nobody waits here for another's child
        self._killed = self._ended = True

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        try:
            with self._busy:
                if self._killed:
                    raise Left
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """End it, if that is wanted and nobody uses it."""
        if not self._killed or not self._busy.acquire(blocking=False):
            return
        done, self._ended = self._ended, True
        self._busy.release()
        if done:
            return
        self._channel.close()
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DYING)

    def _died(self, error: Exception, begun: bool = True) -> WorkerDied:
        if isinstance(error, Broken):
            return WorkerDied(f"the model's process breaks the rules: {error}", begun=begun)
        if isinstance(error, Late):
            return WorkerDied(f"the model's process has not loaded it within {LOADING:g} s")
        if self._killed:
            return WorkerDied("the model's process has been ended")
        code = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(DYING)
        return WorkerDied(
            f"the model's process has ended{_how(code)}",
            out_of_memory=code == -signal.SIGKILL,
            begun=begun,
        )


def _how(code: int | None) -> str:
    """How a process has ended, by its exit code; None: a shared one does not tell."""
    if code is None:
        return ""
    if code >= 0:
        return f" with exit code {code}"
    if code == -signal.SIGKILL:
        return ": killed, as when memory runs out"
    try:
        return f" by {signal.Signals(-code).name}"
    except ValueError:
        return f" by signal {-code}"
