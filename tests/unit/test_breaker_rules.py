"""When circuits trip, let probes through, close and reopen, and what they tell of it.

All on ``memory://`` with a clock that only the tests move.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

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
    Transition,
)
from tests.unit.clock import (
    BRITTLE,
    STURDY,
    Boom,
    FakeClock,
    boom,
    fail,
    make_due,
    refused,
    succeed,
    wait_until,
)


def make(**policy: Any) -> tuple[CircuitBreaker, FakeClock]:
    """A circuit of its own, for hypothesis and for tests of one policy."""
    clock = FakeClock()
    registry = CircuitBreakerRegistry.from_url("memory://", clock=clock)
    return registry.breaker("b", Policy(**{"jitter": 0.0, **policy})), clock


# Only the run can trip it, or only the rates can.
RUN = {"failure_rate": None, "minimum_calls": 1_000_000}
RATE = {"failure_threshold": 1_000_000}


# ---------------------------------------------------------------------------- the run


@pytest.mark.parametrize("threshold", [1, 2, 5, 7])
def test_as_many_failures_in_a_row_as_the_threshold_trip(threshold: int) -> None:
    breaker, _ = make(failure_threshold=threshold, **RUN)
    fail(breaker, threshold - 1)
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"


def test_a_success_ends_the_run() -> None:
    breaker, _ = make(failure_threshold=3, **RUN)
    for _ in range(4):
        fail(breaker, 2)
        succeed(breaker)
    assert breaker.state == "closed"
    assert breaker.snapshot().run == 0
    fail(breaker, 3)
    assert breaker.state == "open"


def test_an_ignored_call_does_not_end_the_run() -> None:
    breaker, _ = make(failure_threshold=3, ignore=(KeyError,), **RUN)
    fail(breaker, 2)
    with pytest.raises(KeyError):
        breaker.call({}.__getitem__, "k")
    assert breaker.snapshot().run == 2
    fail(breaker)
    assert breaker.state == "open"


def test_the_run_does_not_age() -> None:
    """Five failures in a row are five in a row, however rare the calls are."""
    breaker, clock = make(failure_threshold=5, **RUN)
    for _ in range(5):
        assert breaker.state == "closed"
        fail(breaker)
        clock.advance(3_600.0)
    assert breaker.state == "open"


def last_straw(clock: FakeClock, kind: str) -> Callable[[CircuitBreaker], None]:
    """One call that ends as on the wire: the letter of its kind, ``*`` with an open_for."""

    def straw(breaker: CircuitBreaker) -> None:
        with suppress(Boom, KeyError), breaker.guard() as call:
            if kind in "SFI":
                clock.advance(5.0)
            if kind in "fF":
                raise Boom
            if kind == "I":
                raise KeyError
            if kind == "*":
                call.failure(open_for=60.0)

    return straw


@pytest.mark.parametrize("kind", "fFSI*")
def test_the_call_after_the_trip_is_refused_at_once(kind: str) -> None:
    """Without anybody's look at the state in between."""
    breaker, clock = make(failure_threshold=2, slow_call_duration=5.0, ignore=(KeyError,), **RUN)
    fail(breaker)
    last_straw(clock, kind)(breaker)
    refused(breaker)


def test_slow_calls_belong_to_the_run() -> None:
    breaker, clock = make(failure_threshold=3, slow_call_duration=1.0, **RUN)
    breaker.call(clock.advance, 1.0)
    fail(breaker)
    breaker.call(clock.advance, 2.0)
    assert breaker.state == "open"


# ---------------------------------------------------------------------------- the rates


def test_the_rate_is_not_looked_at_below_minimum_calls() -> None:
    breaker, _ = make(minimum_calls=10, failure_rate=0.5, **RATE)
    fail(breaker, 9)
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"


def test_the_success_that_completes_minimum_calls_can_trip() -> None:
    """It is evaluated after each outcome, good ones included."""
    breaker, _ = make(minimum_calls=10, failure_rate=0.5, **RATE)
    fail(breaker, 5)
    succeed(breaker, 4)
    assert breaker.state == "closed"
    succeed(breaker)
    assert breaker.state == "open"


def test_a_rate_just_below_does_not_trip() -> None:
    breaker, _ = make(minimum_calls=10, failure_rate=0.5, **RATE)
    succeed(breaker, 11)
    fail(breaker, 10)
    assert breaker.state == "closed"
    fail(breaker)
    assert breaker.state == "open"


def test_without_a_rate_only_the_run_trips() -> None:
    breaker, _ = make(minimum_calls=1, failure_rate=None, failure_threshold=6)
    for _ in range(5):
        fail(breaker, 5)
        succeed(breaker)
    assert breaker.state == "closed"


def test_failures_leave_the_window() -> None:
    breaker, clock = make(minimum_calls=10, failure_rate=0.5, window=12.0, **RATE)
    fail(breaker, 8)
    clock.advance(13.0)
    assert breaker.snapshot().window == (0, 0, 0)
    succeed(breaker, 8)
    fail(breaker, 4)
    assert breaker.state == "closed"
    assert breaker.snapshot().window == (12, 4, 0)


def test_the_window_moves_on_bucket_by_bucket() -> None:
    breaker, clock = make(window=12.0, failure_threshold=1_000_000, failure_rate=None)
    for _ in range(12):
        fail(breaker)
        clock.advance(1.0)
    calls = breaker.snapshot().window.calls
    assert calls in (11, 12)  # the oldest may share the bucket that has just gone
    clock.advance(5.0)
    assert breaker.snapshot().window.calls == calls - 5
    clock.advance(12.0)
    assert breaker.snapshot().window.calls == 0


@pytest.mark.parametrize("failing", [False, True])
def test_the_slow_rule(failing: bool) -> None:
    breaker, clock = make(
        minimum_calls=4, failure_rate=None, slow_call_rate=0.5, slow_call_duration=1.0, **RATE
    )

    def slow() -> None:
        clock.advance(1.5)
        if failing:
            raise Boom

    succeed(breaker, 2)
    with suppress(Boom):
        breaker.call(slow)
    assert breaker.state == "closed"
    with suppress(Boom):
        breaker.call(slow)
    assert breaker.state == "open"


def test_without_a_slow_call_duration_nothing_is_slow() -> None:
    breaker, clock = make(minimum_calls=1, slow_call_rate=0.0001, **RATE)
    breaker.call(clock.advance, 3_600.0)
    assert breaker.state == "closed"
    assert breaker.snapshot().window.slow == 0


@given(
    st.lists(st.sampled_from("sfi"), max_size=40),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([None, 0.25, 0.5, 1.0]),
)
def test_a_circuit_trips_exactly_by_the_rule(
    outcomes: list[str], threshold: int, minimum: int, rate: float | None
) -> None:
    breaker, _ = make(failure_threshold=threshold, minimum_calls=minimum, failure_rate=rate)
    run = calls = failures = 0
    for kind in outcomes:
        permit = breaker.acquire()
        {"s": permit.success, "f": permit.failure, "i": permit.ignore}[kind]()
        if kind != "i":
            calls += 1
            failures += kind == "f"
            run = run + 1 if kind == "f" else 0
        by_rate = rate is not None and calls >= minimum and failures and failures >= rate * calls
        if run >= threshold or by_rate:
            assert breaker.state == "open", "the rule says trip"
            return
        assert breaker.state == "closed", "the rule does not say trip"
        window = breaker.snapshot().window
        assert (window.calls, window.failures) == (calls, failures)


# ---------------------------------------------------------------------------- Retry-After


def test_open_for_opens_at_once() -> None:
    breaker, clock = make()
    breaker.acquire().failure(open_for=17.0)
    assert breaker.state == "open"
    error = refused(breaker)
    assert error.retry_after == 17.0
    clock.advance(16.999)
    refused(breaker)
    clock.advance(0.001)
    succeed(breaker)


@pytest.mark.parametrize(
    ("policy", "asked", "given"),
    [
        ({"open_interval": 5.0}, 49.0, 49.0),
        ({"open_interval": 5.0}, 51.0, 50.0),
        ({"open_interval": 5.0}, 1e300, 50.0),
        ({"open_interval": 5.0, "open_interval_max": 20.0}, 51.0, 20.0),
        ({"open_interval": 5.0, "open_interval_max": 90.0}, 80.0, 80.0),
        ({"open_interval": 5.0}, 0.0001, 0.001),
        ({"open_interval": 5.0, "jitter": 1.0}, 30.0, 30.0),
    ],
)
def test_open_for_is_bounded(policy: dict[str, Any], asked: float, given: float) -> None:
    breaker, _ = make(**policy)
    breaker.acquire().failure(open_for=asked)
    assert breaker.snapshot().retry_after == given


def test_a_probe_can_bring_open_for() -> None:
    breaker, clock = make(failure_threshold=1)
    make_due(breaker, clock)
    with breaker.guard() as call:
        call.failure(open_for=90.0)
    assert refused(breaker).retry_after == 90.0


def test_a_late_open_for_changes_nothing() -> None:
    breaker, clock = make(failure_threshold=1)
    late = breaker.acquire()
    fail(breaker)
    clock.advance(10.0)
    late.failure(open_for=500.0)
    assert refused(breaker).retry_after == 50.0


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


# ---------------------------------------------------------------------------- operators


def operate(breaker: CircuitBreaker, what: str, **more: Any) -> None:
    getattr(breaker, what)(actor="ann", reason="maintenance", **more)


def test_forced_open_refuses_everything_until_released(
    clock: FakeClock, brittle: CircuitBreaker
) -> None:
    operate(brittle, "force_open")
    for _ in range(3):
        error = refused(brittle)
        assert (error.state, error.source, error.retry_after) == ("forced_open", "override", 0.0)
        clock.advance(1_000_000.0)
    operate(brittle, "release")
    assert brittle.state == "half_open", "never straight to closed"
    succeed(brittle)
    assert brittle.state == "closed"


def test_forced_closed_admits_everything_and_still_records(brittle: CircuitBreaker) -> None:
    operate(brittle, "force_closed")
    fail(brittle, 20)
    brittle.acquire().failure(open_for=100.0)
    snapshot = brittle.snapshot()
    assert (snapshot.state, snapshot.shared_state, snapshot.source) == (
        "forced_closed", "forced_closed", "override",
    )  # fmt: skip
    assert snapshot.window == (21, 21, 0)
    operate(brittle, "release")
    assert brittle.state == "closed"
    assert brittle.snapshot().window == (0, 0, 0)
    fail(brittle)
    assert brittle.state == "open"


def test_forced_open_ends_with_its_ttl(clock: FakeClock, brittle: CircuitBreaker) -> None:
    operate(brittle, "force_open", ttl=100.0)
    clock.advance(30.0)
    assert refused(brittle).retry_after == 70.0
    clock.advance(69.999)
    refused(brittle)
    clock.advance(0.001)
    assert brittle.state == "half_open"
    succeed(brittle)
    assert brittle.state == "closed"


def test_an_expired_forced_open_lets_a_probe_through_unasked(
    clock: FakeClock, brittle: CircuitBreaker
) -> None:
    operate(brittle, "force_open", ttl=100.0)
    refused(brittle)
    clock.advance(100.0)
    fail(brittle)  # admitted, and as a probe it counts
    assert brittle.state == "open"


def test_forced_closed_ends_with_its_ttl(clock: FakeClock, brittle: CircuitBreaker) -> None:
    operate(brittle, "force_closed", ttl=5.0)
    fail(brittle)
    clock.advance(4.999)
    assert brittle.state == "forced_closed"
    clock.advance(0.001)
    assert brittle.state == "closed"
    fail(brittle)
    assert brittle.state == "open"


def test_an_expired_forced_closed_protects_again_unasked(
    clock: FakeClock, brittle: CircuitBreaker
) -> None:
    """The first outcome after the end tells that it is over, and so may itself count as late."""
    operate(brittle, "force_closed", ttl=5.0)
    clock.advance(5.0)
    fail(brittle)
    with suppress(Boom, CircuitBreakerOpenException):
        brittle.call(boom)
    refused(brittle)


STATES: dict[str, Callable[[CircuitBreaker, FakeClock], object]] = {
    "closed": lambda breaker, clock: None,
    "open": lambda breaker, clock: fail(breaker),
    "half_open": lambda breaker, clock: (make_due(breaker, clock), breaker.acquire()),
    "forced_open": lambda breaker, clock: operate(breaker, "force_open"),
    "forced_closed": lambda breaker, clock: operate(breaker, "force_closed"),
}


@pytest.mark.parametrize(
    ("what", "leads"),
    [
        ("force_open", dict.fromkeys(STATES, "forced_open")),
        ("force_closed", dict.fromkeys(STATES, "forced_closed")),
        ("reset", dict.fromkeys(STATES, "closed")),
        (
            "release",
            {
                "closed": "closed",
                "open": "open",
                "half_open": "half_open",
                "forced_open": "half_open",
                "forced_closed": "closed",
            },
        ),
    ],
)
@pytest.mark.parametrize("state", STATES)
def test_operators_steps_from_every_state(
    brittle: CircuitBreaker, clock: FakeClock, what: str, leads: dict[str, str], state: str
) -> None:
    STATES[state](brittle, clock)
    assert brittle.state == state
    operate(brittle, what)
    assert brittle.state == leads[state]


@pytest.mark.parametrize("kind", ["force_open", "force_closed"])
@pytest.mark.parametrize(
    "ttl", [0, -1, 0.0001, 31_536_001, float("nan"), float("inf"), "5"], ids=repr
)
def test_a_bad_ttl_is_refused_and_changes_nothing(
    brittle: CircuitBreaker, kind: str, ttl: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match="ttl") as caught:
        operate(brittle, kind, ttl=ttl)
    assert repr(ttl) in str(caught.value)
    assert brittle.state == "closed"


@pytest.mark.parametrize("ttl", [0.001, 1, 31_536_000])
def test_a_good_ttl_is_kept(brittle: CircuitBreaker, ttl: float) -> None:
    operate(brittle, "force_open", ttl=ttl)
    assert brittle.snapshot().retry_after == ttl


def test_a_later_override_replaces_the_earlier(brittle: CircuitBreaker, clock: FakeClock) -> None:
    operate(brittle, "force_open", ttl=5.0)
    operate(brittle, "force_open")
    clock.advance(10.0)
    refused(brittle)
    operate(brittle, "force_closed", ttl=5.0)
    succeed(brittle)
    clock.advance(5.0)
    assert brittle.state == "closed"


def test_actor_and_reason_may_be_any_text(brittle: CircuitBreaker) -> None:
    for text in ("", "a b", "é" * 500, "\udcff", "\n\0", '"}{', "x" * 10_000):
        brittle.force_open(actor=text, reason=text)
        brittle.release(actor=text, reason=text)
        brittle.reset(actor=text, reason=text)
    assert brittle.state == "closed"


def test_operators_words_are_keywords(brittle: CircuitBreaker) -> None:
    """So that actor and reason are never mixed up."""
    for method in (brittle.reset, brittle.force_open, brittle.force_closed, brittle.release):
        with pytest.raises(TypeError):
            method("ann")  # type: ignore[call-arg]


# ---------------------------------------------------------------------------- transitions


class Listener:
    def __init__(self, breaker: CircuitBreaker) -> None:
        self.heard: list[Transition] = []
        self.threads: set[threading.Thread] = set()
        breaker.on_transition(self)

    def __call__(self, transition: Transition) -> None:
        self.threads.add(threading.current_thread())
        self.heard.append(transition)

    def steps(self) -> list[tuple[str, str, str, str]]:
        return [(t.old.value, t.new.value, t.source, t.cause) for t in self.heard]


def test_transitions_are_heard_in_order(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock
) -> None:
    listener = Listener(brittle)
    make_due(brittle, clock)
    fail(brittle)  # a probe
    clock.advance(60.0)
    succeed(brittle)
    brittle.force_open()
    brittle.release()
    succeed(brittle)
    brittle.force_closed()
    brittle.reset()
    registry.flush(5.0)
    assert listener.steps() == [
        ("closed", "open", "shared", "run"),
        ("open", "half_open", "shared", "due"),
        ("half_open", "open", "shared", "probe"),
        ("open", "half_open", "shared", "due"),
        ("half_open", "closed", "shared", "recovered"),
        ("closed", "forced_open", "override", "forced_open"),
        ("forced_open", "half_open", "shared", "released"),
        ("half_open", "closed", "shared", "recovered"),
        ("closed", "forced_closed", "override", "forced_closed"),
        ("forced_closed", "closed", "shared", "reset"),
    ]
    generations = [t.generation for t in listener.heard]
    assert generations == sorted(set(generations))
    assert {t.circuit for t in listener.heard} == {"brittle"}
    assert all(isinstance(t.old, State) and isinstance(t.new, State) for t in listener.heard)


def test_listeners_run_in_one_thread_of_their_own(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    listeners = [Listener(registry.breaker(name, BRITTLE)) for name in ("a", "b", "c")]
    for name in ("a", "b", "c"):
        fail(registry.breaker(name))
    registry.flush(5.0)
    threads = set().union(*(listener.threads for listener in listeners))
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_transitions_without_calls_are_heard(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock
) -> None:
    brittle.force_closed(ttl=5.0)
    listener = Listener(brittle)
    clock.advance(5.0)
    assert brittle.state == "closed"
    registry.flush(5.0)
    assert listener.steps() == [("forced_closed", "closed", "shared", "expired")]


def test_a_raising_listener_breaks_nothing(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_: Transition) -> None:
        raise RuntimeError("a listener's own defect")

    brittle.on_transition(bad)
    listener = Listener(brittle)
    fail(brittle)
    brittle.reset()
    registry.flush(5.0)
    assert len(listener.heard) == 2
    assert "a listener's own defect" in caplog.text


def test_a_listener_that_ends_its_thread_ends_no_other(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    def bad(_: Transition) -> None:
        raise SystemExit

    brittle.on_transition(bad)
    listener = Listener(brittle)
    for _ in range(3):
        fail(brittle)
        brittle.reset()
    registry.flush(5.0)
    assert len(listener.heard) == 6


def test_a_listener_may_use_the_breaker(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    heard: list[object] = []

    def listener(transition: Transition) -> None:
        heard.append((transition.new, brittle.state, brittle.snapshot().state))
        if transition.new is State.OPEN:
            brittle.reset(actor="listener")

    brittle.on_transition(listener)
    fail(brittle)
    wait_until(lambda: len(heard) == 2)
    assert brittle.state == "closed"


def test_a_call_never_waits_for_a_listener(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    """Its queue is bounded: what does not fit is dropped and counted, and order is kept."""
    go_on = threading.Event()
    heard: list[int] = []

    def slow(transition: Transition) -> None:
        assert go_on.wait(20)
        heard.append(transition.generation)

    brittle.on_transition(slow)
    for _ in range(800):
        fail(brittle)
        brittle.reset()
    assert not heard
    go_on.set()
    registry.flush(20.0)
    assert 1000 <= len(heard) < 1600
    assert heard == sorted(heard)
    assert len(heard) + registry._dispatcher.dropped == 1600


# ---------------------------------------------------------------------------- snapshot


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
    assert dict(snapshot.local) == {"recorded": 9, "flushed": 9, "dropped": 0, "pending": 0}


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
    assert snapshot.local == {"recorded": calls, "flushed": calls, "dropped": 0, "pending": 0}
    assert snapshot.totals["calls"] == calls
    assert snapshot.totals["rejected"] == rejected
