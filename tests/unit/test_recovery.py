"""How an open circuit comes back: probes, leases, backoff, and results that come too late."""

from __future__ import annotations

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy
from tests.unit.clock import BRITTLE, RUN, Boom, FakeClock, fail, make, make_due, refused, succeed

# ---------------------------------------------------------------------------- open, half_open


def test_open_refuses_until_the_interval_is_over() -> None:
    breaker, clock = make(failure_threshold=1, open_interval=30.0, success_threshold=1)
    fail(breaker)
    for left in (30.0, 20.0, 10.0):
        assert refused(breaker).retry_after == left
        clock.advance(10.0)
    succeed(breaker)
    assert breaker.state == "closed"


def test_open_stays_open_without_traffic() -> None:
    """Nothing but a probe leaves it, however long that takes."""
    breaker, clock = make(failure_threshold=1)
    fail(breaker)
    clock.advance(1_000_000.0)
    assert breaker.state == "open"
    assert breaker.snapshot().retry_after == 0.0


@pytest.mark.parametrize("needed", [1, 2, 3, 5])
def test_as_many_successful_probes_as_the_threshold_close(needed: int) -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=needed)
    make_due(breaker, clock)
    for _ in range(needed - 1):
        succeed(breaker)
        assert breaker.state == "half_open"
    succeed(breaker)
    assert breaker.state == "closed"


def test_successes_may_be_far_apart() -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=3)
    make_due(breaker, clock)
    for _ in range(3):
        assert breaker.state != "closed"
        succeed(breaker)
        clock.advance(100_000.0)
    assert breaker.state == "closed"


def test_one_failed_probe_opens_again() -> None:
    breaker, clock = make(failure_threshold=5, success_threshold=3)
    fail(breaker, 5)
    clock.advance(60.0)
    succeed(breaker, 2)
    fail(breaker)
    assert breaker.state == "open"
    clock.advance(60.0)
    succeed(breaker, 2)
    assert breaker.state == "half_open"  # the earlier successes are forgotten


@pytest.mark.parametrize(("successes", "permits"), [(3, None), (3, 1), (3, 2), (3, 3), (20, None)])
def test_only_so_many_probes_run_at_a_time(successes: int, permits: int | None) -> None:
    breaker, clock = make(
        failure_threshold=1, success_threshold=successes, half_open_permits=permits
    )
    make_due(breaker, clock)
    most = permits or min(successes, 16)
    held = [breaker.acquire() for _ in range(most)]
    error = refused(breaker)
    assert (error.state, error.source) == ("half_open", "shared")
    assert 0.0 < error.retry_after <= 0.5
    held.pop().ignore()
    held.append(breaker.acquire())
    refused(breaker)
    assert all(permit.is_probe for permit in held)


def test_no_more_probes_than_successes_are_missing() -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=3)
    make_due(breaker, clock)
    succeed(breaker)
    held = [breaker.acquire(), breaker.acquire()]
    refused(breaker)
    for permit in held:
        permit.success()
    assert breaker.state == "closed"


def test_probes_that_overlap_all_count() -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=3)
    make_due(breaker, clock)
    first, second, third = (breaker.acquire() for _ in range(3))
    first.success()
    third.success()
    assert breaker.state == "half_open"
    second.failure()
    assert breaker.state == "open"


def test_a_probe_that_ends_after_another_failed_is_late() -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=2)
    make_due(breaker, clock)
    first, second = breaker.acquire(), breaker.acquire()
    first.failure()
    clock.advance(60.0)
    third = breaker.acquire()
    assert breaker.state == "half_open"
    second.success()
    third.success()
    assert breaker.state == "half_open", "a late success has voted"
    succeed(breaker)
    assert breaker.state == "closed"
    assert breaker.snapshot().totals["late"] == 1


@pytest.mark.parametrize("lease", [0.01, 5.0, 30.0])
def test_a_permit_that_is_never_settled_comes_back(lease: float) -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=1, permit_lease=lease)
    make_due(breaker, clock)
    lost = breaker.acquire()
    clock.advance(lease - 0.001)
    refused(breaker)
    clock.advance(0.001)
    succeed(breaker)
    assert breaker.state == "closed"
    lost.failure()  # of a permit that somebody else has had since
    assert breaker.state == "closed"
    assert breaker.snapshot().totals["late"] == 1


def test_a_freed_permit_can_be_had_at_once() -> None:
    """Not only when the wait that a refusal named is over."""
    breaker, clock = make(failure_threshold=1, success_threshold=1)
    make_due(breaker, clock)
    permit = breaker.acquire()
    assert refused(breaker).retry_after > 0
    permit.ignore()
    assert breaker.acquire().is_probe


# ---------------------------------------------------------------------------- backoff, jitter


def reopen(breaker: CircuitBreaker, clock: FakeClock) -> float:
    """Let the probe of an open circuit fail; returns how long it stays open then."""
    clock.advance(breaker.snapshot().retry_after)
    fail(breaker)
    return breaker.snapshot().retry_after


def test_without_a_maximum_the_interval_is_constant() -> None:
    breaker, clock = make(failure_threshold=1, open_interval=10.0, backoff_multiplier=3.0)
    fail(breaker)
    assert [reopen(breaker, clock) for _ in range(4)] == [10.0] * 4


def test_the_interval_grows_to_its_maximum() -> None:
    breaker, clock = make(
        failure_threshold=1, open_interval=10.0, open_interval_max=100.0, backoff_multiplier=2.0
    )
    fail(breaker)
    assert breaker.snapshot().retry_after == 10.0
    assert [reopen(breaker, clock) for _ in range(6)] == [20.0, 40.0, 80.0, 100.0, 100.0, 100.0]
    assert breaker.snapshot().attempt == 6


@pytest.mark.parametrize(("rest", "interval"), [(10.0, 10.0), (9.999, 20.0)])
def test_the_interval_starts_again_after_a_rest(rest: float, interval: float) -> None:
    """A closed time as long as the last open one is a rest."""
    breaker, clock = make(
        failure_threshold=1, success_threshold=1, open_interval=10.0, open_interval_max=100.0
    )
    fail(breaker)
    clock.advance(10.0)
    succeed(breaker)
    clock.advance(rest)
    fail(breaker)
    assert breaker.snapshot().retry_after == interval


def test_reset_forgets_the_attempts() -> None:
    breaker, clock = make(failure_threshold=1, open_interval=10.0, open_interval_max=100.0)
    fail(breaker)
    assert reopen(breaker, clock) == 20.0
    breaker.reset(actor="me")
    fail(breaker)
    assert breaker.snapshot().retry_after == 10.0


def test_jitter_lengthens_within_its_share() -> None:
    lengths = set()
    for _ in range(40):
        breaker, _ = make(failure_threshold=1, open_interval=10.0, jitter=0.5)
        fail(breaker)
        lengths.add(breaker.snapshot().retry_after)
    assert min(lengths) >= 10.0
    assert max(lengths) < 15.0
    assert len(lengths) > 20, "no chance in it"
    assert max(lengths) - min(lengths) > 1.0


def test_jitter_may_exceed_the_maximum_by_its_share_only() -> None:
    breaker, clock = make(
        failure_threshold=1, open_interval=10.0, open_interval_max=20.0, jitter=0.1
    )
    fail(breaker)
    assert all(20.0 <= reopen(breaker, clock) < 22.0 for _ in range(20))


# ---------------------------------------------------------------------------- late results


@pytest.mark.parametrize("outcome", ["success", "failure", "ignore"])
def test_a_call_that_began_before_the_trip_is_late(outcome: str) -> None:
    """It moves neither the state nor the open time nor the window; totals count it as late."""
    breaker, clock = make(failure_threshold=1, success_threshold=1)
    late = breaker.acquire()
    fail(breaker)
    for _ in range(3):
        assert breaker.state == "open"  # the old generation is not forgotten by looking
    clock.advance(20.0)
    getattr(late, outcome)()
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.retry_after) == ("open", 40.0)
    assert snapshot.window == (0, 0, 0)
    assert snapshot.totals["late"] == 1
    assert snapshot.totals["calls"] == 2


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_a_call_that_began_before_the_trip_is_late_in_half_open(outcome: str) -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=1)
    late = breaker.acquire()
    make_due(breaker, clock)
    probe = breaker.acquire()
    getattr(late, outcome)()
    assert breaker.state == "half_open"
    probe.success()
    assert breaker.state == "closed"


def test_a_call_that_began_before_the_trip_is_late_after_the_recovery() -> None:
    breaker, clock = make(failure_threshold=1, success_threshold=1)
    late = [breaker.acquire() for _ in range(5)]
    make_due(breaker, clock)
    succeed(breaker)
    for permit in late:
        permit.failure()
    assert breaker.state == "closed"
    assert breaker.snapshot().window == (0, 0, 0)
    assert breaker.snapshot().totals["late"] == 5


def test_late_failures_of_running_calls_do_not_count_for_a_new_generation(
    registry: CircuitBreakerRegistry,
) -> None:
    """Not only for permits in hand: so is a function that runs while the circuit moves on."""
    breaker = registry.breaker("b", BRITTLE)

    def reset_meanwhile() -> None:
        breaker.reset(actor="me")
        raise Boom

    with pytest.raises(Boom):
        breaker.call(reset_meanwhile)
    with pytest.raises(Boom):
        breaker(reset_meanwhile)()
    with pytest.raises(Boom), breaker:
        reset_meanwhile()
    assert breaker.state == "closed"
    assert breaker.snapshot().totals["late"] == 3


def test_outcomes_behind_the_trip_in_one_batch_are_late(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=2, **RUN))
    permits = [breaker.acquire() for _ in range(5)]
    with breaker._lock:  # all that follow drain as one batch
        for permit in permits:
            permit.failure()
    assert breaker.state == "open"
    assert breaker.snapshot().totals["late"] == 3
