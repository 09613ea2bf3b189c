"""What applications need to test how they behave around circuits: time, outcomes, assertions.

The fixtures are in ``pytest_distributed_breaker.py``, a plugin that pytest finds by itself; all of
this can be used without it, and without pytest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .breaker import CircuitBreaker
from .errors import CircuitBreakerOpenException
from .faults import InjectedFailure
from .permit import Permit
from .policy import check_number

__all__ = ["FakeClock", "assert_tripped", "fail_next", "own_services", "trip"]

LONGEST = 10_000  # calls that may be made to fail


class FakeClock:
    """Monotonic seconds that only a test moves, exact to the millisecond: the ``clock`` of
    ``CircuitBreakerRegistry.from_url``.  Also durations of calls are measured with it.

    Args:
        start: the time at first.
    """

    def __init__(self, start: float = 1_000.0) -> None:
        self.ms = round(start * 1000)

    def __call__(self) -> float:
        return self.ms / 1000

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.ms += round(seconds * 1000)


def trip(breaker: CircuitBreaker, seconds: float | None = None) -> None:
    """Open a circuit, as a failure with Retry-After does.  One that refuses calls stays as it is.

    Args:
        seconds: for how long; None: the policy's open interval.
    """
    with contextlib.suppress(CircuitBreakerOpenException):
        breaker.acquire().failure(open_for=seconds or breaker.policy.open_interval)


def fail_next(
    breaker: CircuitBreaker, times: int = 1, error: Callable[[], Exception] = InjectedFailure
) -> None:
    """Let the next calls that the circuit admits fail, without their functions being called.

    Args:
        times: how many, up to 10,000; 0: none any more.
        error: makes what they raise; it counts as if the function had raised it.
    """
    left = int(check_number("times", times, 0, LONGEST))
    breaker.inspect(_Failing(breaker, left, error) if left else None)


class _Failing:
    def __init__(self, breaker: CircuitBreaker, times: int, error: Callable[[], Exception]) -> None:
        self._breaker = breaker
        self._left = [None] * times  # a pop is atomic, a decrement is not
        self._error = error

    def admitted(self, permit: Permit) -> None:
        try:
            self._left.pop()
        except IndexError:
            return  # another thread's call was the last
        if not self._left:
            self._breaker.inspect(None)
        raise self._error()

    async def admitted_async(self, permit: Permit) -> None:
        self.admitted(permit)


def assert_tripped(breaker: CircuitBreaker, times: int | None = None) -> None:
    """Fail unless the circuit has tripped: gone from closed to open.

    Args:
        times: how often it must have; None: at least once.
    """
    breaker.drain()
    now = breaker.snapshot()
    trips = now.totals.get("trips", 0)
    if trips != times if times is not None else not trips:
        wanted = "at all" if times is None else f"{times} times"
        raise AssertionError(
            f"circuit {breaker.name!r} has not tripped {wanted}, but {trips} times: it is "
            f"{now.state} after {now.window.calls} calls with {now.window.failures} failures in "
            f"its window, {now.run} of them in a row"
        )


@contextlib.contextmanager
def own_services() -> Iterator[None]:
    """Let the getters of ``circuit_breaker_config`` forget their services within the block, so
    that the first of them, or ``initialize_circuit_breakers``, makes new ones; afterwards those are
    closed, and the getters have the services from before."""
    from . import services  # which needs more packages than the rest

    current = services._current
    with current.lock:
        before, current.services = current.services, None
    try:
        yield
    finally:
        services.shut_down()
        with current.lock:
            current.services = before
