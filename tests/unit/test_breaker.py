"""Every way to protect a synchronous call: what it returns, raises, counts and refuses.

How asynchronous calls behave stands in ``test_breaker_async``, when circuits trip and close in
``test_breaker_rules``, what threads may rely on in ``test_breaker_threads``.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import pickle
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from tests.unit.clock import (
    BRITTLE,
    STURDY,
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
    every_seeing_way,
    every_way,
)


def counts(breaker: CircuitBreaker) -> tuple[int, int]:
    """Calls and failures in the window."""
    window = breaker.snapshot().window
    return window.calls, window.failures


def totals(breaker: CircuitBreaker) -> dict[str, int]:
    """The totals that are not zero, without times."""
    return {
        name: count
        for name, count in breaker.snapshot().totals.items()
        if count and not name.startswith(("last_", "duration_", "b"))
    }


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


# ---------------------------------------------------------------------------- call


def test_call_passes_all_arguments_on(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert breaker.call(function, 1, 2, self=3, function=4) == ((1, 2), {"self": 3, "function": 4})


def test_what_call_raises_for_wrong_arguments_is_the_users_own(
    registry: CircuitBreakerRegistry,
) -> None:
    breaker = registry.breaker("b")
    with pytest.raises(TypeError, match="argument"):
        breaker.call(lambda: None, 1)


# ---------------------------------------------------------------------------- decorator


def test_a_decorated_function_looks_like_itself(registry: CircuitBreakerRegistry) -> None:
    def function(a: int, b: str = "x") -> str:
        """What it does."""
        return b * a

    protected = registry.breaker("b")(function)
    assert protected(2, b="y") == "yy"
    assert protected.__name__ == "function"
    assert protected.__doc__ == "What it does."
    assert inspect.signature(protected) == inspect.signature(function)
    assert inspect.unwrap(protected) is function


def test_a_decorated_function_keeps_its_kind(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    async def coroutine() -> None: ...
    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> Any:
        yield 1

    assert inspect.iscoroutinefunction(breaker(coroutine))
    assert inspect.isgeneratorfunction(breaker(generator))
    assert inspect.isasyncgenfunction(breaker(async_generator))
    assert not inspect.iscoroutinefunction(breaker(lambda: None))


def test_static_and_class_methods_in_either_order(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    class Service:
        @staticmethod
        @breaker
        def static(value: int) -> int:
            return value

        @classmethod
        @breaker
        def of_class(cls, value: int) -> tuple[type, int]:
            return cls, value

        @breaker
        @staticmethod
        def static_inside(value: int) -> int:
            return value

        @breaker
        @classmethod
        def class_inside(cls, value: int) -> tuple[type, int]:
            return cls, value

    class Child(Service):
        pass

    for thing in (Service, Service(), Child, Child()):
        kind = thing if isinstance(thing, type) else type(thing)
        assert thing.static(1) == 1
        assert thing.static_inside(2) == 2
        assert thing.of_class(3) == (kind, 3)
        assert thing.class_inside(4) == (kind, 4)
    assert counts(breaker) == (16, 0)


def test_decorated_methods_share_one_circuit(brittle: CircuitBreaker) -> None:
    class Service:
        def __init__(self, name: str) -> None:
            self.name = name

        @brittle
        def work(self, well: bool) -> str:
            if not well:
                boom()
            return self.name

    one, two = Service("one"), Service("two")
    assert one.work(True) == "one"
    assert two.work(well=True) == "two"
    with pytest.raises(Boom):
        one.work(False)
    with pytest.raises(CircuitBreakerOpenException):
        two.work(True)


def test_callable_objects_and_partials_can_be_protected(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    class Adder:
        def __call__(self, a: int, b: int) -> int:
            return a + b

    assert breaker(Adder())(1, 2) == 3
    assert breaker(functools.partial(Adder(), 1))(2) == 3
    assert breaker(max)(1, 2) == 2
    assert counts(breaker) == (3, 0)


@pytest.mark.parametrize("thing", [5, "text", None, object()])
def test_what_cannot_be_called_cannot_be_protected(
    registry: CircuitBreakerRegistry, thing: Any
) -> None:
    with pytest.raises(TypeError, match="cannot be called"):
        registry.breaker("b")(thing)


def test_one_function_under_two_circuits(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    other = registry.breaker("other", BRITTLE)
    protected = other(brittle(boom))
    with pytest.raises(Boom):
        protected()
    assert (brittle.state, other.state) == ("open", "open")


# ---------------------------------------------------------------------------- guard


def test_failure_overrides_a_blocks_good_end(brittle: CircuitBreaker) -> None:
    with brittle.guard() as call:
        call.failure(Boom("a bad answer"))
    assert brittle.state == "open"


def test_ignore_overrides_a_blocks_error(brittle: CircuitBreaker) -> None:
    with suppress(Boom), brittle.guard() as call:
        call.ignore()
        boom()
    assert brittle.state == "closed"
    assert totals(brittle) == {"calls": 1, "ignored": 1}


def test_success_overrides_a_blocks_error(brittle: CircuitBreaker) -> None:
    with suppress(Boom), brittle.guard() as call:
        call.success()
        boom()
    assert brittle.state == "closed"
    assert totals(brittle) == {"calls": 1}


def test_failure_counts_an_error_that_would_be_ignored(registry: CircuitBreakerRegistry) -> None:
    """The caller has classified it; the policy is not asked again."""
    breaker = registry.breaker("b", Policy(failure_threshold=1, ignore=(KeyError,)))
    with breaker.guard() as call:
        call.failure(KeyError())
    assert breaker.state == "open"


@pytest.mark.parametrize("first", ["success", "failure", "ignore"])
@pytest.mark.parametrize("second", ["success", "failure", "ignore"])
@pytest.mark.parametrize("due", [False, True])
def test_the_first_word_counts(
    brittle: CircuitBreaker, clock: FakeClock, first: str, second: str, due: bool
) -> None:
    if due:
        make_due(brittle, clock)
    before = totals(brittle).get("calls", 0)
    with brittle.guard() as call:
        getattr(call, first)()
        getattr(call, second)()
    expected = {"success": "closed", "failure": "open", "ignore": "half_open" if due else "closed"}
    assert brittle.state == expected[first]
    assert totals(brittle)["calls"] == before + 1


def test_a_guard_can_be_used_again(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", STURDY)
    guard = breaker.guard()
    with guard:
        pass
    with pytest.raises(Boom), guard:
        boom()
    assert counts(breaker) == (2, 1)


def test_guard_lets_the_blocks_error_through(brittle: CircuitBreaker) -> None:
    error = Boom()
    with pytest.raises(Boom) as caught, brittle.guard():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ["guard", "itself"])
def test_a_refused_block_does_not_run(brittle: CircuitBreaker, name: str) -> None:
    fail(brittle)
    block = brittle.guard() if name == "guard" else brittle
    with pytest.raises(CircuitBreakerOpenException), block:
        must_not_run()
    refused(brittle)


# ---------------------------------------------------------------------------- with breaker


def test_with_breaker_gives_the_permit(brittle: CircuitBreaker) -> None:
    with brittle as call:
        call.failure()
    assert brittle.state == "open"


def test_with_breaker_nests_in_itself_and_others(registry: CircuitBreakerRegistry) -> None:
    a, b = registry.breaker("a", STURDY), registry.breaker("b", STURDY)
    with a, b, a:
        with suppress(Boom), b:
            boom()
        with suppress(Boom), a:
            boom()
    assert counts(a) == (3, 1)
    assert counts(b) == (2, 1)
    nothing_stays_in_the_context()


def test_with_breaker_settles_each_entry_by_its_own_end(registry: CircuitBreakerRegistry) -> None:
    """Inner good, outer bad: the outer entry's duration and error are the outer's."""
    breaker = registry.breaker("b", STURDY)
    with suppress(Boom), breaker:
        with breaker:
            pass
        boom()
    assert counts(breaker) == (2, 1)


def test_blocks_that_do_not_nest_keep_their_own_outcomes(registry: CircuitBreakerRegistry) -> None:
    """A suspended generator holds a block open while its consumer enters and leaves others."""
    a, b = registry.breaker("a", BRITTLE), registry.breaker("b", BRITTLE)

    def reader() -> Iterator[int]:
        with b:
            yield 1

    reading = reader()
    next(reading)
    with a, suppress(Boom):
        reading.throw(Boom())  # type: ignore[attr-defined]
    assert (a.state, b.state) == ("closed", "open")
    assert counts(a) == (1, 0)


def test_blocks_of_one_circuit_that_do_not_nest_all_count(
    registry: CircuitBreakerRegistry,
) -> None:
    breaker = registry.breaker("b", STURDY)

    def reader() -> Iterator[int]:
        with breaker:
            yield 1

    first, second = reader(), reader()
    next(first), next(second)
    with suppress(Boom):
        first.throw(Boom())  # type: ignore[attr-defined]
    assert list(second) == []
    assert counts(breaker) == (2, 1)


@pytest.mark.parametrize("due", [False, True])
def test_a_block_left_in_another_context_does_no_harm(
    brittle: CircuitBreaker, clock: FakeClock, due: bool
) -> None:
    """Frameworks enter in one context and leave in another: fixtures, dependencies with yield."""
    if due:
        make_due(brittle, clock)

    @contextmanager
    def dependency() -> Iterator[None]:
        with brittle:
            yield

    entered = dependency()
    contextvars.copy_context().run(entered.__enter__)
    error = Boom("the block's own")
    swallowed = contextvars.copy_context().run(entered.__exit__, Boom, error, None)
    assert not swallowed  # contextmanager says so when its generator let the error through
    assert brittle.state == "open"
    # Nothing of the other context stays here.
    refused(brittle)
    clock.advance(60.0)
    succeed(brittle)
    assert brittle.state == "closed"


def test_a_block_left_elsewhere_is_not_taken_for_another(
    registry: CircuitBreakerRegistry,
) -> None:
    """This context still holds a block that was left in a copy of it, and now leaves one that was
    entered in yet another."""
    breaker = registry.breaker("b", STURDY)
    ours = contextvars.copy_context()
    ours.run(breaker.__enter__)
    ours.copy().run(breaker.__exit__, None, None, None)
    ours.copy().run(breaker.__enter__)
    ours.run(breaker.__exit__, Boom, Boom(), None)
    assert counts(breaker) == (2, 1)


def test_leaving_what_was_not_entered_does_nothing(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", STURDY)
    breaker.__exit__(None, None, None)
    assert counts(breaker) == (0, 0)


def test_with_breaker_in_many_threads_at_once(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", STURDY)

    def work(number: int) -> None:
        for _ in range(100):
            with suppress(Boom), breaker, breaker:
                if number % 2:
                    boom()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert counts(breaker) == (1600, 800)


# ---------------------------------------------------------------------------- two steps


def test_acquire_leaves_the_outcome_to_the_caller(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", STURDY)
    permits = [breaker.acquire() for _ in range(4)]
    assert totals(breaker) == {}
    permits[0].success()
    permits[1].failure()
    permits[2].failure(Boom())
    permits[3].ignore()
    assert counts(breaker) == (3, 2)
    assert totals(breaker) == {"calls": 4, "failures": 2, "ignored": 1}


def test_a_permit_tells_whether_it_is_a_probe(brittle: CircuitBreaker, clock: FakeClock) -> None:
    assert not brittle.acquire().is_probe
    make_due(brittle, clock)
    assert brittle.acquire().is_probe


def test_a_permit_can_be_settled_in_another_thread(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    permit = brittle.acquire()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(permit.success).result(5)
    assert brittle.state == "closed"


def test_a_permit_in_hand_lends_itself_to_nobody(brittle: CircuitBreaker, clock: FakeClock) -> None:
    make_due(brittle, clock)
    permit = brittle.acquire()
    assert refused(brittle).state == "half_open"
    permit.ignore()
    succeed(brittle)


def test_acquire_is_refused_like_a_call(brittle: CircuitBreaker) -> None:
    fail(brittle)
    with pytest.raises(CircuitBreakerOpenException) as caught:
        brittle.acquire()
    assert caught.value.retry_after == 60.0


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan"), float("inf"), -float("inf"), "5"])
def test_a_bad_open_for_is_refused_and_settles_nothing(brittle: CircuitBreaker, value: Any) -> None:
    permit = brittle.acquire()
    with pytest.raises((ValueError, TypeError), match="open_for") as caught:
        permit.failure(open_for=value)
    assert repr(value) in str(caught.value)
    assert brittle.state == "closed"
    permit.failure()
    assert brittle.state == "open"


# ---------------------------------------------------------------------------- generators


class Script:
    """A generator that does as its consumer says, on a clock that moves inside it."""

    def __init__(self, breaker: CircuitBreaker, clock: FakeClock) -> None:
        self.steps: list[Any] = []
        self.closed = False

        @breaker
        def run(*items: Any, spend: float = 0.0, error: BaseException | None = None) -> Any:
            try:
                for item in items:
                    clock.advance(spend)
                    try:
                        self.steps.append((yield item))
                    except Boom as caught:
                        self.steps.append(caught)
                clock.advance(spend)
                if error is not None:
                    raise error
                return "done"
            finally:
                self.closed = True

        self.run = run


@pytest.fixture
def script(brittle: CircuitBreaker, clock: FakeClock) -> Script:
    return Script(brittle, clock)


def returned(generator: Generator[Any, Any, Any]) -> Any:
    with pytest.raises(StopIteration) as caught:
        next(generator)
    return caught.value.value


def test_a_generator_is_admitted_at_its_first_next(brittle: CircuitBreaker, script: Script) -> None:
    generator = script.run(1)
    fail(brittle)
    with pytest.raises(CircuitBreakerOpenException):
        next(generator)
    assert not script.steps
    with pytest.raises(StopIteration):
        next(generator)


def test_a_generator_is_one_call_and_its_end_is_the_outcome(
    brittle: CircuitBreaker, script: Script
) -> None:
    generator = script.run(1, 2)
    assert [next(generator), next(generator)] == [1, 2]
    assert totals(brittle) == {}
    assert returned(generator) == "done"
    assert totals(brittle) == {"calls": 1}


def test_a_generators_error_is_the_outcome(brittle: CircuitBreaker, script: Script) -> None:
    error = Boom()
    generator = script.run(1, error=error)
    next(generator)
    with pytest.raises(Boom) as caught:
        next(generator)
    assert caught.value is error
    assert brittle.state == "open"


def test_an_error_before_the_first_item_counts(brittle: CircuitBreaker, script: Script) -> None:
    with pytest.raises(Boom):
        next(script.run(error=Boom()))
    assert brittle.state == "open"


@pytest.mark.parametrize("due", [False, True])
def test_an_early_close_is_ignored(
    brittle: CircuitBreaker, script: Script, clock: FakeClock, due: bool
) -> None:
    if due:
        make_due(brittle, clock)
    before = totals(brittle).get("calls", 0)
    generator = script.run(1, 2)
    next(generator)
    generator.close()
    assert script.closed
    assert brittle.state == ("half_open" if due else "closed")
    assert totals(brittle)["ignored"] == 1
    assert totals(brittle)["calls"] == before + 1
    if due:
        succeed(brittle)  # the permit has come back


def test_an_error_while_closing_reaches_who_closes(brittle: CircuitBreaker) -> None:
    """The inner generator is closed, not left to the garbage collector."""

    @brittle
    def items() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise Boom

    generator = items()
    next(generator)
    with pytest.raises(Boom):
        generator.close()  # type: ignore[attr-defined]


def test_a_forgotten_generator_gives_its_permit_back(
    brittle: CircuitBreaker, script: Script, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    generator = script.run(1, 2)
    next(generator)
    del generator
    assert script.closed
    succeed(brittle)
    assert brittle.state == "closed"


def test_a_generator_that_was_never_begun_is_no_call(
    brittle: CircuitBreaker, script: Script
) -> None:
    generator = script.run(1)
    generator.close()
    del generator
    assert totals(brittle) == {}


def test_send_and_throw_pass_through(brittle: CircuitBreaker, script: Script) -> None:
    generator = script.run(1, 2, 3)
    assert next(generator) == 1
    assert generator.send("sent") == 2
    error = Boom("thrown")
    assert generator.throw(error) == 3
    assert returned(generator) == "done"
    assert script.steps == ["sent", error, None]
    assert totals(brittle) == {"calls": 1}


def test_a_thrown_error_that_comes_back_is_the_outcome(
    brittle: CircuitBreaker,
) -> None:
    @brittle
    def items() -> Iterator[int]:
        yield 1

    generator = items()
    next(generator)
    error = Boom()
    with pytest.raises(Boom) as caught:
        generator.throw(error)  # type: ignore[attr-defined]
    assert caught.value is error
    assert brittle.state == "open"


def test_yield_from_passes_through_a_protected_generator(
    brittle: CircuitBreaker, script: Script
) -> None:
    def outer() -> Generator[int, Any, Any]:
        return (yield from script.run(1, 2))

    generator = outer()
    assert next(generator) == 1
    assert generator.send("x") == 2
    assert returned(generator) == "done"
    assert script.steps == ["x", None]


def test_a_protected_generator_can_be_a_context_manager(brittle: CircuitBreaker) -> None:
    @contextmanager
    @brittle
    def resource() -> Iterator[str]:
        yield "resource"

    with resource() as value:
        assert value == "resource"
    assert counts(brittle) == (1, 0)
    with pytest.raises(Boom), resource():
        boom()
    assert brittle.state == "open"


def slow_generator(registry: CircuitBreakerRegistry, clock: FakeClock) -> Script:
    policy = Policy(failure_threshold=1, slow_call_duration=1.0)
    return Script(registry.breaker("slow", policy), clock)


def test_only_time_inside_next_counts(registry: CircuitBreakerRegistry, clock: FakeClock) -> None:
    script = slow_generator(registry, clock)
    for _ in script.run(1, 2, 3, spend=0.2):
        clock.advance(100.0)  # the consumer's own time
    breaker = registry.breaker("slow")
    assert breaker.state == "closed"
    assert breaker.snapshot().totals["duration_us"] == 800_000
    list(script.run(1, 2, 3, spend=0.25))
    assert breaker.state == "open"


def test_an_early_close_is_not_slow_for_its_consumers_time(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    script = slow_generator(registry, clock)
    generator = script.run(1, 2, 3, spend=0.2)
    next(generator)
    clock.advance(100.0)
    generator.close()
    breaker = registry.breaker("slow")
    assert breaker.state == "closed"
    assert totals(breaker) == {"calls": 1, "ignored": 1}


def test_wrong_arguments_leak_no_permit(brittle: CircuitBreaker, clock: FakeClock) -> None:
    @brittle
    def items(count: int) -> Iterator[int]:
        yield from range(count)

    make_due(brittle, clock)
    with pytest.raises(TypeError):
        next(items())  # type: ignore[call-arg]
    no_permit_is_out(brittle)


def test_a_calls_in_a_consumer_do_not_ride(brittle: CircuitBreaker, clock: FakeClock) -> None:
    """While a generator is suspended, its permit covers nothing that the consumer does."""

    @brittle
    def items() -> Iterator[int]:
        yield 1
        yield 2

    make_due(brittle, clock)
    generator = items()
    next(generator)
    refused(brittle)
    assert list(generator) == [2]
    assert brittle.state == "closed"


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
