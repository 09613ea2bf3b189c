"""A clock that only a test moves, and how tests drive a circuit with it."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from distributed_breaker.testing import FakeClock

# One failure trips it, one probe closes it, and no chance is involved.
BRITTLE = Policy(failure_threshold=1, success_threshold=1, jitter=0.0)
# Nothing but an operator or a Retry-After ever opens it.
STURDY = Policy(failure_threshold=1_000_000, failure_rate=None, minimum_calls=1_000_000)
OPEN_INTERVAL = 60.0
# Only the run can trip it, or only the rates can.
RUN = {"failure_rate": None, "minimum_calls": 1_000_000}
RATE = {"failure_threshold": 1_000_000}


class Boom(Exception):
    """What a protected dependency raises in these tests."""


def boom(*_: object) -> NoReturn:
    raise Boom("the dependency is down")


def fail(breaker: CircuitBreaker, times: int = 1) -> None:
    """Let protected calls fail."""
    for _ in range(times):
        with pytest.raises(Boom):
            breaker.call(boom)


def succeed(breaker: CircuitBreaker, times: int = 1) -> None:
    """Let protected calls succeed."""
    for _ in range(times):
        assert breaker.call(lambda: "fine") == "fine"


def must_not_run(*_: object) -> NoReturn:
    raise AssertionError("the protected function ran")


def refused(breaker: CircuitBreaker) -> CircuitBreakerOpenException:
    """A call must be refused; returns the rejection."""
    with pytest.raises(CircuitBreakerOpenException) as caught:
        breaker.call(must_not_run)
    return caught.value


def open_and_refused(breaker: CircuitBreaker) -> CircuitBreakerOpenException:
    """The same where a link's threads share the lock.

    A failing call that finds it taken leaves its outcome to the holder, and may be back before
    that one has looked; whoever looks at the state waits for it.
    """
    assert breaker.state == "open"
    return refused(breaker)


def make_due(breaker: CircuitBreaker, clock: FakeClock, seconds: float = OPEN_INTERVAL) -> None:
    """Trip a brittle circuit and let its open interval pass, so that the next call is a probe."""
    fail(breaker)
    assert breaker.state == "open"
    clock.advance(seconds)


def no_permit_is_out(breaker: CircuitBreaker) -> None:
    """Half-open, and the one permit can be had; or open again."""
    if breaker.state != "open" or breaker.snapshot().retry_after == 0.0:
        breaker.acquire().ignore()


def nothing_stays_in_the_context() -> None:
    """What the library keeps in context variables is gone once all blocks have been left."""
    assert not {variable.name: value for variable, value in _kept()}


def forget_the_context() -> None:
    """What one test has left there is not to fail the next ones."""
    for variable, value in _kept():
        variable.set(() if isinstance(value, tuple) else None)


def _kept() -> list[tuple[contextvars.ContextVar[Any], Any]]:
    return [
        (variable, value)
        for variable, value in contextvars.copy_context().items()
        if variable.name.startswith("circuit_breaker") and value
    ]


def wait_until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Poll for something that another thread does; never longer than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def make(**policy: Any) -> tuple[CircuitBreaker, FakeClock]:
    """A circuit of its own, for hypothesis and for tests of one policy."""
    clock = FakeClock()
    registry = CircuitBreakerRegistry.from_url("memory://", clock=clock)
    return registry.breaker("b", Policy(**{"jitter": 0.0, **policy})), clock
