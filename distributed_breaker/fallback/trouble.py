"""Whether to ask a disk that has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ClassVar

from ..process import OwnLock
from .forks import follow_forks

TROUBLES = 3  # in a row after which the disk is left alone …
RETRY = 30.0  # … for so many seconds

log = logging.getLogger("distributed_breaker")


class Trouble:
    """Whether to ask the disk: after some failures in a row only now and then, and one at a time.

    It is no circuit of this library: nobody else's failures count, and nobody looks at its state.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((60, "_lock"),)
    _lock = OwnLock()

    def __init__(self, clock: Callable[[], float], what: str) -> None:
        self.error = ""
        self._what = what
        self._clock = clock
        self._failures = 0
        self._since = 0.0
        self._retry_at = 0.0
        follow_forks(self)

    def admits(self) -> bool:
        if self._failures < TROUBLES:
            return True
        with self._lock:
            now = self._clock()
            if now < self._retry_at:
                return False
            self._retry_at = now + RETRY
            return True

    def lasted(self, seconds: float) -> bool:
        """Whether the failures have lasted for so long, or for so long again since the last yes."""
        with self._lock:
            now = self._clock()
            if not self._failures or now - self._since < seconds:
                return False
            self._since = now
            return True

    def failed(self, error: str) -> None:
        with self._lock:
            now = self._clock()
            self.error = error
            self._since = self._since if self._failures else now
            self._failures += 1
            self._retry_at = now + RETRY
            first = self._failures == TROUBLES
        if first:
            log.warning("%s until it works again: %s", self._what, error)

    def worked(self) -> None:
        if not self._failures:
            return
        with self._lock:
            loud = self._failures >= TROUBLES
            self._failures = 0
            self.error = ""
        if loud:
            log.warning("the disk tier works again; before: %s", self._what)

    def forked(self, clean: bool) -> None:
        """What was seen of the disk holds for the child, too."""
