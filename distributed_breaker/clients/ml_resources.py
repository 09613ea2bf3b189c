"""What is in use, looked at once per second in the background, for all clients of a process."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from ..process import (
    OwnLock,
    before_uwsgi_forks,
    close_with_process,
    follow_process,
    uwsgi_without_threads,
)
from ..workers import start_thread
from .ml_readings import Limits, Readings, Usage

__all__ = ["SHARED", "Limits", "Readings", "Resources", "Usage"]

INTERVAL = 1.0  # s between two looks
STALE = 5.0  # s after which a look says nothing any more

log = logging.getLogger("distributed_breaker")


class Resources:
    """The newest look at what is in use.  Reading it neither waits nor looks.

    A thread looks as long as somebody has joined.  Where there cannot be one (uWSGI without
    threads), who reads looks, at most once in an interval.

    Args:
        readings: makes what looks, in each process anew.
        interval: seconds between two looks.
        clock: monotonic seconds.
    """

    _lock = OwnLock()

    def __init__(
        self,
        readings: Callable[[], Readings] = Readings,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = readings
        self._readings: Readings | None = None
        self._interval = interval
        self._clock = clock
        self._joined: Counter[str] = Counter()
        self._newest = self._shown = Usage()
        self._good_until = self._looked = -math.inf
        self._pretended = False
        self._thread: _Looks | None = None
        self._closes_with_process = False
        follow_process(self)

    @property
    def usage(self) -> Usage:
        """What is in use; all of it unknown while nobody has joined, or before the first look."""
        if self._clock() < self._good_until:
            return self._shown
        return self._overdue()

    def join(self, device: str = "cpu") -> None:
        """Have the thread look, also at the GPU that ``device`` names ("cuda:0")."""
        with self._lock:
            self._joined[device] += 1
        self._start()

    def leave(self, device: str = "cpu") -> None:
        """Undo a ``join``; with the last one the thread ends."""
        with self._lock:
            self._joined[device] -= 1
            self._joined = +self._joined
            if self._joined:
                return
        self.close()

    def pretend(self, usage: Usage | None) -> None:
        """Report this instead of what is in use, until it is None: for tests and rehearsals."""
        with self._lock:
            self._pretended = usage is not None
            self._shown = usage or self._newest
            self._good_until = math.inf if usage else self._looked + STALE

    def look(self) -> None:
        """Look now; the thread does."""
        if self._readings is None:
            self._readings = self._make()
        with self._lock:
            devices = tuple(self._joined)
        usage = self._readings.look(devices)
        with self._lock:
            self._newest, self._looked = usage, self._clock()
            if not self._pretended:
                self._shown = usage
                self._good_until = self._looked + (STALE if self._thread else self._interval)

    def _overdue(self) -> Usage:
        """There is no thread, or it has not looked for long."""
        if not self._joined:
            return Usage()
        if self._start():
            late = self._clock() - self._looked
            if late <= STALE:
                return Usage()
            return Usage(problems=(f"what is in use has not been seen for {late:.0f} s",))
        self.look()
        return self._shown

    def _start(self) -> bool:
        """Start the thread unless it runs; False where none can."""
        if sys.is_finalizing() or uwsgi_without_threads() or before_uwsgi_forks():
            return False
        with self._lock:
            if self._thread is None and self._joined:
                try:
                    self._thread = _Looks(self.look, self._interval)
                except RuntimeError:
                    return False
                self._looked = self._clock()
            if not self._closes_with_process:
                self._closes_with_process = True
                close_with_process(self)
        return True

    def forked(self) -> None:
        """The child's thread starts when its first call finds that nobody has looked."""
        vars(self).pop("_lock", None)
        if self._thread is not None:
            self._thread.ended = True  # a thread that is a greenlet has come along
        self._thread = self._readings = None
        self._closes_with_process = False

    def close(self) -> None:
        """End the thread, in at most a second."""
        with self._lock:
            thread, self._thread = self._thread, None
            if not self._pretended:
                self._good_until = -math.inf
        if thread is not None:
            thread.close()


class _Looks:
    """The thread."""

    def __init__(self, look: Callable[[], None], interval: float) -> None:
        self.ended = False
        self._look = look
        self._interval = interval
        self._wake = threading.Event()
        self._thread = start_thread("circuit-breaker-resources", self._run)

    def _run(self) -> None:
        while not self.ended:
            try:
                self._look()
            except Exception:
                log.exception("what is in use is looked at again, after a defect")
            self._wake.wait(self._interval)

    def close(self) -> None:
        self.ended = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)


SHARED = Resources()
"""The one of this process."""
