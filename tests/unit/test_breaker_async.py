"""Every way to protect an asynchronous call: what it returns, raises, counts and refuses."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from tests.unit.async_ways import (
    RETURNING,
    Way,
    broken,
    by_generator,
    by_guard,
    by_sync_guard,
    by_sync_with,
    by_with,
    counts,
    every_seeing_way,
    every_way,
    fine,
    must_not_run,
    total,
)
from tests.unit.clock import Boom, FakeClock, fail, make_due, nothing_stays_in_the_context, refused

# ---------------------------------------------------------------------------- all ways alike


@every_way
async def test_success_is_returned_and_counted(registry: CircuitBreakerRegistry, way: Way) -> None:
    breaker = registry.breaker("b")
    assert await way(breaker, fine) == "fine"
    assert counts(breaker) == (1, 0)


@every_way
async def test_failure_is_raised_unchanged_and_counted(
    registry: CircuitBreakerRegistry, way: Way
) -> None:
    breaker = registry.breaker("b")
    error = Boom()

    async def function() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(Boom) as caught:
        await way(breaker, function)
    assert caught.value is error
    assert counts(breaker) == (1, 1)


@every_way
async def test_an_open_circuit_refuses_without_running(
    brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    fail(brittle)
    clock.advance(20.0)
    with pytest.raises(CircuitBreakerOpenException) as caught:
        await way(brittle, must_not_run)
    assert (caught.value.state, caught.value.retry_after) == ("open", 40.0)


@every_way
async def test_probes_close_and_reopen(brittle: CircuitBreaker, clock: FakeClock, way: Way) -> None:
    make_due(brittle, clock)
    with pytest.raises(Boom):
        await way(brittle, broken)
    assert brittle.state == "open"
    clock.advance(60.0)
    assert await way(brittle, fine) == "fine"
    assert brittle.state == "closed"
    nothing_stays_in_the_context()


@pytest.mark.parametrize("way", RETURNING, ids=lambda way: way.__name__)
async def test_record_result_makes_a_return_value_a_failure(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way
) -> None:
    policy = Policy(
        failure_threshold=1,
        success_threshold=1,
        jitter=0.0,
        record_result=lambda text: text == "fine",
    )
    breaker = registry.breaker("b", policy)
    assert await way(breaker, fine) == "fine"
    assert breaker.state == "open"
    clock.advance(60.0)
    assert await way(breaker, fine) == "fine"
    assert breaker.state == "open"


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize(
    "way", [by_guard, by_with, by_sync_guard, by_sync_with, by_generator], ids=lambda w: w.__name__
)
async def test_a_block_has_no_return_value_to_judge(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way, due: bool
) -> None:
    policy = Policy(
        failure_threshold=1, success_threshold=1, jitter=0.0, record_result=lambda result: True
    )
    breaker = registry.breaker("b", policy)
    if due:
        make_due(breaker, clock)
    await way(breaker, fine)
    assert breaker.state == "closed"


@every_seeing_way
async def test_nested_calls_ride_on_the_outers_permit(
    brittle: CircuitBreaker, clock: FakeClock, way: Way
) -> None:
    make_due(brittle, clock)
    before = total(brittle, "calls")
    assert await way(brittle, lambda: brittle.call_async(fine)) == "fine"
    assert brittle.state == "closed"
    assert total(brittle, "calls") == before + 1


@every_way
async def test_slow_calls_are_bad(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way
) -> None:
    policy = Policy(failure_threshold=1, slow_call_duration=1.0)
    breaker = registry.breaker("b", policy)

    async def lasting(seconds: float) -> None:
        clock.advance(seconds)

    await way(breaker, lambda: lasting(0.9))
    assert breaker.state == "closed"
    await way(breaker, lambda: lasting(1.0))
    assert breaker.state == "open"


async def test_call_async_passes_all_arguments_on(registry: CircuitBreakerRegistry) -> None:
    async def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    result = await registry.breaker("b").call_async(function, 1, self=2, function=3)
    assert result == ((1,), {"self": 2, "function": 3})


async def test_guard_overrides(brittle: CircuitBreaker) -> None:
    async with brittle.guard() as call:
        call.ignore()
    async with brittle as call:
        call.success()
    assert brittle.state == "closed"
    assert total(brittle, "ignored") == 1
    async with brittle.guard() as call:
        call.failure()
    assert brittle.state == "open"


async def test_a_decorated_coroutine_function_looks_like_itself(brittle: CircuitBreaker) -> None:
    async def function(a: int) -> int:
        """What it does."""
        return a

    protected = brittle(function)
    assert (protected.__name__, protected.__doc__) == ("function", "What it does.")
    assert inspect.signature(protected) == inspect.signature(function)
    assert await protected(3) == 3


async def test_nothing_is_admitted_before_it_is_awaited(brittle: CircuitBreaker) -> None:
    @brittle
    async def function() -> None: ...

    waiting = function()
    fail(brittle)
    with pytest.raises(CircuitBreakerOpenException):
        await waiting


# ---------------------------------------------------------------------------- the async twins


async def test_async_twins_of_the_operators(brittle: CircuitBreaker, clock: FakeClock) -> None:
    await brittle.force_open_async(actor="ann", reason="why", ttl=100.0)
    assert refused(brittle).retry_after == 100.0
    await brittle.release_async(actor="ann", reason="why")
    assert brittle.state == "half_open"
    await brittle.force_closed_async(actor="ann", reason="why")
    assert brittle.state == "forced_closed"
    await brittle.reset_async(actor="ann", reason="why")
    assert brittle.state == "closed"


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
async def test_a_bad_ttl_is_refused(brittle: CircuitBreaker, ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl"):
        await brittle.force_open_async(ttl=ttl)
    assert brittle.state == "closed"


async def test_async_twins_of_looking(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    fail(brittle)
    await registry.flush_async()
    assert (await brittle.snapshot_async()).state == "open"
    assert (await registry.snapshot_async())["brittle"].state == "open"


async def test_a_permit_of_acquire_async_is_settled_without_await(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    make_due(brittle, clock)
    permit = await brittle.acquire_async()
    assert permit.is_probe
    permit.success()
    assert brittle.state == "closed"
