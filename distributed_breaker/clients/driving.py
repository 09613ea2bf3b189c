"""Rules that are written once and carried out both by blocking and on an event loop.

A rule is a generator that yields what is to be done and is sent what came of it, or thrown the
error.  What it yields: ``Ask`` the dependency, under the circuit; ``Aside``, something that waits
for the disk; ``Load``, the caller's own function; ``Pause``.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple, TypeVar, cast

from ..breaker import CircuitBreaker
from ..permit import Permit

T = TypeVar("T")


class Ask(NamedTuple):
    """Something that the dependency's client does, under the circuit.

    ``look`` is shown the answer while the call lasts; what it raises is how the call ends.
    """

    of: Callable[[Any], Any]
    look: Callable[[Any], object] | None = None


class Aside(NamedTuple):
    """Something that waits for the disk."""

    work: Callable[[], Any]


class Load(NamedTuple):
    """The caller's own function, or coroutine function."""

    function: Callable[[], Any]


class Pause(NamedTuple):
    """Wait for another thread's result, or only for some time."""

    seconds: float
    future: Future[Any] | None = None


What = Ask | Aside | Load | Pause
Rules = Generator[What, Any, T]


class Driver:
    """Carries rules out.  A client that is one says how its dependency is asked."""

    _breaker: CircuitBreaker

    def _client(self) -> Any:
        """What ``Ask.of`` is given."""
        raise NotImplementedError

    def _client_async(self) -> Any:
        """The same for the running event loop; what ``Ask.of`` returns is awaited."""
        raise NotImplementedError

    def _native(self, error: BaseException) -> BaseException:
        """An error as rules and callers see it."""
        return error

    def _failed(self, permit: Permit, error: Exception) -> None:
        """Say so if an error counts, or does not, against what its type says."""

    def _drive(self, rules: Rules[T]) -> T:
        try:
            what = next(rules)
            while True:
                try:
                    done = self._do(what)
                except BaseException as error:
                    what = rules.throw(self._native(error))
                else:
                    what = rules.send(done)
        except StopIteration as end:
            return cast(T, end.value)

    def _do(self, what: What) -> Any:
        if isinstance(what, Ask):
            with self._breaker.guard() as permit:
                try:
                    done = what.of(self._client())
                    if what.look is not None:
                        what.look(done)
                    return done
                except Exception as error:
                    self._failed(permit, error)
                    raise
        if isinstance(what, Aside):
            return what.work()
        if isinstance(what, Load):
            return what.function()
        if what.future is not None:
            return what.future.result(what.seconds)
        return time.sleep(what.seconds)

    async def _drive_async(self, rules: Rules[T]) -> T:
        try:
            what = next(rules)
            while True:
                try:
                    done = await self._do_async(what)
                except BaseException as error:
                    what = rules.throw(self._native(error))
                else:
                    what = rules.send(done)
        except StopIteration as end:
            return cast(T, end.value)

    async def _do_async(self, what: What) -> Any:
        if isinstance(what, Ask):
            async with self._breaker.guard() as permit:
                try:
                    done = await what.of(self._client_async())
                    if what.look is not None:
                        what.look(done)
                    return done
                except Exception as error:
                    self._failed(permit, error)
                    raise
        if isinstance(what, Aside):
            return await asyncio.to_thread(what.work)
        if isinstance(what, Load):
            if inspect.iscoroutinefunction(what.function):
                return await what.function()
            found = await asyncio.to_thread(what.function)
            return await found if inspect.isawaitable(found) else found
        if what.future is not None:
            waiting = asyncio.shield(asyncio.wrap_future(what.future))
            try:
                return await asyncio.wait_for(waiting, what.seconds)
            except TimeoutError:
                raise FutureTimeout from None
        return await asyncio.sleep(what.seconds)
