"""When a closed circuit trips: the run, the rates, and Retry-After."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker import CircuitBreaker
from tests.unit.clock import RATE, RUN, Boom, FakeClock, fail, make, make_due, refused, succeed

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
