"""What the decorator makes of each kind of function.

The first of these is the hot path of most users, so every call and attribute read in it counts:
its steps stand once more in ``CircuitBreaker.call``, a call without keywords is spared their
dictionary, and a rejection is raised near its caller, since each frame that it passes through
costs a fifth of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from .linked import FULL
from .permit import Permit, held, rides

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
    clock, seconds = breaker._now_ns, breaker._seconds

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> T:
        era = breaker._era
        if era is None:
            now = seconds()
            if now < breaker._refuse_until and not (held.get() and rides(breaker)):
                raise breaker._rejection(now)
            return breaker._call_guarded(function, args, kwargs)
        start = clock()
        try:
            result = function(*args, **kwargs) if kwargs else function(*args)
        except BaseException as error:
            breaker._raised(era, error, clock() - start)
            raise
        duration = clock() - start
        if era.plain or duration < era.fast:
            tally = era.tally
            tally.append(duration)
            if len(tally) > FULL:
                breaker.drain_if_free(era)
        else:
            breaker._returned(era, result, duration)
        return result

    return guarded


def wrap_coroutine(
    breaker: CircuitBreaker, function: Callable[..., Awaitable[T]]
) -> Callable[..., Any]:
    clock, seconds = breaker._now_ns, breaker._seconds

    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> T:
        era = breaker._era
        if era is None:
            now = seconds()
            if now < breaker._refuse_until and not (held.get() and rides(breaker)):
                raise breaker._rejection(now)
            return await breaker._call_guarded_async(function, args, kwargs)
        start = clock()
        try:
            result = await function(*args, **kwargs) if kwargs else await function(*args)
        except BaseException as error:
            breaker._raised(era, error, clock() - start)
            raise
        duration = clock() - start
        if era.plain or duration < era.fast:
            tally = era.tally
            tally.append(duration)
            if len(tally) > FULL:
                breaker.drain_if_free(era)
        else:
            breaker._returned(era, result, duration)
        return result

    return guarded


def wrap_generator(breaker: CircuitBreaker, function: Callable[..., Any]) -> Callable[..., Any]:
    clock = breaker._now_ns

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = function(*args, **kwargs)
        permit = breaker.acquire()
        resume, value, spent = inner.send, None, 0
        while True:
            start = clock()
            outer = _hold(permit) if permit.is_probe else None
            try:
                item = resume(value)
            except StopIteration as end:
                permit._ended(None, spent + clock() - start)
                return end.value
            except BaseException as error:
                permit._ended(error, spent + clock() - start)
                raise
            finally:
                if outer is not None:
                    held.set(outer)
            spent += clock() - start
            try:
                value = yield item
                resume = inner.send
            except GeneratorExit as closed:
                permit._ended(closed, spent)
                inner.close()
                raise
            except BaseException as error:
                resume, value = inner.throw, error

    return guarded


def wrap_async_generator(
    breaker: CircuitBreaker, function: Callable[..., Any]
) -> Callable[..., Any]:
    clock = breaker._now_ns

    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner = function(*args, **kwargs)
        permit = await breaker.acquire_async()
        resume, value, spent = inner.asend, None, 0
        while True:
            start = clock()
            outer = _hold(permit) if permit.is_probe else None
            try:
                item = await resume(value)
            except StopAsyncIteration:
                permit._ended(None, spent + clock() - start)
                return
            except BaseException as error:
                permit._ended(error, spent + clock() - start)
                raise
            finally:
                if outer is not None:
                    held.set(outer)
            spent += clock() - start
            try:
                value = yield item
                resume = inner.asend
            except GeneratorExit as closed:
                permit._ended(closed, spent)
                await inner.aclose()
                raise
            except BaseException as error:
                resume, value = inner.athrow, error

    return guarded


def _hold(permit: Permit) -> tuple[Permit, ...]:
    """Let calls inside the generator ride on its probe's permit; returns what to set back."""
    outer = held.get()
    held.set((*outer, permit))
    return outer
