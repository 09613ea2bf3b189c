"""How many calls of one process may be under way at once; the rest wait, boundedly, or are refused.

A free slot is taken and given back without a lock.  Only who finds none takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Future

from ..deadline import remaining
from ..policy import check_number
from ..process import OwnLock, follow_process


class BulkheadFull(Exception):
    """As many calls as may be are under way in this process.  It says nothing of the dependency."""


class Bulkhead:
    """At most ``limit`` calls at once, threads and tasks of this process taken together.

    May be shared by all that use one resource.

    Args:
        limit: calls at once, 1 to 1,000,000.
        queue: further ones that may wait for their turn; 0: none waits.
        max_wait: seconds that one waits at most, less if the context's deadline comes before.

    Raises:
        ValueError, TypeError: a number is out of range.
    """

    _lock = OwnLock()

    def __init__(self, limit: int, *, queue: int = 0, max_wait: float = 1.0) -> None:
        self.limit = int(check_number("limit", limit, 1, 1_000_000))
        self.queue = int(check_number("queue", queue, 0, 1_000_000))
        self.max_wait = check_number("max_wait", max_wait, 0.0, 3_600.0)
        self._begin()
        follow_process(self)

    def _begin(self) -> None:
        # One entry for each free slot.  Who takes one gives it back to the same deque, so that a
        # fork's child, which begins with a new one, is given none of its parent's.
        self.free = deque([None] * self.limit)
        self._waiting: deque[Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<Bulkhead {self.in_use}/{self.limit}, {len(self._waiting)} waiting>"

    @property
    def in_use(self) -> int:
        """Calls that are under way."""
        return self.limit - len(self.free)

    @property
    def full(self) -> bool:
        """Whether a call that comes now must wait, or is refused."""
        return not self.free

    def slot(self) -> Slot:
        """A block, for ``with`` and ``async with``, that has one of the slots, and waits for it if
        need be.

        Entering it raises:
            BulkheadFull: there was none in time, or too many wait.
        """
        return Slot(self)

    def patience(self) -> float:
        """Seconds that one who waits now waits at most."""
        left = remaining()
        return self.max_wait if left is None else min(left, self.max_wait)

    def refusal(self, why: str) -> BulkheadFull:
        """What one gets who gets no slot."""
        return BulkheadFull(f"{self.limit} calls are under way: {why}")

    def queue_up(self, free: deque[None]) -> Future[None]:
        """What becomes done when a slot was taken for the caller."""
        with self._lock:
            if len(self._waiting) >= self.queue:
                raise self.refusal(f"{self.queue} more may wait")
            turn: Future[None] = Future()
            self._waiting.append(turn)
        # Whoever gave one back before this one waited did not see it.
        self._hand_on(free)
        return turn

    def give_back(self, free: deque[None]) -> None:
        """A slot is free again."""
        free.append(None)
        if self._waiting:
            self._hand_on(free)

    def _hand_on(self, free: deque[None]) -> None:
        """Give free slots to those who wait, the first ones first."""
        with self._lock:
            while self._waiting:
                try:
                    free.pop()
                except IndexError:
                    return
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                else:
                    free.append(None)

    def give_up(self, turn: Future[None], free: deque[None]) -> None:
        """One who has waited waits no longer."""
        if turn.cancel():
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(turn)
        else:
            self.give_back(free)  # it came at the last moment

    def close(self) -> None:
        """Holds nothing."""

    def forked(self) -> None:
        """None of its parent's other threads lives on in a child."""
        vars(self).pop("_lock", None)
        self._begin()


class Slot:
    """A block that has a slot.  May be entered once."""

    __slots__ = ("_bulkhead", "_free")

    def __init__(self, bulkhead: Bulkhead) -> None:
        self._bulkhead = bulkhead
        self._free = bulkhead.free

    def __enter__(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            pass
        else:
            return
        bulkhead = self._bulkhead
        turn = bulkhead.queue_up(self._free)
        try:
            turn.result(bulkhead.patience())
        except BaseException as error:
            self._leave(turn, error)
            raise

    def __exit__(self, *error: object) -> None:
        self._bulkhead.give_back(self._free)

    async def __aenter__(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            pass
        else:
            return
        bulkhead = self._bulkhead
        turn = bulkhead.queue_up(self._free)
        try:
            async with asyncio.timeout(bulkhead.patience()):
                await asyncio.wrap_future(turn)
        except BaseException as error:
            self._leave(turn, error)
            raise

    def _leave(self, turn: Future[None], error: BaseException) -> None:
        self._bulkhead.give_up(turn, self._free)
        if isinstance(error, TimeoutError):
            raise self._bulkhead.refusal("no slot came free in time") from None

    async def __aexit__(self, *error: object) -> None:
        self._bulkhead.give_back(self._free)
