"""The right to make one call: permits, and the guarded blocks that hold one."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self

from .linked import FULL
from .model import MAX_SPAN
from .policy import Outcome, check_number
from .shadow import Era, Generation

if TYPE_CHECKING:
    from .breaker import CircuitBreaker

# The probes' permits that this context holds: inner calls on their circuits ride on them and are
# not counted.  A task started inside may outlive the permit, so riders look whether it is settled.
held: ContextVar[tuple[Permit, ...]] = ContextVar("circuit_breaker_permits", default=())


def rides(breaker: CircuitBreaker) -> bool:
    """Whether a call on this circuit is part of a probe that this context is making."""
    return any(p._breaker is breaker and p._lease and not p._done for p in held.get())


class Lease(NamedTuple):
    """What makes a permit the permit of a probe."""

    token: str
    local: Generation | None  # of the local machine, when that gave the permit
    shared: Generation
    reporter: str  # the process to which it was given
    until: int = 0  # ms


class Permit:
    """The right to make one call, and the place to say how it ended.

    The first of ``success``, ``slow``, ``failure`` and ``ignore`` counts; later ones do nothing.
    """

    # There is no __init__: a permit is made for every guarded block, and calling an __init__
    # would take a quarter of the block's time.  ``Permit()._begin(…)`` makes one.
    __slots__ = ("_breaker", "_done", "_era", "_lease", "_start")

    _breaker: CircuitBreaker
    _era: Era | None  # None: a probe, or a call that rides on one
    _lease: Lease | None  # of a probe
    _done: bool
    _start: int  # ns

    def _begin(self, breaker: CircuitBreaker, era: Era | None, lease: Lease | None = None) -> Self:
        self._breaker = breaker
        self._era = era
        self._lease = lease
        self._done = False
        clock = breaker._now_ns
        self._start = clock()
        return self

    @property
    def is_probe(self) -> bool:
        """Whether this is a trial call of a half-open circuit."""
        return self._lease is not None

    def success(self) -> None:
        """The call succeeded."""
        self._ended(None)

    def slow(self, duration: float | None = None) -> None:
        """The call succeeded, and counts as a slow one, for another reason than how long it took.

        Args:
            duration: seconds that the dependency took; None: those since the call began.
        """
        if not self._done:
            self._done = True
            spent = None if duration is None else round(duration * 1e9)
            self._record(Outcome.SUCCESS, spent, slow=True)

    def failure(self, exc: BaseException | None = None, open_for: float | None = None) -> None:
        """The call failed.

        Args:
            exc: the error, for the record; how it is classified is not asked again.
            open_for: seconds for which the dependency asked to be left alone (Retry-After): the
                circuit opens at once for that long, without quorum, up to the policy's bound.

        Raises:
            ValueError, TypeError: open_for is not a positive number of seconds.
        """
        if open_for is not None:
            check_number("open_for", open_for, 1e-9, sys.float_info.max)
        self._settle(Outcome.FAILURE, None, exc, open_for)

    def ignore(self, open_for: float | None = None) -> None:
        """The call says nothing about the dependency; a held permit is given back.

        Args:
            open_for: as of ``failure``, for a dependency that is well and asks to be left alone.
        """
        if open_for is not None:
            check_number("open_for", open_for, 1e-9, sys.float_info.max)
        self._settle(Outcome.IGNORED, None, None, open_for)

    def _ended(self, error: BaseException | None, duration: int | None = None) -> None:
        """Settle by how a block ended, after ``duration`` ns (None: from its beginning)."""
        if self._done:
            return
        # Nothing may stand between the look and the mark, or two threads could both settle.
        self._done = True
        breaker, era = self._breaker, self._era
        if error is not None:
            self._record(breaker.policy.outcome_of(error), duration, error)
            return
        if duration is None:
            clock = breaker._now_ns
            duration = clock() - self._start
        if era is not None and (breaker._never_slow or duration < breaker._slow_ns):
            tally = era.tally
            tally.append(duration)
            if len(tally) > FULL:
                breaker.drain_if_free(era)
        else:
            self._record(Outcome.SUCCESS, duration)

    def _returned(self, result: object) -> None:
        """Settle by what a function returned."""
        failed = self._breaker._is_failure(result)
        self._settle(Outcome.FAILURE if failed else Outcome.SUCCESS)

    def _settle(
        self,
        outcome: Outcome,
        duration: int | None = None,
        error: BaseException | None = None,
        open_for: float | None = None,
    ) -> None:
        if not self._done:
            self._done = True
            self._record(outcome, duration, error, open_for)

    def _record(
        self,
        outcome: Outcome,
        duration: int | None,
        error: BaseException | None = None,
        open_for: float | None = None,
        *,
        slow: bool = False,
    ) -> None:
        breaker, lease = self._breaker, self._lease
        elapsed = breaker._now_ns() - self._start
        spent = elapsed if duration is None else duration
        wait = 0 if open_for is None else min(MAX_SPAN, max(1, round(open_for * 1000)))
        if self._era is not None:
            breaker._record(self._era, outcome, spent, error, wait, elapsed, slow)
        elif lease is not None:
            item = breaker._item(outcome, spent, error, wait, elapsed, slow)
            if lease.local is not None:
                breaker.settle_locally(lease.token, lease.local, item, lease.shared)
                breaker._link_nudge()
            elif lease.reporter != breaker._shadow.reporter:
                breaker.settle_inherited(item)
            else:
                breaker._settle_shared(lease.token, lease.shared, item, lease.until)


class Inspector(Protocol):
    """Is shown each call that a circuit admits, before it is made.

    It may wait.  What it raises ends the call as if the call had raised it.
    """

    def admitted(self, permit: Permit) -> None: ...
    async def admitted_async(self, permit: Permit) -> None: ...


class Guard(Permit):
    """A guarded block: ``with breaker.guard() as call`` or ``async with``.

    ``call.failure()`` and ``call.ignore()`` override what the block's end says.  The guard is
    itself the permit that it gives, and may be entered again when it has been left.
    """

    __slots__ = ("_below", "_outer")

    _below: Guard | None  # of ``with breaker:``, the block around this one
    _outer: tuple[Permit, ...]  # of a probe, what the context held before
    _by_check: ClassVar[bool] = False

    def __enter__(self) -> Permit:
        breaker = self._breaker
        era = breaker._era
        if era is None:
            seconds = breaker._seconds
            now = seconds()
            refused = now < breaker._refuse_until and not self._by_check
            if refused and not (held.get() and rides(breaker)):
                raise breaker._rejection(now)
            return self._take(breaker._admit(by_check=self._by_check))
        # As in _begin, whose call is spared here.
        self._era = era
        self._lease = None
        self._done = False
        clock = breaker._now_ns
        self._start = clock()
        return self

    async def __aenter__(self) -> Permit:
        breaker = self._breaker
        era = breaker._era
        if era is None:
            seconds = breaker._seconds
            now = seconds()
            if now < breaker._refuse_until and not (held.get() and rides(breaker)):
                raise breaker._rejection(now)
            return self._take(await breaker._admit_async())
        return self._begin(breaker, era)

    def _take(self, permit: Permit) -> Permit:
        """Become the permit that could not be had at once."""
        self._era, self._lease, self._start = permit._era, permit._lease, permit._start
        self._done = False
        if self._lease is not None:
            self._outer = held.get()
            held.set((*self._outer, self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            held.set(self._outer)
        self._ended(error)
        self._era = None  # A guard that is kept for another block keeps no generation alive.

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)


class CheckGuard(Guard):
    """The guarded block of a health check, which may probe where calls may not."""

    __slots__ = ()

    _by_check = True
