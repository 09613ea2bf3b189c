"""Protected calls in tasks: cancellation, many tasks at once, tasks inside a probe."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from tests.unit.async_ways import (
    Way,
    by_call,
    by_decorator,
    by_guard,
    by_sync_with,
    by_with,
    counts,
    every_way,
    fine,
    must_not_run,
    run,
    total,
    turns,
)
from tests.unit.clock import BRITTLE, STURDY, Boom, FakeClock, make_due, succeed

# ---------------------------------------------------------------------------- cancellation


async def cancelled(way: Way, breaker: CircuitBreaker, clock: FakeClock, after: float) -> None:
    """Cancel a call that has lasted ``after`` seconds."""
    running = asyncio.Event()

    async def hang() -> None:
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(run(way, breaker, hang))
    await running.wait()
    clock.advance(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@every_way
@pytest.mark.parametrize("due", [False, True])
async def test_a_cancelled_call_is_ignored_and_gives_its_permit_back(
    brittle: CircuitBreaker, clock: FakeClock, way: Way, due: bool
) -> None:
    if due:
        make_due(brittle, clock)
    await cancelled(way, brittle, clock, after=100.0)
    assert brittle.state == ("half_open" if due else "closed")
    assert total(brittle, "ignored") == 1
    succeed(brittle)
    assert brittle.state == "closed"


@every_way
@pytest.mark.parametrize("due", [False, True])
async def test_a_cancelled_call_that_lasted_is_slow(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way, due: bool
) -> None:
    """Otherwise an outer wait_for would hide a dependency that hangs."""
    policy = Policy(
        failure_threshold=1,
        success_threshold=1,
        jitter=0.0,
        slow_call_duration=2.0,
        permit_lease=1000.0,
    )
    breaker = registry.breaker("b", policy)
    if due:
        make_due(breaker, clock)
    await cancelled(way, breaker, clock, after=1.9)
    assert breaker.state == ("half_open" if due else "closed")
    await cancelled(way, breaker, clock, after=2.0)
    assert breaker.state == "open"
    assert total(breaker, "slow") == 1
    assert total(breaker, "ignored") == 2


async def test_a_timeout_around_the_call_cancels_it(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=1, slow_call_duration=2.0))

    async def hang() -> None:
        clock.advance(5.0)
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(breaker.call_async(hang), 0.001)
    assert breaker.state == "open"


async def test_a_timeout_inside_the_call_is_a_failure(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", BRITTLE)

    async def impatient() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), 0.001)

    with pytest.raises(TimeoutError):
        await breaker.call_async(impatient)
    assert breaker.state == "open"


async def test_a_task_cancelled_before_it_began_is_no_call(brittle: CircuitBreaker) -> None:
    task = asyncio.create_task(run(by_call, brittle, must_not_run))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert total(brittle, "calls") == 0


# ---------------------------------------------------------------------------- tasks


async def test_half_open_admits_only_so_many_tasks(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    policy = Policy(failure_threshold=1, success_threshold=2, half_open_permits=2, jitter=0.0)
    breaker = registry.breaker("b", policy)
    make_due(breaker, clock)
    go_on = asyncio.Event()
    running = 0

    async def probe() -> str:
        nonlocal running
        running += 1
        await go_on.wait()
        return "probed"

    tasks = [asyncio.create_task(run(by_decorator, breaker, probe)) for _ in range(20)]
    await turns()
    assert running == 2
    go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results.count("probed") == 2
    assert sum(isinstance(r, CircuitBreakerOpenException) for r in results) == 18
    assert breaker.state == "closed"


@pytest.mark.parametrize(
    "way", [by_with, by_sync_with, by_guard, by_call], ids=lambda way: way.__name__
)
async def test_blocks_of_many_tasks_do_not_mix(registry: CircuitBreakerRegistry, way: Way) -> None:
    breaker = registry.breaker("b", STURDY)
    gates = [asyncio.Event() for _ in range(20)]

    async def work(number: int) -> None:
        await gates[number].wait()
        if number % 2:
            raise Boom

    tasks = [
        asyncio.create_task(run(way, breaker, lambda n=n: work(n)))  # type: ignore[misc]
        for n in range(20)
    ]
    await turns()
    for number in (*range(1, 20, 3), *range(0, 20, 3), *range(2, 20, 3)):
        gates[number].set()
        await turns(2)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, Boom) for result in results] == [bool(n % 2) for n in range(20)]
    assert counts(breaker) == (20, 10)


async def test_a_child_task_inside_a_probe_rides_while_the_permit_is_held(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    async with brittle.guard():
        results = await asyncio.gather(*(brittle.call_async(fine) for _ in range(5)))
    assert results == ["fine"] * 5
    assert brittle.state == "closed"
    assert total(brittle, "calls") == 2


async def test_a_child_task_that_outlives_the_probe_does_not_ride_on(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    """Its context is a copy, which still holds what its parent held when it was started."""
    make_due(brittle, clock)
    ended = asyncio.Event()

    async def child() -> None:
        await ended.wait()
        await brittle.call_async(must_not_run)

    with suppress(Boom):
        async with brittle.guard():
            task = asyncio.create_task(child())
            await turns()
            raise Boom
    assert brittle.state == "open"
    ended.set()
    with pytest.raises(CircuitBreakerOpenException):
        await task


async def test_a_sibling_task_does_not_ride(brittle: CircuitBreaker, clock: FakeClock) -> None:
    make_due(brittle, clock)
    entered, leave = asyncio.Event(), asyncio.Event()

    async def prober() -> None:
        async with brittle.guard():
            entered.set()
            await leave.wait()

    task = asyncio.create_task(prober())
    await entered.wait()
    with pytest.raises(CircuitBreakerOpenException):
        await brittle.call_async(must_not_run)
    leave.set()
    await task
    assert brittle.state == "closed"


async def test_a_late_task_does_not_vote(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", BRITTLE)
    go_on = asyncio.Event()

    async def late() -> None:
        await go_on.wait()
        raise Boom

    tasks = [asyncio.create_task(run(by_call, breaker, late)) for _ in range(5)]
    await turns()
    breaker.reset(actor="me")
    go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert breaker.state == "closed"
    assert total(breaker, "late") == 5


async def test_a_block_left_in_another_context_does_no_harm(brittle: CircuitBreaker) -> None:
    """As by pytest-asyncio's fixtures and by event loops that close async generators."""

    @asynccontextmanager
    async def dependency() -> AsyncIterator[None]:
        async with brittle:
            yield

    entered = dependency()
    contexts = contextvars.copy_context(), contextvars.copy_context()
    await asyncio.create_task(_await(entered.__aenter__()), context=contexts[0])
    error = Boom()
    swallowed = await asyncio.create_task(
        _await(entered.__aexit__(Boom, error, None)), context=contexts[1]
    )
    assert not swallowed
    assert brittle.state == "open"


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
