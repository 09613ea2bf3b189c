"""Protected async generators: admitted at the first ``anext``, judged by their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from tests.unit.async_ways import counts, total
from tests.unit.clock import Boom, FakeClock, fail, make_due, no_permit_is_out, refused, succeed


class Script:
    """An async generator that does as its consumer says, on a clock that moves inside it."""

    def __init__(self, breaker: CircuitBreaker, clock: FakeClock) -> None:
        self.steps: list[Any] = []
        self.closed = False

        @breaker
        async def run(*items: Any, spend: float = 0.0, error: BaseException | None = None) -> Any:
            try:
                for item in items:
                    clock.advance(spend)
                    await asyncio.sleep(0)
                    try:
                        self.steps.append((yield item))
                    except Boom as caught:
                        self.steps.append(caught)
                clock.advance(spend)
                if error is not None:
                    raise error
            finally:
                await asyncio.sleep(0)
                self.closed = True

        self.run: Callable[..., AsyncGenerator[Any, Any]] = run


@pytest.fixture
def script(brittle: CircuitBreaker, clock: FakeClock) -> Script:
    return Script(brittle, clock)


async def test_an_async_generator_is_admitted_at_its_first_next(
    brittle: CircuitBreaker, script: Script
) -> None:
    generator = script.run(1)
    fail(brittle)
    with pytest.raises(CircuitBreakerOpenException):
        await anext(generator)
    assert not script.steps


async def test_an_async_generator_is_one_call(brittle: CircuitBreaker, script: Script) -> None:
    generator = script.run(1, 2)
    assert [await anext(generator), await anext(generator)] == [1, 2]
    assert total(brittle, "calls") == 0
    with pytest.raises(StopAsyncIteration):
        await anext(generator)
    assert counts(brittle) == (1, 0)


async def test_an_async_generators_error_is_the_outcome(
    brittle: CircuitBreaker, script: Script
) -> None:
    error = Boom()
    with pytest.raises(Boom) as caught:
        [item async for item in script.run(1, error=error)]
    assert caught.value is error
    assert brittle.state == "open"


@pytest.mark.parametrize("due", [False, True])
async def test_an_early_close_is_ignored(
    brittle: CircuitBreaker, script: Script, clock: FakeClock, due: bool
) -> None:
    if due:
        make_due(brittle, clock)
    generator = script.run(1, 2)
    await anext(generator)
    await generator.aclose()
    assert script.closed
    assert total(brittle, "ignored") == 1
    assert brittle.state == ("half_open" if due else "closed")
    succeed(brittle)


async def test_asend_and_athrow_pass_through(brittle: CircuitBreaker, script: Script) -> None:
    generator = script.run(1, 2, 3)
    assert await anext(generator) == 1
    assert await generator.asend("sent") == 2
    error = Boom()
    assert await generator.athrow(error) == 3
    with pytest.raises(StopAsyncIteration):
        await anext(generator)
    assert script.steps == ["sent", error, None]
    assert counts(brittle) == (1, 0)


async def test_only_time_inside_next_counts(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("slow", Policy(failure_threshold=1, slow_call_duration=1.0))
    script = Script(breaker, clock)
    async for _ in script.run(1, 2, 3, spend=0.2):
        clock.advance(100.0)
    assert breaker.state == "closed"
    assert total(breaker, "duration_us") == 800_000
    generator = script.run(1, 2, spend=0.2)
    await anext(generator)
    clock.advance(100.0)
    await generator.aclose()
    assert breaker.state == "closed"
    assert [item async for item in script.run(1, 2, 3, spend=0.25)] == [1, 2, 3]
    assert breaker.state == "open"


async def test_cancelling_inside_an_async_generator_is_ignored(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    running = asyncio.Event()

    @brittle
    async def items() -> AsyncIterator[int]:
        yield 1
        running.set()
        await asyncio.Event().wait()

    async def consume() -> None:
        async for _ in items():
            pass

    make_due(brittle, clock)
    task = asyncio.create_task(consume())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert brittle.state == "half_open"
    succeed(brittle)
    assert brittle.state == "closed"


async def test_a_forgotten_async_generator_gives_its_permit_back(
    brittle: CircuitBreaker, script: Script, clock: FakeClock
) -> None:
    """A loop that is left early closes nothing; the event loop does, soon."""
    make_due(brittle, clock)
    async for _ in script.run(1, 2):
        break
    while not script.closed:
        await asyncio.sleep(0)
    succeed(brittle)
    assert brittle.state == "closed"


async def test_wrong_arguments_leak_no_permit(brittle: CircuitBreaker, clock: FakeClock) -> None:
    @brittle
    async def items(count: int) -> AsyncIterator[int]:
        yield count

    make_due(brittle, clock)
    with pytest.raises(TypeError):
        await anext(items())  # type: ignore[call-arg]
    no_permit_is_out(brittle)


async def test_a_consumers_calls_do_not_ride(
    brittle: CircuitBreaker, script: Script, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    generator = script.run(1, 2)
    await anext(generator)
    refused(brittle)
    assert [item async for item in generator] == [2]
    assert brittle.state == "closed"


async def test_a_protected_async_generator_can_be_a_context_manager(
    brittle: CircuitBreaker,
) -> None:
    @asynccontextmanager
    @brittle
    async def resource() -> AsyncIterator[str]:
        yield "resource"

    async with resource() as value:
        assert value == "resource"
    assert counts(brittle) == (1, 0)
    with pytest.raises(Boom):
        async with resource():
            raise Boom
    assert brittle.state == "open"
