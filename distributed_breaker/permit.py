"""The right to make one call: permits, and the guarded blocks that hold one."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

from .model import MAX_SPAN
from .policy import Outcome, check_number
from .shadow import NO_GENERATION, Era, Generation

if TYPE_CHECKING:
    from .breaker import CircuitBreaker

# The probes' permits that this context holds: inner calls on their circuits ride on them and are
# not counted.  A task started inside may outlive the permit, so riders look whether it is settled.
held: ContextVar[tuple[Permit, ...]] = ContextVar("circuit_breaker_permits", default=())


def rides(breaker: CircuitBreaker) -> bool:
    """Whether a call on this circuit is part of a probe that this context is making."""
    return any(p._breaker is breaker and not p._done for p in held.get())


class Permit:
    """The right to make one call, and the place to say how it ended.

    The first of ``success``, ``failure`` and ``ignore`` counts; later ones do nothing.
    """

    # What only a probe's permit has stands here, so that the others need not set it.
    _token = ""
    _local: Generation | None = None  # generation of the local machine, when that gave the permit
    _shared: Generation = NO_GENERATION
    _until = 0  # ms: the end of the lease, as far as this process may use it
    _done = False

    def __init__(self, breaker: CircuitBreaker, era: Era | None) -> None:
        self._breaker = breaker
        self._era = era
        self._start = breaker._now_ns()

    @classmethod
    def probe(
        cls,
        breaker: CircuitBreaker,
        token: str,
        shared: Generation,
        *,
        local: Generation | None = None,
        until: int = 0,
    ) -> Permit:
        """A trial call's permit: of the store until ``until`` (ms), or of the ``local`` machine."""
        permit = cls(breaker, None)
        permit._token = token
        permit._shared = shared
        permit._local = local
        permit._until = until
        return permit

    @property
    def is_probe(self) -> bool:
        """Whether this is a trial call of a half-open circuit."""
        return bool(self._token)

    def success(self) -> None:
        """The call succeeded."""
        self._settle(Outcome.SUCCESS, self._elapsed())

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
        self._settle(Outcome.FAILURE, self._elapsed(), exc, open_for)

    def ignore(self) -> None:
        """The call says nothing about the dependency; a held permit is given back."""
        self._settle(Outcome.IGNORED, self._elapsed())

    def _elapsed(self) -> int:
        return self._breaker._now_ns() - self._start

    def _ended(self, error: BaseException | None, duration: int | None = None) -> None:
        """Settle by how a block ended, after ``duration`` ns (None: from its beginning)."""
        if self._done:
            return
        spent = self._elapsed() if duration is None else duration
        if error is None:
            self._settle(Outcome.SUCCESS, spent)
        else:
            self._settle(self._breaker.policy.outcome_of(error), spent, error)

    def _returned(self, result: object) -> None:
        """Settle by what a function returned."""
        failed = self._breaker._is_failure(result)
        self._settle(Outcome.FAILURE if failed else Outcome.SUCCESS, self._elapsed())

    def _settle(
        self,
        outcome: Outcome,
        duration: int,
        error: BaseException | None = None,
        open_for: float | None = None,
    ) -> None:
        if self._done:
            return
        self._done = True
        breaker = self._breaker
        wait = 0 if open_for is None else min(MAX_SPAN, max(1, round(open_for * 1000)))
        if self._era is not None:
            breaker._record(self._era, outcome, duration, error, wait)
        elif self._token:
            item = breaker._item(outcome, duration, error, wait)
            if self._local is not None:
                breaker.settle_locally(self._token, self._local, item, self._shared)
                breaker._link_nudge()
            else:
                breaker._settle_shared(self._token, self._shared, item, self._until)


class Guard(Permit):
    """A guarded block: ``with breaker.guard() as call`` or ``async with``.

    It is its own permit: ``call.failure()`` and ``call.ignore()`` override what the block's end
    says.
    """

    _outer: tuple[Permit, ...] | None = None  # what the context held before this probe

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker

    def __enter__(self) -> Permit:
        breaker = self._breaker
        self._era = era = breaker._era
        self._done = False
        if era is None:
            self._take(breaker._admit())
        else:
            self._start = breaker._now_ns()
        return self

    async def __aenter__(self) -> Permit:
        breaker = self._breaker
        self._era = era = breaker._era
        self._done = False
        if era is None:
            self._take(await breaker._admit_async())
        else:
            self._start = breaker._now_ns()
        return self

    def _take(self, permit: Permit) -> None:
        self.__dict__.update(permit.__dict__)
        if permit._token:
            self._outer = held.get()
            held.set((*self._outer, self))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._outer is not None:
            held.set(self._outer)
            self._outer = None
        if not self._done:
            self._ended(error)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)
