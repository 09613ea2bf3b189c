"""Protected generators: admitted at the first ``next``, judged by their end."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from tests.unit.clock import (
    Boom,
    FakeClock,
    boom,
    fail,
    make_due,
    no_permit_is_out,
    refused,
    succeed,
)
from tests.unit.ways import counts, totals


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
