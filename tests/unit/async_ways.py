"""Every way to protect an asynchronous call, as functions that are alike, and what they count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker
from tests.unit.clock import Boom

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


async def run(way: Way, breaker: CircuitBreaker, function: Function) -> Any:
    return await way(breaker, function)
