"""A thread that does something again and again, beside the calls of a process."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable

from ..process import before_uwsgi_forks, uwsgi_without_threads
from ..workers import start_thread

SOONEST = 0.05  # s between two ticks, however often it is woken
AFTER_DEFECT = 5.0  # s

log = logging.getLogger("distributed_breaker")


class Ticker:
    """Calls a function from a thread of its own, until it is closed.

    Args:
        name: of the thread.
        tick: what is called; it returns the seconds until the next time.  If it raises, that is
            logged, once for each kind of error, and it is called again later.

    Where no thread can run, it is never called.
    """

    def __init__(self, name: str, tick: Callable[[], float]) -> None:
        self._name = name
        self._tick = tick
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._once_more = False
        self._thread: threading.Thread | None = None
        self._said: set[type[Exception]] = set()

    def start(self) -> None:
        """Begin; again, after a fork."""
        if sys.is_finalizing() or before_uwsgi_forks() or uwsgi_without_threads():
            return
        with contextlib.suppress(RuntimeError):
            self._thread = start_thread(self._name, self._run)

    def wake(self) -> None:
        """Tick now."""
        self._wake.set()

    def close(self, timeout: float = 1.0, *, once_more: bool = False) -> None:
        """End it, perhaps after one last tick, and wait at most ``timeout`` seconds for that."""
        self._once_more = once_more and not self._stopping.is_set()
        self._stopping.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def forked(self) -> None:
        """A child has none of its parent's threads."""
        again = self._thread is not None and not self._stopping.is_set()
        self._begin_anew()
        if again:
            self.start()

    def _run(self) -> None:
        wake, stopping = self._wake, self._stopping
        # A thread that gevent has made a greenlet comes along into a forked child, and ends there.
        while not stopping.is_set() and self._stopping is stopping:
            wake.clear()
            wait = self._safe_tick()
            if not stopping.wait(SOONEST):
                wake.wait(max(0.0, wait - SOONEST))
        if self._once_more and self._stopping is stopping:
            self._safe_tick()

    def _safe_tick(self) -> float:
        try:
            return self._tick()
        except Exception as error:
            if type(error) not in self._said:
                self._said.add(type(error))
                log.exception("%s goes on after a defect", self._name)
            return AFTER_DEFECT
