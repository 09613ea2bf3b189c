"""Every way to protect an asynchronous call; cancellation, tasks and async generators."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
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
    fail,
    make_due,
    no_permit_is_out,
    nothing_stays_in_the_context,
    refused,
    succeed,
)

Function = Callable[[], Awaitable[Any]]
Way = Callable[[CircuitBreaker, Function], Awaitable[Any]]


async def by_decorator(breaker: CircuitBreaker, function: Function) -> Any:
    @breaker
    async def protected() -> Any:
        return await function()

    return await protected()


async def by_method(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        @breaker
        async def protected(self) -> Any:
            return await function()

    return await Service().protected()


async def by_static_method(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        @breaker
        @staticmethod
        async def protected() -> Any:
            return await function()

    return await Service.protected()


async def by_class_method(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        @breaker
        @classmethod
        async def protected(cls) -> Any:
            return await function()

    return await Service().protected()


async def by_callable_object(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        async def __call__(self) -> Any:
            return await function()

    return await breaker(Service())()


async def by_call(breaker: CircuitBreaker, function: Function) -> Any:
    return await breaker.call_async(function)


async def by_guard(breaker: CircuitBreaker, function: Function) -> Any:
    async with breaker.guard():
        return await function()


async def by_sync_guard(breaker: CircuitBreaker, function: Function) -> Any:
    with breaker.guard():
        return await function()


async def by_with(breaker: CircuitBreaker, function: Function) -> Any:
    async with breaker:
        return await function()


async def by_sync_with(breaker: CircuitBreaker, function: Function) -> Any:
    with breaker:
        return await function()


async def by_generator(breaker: CircuitBreaker, function: Function) -> Any:
    @breaker
    async def protected() -> AsyncIterator[Any]:
        yield await function()

    (item,) = [item async for item in protected()]
    return item


async def by_acquire(breaker: CircuitBreaker, function: Function) -> Any:
    permit = await breaker.acquire_async()
    try:
        result = await function()
    except Exception as error:
        permit.failure(error)
        raise
    except BaseException:
        permit.ignore()
        raise
    permit.success()
    return result


SEEING: list[Way] = [
    by_decorator, by_method, by_static_method, by_class_method, by_callable_object, by_call,
    by_guard, by_sync_guard, by_with, by_sync_with, by_generator,
]  # fmt: skip
RETURNING: list[Way] = [
    by_decorator, by_method, by_static_method, by_class_method, by_callable_object, by_call,
]  # fmt: skip
every_way = pytest.mark.parametrize("way", [*SEEING, by_acquire], ids=lambda way: way.__name__)
every_seeing_way = pytest.mark.parametrize("way", SEEING, ids=lambda way: way.__name__)


async def fine() -> str:
    await asyncio.sleep(0)
    return "fine"


async def broken() -> None:
    await asyncio.sleep(0)
    raise Boom


async def must_not_run() -> None:
    raise AssertionError("the protected function ran")


def counts(breaker: CircuitBreaker) -> tuple[int, int]:
    window = breaker.snapshot().window
    return window.calls, window.failures


def total(breaker: CircuitBreaker, name: str) -> int:
    return breaker.snapshot().totals[name]


async def turns(count: int = 5) -> None:
    """Let other tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)


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


# ---------------------------------------------------------------------------- cancellation


async def cancelled(way: Way, breaker: CircuitBreaker, clock: FakeClock, after: float) -> None:
    """Cancel a call that has lasted ``after`` seconds."""
    running = asyncio.Event()

    async def hang() -> None:
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(_run(way, breaker, hang))
    await running.wait()
    clock.advance(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _run(way: Way, breaker: CircuitBreaker, function: Function) -> Any:
    return await way(breaker, function)


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
    task = asyncio.create_task(_run(by_call, brittle, must_not_run))
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

    tasks = [asyncio.create_task(_run(by_decorator, breaker, probe)) for _ in range(20)]
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
        asyncio.create_task(_run(way, breaker, lambda n=n: work(n)))  # type: ignore[misc]
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

    tasks = [asyncio.create_task(_run(by_call, breaker, late)) for _ in range(5)]
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


# ---------------------------------------------------------------------------- async generators


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
