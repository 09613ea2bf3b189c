"""A registry without a store, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry
from tests.unit.clock import BRITTLE, FakeClock

# Nothing here is timed: how long an example takes says more about the machine.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry(clock: FakeClock) -> Iterator[CircuitBreakerRegistry]:
    with CircuitBreakerRegistry.from_url("memory://", clock=clock) as registry:
        yield registry


@pytest.fixture
def brittle(registry: CircuitBreakerRegistry) -> CircuitBreaker:
    """A circuit that one failure trips and one probe closes."""
    return registry.breaker("brittle", BRITTLE)


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The link survives its own defects and logs them, so they would go unnoticed here."""
    yield
    defects = [r for r in caplog.get_records("call") if r.exc_info and "listener" not in r.msg]
    assert not defects, defects[0].exc_info
