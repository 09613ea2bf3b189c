"""What a snapshot tells: states, counts, evidence without secrets, and an exact account."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    Snapshot,
    State,
)
from tests.unit.clock import (
    BRITTLE,
    STURDY,
    Boom,
    FakeClock,
    fail,
    make,
    make_due,
    refused,
    succeed,
)

# ---------------------------------------------------------------------------- snapshot


def test_since_when_and_why_a_state_holds(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=3, open_interval=60.0, jitter=0.0))
    new = breaker.snapshot()
    assert (new.cause, new.ends_at, dict(new.detail), new.permits) == ("created", None, {}, 0)
    clock.advance(5.0)
    fail(breaker, 3)
    tripped = breaker.snapshot()
    assert tripped.since is not None
    assert tripped.ends_at is not None
    assert tripped.ends_at - tripped.since == pytest.approx(60.0)
    assert (tripped.cause, tripped.detail["error"]) == ("run", "Boom")
    clock.advance(61.0)
    permits = [breaker.acquire(), breaker.acquire()]
    permits[0].success()
    probing = breaker.snapshot()
    assert (probing.state, probing.successes, probing.permits) == ("half_open", 1, 1)
    assert (probing.cause, probing.ends_at) == ("due", None)
    clock.advance(31.0)
    assert breaker.snapshot().permits == 0, "its lease is over"
    breaker.force_closed(actor="ann", reason="drill", ttl=10.0)
    forced = breaker.snapshot()
    assert forced.since is not None
    assert forced.ends_at == pytest.approx(forced.since + 10.0)
    assert (forced.detail["actor"], forced.detail["reason"]) == ("ann", "drill")
    breaker.force_open()
    assert breaker.snapshot().ends_at is None


def test_the_snapshot_of_a_new_circuit(registry: CircuitBreakerRegistry) -> None:
    policy = Policy(slow_call_duration=3.0, record=(Boom,))
    snapshot = registry.breaker("b", policy).snapshot()
    assert isinstance(snapshot, Snapshot)
    assert (snapshot.circuit, snapshot.state, snapshot.shared_state, snapshot.source) == (
        "b", "closed", "closed", "shared",
    )  # fmt: skip
    assert snapshot.generation > 0
    assert (snapshot.retry_after, snapshot.opened_at, snapshot.attempt) == (0.0, None, 0)
    assert (snapshot.window, snapshot.run, snapshot.reporters) == ((0, 0, 0), 0, ())
    assert snapshot.last_trip is None
    assert snapshot.mirror_age is None
    assert snapshot.policy == dataclasses.replace(policy, half_open_permits=3)
    assert snapshot.policy_mismatch is False


def test_the_snapshot_of_an_open_circuit(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=3, jitter=0.0))
    before = breaker.snapshot()
    succeed(breaker, 2)
    fail(breaker, 3)
    clock.advance(12.5)
    for _ in range(4):
        refused(breaker)
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.shared_state, snapshot.source) == ("open", "open", "shared")
    assert snapshot.generation > before.generation
    assert snapshot.retry_after == 47.5
    assert snapshot.opened_at is not None
    assert snapshot.last_trip is not None
    assert snapshot.last_trip.cause == "run"
    assert snapshot.last_trip.at == pytest.approx(snapshot.opened_at)
    assert snapshot.last_trip.detail["error"] == "Boom"
    assert snapshot.last_trip.detail["message"] == "the dependency is down"
    assert snapshot.totals["calls"] == 5
    assert snapshot.totals["failures"] == 3
    assert snapshot.totals["rejected"] == 4
    assert (snapshot.totals["trips"], snapshot.totals["opens"]) == (1, 1)


def test_the_snapshot_counts_the_window_and_the_run(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", STURDY)
    fail(breaker, 2)
    succeed(breaker, 3)
    fail(breaker, 4)
    snapshot = breaker.snapshot()
    assert snapshot.window == (9, 6, 0)
    assert snapshot.run == 4
    (share,) = snapshot.reporters
    assert (share.bad, share.run) == (6, 4)
    assert dict(snapshot.local) == {
        "recorded": 9, "flushed": 9, "dropped": 0, "pending": 0, "rejected": 0, "fallbacks": 0,
    }  # fmt: skip


def test_a_snapshot_is_frozen(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")
    snapshot = breaker.snapshot()
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.state = State.OPEN  # type: ignore[misc]
    with pytest.raises(TypeError):
        snapshot.totals["calls"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        snapshot.local["recorded"] = 1  # type: ignore[index]
    fail(breaker)
    assert snapshot.window.calls == 0
    assert snapshot.totals["calls"] == 0


def test_a_forced_snapshot_names_the_operator(brittle: CircuitBreaker, clock: FakeClock) -> None:
    brittle.force_open(actor="ann", reason="maintenance", ttl=100.0)
    snapshot = brittle.snapshot()
    assert (snapshot.state, snapshot.shared_state, snapshot.source) == (
        "forced_open", "forced_open", "override",
    )  # fmt: skip
    assert snapshot.retry_after == 100.0


def test_the_last_trip_is_remembered_after_the_recovery(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    succeed(brittle)
    snapshot = brittle.snapshot()
    assert snapshot.state == "closed"
    assert snapshot.opened_at is None
    assert snapshot.last_trip is not None
    assert snapshot.last_trip.cause == "run"


def test_the_last_trip_holds_its_evidence(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=3))
    succeed(breaker, 2)
    fail(breaker, 3)
    trip = breaker.snapshot().last_trip
    assert trip is not None
    assert (trip.window, trip.run, trip.reporters) == ((5, 3, 0), 3, 1)


SECRETS = [
    "could not connect to postgresql://user:hunter2@db:5432/x",
    "redis://:hunter2@cache:6379/0 refused",
    "(psycopg2.Error) failed\n[SQL: SELECT 'hunter2']",
    "failed [SQL: SELECT 1] [parameters: ('hunter2',)]",
    "GET https://user:hunter2@api/ failed",
    "two: http://a:hunter2@b http://c:hunter2@d",
    "HTTPSConnectionPool(host='api', port=443): Max retries exceeded with url: /v1?key=hunter2",
    "404 for https://api/v1?token=hunter2&page=2",
]


@pytest.mark.parametrize("message", SECRETS)
def test_no_credentials_are_kept(registry: CircuitBreakerRegistry, message: str) -> None:
    breaker = registry.breaker("b", BRITTLE)

    def function() -> None:
        raise Boom(message)

    with pytest.raises(Boom):
        breaker.call(function)
    with pytest.raises(CircuitBreakerOpenException) as caught:
        breaker.call(function)
    assert "hunter2" not in repr(breaker.snapshot())
    assert "hunter2" not in str(caught.value)


# ---------------------------------------------------------------------------- conservation


@given(st.lists(st.sampled_from("sfilopr"), max_size=60))
def test_every_outcome_is_accounted_for(steps: list[str]) -> None:
    """recorded = flushed + dropped + pending, and the totals hold every one."""
    breaker, clock = make(failure_threshold=2, success_threshold=2, ignore=(KeyError,))
    held = []
    calls = rejected = 0
    for step in steps:
        try:
            permit = breaker.acquire() if step in "sfil" else None
        except CircuitBreakerOpenException:
            rejected += 1
            permit = None
        if permit is not None and step == "l":
            held.append(permit)
        elif permit is not None:
            {"s": permit.success, "f": permit.failure, "i": permit.ignore}[step]()
            calls += 1
        elif step == "p":
            clock.advance(60.0)
        elif step == "o":
            breaker.force_open(ttl=5.0)
        elif step == "r":
            breaker.reset()
        account = breaker.conservation()
        assert account["recorded"] == calls
        assert account["recorded"] == (account["flushed"] + account["dropped"] + account["pending"])
    for permit in held:
        permit.failure()
        calls += 1
    snapshot = breaker.snapshot()
    spent = {name for name in snapshot.local if name == "duration_us" or name[1:].isdigit()}
    assert {name: n for name, n in snapshot.local.items() if name not in spent} == {
        "recorded": calls, "flushed": calls, "dropped": 0, "pending": 0,
        "rejected": rejected, "fallbacks": 0,
    }  # fmt: skip
    measured = sum(snapshot.local[name] for name in spent - {"duration_us"})
    probes = snapshot.totals["probes"]  # whose durations are only in the totals
    assert measured <= sum(snapshot.totals[f"b{i}"] for i in range(16)) <= measured + probes
    assert snapshot.totals["calls"] == calls
    assert snapshot.totals["rejected"] == rejected
