"""Every way to protect a synchronous call, as functions that are alike, and what they count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker

Function = Callable[[], Any]
Way = Callable[[CircuitBreaker, Function], Any]


def by_decorator(breaker: CircuitBreaker, function: Function) -> Any:
    @breaker
    def protected() -> Any:
        return function()

    return protected()


def by_method(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        @breaker
        def protected(self) -> Any:
            return function()

    return Service().protected()


def by_static_method(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        @breaker
        @staticmethod
        def protected() -> Any:
            return function()

    return Service.protected()


def by_class_method(breaker: CircuitBreaker, function: Function) -> Any:
    class Service:
        @breaker
        @classmethod
        def protected(cls) -> Any:
            assert cls is Service
            return function()

    return Service().protected()


def by_call(breaker: CircuitBreaker, function: Function) -> Any:
    return breaker.call(function)


def by_guard(breaker: CircuitBreaker, function: Function) -> Any:
    with breaker.guard():
        return function()


def by_with(breaker: CircuitBreaker, function: Function) -> Any:
    with breaker:
        return function()


def by_generator(breaker: CircuitBreaker, function: Function) -> Any:
    @breaker
    def protected() -> Iterator[Any]:
        yield function()

    (item,) = protected()
    return item


def by_acquire(breaker: CircuitBreaker, function: Function) -> Any:
    permit = breaker.acquire()
    try:
        result = function()
    except Exception as error:
        permit.failure(error)
        raise
    except BaseException:
        permit.ignore()
        raise
    permit.success()
    return result


# Those in which the library sees how the call ended.
SEEING: list[Way] = [
    by_decorator, by_method, by_static_method, by_class_method, by_call, by_guard, by_with,
    by_generator,
]  # fmt: skip
WAYS: list[Way] = [*SEEING, by_acquire]
RETURNING: list[Way] = [by_decorator, by_method, by_static_method, by_class_method, by_call]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
every_seeing_way = pytest.mark.parametrize("way", SEEING, ids=lambda way: way.__name__)


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
