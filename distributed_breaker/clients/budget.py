"""How many of one process's calls may be tried again (docs/decisions/0014-the-retry-budget.md)."""

from __future__ import annotations

import itertools

from ..policy import check_number
from ..process import OwnLock, follow_process

BURST = 100  # calls whose share of retries may be made at once, and is lent at the start


class RetryBudget:
    """Retries are at most a share of the calls, by the last hundred of them.

    May be shared by all that call one dependency.  The first hundred calls are lent their retries.
    A fork's child begins anew.

    Args:
        share: retries per call, between 0 and 1.

    Raises:
        ValueError, TypeError: the share is none.
    """

    _lock = OwnLock()

    def __init__(self, share: float = 0.1) -> None:
        self.share = check_number("share", share, 0.0, 1.0)
        self._begin()
        follow_process(self)

    def _begin(self) -> None:
        self._count = itertools.count(1)
        self.calls = 0
        # What the first calls will have earned is lent them.
        self._tokens, self._seen = BURST * self.share, BURST

    def called(self) -> None:
        """Count a call (not its retries); takes no lock."""
        # Two threads may store their numbers in the wrong order: the next call mends it.
        self.calls = next(self._count)

    def take(self, calls: int | None = None) -> bool:
        """Take a retry out of the budget, if there is one.

        Args:
            calls: how many there have been; None: those that ``called`` was told of.
        """
        with self._lock:
            known = max(self._seen, self.calls if calls is None else calls)
            earned = self.share * (known - self._seen)
            self._tokens = min(BURST * self.share, self._tokens + earned)
            self._seen = known
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def close(self) -> None:
        """Holds nothing."""

    def forked(self) -> None:
        """A child makes a lock of its own, and earns by its own calls."""
        vars(self).pop("_lock", None)
        self._begin()
