"""The process that runs a model for others: ``python -m distributed_breaker.clients.ml_worker``.

It is started by ``ml_process`` and serves one application, or by ``ml_host`` and serves all of this
user's on the host that use the model.  It computes one prediction at a time, in turns among those
who ask.

It ends by itself when nobody needs it.  A call that overruns its deadline ends it as well, by a
timer of the kernel's with which no code of the model can interfere, be it stuck in a library that
holds Python's lock.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from .ml_channel import Broken, Channel, Gone, Late
from .ml_files import brief, need_torch
from .ml_host import Door
from .ml_models import Loaded, ModelProblem, load_model
from .ml_modules import out_of_memory

LOADING = 600.0  # s
FRAME = 1.0  # s for a frame to be read or written
GRACE = 1.0  # s after a call's deadline; where others share the worker, as long as the call itself
LINGERING = 60.0  # s without anyone connected
LOOK = 5.0  # s between two looks whether the parent is still there
MOST_CONNECTED = 256
LONGEST_CALL = 24 * 3600.0  # s
ABOUT = ("version", "kind", "bytes", "device", "seconds", "torch", "stamp")  # of what is loaded
PAGE = os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str]) -> None:
    """Serve until nobody needs it.

    Args:
        arguments: the descriptor of a connected socket; or of a listening one, and its path.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Where memory runs out, the kernel is to choose this process before the applications.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")
    given = socket.socket(fileno=int(arguments[0]))
    if arguments[1:]:
        # Nobody has to wait for the end of what outlives its parent.
        if os.fork():
            os._exit(0)
        worker = Worker(Door(given, arguments[1]))
    else:
        # An application that is told to end answers what it has begun, and needs this for it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = Worker(None)
        worker.channels.append(Channel(given))
    worker.serve()
    # Nothing is left to be done; what a library does at exit could only hang.
    os._exit(0)


class Worker:
    """A model, and those who use it.

    Args:
        door: where they come in; None: there is one only, who is connected already.
    """

    def __init__(self, door: Door | None) -> None:
        self.channels: list[Channel] = []
        self._door = door
        self._loaded: Loaded | None = None
        self._model: Any = None  # what the first client has asked for
        self._most: int | None = None
        self._before, self._at_first = 0, 0
        self._left_at = time.monotonic()
        self._parent = os.getppid()

    def serve(self) -> None:
        """Serve until nobody needs it."""
        while self._needed():
            ready = {fd for fd, _ in self._poll(LOOK)}
            # In turns: one frame of each, however many one has sent.
            for channel in [each for each in self.channels if each.fileno() in ready]:
                try:
                    self._handle(channel)
                except (Gone, Late, Broken, MemoryError, RuntimeError):
                    self._leave(channel)
                except ModelProblem as problem:
                    self._give_up(problem)
                    return
            if self._door is not None and self._door.fileno() in ready:
                self._enter()

    def _poll(self, seconds: float) -> list[tuple[int, int]]:
        poll = select.poll()
        for each in self.channels:
            poll.register(each, select.POLLIN)
        if self._door is not None and self._door.fileno() >= 0:
            poll.register(self._door, select.POLLIN)
        return poll.poll(seconds * 1000)

    def _needed(self) -> bool:
        if self.channels:
            return self._door is not None or os.getppid() == self._parent
        if self._door is None or self._door.fileno() < 0:
            return False
        if time.monotonic() - self._left_at < LINGERING:
            return True
        return not self._door.close(unless_wanted=True)

    def _enter(self) -> None:
        assert self._door is not None
        sock = self._door.accept()
        if sock is not None and len(self.channels) < MOST_CONNECTED:
            self.channels.append(Channel(sock))
        elif sock is not None:
            sock.close()

    def _leave(self, channel: Channel) -> None:
        channel.close()
        self.channels.remove(channel)
        self._left_at = time.monotonic()

    def _handle(self, channel: Channel) -> None:
        frame, tree = channel.receive(time.monotonic() + FRAME)
        match frame:
            case {"model": dict(model), "most_bytes": int() | None as most_bytes}:
                self._greet(channel, model, most_bytes)
            case {"call": int(number), "deadline": float(deadline)} if math.isfinite(deadline):
                self._call(channel, number, deadline, tree)
            case _:
                raise Broken("neither the model's name nor a call")

    def _greet(self, channel: Channel, model: dict[str, Any], most_bytes: int | None) -> None:
        """Load the model, if this is the first who asks for it, and tell about it."""
        if self._loaded is None:
            with _ends_after(LOADING):
                # What PyTorch takes by itself is no memory of the model's.
                need_torch(str(model.get("path")))
                self._before = own_memory()
                self._loaded = _load(model)
            self._model, self._most = model, most_bytes
            self._at_first = own_memory() - self._before
        elif model != self._model:
            raise Broken("this worker is another model's")
        about = {name: getattr(self._loaded, name) for name in ABOUT}
        channel.send({"pid": os.getpid()}, time.monotonic() + FRAME, about)

    def _give_up(self, problem: ModelProblem) -> None:
        """Tell all who wait for the model that there is none."""
        if self._door is not None:
            while (sock := self._door.accept()) is not None:
                self.channels.append(Channel(sock))
            self._door.close()
        words = [str(each)[:1000] for each in (problem.where, problem.why, problem.remedy)]
        for channel in self.channels:
            with contextlib.suppress(Gone, Late):
                channel.send({"problem": words}, time.monotonic() + FRAME)

    def _call(self, channel: Channel, number: int, deadline: float, tree: Any) -> None:
        if self._loaded is None:
            raise Broken("a call comes before the model's name")
        left = min(deadline - time.monotonic(), LONGEST_CALL)
        if left <= 0:
            return  # who asked does not wait any more
        grace = GRACE if self._door is None else max(GRACE, left)
        with _ends_after(left + grace):
            channel.mark(number)
            try:
                output = self._loaded.call(tree)
                channel.send(self._answer(number), time.monotonic() + FRAME, output)
            except (Gone, Late):
                raise
            except BaseException as error:
                channel.send(
                    {**self._answer(number), "error": type(error).__qualname__[:200],
                     "message": _said(error), "out_of_memory": out_of_memory(error)},
                    time.monotonic() + FRAME,
                )  # fmt: skip
            finally:
                channel.mark(0)

    def _answer(self, number: int) -> dict[str, Any]:
        """What each answer says.  A worker that has taken too much memory asks to be replaced."""
        taken = own_memory() - self._before if self._most is not None else 0
        retires = self._most is not None and self._at_first <= self._most < taken
        if retires and self._door is not None:
            self._door.close()
        return {"call": number, "retires": retires}


@contextlib.contextmanager
def _ends_after(seconds: float) -> Iterator[None]:
    """The kernel ends this process if what is done here takes longer."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _load(model: dict[str, Any]) -> Loaded:
    """Raises ModelProblem, whatever is wrong."""
    try:
        return load_model(**model)
    except ModelProblem:
        raise
    except Exception as error:
        what = f"cannot be loaded ({type(error).__name__}: {brief(error)})"
        raise ModelProblem(str(model.get("path")), what, "look at the file") from error


def _said(error: BaseException) -> str:
    """What an error says; it is the model's own, and may have defects, too."""
    try:
        return brief(error)
    except Exception:
        return ""


def own_memory(pid: int | str = "self") -> int:
    """Bytes of memory that a process has for itself: resident, and not shared."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * PAGE


if __name__ == "__main__":
    main(sys.argv[1:])
