"""What the benchmarks guard: next to nothing, so that every added nanosecond shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from distributed_breaker import CircuitBreaker, State

SETTLED = 5.0  # s within which a circuit must have opened in the store


class Boom(Exception):
    """The failure of a dependency."""


def work() -> None:
    pass


async def work_async() -> None:
    pass


def work_generator() -> Iterator[None]:
    yield


async def work_async_generator() -> AsyncIterator[None]:
    yield


def boom() -> None:
    raise Boom


def trip(breaker: CircuitBreaker) -> None:
    """Open a circuit whose policy trips at the first failure, and see it open in the store."""
    with contextlib.suppress(Boom):
        breaker.call(boom)
    deadline = time.monotonic() + SETTLED
    while breaker.snapshot().shared_state is not State.OPEN:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{breaker!r} has not opened in the store")
