"""When the store counts as gone, and the way back.  Pure: no clock and no I/O.

Refused, reset or an error of the store: gone at once.  Timeouts: after two in a row, but after one
when a first sync or an acquire was among what was asked, since callers wait for those.  The way
back: attempts after full-jitter pauses, two good answers, a wait that spreads a fleet's returns,
and then the sync, which the link carries out.
"""

from __future__ import annotations

from collections.abc import Callable

TIMEOUTS = 2  # in a row before the store counts as gone
FIRST_PAUSE = 100  # ms; the longest first pause, doubled with each attempt
LONGEST_RETRY = 2_000  # ms
NEXT_LOOK = 20  # ms between the first and the second good answer
RETURN_SPREAD = 200  # ms over which a fleet's returns are spread
MAX_TRIES = 10


class Outage:
    """Whether the store is gone, and when to look again.

    Args:
        uniform: a random number between two others.

    Attributes:
        code: why it counts as gone; empty while it serves.
        look_at: when to look again (ms), while it is gone.
    """

    def __init__(self, uniform: Callable[[float, float], float]) -> None:
        self.code = ""
        self.look_at = 0
        self._uniform = uniform
        self._timeouts = 0
        self._tries = 0
        self._good = 0

    def answered(self) -> None:
        """The store has answered."""
        self._timeouts = 0

    def tolerates(self, timeout: bool, at_once: bool) -> bool:
        """Whether one failure is not enough yet."""
        if not timeout or at_once:
            return False
        self._timeouts += 1
        return self._timeouts < TIMEOUTS

    def begin(self, code: str, now: int) -> bool:
        """The store counts as gone; returns False when it did before."""
        first = not self.code
        self.code = code
        self._timeouts = 0
        if first:
            self._tries = 0
        self.pause(now)
        return first

    def pause(self, now: int) -> None:
        """A look has failed: wait longer before the next."""
        self._good = 0
        longest = min(LONGEST_RETRY, FIRST_PAUSE << self._tries)
        self._tries = min(self._tries + 1, MAX_TRIES)
        self.look_at = now + round(self._uniform(0, longest))

    def good_answer(self, now: int) -> bool:
        """A look has succeeded; returns True when it is time for the sync."""
        self._good += 1
        wait = NEXT_LOOK if self._good < 2 else round(self._uniform(0, RETURN_SPREAD))
        self.look_at = now + wait
        return self._good > 2

    def end(self) -> None:
        """The store serves again."""
        self.code = ""
        self._tries = 0
