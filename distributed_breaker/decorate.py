"""What the decorator makes of each kind of function.

The first of these is the hot path of most users: every attribute read and every call in it counts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from .linked import FULL

if TYPE_CHECKING:
    from .breaker import CircuitBreaker

T = TypeVar("T")


def decorate(breaker: CircuitBreaker, function: Any) -> Any:
    """Wrap a function, coroutine function, generator, async generator or method."""
    if isinstance(function, staticmethod | classmethod):
        return type(function)(decorate(breaker, function.__func__))
    if not callable(function):
        raise TypeError(f"{function!r} cannot be called, so it cannot be protected")
    if inspect.isasyncgenfunction(function):
        return wrap_async_generator(breaker, function)
    if inspect.isgeneratorfunction(function):
        return wrap_generator(breaker, function)
    called = getattr(function, "__call__", None)  # noqa: B004 - an object with async __call__
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called):
        return wrap_coroutine(breaker, function)
    return wrap_function(breaker, function)


def wrap_function(breaker: CircuitBreaker, function: Callable[..., T]) -> Callable[..., T]:
    if not breaker._plain:
        return wrap_judged_function(breaker, function)
    clock = breaker._now_ns

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> T:
        era = breaker._era
        if era is None:
            return breaker._call_guarded(function, args, kwargs)
        start = clock()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            breaker._raised(era, error, start)
            raise
        era.append(clock() - start)
        if len(era.tally) > FULL:
            breaker.drain_if_free(era)
        return result

    return guarded


def wrap_judged_function(breaker: CircuitBreaker, function: Callable[..., T]) -> Callable[..., T]:
    clock = breaker._now_ns

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> T:
        era = breaker._era
        if era is None:
            return breaker._call_guarded(function, args, kwargs)
        start = clock()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            breaker._raised(era, error, start)
            raise
        breaker._returned(era, result, start)
        return result

    return guarded


def wrap_coroutine(
    breaker: CircuitBreaker, function: Callable[..., Awaitable[T]]
) -> Callable[..., Any]:
    clock = breaker._now_ns

    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> T:
        era = breaker._era
        if era is None:
            return await breaker._call_guarded_async(function, args, kwargs)
        start = clock()
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            breaker._raised(era, error, start)
            raise
        breaker._returned(era, result, start)
        return result

    return guarded


def wrap_generator(breaker: CircuitBreaker, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        permit = breaker.acquire()
        inner = function(*args, **kwargs)
        resume, value, spent = inner.send, None, 0
        while True:
            start = breaker._now_ns()
            try:
                item = resume(value)
            except StopIteration as end:
                permit._settle_result(end.value, spent + breaker._now_ns() - start)
                return end.value
            except BaseException as error:
                permit._settle_error(error, spent + breaker._now_ns() - start)
                raise
            spent += breaker._now_ns() - start
            try:
                value = yield item
                resume = inner.send
            except GeneratorExit:
                permit.ignore()
                inner.close()
                raise
            except BaseException as error:
                resume, value = inner.throw, error

    return guarded


def wrap_async_generator(
    breaker: CircuitBreaker, function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        permit = await breaker.acquire_async()
        inner = function(*args, **kwargs)
        resume, value, spent = inner.asend, None, 0
        while True:
            start = breaker._now_ns()
            try:
                item = await resume(value)
            except StopAsyncIteration:
                permit._settle_result(None, spent + breaker._now_ns() - start)
                return
            except BaseException as error:
                permit._settle_error(error, spent + breaker._now_ns() - start)
                raise
            spent += breaker._now_ns() - start
            try:
                value = yield item
                resume = inner.asend
            except GeneratorExit:
                permit.ignore()
                await inner.aclose()
                raise
            except BaseException as error:
                resume, value = inner.athrow, error

    return guarded
