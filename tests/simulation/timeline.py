"""Virtual time: what happens when.  What falls on the same millisecond comes in random order."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from itertools import count

Action = Callable[[], object]
MOST_STEPS = 200_000  # in one run; usual are some 10,000, and those who talk without end have more


class Timeline:
    """A queue of actions on a clock that only moves when the next action is due."""

    def __init__(self, chance: random.Random) -> None:
        self.now = 0  # ms
        self.steps = 0
        self._chance = chance
        self._count = count()
        self._queue: list[tuple[int, float, int, Action]] = []

    def after(self, delay: int, action: Action) -> None:
        """Have something done ``delay`` ms from now."""
        entry = (self.now + max(0, delay), self._chance.random(), next(self._count), action)
        heapq.heappush(self._queue, entry)

    def run(self, until: int) -> None:
        """Do everything that is due up to ``until`` (ms), which is the time afterwards."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, _, action = heapq.heappop(self._queue)
            self.steps += 1
            assert self.steps < MOST_STEPS, f"L6: {self.steps} steps by {self.now} ms, and no end"
            action()
        self.now = until
