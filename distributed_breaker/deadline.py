"""How long what is under way may still take: one deadline per context, which calls pass on inwards.

Whoever waits for something reads ``remaining``.  Nothing is stopped from here: a thread cannot be,
so a blocking call must be given what remains as its own timeout, or ask ``check`` between steps.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

# Monotonic seconds.  Tasks and asyncio.to_thread inherit it; a plain new thread does not.
until: ContextVar[float | None] = ContextVar("circuit_breaker_deadline", default=None)


class DeadlineExceeded(TimeoutError):
    """The time that the caller has given is over.  It says nothing of the dependency."""


class deadline:  # noqa: N801 - it is used as a function is
    """Give everything within the block at most so many seconds, or less if less was left before.

    Raises:
        ValueError: ``seconds`` is negative or no number.
    """

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds={seconds!r} must not be negative")
        self._seconds = seconds

    def __enter__(self) -> None:
        self._token = until.set(sooner(time.monotonic() + self._seconds))

    def __exit__(self, *error: object) -> None:
        until.reset(self._token)


def sooner(end: float) -> float:
    """``end`` (monotonic seconds), or the context's deadline when that comes before."""
    known = until.get()
    return end if known is None or known > end else known


def remaining() -> float | None:
    """Seconds until the context's deadline, never below 0; None: there is no deadline."""
    end = until.get()
    return None if end is None else max(0.0, end - time.monotonic())


def check() -> None:
    """Raise DeadlineExceeded if the context's deadline has passed: for a place between two steps,
    where it costs nothing to stop."""
    end = until.get()
    if end is not None and time.monotonic() >= end:
        raise DeadlineExceeded("the time that the caller has given is over")
