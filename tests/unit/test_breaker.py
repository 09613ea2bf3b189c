"""Every way to protect a synchronous call: what it returns, raises, counts and refuses.

How asynchronous calls behave stands in ``test_breaker_async``, when circuits trip and close in
``test_rules`` and ``test_recovery``, what threads may rely on in ``test_threads``.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import suppress

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from tests.unit.clock import (
    BRITTLE,
    Boom,
    FakeClock,
    boom,
    fail,
    make_due,
    must_not_run,
    no_permit_is_out,
    nothing_stays_in_the_context,
    refused,
    succeed,
)
from tests.unit.ways import (
    RETURNING,
    WAYS,
    Function,
    Way,
    by_generator,
    by_guard,
    by_with,
    counts,
    every_seeing_way,
    every_way,
    totals,
)

# ---------------------------------------------------------------------------- all ways alike


@every_way
def test_success_is_returned_and_counted(registry: CircuitBreakerRegistry, way: Way) -> None:
    breaker = registry.breaker("b")
    result = object()
    assert way(breaker, lambda: result) is result
    assert counts(breaker) == (1, 0)
    assert totals(breaker) == {"calls": 1}


@every_way
def test_failure_is_raised_unchanged_and_counted(
    registry: CircuitBreakerRegistry, way: Way
) -> None:
    breaker = registry.breaker("b")
    error = Boom("mine")

    def function() -> None:
        raise error

    with pytest.raises(Boom) as caught:
        way(breaker, function)
    assert caught.value is error
    assert error.__cause__ is None
    assert error.__context__ is None
    assert counts(breaker) == (1, 1)


@every_way
def test_an_open_circuit_refuses_without_running(
    brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    fail(brittle)
    clock.advance(20.0)
    with pytest.raises(CircuitBreakerOpenException) as caught:
        way(brittle, must_not_run)
    error = caught.value
    assert type(error) is CircuitBreakerOpenException
    assert (error.circuit, error.state, error.source) == ("brittle", "open", "shared")
    assert error.retry_after == 40.0
    assert error.reason


@every_way
def test_a_due_circuit_is_closed_by_a_probe(
    brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    make_due(brittle, clock)
    assert way(brittle, lambda: "back") == "back"
    assert brittle.state == "closed"
    nothing_stays_in_the_context()


@every_way
def test_a_failed_probe_opens_again(brittle: CircuitBreaker, clock: FakeClock, way: Way) -> None:
    make_due(brittle, clock)
    with pytest.raises(Boom):
        way(brittle, boom)
    assert brittle.state == "open"
    assert refused(brittle).retry_after == 60.0


@every_way
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_is_ignored(
    brittle: CircuitBreaker, clock: FakeClock, way: Way, kind: type[BaseException]
) -> None:
    def function() -> None:
        raise kind

    with pytest.raises(kind):
        way(brittle, function)
    assert brittle.state == "closed"
    assert counts(brittle) == (0, 0)
    assert totals(brittle) == {"calls": 1, "ignored": 1}

    make_due(brittle, clock)
    with pytest.raises(kind):
        way(brittle, function)
    assert brittle.state == "half_open"
    succeed(brittle)  # the permit has come back at once
    assert brittle.state == "closed"


@every_seeing_way
def test_ignored_errors_are_neither_success_nor_failure(
    registry: CircuitBreakerRegistry, way: Way, clock: FakeClock
) -> None:
    policy = Policy(
        failure_threshold=2,
        success_threshold=1,
        jitter=0.0,
        ignore=(KeyError,),
        record=(OSError, Boom),
    )
    breaker = registry.breaker("b", policy)

    def ignored() -> None:
        raise KeyError("k")

    def unrecorded() -> None:
        raise ValueError("the caller's own")

    fail(breaker)
    for function, kind in ((ignored, KeyError), (unrecorded, ValueError)):
        with pytest.raises(kind):
            way(breaker, function)
    assert counts(breaker) == (1, 1)
    fail(breaker)  # the run went on: nothing good came between
    assert breaker.state == "open"

    clock.advance(60.0)
    with pytest.raises(KeyError):
        way(breaker, ignored)
    assert breaker.state == "half_open"
    succeed(breaker)
    assert breaker.state == "closed"


@every_seeing_way
def test_another_circuits_rejection_is_ignored(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    other = registry.breaker("other", Policy(failure_threshold=1, open_interval=1_000.0))
    fail(other)
    with pytest.raises(CircuitBreakerOpenException) as caught:
        way(brittle, lambda: other.call(must_not_run))
    assert caught.value.circuit == "other"
    assert brittle.state == "closed"
    assert counts(brittle) == (0, 0)

    make_due(brittle, clock)
    with pytest.raises(CircuitBreakerOpenException):
        way(brittle, lambda: other.call(must_not_run))
    assert brittle.state == "half_open"
    succeed(brittle)


@every_seeing_way
def test_another_circuits_rejection_counts_where_it_is_listed(
    registry: CircuitBreakerRegistry, way: Way
) -> None:
    policy = Policy(failure_threshold=1, record=(CircuitBreakerOpenException,))
    breaker = registry.breaker("b", policy)
    other = registry.breaker("other", BRITTLE)
    fail(other)
    with pytest.raises(CircuitBreakerOpenException):
        way(breaker, lambda: other.call(must_not_run))
    assert breaker.state == "open"


@every_seeing_way
def test_an_unprintable_error_is_the_users_own(registry: CircuitBreakerRegistry, way: Way) -> None:
    """What is kept of an error for people must never stand in the error's way."""

    class Unprintable(Boom):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    class Strange(Boom):
        def __str__(self) -> str:
            return 5  # type: ignore[return-value]

    texts = ["", "\udcff", "\0", "\n", "é" * 500, "\U0001f600" * 500, "x" * 100_000, "{}%s\\"]
    errors = [Unprintable(), Strange(), *map(Boom, texts)]
    breaker = registry.breaker("b", Policy(failure_threshold=len(errors), success_threshold=1))
    for error in errors:

        def function(error: Boom = error) -> None:
            raise error

        with pytest.raises(Boom) as caught:
            way(breaker, function)
        assert caught.value is error
    assert breaker.state == "open"
    assert totals(breaker)["failures"] == len(errors)


@pytest.mark.parametrize("way", RETURNING, ids=lambda way: way.__name__)
def test_record_result_makes_a_return_value_a_failure(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way
) -> None:
    policy = Policy(
        failure_threshold=2,
        success_threshold=1,
        jitter=0.0,
        record_result=lambda status: status >= 500,
    )
    breaker = registry.breaker("b", policy)
    assert way(breaker, lambda: 500) == 500
    assert way(breaker, lambda: 200) == 200
    assert counts(breaker) == (2, 1)
    assert way(breaker, lambda: 503) == 503
    assert way(breaker, lambda: 503) == 503
    assert breaker.state == "open"
    clock.advance(60.0)
    assert way(breaker, lambda: 500) == 500  # a probe
    assert breaker.state == "open"
    clock.advance(60.0)
    assert way(breaker, lambda: 200) == 200
    assert breaker.state == "closed"


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("way", [by_guard, by_with, by_generator], ids=lambda way: way.__name__)
def test_a_block_has_no_return_value_to_judge(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way, due: bool
) -> None:
    asked: list[object] = []

    def is_failure(result: object) -> bool:
        asked.append(result)
        return True

    policy = Policy(failure_threshold=1, success_threshold=1, record_result=is_failure, jitter=0.0)
    breaker = registry.breaker("b", policy)
    if due:
        make_due(breaker, clock)
    way(breaker, lambda: 500)
    assert asked == []
    assert breaker.state == "closed"


@pytest.mark.parametrize("way", RETURNING, ids=lambda way: way.__name__)
def test_a_predicate_that_raises_leaks_no_permit(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way
) -> None:
    policy = Policy(
        failure_threshold=1,
        success_threshold=1,
        jitter=0.0,
        record_result=lambda result: result.status,
    )
    breaker = registry.breaker("b", policy)
    make_due(breaker, clock)
    with pytest.raises(AttributeError):
        way(breaker, lambda: 5)
    no_permit_is_out(breaker)
    clock.advance(60.0)
    way(breaker, lambda: type("Answer", (), {"status": False}))
    assert breaker.state == "closed"


@every_way
def test_without_measuring_no_clock_is_read(registry: CircuitBreakerRegistry, way: Way) -> None:
    breaker = registry.breaker("b", Policy(measure=False))
    way(breaker, lambda: None)
    with suppress(Boom):
        way(breaker, boom)
    all_totals = breaker.snapshot().totals
    assert all_totals["calls"] == 2
    assert all_totals["duration_us"] == 0
    assert sum(all_totals[f"b{i}"] for i in range(16)) == 0


@every_way
def test_durations_are_counted(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way
) -> None:
    breaker = registry.breaker("b")

    def slow() -> None:
        clock.advance(0.25)

    way(breaker, slow)
    snapshot = breaker.snapshot()
    assert snapshot.totals["duration_us"] == 250_000
    assert snapshot.totals["b8"] == 1  # under 2^28 ns = 0.268 s
    assert snapshot.window.slow == 0


@every_way
def test_slow_calls_are_bad(registry: CircuitBreakerRegistry, clock: FakeClock, way: Way) -> None:
    policy = Policy(failure_threshold=2, success_threshold=1, slow_call_duration=1.0, jitter=0.0)
    breaker = registry.breaker("b", policy)

    def lasting(seconds: float) -> Function:
        return lambda: clock.advance(seconds)

    way(breaker, lasting(0.999))
    assert breaker.snapshot().window.slow == 0
    way(breaker, lasting(1.0))
    assert breaker.snapshot().window == (2, 0, 1)
    assert breaker.snapshot().run == 1
    way(breaker, lasting(5.0))
    assert breaker.state == "open"
    clock.advance(60.0)
    way(breaker, lasting(1.0))  # a slow probe is a bad one
    assert breaker.state == "open"
    clock.advance(60.0)
    way(breaker, lasting(0.5))
    assert breaker.state == "closed"


@every_seeing_way
def test_nested_calls_ride_on_the_outers_permit(
    brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    """Only one permit exists, and the inner call must not need it.

    A permit in hand is no such thing: it may be settled anywhere, so it covers no nested call.
    """
    make_due(brittle, clock)
    before = totals(brittle)["calls"]
    assert way(brittle, lambda: brittle.call(lambda: "inner")) == "inner"
    assert brittle.state == "closed"
    assert totals(brittle)["calls"] == before + 1


@every_way
def test_every_way_rides_on_a_guards_permit(
    brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    make_due(brittle, clock)
    before = totals(brittle)["calls"]
    with brittle.guard():
        for _ in range(3):
            assert way(brittle, lambda: "inner") == "inner"
        with pytest.raises(Boom):
            way(brittle, boom)
        assert brittle.state == "half_open"
    assert brittle.state == "closed"
    assert totals(brittle)["calls"] == before + 1


def test_a_nested_failure_is_counted_once_in_a_probe(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    before = totals(brittle)
    with pytest.raises(Boom), brittle.guard():
        brittle.call(boom)
    assert brittle.state == "open"
    assert totals(brittle)["failures"] == before["failures"] + 1


def test_riding_ends_with_the_permit(brittle: CircuitBreaker, clock: FakeClock) -> None:
    make_due(brittle, clock)
    with brittle.guard() as call:
        call.failure()
        assert brittle.state == "open"
        refused(brittle)
    refused(brittle)


def test_another_circuit_does_not_ride(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock
) -> None:
    other = registry.breaker("other", BRITTLE)
    make_due(brittle, clock)
    fail(other)
    with brittle.guard():
        refused(other)


# ---------------------------------------------------------------------------- the object


def test_breakers_refuse_pickling_with_a_hint(brittle: CircuitBreaker) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"registry\.breaker\('brittle'\)"):
            attempt(brittle)


def test_a_breaker_says_what_it_is(brittle: CircuitBreaker) -> None:
    assert repr(brittle) == "<CircuitBreaker 'brittle' closed>"
    fail(brittle)
    assert repr(brittle) == "<CircuitBreaker 'brittle' open>"
    assert brittle.name == "brittle"


def test_no_rejection_is_logged(brittle: CircuitBreaker, caplog: pytest.LogCaptureFixture) -> None:
    """A traceback per rejected call would pin a core."""
    caplog.set_level(0)
    fail(brittle)
    for way in WAYS:
        with pytest.raises(CircuitBreakerOpenException):
            way(brittle, must_not_run)
    assert not caplog.records


def test_a_rejection_carries_no_foreign_context(brittle: CircuitBreaker) -> None:
    """Nothing of the library's own inner life shows in a user's traceback."""
    fail(brittle)
    error = refused(brittle)
    assert error.__cause__ is None
    assert error.__context__ is None
