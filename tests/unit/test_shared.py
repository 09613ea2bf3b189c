"""Registries that share a store: what one process does, and what the others see of it.

Each registry here stands for a process.  The store is a fake that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from distributed_breaker import CircuitBreakerOpenException, Policy, StoreUnavailable, Transition
from distributed_breaker.errors import StoreDown
from tests.unit.clock import (
    BRITTLE,
    STURDY,
    Boom,
    FakeClock,
    boom,
    fail,
    must_not_run,
    open_and_refused,
    refused,
    succeed,
    wait_until,
)
from tests.unit.fake_store import GONE, TIMEOUT, Process, Server, accounts
from tests.unit.instruments import FORBIDDEN, CountingLock, profiled
from tests.unit.ways import Way, every_way

# ---------------------------------------------------------------------------- the fleet


def test_a_trip_is_seen_by_every_process(start: Callable[[], Process]) -> None:
    one, two = start(), start()
    mine, theirs = one.synced(BRITTLE), two.synced(BRITTLE)
    fail(mine)
    wait_until(lambda: theirs.state == "open")
    assert refused(theirs).source == "shared"
    assert mine.snapshot().generation == theirs.snapshot().generation


def test_a_fresh_process_never_calls_through_an_open_circuit(start: Callable[[], Process]) -> None:
    sick = start().synced(BRITTLE)
    fail(sick)
    wait_until(lambda: sick.snapshot().shared_state == "open")
    for _ in range(20):
        assert refused(start().breaker(BRITTLE)).state == "open"


def test_operators_act_on_every_process(start: Callable[[], Process], clock: FakeClock) -> None:
    breakers = [start().synced(BRITTLE) for _ in range(3)]
    for what, state in [
        ("force_open", "forced_open"),
        ("release", "half_open"),
        ("force_closed", "forced_closed"),
        ("reset", "closed"),
    ]:
        getattr(breakers[1], what)(actor="ann", reason="why")
        assert breakers[1].state == state
        wait_until(lambda state=state: all(b.state == state for b in breakers))  # type: ignore[misc]


def test_permits_are_exact_across_processes(start: Callable[[], Process], clock: FakeClock) -> None:
    policy = Policy(failure_threshold=1, success_threshold=3, half_open_permits=2, jitter=0.0)
    breakers = [start().synced(policy) for _ in range(4)]
    fail(breakers[0])
    wait_until(lambda: all(b.state == "open" for b in breakers))
    clock.advance(60.0)
    permits = []
    for breaker in breakers:
        with suppress(CircuitBreakerOpenException):
            permits.append(breaker.acquire())
    assert len(permits) == 2
    assert all(breaker.state == "half_open" for breaker in breakers)
    for permit in permits:
        permit.success()
    clock.advance(1.0)  # over the wait that the refused were given
    wait_until(lambda: breakers[0].snapshot().shared_state == "half_open")
    succeed(breakers[3])
    wait_until(lambda: all(b.state == "closed" for b in breakers))


def test_what_was_recorded_before_a_flush_is_in_the_store(
    start: Callable[[], Process], fake_server: Server
) -> None:
    process = start()
    breaker = process.synced(STURDY)
    succeed(breaker, 30)
    fail(breaker, 20)
    process.registry.flush(10.0)
    assert accounts(breaker) == {"recorded": 50, "flushed": 50, "dropped": 0, "pending": 0}
    snapshot = breaker.snapshot()
    assert snapshot.fleet
    assert snapshot.window == (50, 20, 0)
    assert snapshot.totals["calls"] == 50


@pytest.mark.parametrize("carried_out", [False, True])
def test_what_was_lost_is_counted_as_dropped(
    start: Callable[[], Process], fake_server: Server, carried_out: bool
) -> None:
    """The store has carried it out, or not: nobody knows, so it is never sent again."""
    process = start()
    breaker = process.synced(STURDY)
    succeed(breaker, 10)
    process.registry.flush(10.0)
    succeed(breaker, 10)
    process.store.lose_replies = carried_out
    process.store.fail_next = TIMEOUT
    with pytest.raises(StoreUnavailable):
        process.registry.flush(10.0)
    assert accounts(breaker) == {"recorded": 20, "flushed": 10, "dropped": 10, "pending": 0}
    succeed(breaker, 5)
    process.registry.flush(10.0)
    assert accounts(breaker) == {"recorded": 25, "flushed": 15, "dropped": 10, "pending": 0}
    totals = breaker.snapshot().totals
    assert totals["calls"] == (25 if carried_out else 15)
    assert totals["dropped"] == 10


@pytest.mark.parametrize("what", ["reset", "force_open", "force_closed", "release"])
def test_an_operators_timeout_says_that_the_outcome_is_unknown(
    start: Callable[[], Process], what: str
) -> None:
    process = start()
    breaker = process.synced(STURDY)
    process.store.failing = TIMEOUT
    with pytest.raises(StoreUnavailable, match="unknown"):
        getattr(breaker, what)(actor="ann")
    assert breaker.state == "closed"


def test_an_operators_refusal_is_not_called_unknown(start: Callable[[], Process]) -> None:
    process = start()
    breaker = process.synced(STURDY)
    process.store.failing = GONE
    with pytest.raises(StoreUnavailable) as caught:
        breaker.force_open(actor="ann")
    assert "unknown" not in str(caught.value)
    assert breaker.state == "closed"


def test_without_a_policy_the_stored_one_rules(start: Callable[[], Process]) -> None:
    start().synced(Policy(failure_threshold=2, jitter=0.0))
    breaker = start().synced()
    snapshot = breaker.snapshot()
    assert snapshot.policy is not None
    assert snapshot.policy.failure_threshold == 2
    assert snapshot.policy_mismatch is False
    fail(breaker, 2)
    assert open_and_refused(breaker).state == "open"


def test_a_lower_version_does_not_replace_a_higher_one(start: Callable[[], Process]) -> None:
    start().synced(Policy(failure_threshold=2, version=7))
    older = start().synced(Policy(failure_threshold=9, version=6))
    snapshot = older.snapshot()
    assert snapshot.policy is not None
    assert snapshot.policy.failure_threshold == 2
    assert snapshot.policy_mismatch is True
    newer = start().synced(Policy(failure_threshold=3, version=8))
    assert newer.snapshot().policy_mismatch is False
    assert older.policy.failure_threshold == 9, "what the user gave is not changed"


def test_the_registry_sees_circuits_of_other_processes(start: Callable[[], Process]) -> None:
    one, two = start(), start()
    sick = one.synced(BRITTLE, "sick")
    fail(sick)
    two.synced(BRITTLE, "well")
    one.registry.flush(10.0)
    two.registry.flush(10.0)
    snapshots = two.registry.snapshot(10.0)
    assert {name: s.state.value for name, s in snapshots.items()} == {
        "sick": "open", "well": "closed",
    }  # fmt: skip
    assert snapshots["sick"].last_trip is not None
    assert snapshots["sick"].mirror_age is None


def test_the_snapshot_tells_the_evidence_of_the_last_trip(start: Callable[[], Process]) -> None:
    breaker = start().synced(Policy(failure_threshold=3))
    succeed(breaker, 2)
    fail(breaker, 3)
    wait_until(lambda: breaker.snapshot().shared_state == "open")
    trip = breaker.snapshot().last_trip
    assert trip is not None
    assert (trip.cause, trip.window, trip.run, trip.reporters) == ("run", (5, 3, 0), 3, 1)
    assert trip.detail["error"] == "Boom"


def test_each_process_hears_a_transition_once(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    heard: dict[int, list[Transition]] = {0: [], 1: []}
    breakers = [start().synced(BRITTLE) for _ in range(2)]
    for number, breaker in enumerate(breakers):
        breaker.on_transition(heard[number].append)
    fail(breakers[0])
    wait_until(lambda: breakers[0].snapshot().source == "shared" and heard[1])
    breakers[1].reset(actor="ann")
    wait_until(lambda: all(b.state == "closed" for b in breakers))
    wait_until(lambda: all(steps and steps[-1].new == "closed" for steps in heard.values()))
    for transitions in heard.values():
        assert [t.new for t in transitions if t.source == "shared"][-2:] == ["open", "closed"]
        assert len(transitions) <= 3  # a trip may be seen first by the local machine


def test_a_process_that_alone_is_sick_is_quarantined(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    policy = Policy(failure_threshold=4, success_threshold=1, jitter=0.0, failure_rate=None)
    well, sick = start(), start()
    good, bad = well.synced(policy), sick.synced(policy)
    succeed(good)
    well.registry.flush(10.0)
    fail(bad, 4)
    sick.registry.flush(10.0)
    assert open_and_refused(bad).source == "quarantine"
    snapshot = bad.snapshot()
    assert (snapshot.state, snapshot.shared_state, snapshot.source) == (
        "open", "closed", "quarantine",
    )  # fmt: skip
    succeed(good)
    clock.advance(60.0)
    succeed(bad)  # its own probe
    assert bad.snapshot().source == "shared"


# ---------------------------------------------------------------------------- the fast paths


@every_way
def test_a_shared_closed_call_takes_no_lock_and_does_no_io(
    start: Callable[[], Process], fake_server: Server, way: Way
) -> None:
    process = start()
    breaker = process.synced(STURDY)
    way(breaker, lambda: None)
    wait_until(lambda: fake_server.subscriptions)
    lock = CountingLock(breaker._lock)
    breaker._lock = lock  # type: ignore[assignment]
    with profiled() as calls:
        for _ in range(100):
            way(breaker, lambda: None)
    assert lock.taken == 0
    assert not FORBIDDEN & set(calls)
    process.registry.flush(10.0)
    assert accounts(breaker)["flushed"] == 101


@every_way
def test_a_shared_rejection_takes_no_lock_and_does_no_io(
    start: Callable[[], Process], fake_server: Server, way: Way
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    breaker.force_open(actor="me")
    refused(breaker)
    commands = fake_server.commands
    with profiled() as calls:
        for _ in range(100):
            with pytest.raises(CircuitBreakerOpenException):
                way(breaker, must_not_run)
    del calls["__enter__"], calls["__exit__"]
    assert not FORBIDDEN & set(calls)
    assert fake_server.commands - commands < 5  # of the link's own, not 100


def test_failures_of_the_store_never_reach_a_call(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(Policy(failure_threshold=2, success_threshold=1, jitter=0.0))
    for failing in (TIMEOUT, GONE, StoreDown("NOPERM", "no right"), StoreDown("OOM", "full")):
        process.store.failing = failing
        succeed(breaker)
        with pytest.raises(Boom):
            breaker.call(boom)
        succeed(breaker)
    fail(breaker, 2)
    assert open_and_refused(breaker).state == "open"


def test_close_reports_what_was_recorded(start: Callable[[], Process], fake_server: Server) -> None:
    process = start()
    breaker = process.synced(STURDY)
    succeed(breaker, 7)
    process.registry.close()
    assert fake_server.circuits["b"].totals[0] == 7
    assert accounts(breaker)["flushed"] == 7
    succeed(breaker)
    assert accounts(breaker)["recorded"] == 8
