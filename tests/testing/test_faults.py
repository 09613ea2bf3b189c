"""Injected faults look to circuits like real ones, and leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
import redis

from circuit_breaker_config import circuit_breaker_health
from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy
from distributed_breaker.errors import CircuitBreakerOpenException
from distributed_breaker.faults import (
    SWITCH,
    Fault,
    FaultsNotEnabled,
    InjectedFailure,
    faults,
    inject,
    remove_all,
    store_outage,
)
from distributed_breaker.testing import FakeClock
from scripts.servers import Server
from tests.unit import async_ways
from tests.unit.clock import BRITTLE, STURDY, must_not_run, succeed, wait_until
from tests.unit.ways import every_way

Registry = CircuitBreakerRegistry


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "true")


@pytest.fixture
def breaker(circuit_breakers: Registry) -> CircuitBreaker:
    return circuit_breakers.breaker("api.http", STURDY)


def totals(breaker: CircuitBreaker) -> dict[str, int]:
    found = breaker.snapshot().totals
    return {name: found[name] for name in ("calls", "failures", "slow") if found.get(name)}


@pytest.mark.parametrize("value", ["", "false", "0", "no", None])
def test_refused_unless_enabled(
    value: str | None, breaker: Any, circuit_breakers: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(SWITCH)
    else:
        monkeypatch.setenv(SWITCH, value)
    with pytest.raises(FaultsNotEnabled, match=SWITCH):
        inject(circuit_breakers, "*", failures=1.0)
    succeed(breaker)
    registry = CircuitBreakerRegistry.from_url("redis://127.0.0.1:1")
    with registry, pytest.raises(FaultsNotEnabled, match=SWITCH):
        store_outage(registry)


@every_way
def test_calls_fail_in_every_way_of_calling(
    way: Callable[..., Any], breaker: CircuitBreaker, circuit_breakers: Registry
) -> None:
    with inject(circuit_breakers, "api.*", failures=1.0), pytest.raises(InjectedFailure):
        way(breaker, must_not_run)
    assert totals(breaker) == {"calls": 1, "failures": 1}
    assert way(breaker, lambda: "fine") == "fine"
    assert totals(breaker) == {"calls": 2, "failures": 1}


@async_ways.every_way
def test_and_on_event_loops(
    way: Callable[..., Any], breaker: CircuitBreaker, circuit_breakers: Registry
) -> None:
    fine = async_ways.fine
    with inject(circuit_breakers, "api.*", failures=1.0), pytest.raises(InjectedFailure):
        asyncio.run(way(breaker, async_ways.must_not_run))
    assert totals(breaker) == {"calls": 1, "failures": 1}
    assert asyncio.run(way(breaker, fine)) == "fine"
    assert totals(breaker) == {"calls": 2, "failures": 1}


def test_a_share_of_the_calls_fails_with_the_error_asked_for(
    breaker: CircuitBreaker, circuit_breakers: Registry
) -> None:
    failed = 0
    with inject(circuit_breakers, "api.http", failures=0.25, error=redis.ConnectionError, seed=7):
        for _ in range(400):
            try:
                succeed(breaker)
            except redis.ConnectionError:
                failed += 1
    assert 70 < failed < 130
    assert totals(breaker) == {"calls": 400, "failures": failed}


def test_failures_open_the_circuit_and_its_probe_fails_too(
    circuit_breakers: Registry, circuit_breaker_clock: FakeClock
) -> None:
    breaker = circuit_breakers.breaker("b", BRITTLE)
    with inject(circuit_breakers, "b", failures=1.0, seconds=600):
        with pytest.raises(InjectedFailure):
            breaker.call(must_not_run)
        with pytest.raises(CircuitBreakerOpenException):
            breaker.call(must_not_run)
        circuit_breaker_clock.advance(60)
        with pytest.raises(InjectedFailure):
            breaker.call(must_not_run)
        assert breaker.snapshot().attempt == 1, "it has reopened"
    circuit_breaker_clock.advance(60)
    succeed(breaker)
    assert breaker.state == "closed"


def test_delays_count_as_duration(circuit_breakers: Registry) -> None:
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        slow = Policy(slow_call_duration=0.01, minimum_calls=1_000)
        breaker = registry.breaker("b", slow)
        with inject(registry, "b", latency=0.02):
            succeed(breaker)
            assert asyncio.run(breaker.call_async(async_ways.fine)) == "fine"
        with inject(registry, "b", latency=60.0, delayed=0.0, failures=1e-9):
            succeed(breaker)
        assert totals(breaker) == {"calls": 3, "slow": 2}


def test_only_circuits_that_match_are_touched(circuit_breakers: Registry) -> None:
    other = circuit_breakers.breaker("web.http", STURDY)
    off = circuit_breakers.breaker("api.off", STURDY, disabled=True)
    with inject(circuit_breakers, "api.*", failures=1.0):
        succeed(other)
        assert other._era is not None, "its calls go the short way"
        succeed(off)
        later = circuit_breakers.breaker("api.later", STURDY)
        with pytest.raises(InjectedFailure):
            later.call(must_not_run)
    succeed(later)
    assert later._era is not None


def test_they_end_by_themselves(
    breaker: CircuitBreaker, circuit_breakers: Registry, circuit_breaker_clock: FakeClock
) -> None:
    fault = inject(circuit_breakers, "*", failures=1.0, seconds=30)
    longer = inject(circuit_breakers, "*", failures=1e-9, seconds=60)
    assert faults(circuit_breakers) == [fault, longer]
    circuit_breaker_clock.advance(30)
    assert not fault.active
    succeed(breaker)
    assert circuit_breakers.faults.faults == (longer,)
    assert breaker._era is None
    circuit_breaker_clock.advance(30)
    succeed(breaker)
    assert breaker._era is not None
    fault.remove()
    assert faults(circuit_breakers) == []


def test_a_call_that_is_delayed_goes_on_when_its_fault_is_removed(
    breaker: CircuitBreaker, circuit_breakers: Registry
) -> None:
    async def delayed() -> object:
        task = asyncio.ensure_future(breaker.call_async(async_ways.fine))
        await asyncio.sleep(0)
        assert not task.done()
        remove_all(circuit_breakers)
        return await asyncio.wait_for(task, 10)

    inject(circuit_breakers, "*", latency=300.0)
    assert asyncio.run(delayed()) == "fine"


def test_a_cancelled_delay_gives_the_permit_back(
    circuit_breakers: Registry, circuit_breaker_clock: FakeClock
) -> None:
    breaker = circuit_breakers.breaker("b", BRITTLE)
    breaker.acquire().failure(open_for=60.0)
    circuit_breaker_clock.advance(60)

    async def cancelled() -> None:
        task = asyncio.ensure_future(breaker.call_async(asyncio.sleep, 0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with inject(circuit_breakers, "b", latency=300.0):
        asyncio.run(cancelled())
    succeed(breaker)
    assert breaker.state == "closed", "the one probe's permit was there again"


def test_they_are_seen(
    circuit_breaker_services: Any, circuit_breakers: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    circuit_breaker_services({"services": {"api": {"database": {}}}})
    with inject(circuit_breakers, "api.*", failures=0.5, latency=2.0, delayed=0.25, seconds=90):
        health = circuit_breaker_health()
    what = "injected into circuits api.*: 50 % of the calls fail, 25 % take 2 s longer"
    assert health["clients"]["fault injection"] == {"status": "degraded", "problems": [what]}
    assert health["overall_status"] == "degraded"
    health = circuit_breaker_health()
    assert "fault injection" not in health["clients"]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"{what}; for 90 s", f"no longer {what}"]


@pytest.mark.parametrize(
    "bad",
    [
        {"failures": 1.1},
        {"latency": 301},
        {"delayed": -1},
        {"seconds": 3601, "failures": 1},
        {},
        {"latency": 1, "delayed": 0},
    ],
)
def test_what_cannot_be_injected(bad: dict[str, float], circuit_breakers: Registry) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad), '')}|nothing would go wrong"):
        inject(circuit_breakers, "*", **bad)
    with pytest.raises(ValueError, match="no store"):
        store_outage(circuit_breakers)
    assert faults(circuit_breakers) == []


# ---------------------------------------------------------------------------- the store


@pytest.mark.servers("valkey")
def test_the_store_seems_to_be_away_and_comes_back(server: Server, namespace: str) -> None:
    """The others go on through the store, and what was recorded alone reaches it afterwards."""
    with (
        CircuitBreakerRegistry.from_url(server.url, namespace) as alone,
        CircuitBreakerRegistry.from_url(server.url, namespace) as other,
    ):
        here, there = alone.breaker("b", STURDY), other.breaker("b", STURDY)
        succeed(here)
        succeed(there)
        alone.flush(10)
        wait_until(lambda: alone._link and alone._link._subscription)
        with store_outage(alone) as outage:
            wait_until(lambda: here.snapshot().source == "shadow")
            assert alone._link is not None
            assert alone._link.down == "CONNECTION"
            with pytest.raises(ValueError, match="already"):
                store_outage(alone)
            there.force_open(reason="somebody else's word")
            assert here.state == "closed", "no push is heard"
            succeed(here)
            assert isinstance(outage, Fault)
        wait_until(lambda: here.state == "forced_open")
        wait_until(lambda: alone._link and not alone._link.down)
        other.flush(10)
        alone.flush(10)
        assert there.snapshot().totals["calls"] == 3


@pytest.mark.servers("valkey")
def test_an_outage_ends_by_itself(server: Server, namespace: str) -> None:
    with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
        breaker = registry.breaker("b", STURDY)
        registry.flush(10)
        store_outage(registry, seconds=0.05)
        wait_until(lambda: registry._link and registry._link.down)
        wait_until(lambda: breaker.snapshot().source == "shared")
        assert registry.faults.faults == (), "it has stepped aside"
        registry.flush(10)
