"""What applications' tests are given does what it says, with the plugin's own fixtures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import circuit_breaker_config
from distributed_breaker import CircuitBreakerOpenException, CircuitBreakerRegistry, Policy
from distributed_breaker import services as module
from distributed_breaker.faults import InjectedFailure
from distributed_breaker.testing import FakeClock, assert_tripped, fail_next, own_services, trip
from tests.unit.clock import BRITTLE, fail, must_not_run, refused, succeed

Registry = CircuitBreakerRegistry
CONFIG = {"services": {"shop": {"http": {"failure_threshold": 2}, "database": {}}}}


def test_the_clock_opens_and_closes(
    circuit_breakers: Registry, circuit_breaker_clock: FakeClock
) -> None:
    breaker = circuit_breakers.breaker("b", Policy(success_threshold=1))
    trip(breaker)
    assert refused(breaker).retry_after >= 60
    circuit_breaker_clock.advance(refused(breaker).retry_after)
    succeed(breaker)
    assert breaker.state == "closed"
    trip(breaker, 5.0)
    trip(breaker, 500.0)
    assert refused(breaker).retry_after == 5.0, "it was open already"


def test_the_next_calls_fail(circuit_breakers: Registry) -> None:
    breaker = circuit_breakers.breaker("b", Policy(failure_threshold=9))
    fail_next(breaker, 2)
    for _ in range(2):
        with pytest.raises(InjectedFailure):
            breaker.call(must_not_run)
    succeed(breaker)
    assert breaker._era is not None, "calls go the short way again"
    fail_next(breaker, 1, lambda: KeyError("gone"))
    with pytest.raises(KeyError, match="gone"):
        asyncio.run(breaker.call_async(asyncio.sleep, 0))
    fail_next(breaker, 5)
    fail_next(breaker, 0)
    succeed(breaker)
    totals = breaker.snapshot().totals
    assert (totals["calls"], totals["failures"]) == (5, 3)


def test_whether_it_tripped(circuit_breakers: Registry) -> None:
    breaker = circuit_breakers.breaker("b", BRITTLE)
    assert_tripped(breaker, 0)
    with pytest.raises(
        AssertionError, match="'b' has not tripped at all, but 0 times: it is closed"
    ):
        assert_tripped(breaker)
    fail(breaker)
    assert_tripped(breaker)
    assert_tripped(breaker, 1)
    with pytest.raises(AssertionError, match="not tripped 2 times, but 1 times: it is open"):
        assert_tripped(breaker, 2)


def test_the_getters_have_services_of_the_test(
    circuit_breaker_services: Any, circuit_breakers: Registry, circuit_breaker_clock: FakeClock
) -> None:
    services = circuit_breaker_services(CONFIG)
    client = circuit_breaker_config.get_http_circuit_breaker("shop")
    assert client.breaker is circuit_breakers.breaker("shop.http")
    trip(client.breaker)
    with pytest.raises(CircuitBreakerOpenException):
        client.call(must_not_run)
    assert module.current() is services
    circuit_breaker_services({"services": {"other": {"database": {}}}})
    with pytest.raises(module.UnknownService, match="other"):
        circuit_breaker_config.get_http_circuit_breaker("shop")


def test_an_application_that_initializes_itself_stays_in_memory(
    circuit_breaker_services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    circuit_breaker_services(CONFIG)
    made = circuit_breaker_config.initialize_circuit_breakers()
    assert made.registry._link is None
    assert circuit_breaker_config.get_http_circuit_breaker("shop").breaker.name == "shop.http"


def test_afterwards_the_getters_have_what_they_had(tmp_path: Path) -> None:
    before = module._current.services
    file = tmp_path / "c.json"
    file.write_text('{"settings": {"redis_url": "memory://"}, "services": {}}')
    with own_services():
        assert module._current.services is None
        made = module.initialize(file)
        with own_services():
            pass
        assert module.current() is made
    assert module._current.services is before
    assert made._stopping.is_set(), "it was closed"
