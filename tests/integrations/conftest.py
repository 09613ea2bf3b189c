"""Circuits for views, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry
from tests.unit.clock import BRITTLE, FakeClock

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> Iterator[CircuitBreaker]:
    """A circuit that one failure trips, for a minute."""
    with CircuitBreakerRegistry.from_url("memory://", clock=clock) as registry:
        yield registry.breaker("secret-internal-name", BRITTLE)
