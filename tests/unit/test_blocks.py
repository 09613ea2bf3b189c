"""Guarded blocks and permits in hand: ``guard()``, ``with breaker`` and ``acquire()``."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
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
    OPEN_INTERVAL,
    STURDY,
    Boom,
    FakeClock,
    boom,
    fail,
    make_due,
    must_not_run,
    nothing_stays_in_the_context,
    refused,
    succeed,
)
from tests.unit.ways import counts, totals

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


def test_whether_a_call_would_be_refused_can_be_asked(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    assert not brittle.refusing
    fail(brittle)
    before = totals(brittle)
    assert brittle.refusing
    assert totals(brittle) == before
    clock.advance(OPEN_INTERVAL)
    assert not brittle.refusing
    with brittle:
        assert not brittle.refusing  # it rides on the probe
        assert contextvars.Context().run(lambda: brittle.refusing)
    assert not brittle.refusing


@pytest.mark.parametrize("value", [0, -1, 0.0, float("nan"), float("inf"), -float("inf"), "5"])
def test_a_bad_open_for_is_refused_and_settles_nothing(brittle: CircuitBreaker, value: Any) -> None:
    permit = brittle.acquire()
    with pytest.raises((ValueError, TypeError), match="open_for") as caught:
        permit.failure(open_for=value)
    assert repr(value) in str(caught.value)
    assert brittle.state == "closed"
    permit.failure()
    assert brittle.state == "open"
