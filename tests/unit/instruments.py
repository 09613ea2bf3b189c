"""Instruments that show what a call does besides running its function."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class CountingLock:
    """Counts how often the thread that made it takes a lock, or even tries to.

    It stands before the lock that it replaces, which another thread may hold at that moment.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._owner = threading.get_ident()
        self.taken = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if threading.get_ident() == self._owner:
            self.taken += 1
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def profiled() -> Iterator[Counter[str]]:
    """Counts the calls of C functions by name, as far as the interpreter tells."""
    calls: Counter[str] = Counter()

    def note(_: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            calls[argument.__name__] += 1

    # The collector may run in this thread at any moment and close what other tests have left.
    gc.disable()
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        gc.enable()


FORBIDDEN = {
    "acquire", "acquire_lock", "__enter__", "release", "release_lock", "sendall", "recv",
    "recv_into", "connect", "select", "poll", "open", "read", "write", "sleep", "wait", "put",
    "start_new_thread", "fork", "urandom", "getpid", "gethostname",
}  # fmt: skip
