"""A circuit and what stands around it, in one object and in one order.

Outermost first: fallback, deadline, retry, bulkhead, circuit, timeout.  Why in this one, and what
counts as an outcome, is said in docs/decisions/0016-the-order-of-a-pipeline.md.  Each part that is
asked for puts one function around the next; the others cost nothing.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Never, ParamSpec, TypeVar, cast, overload

from ..breaker import CircuitBreaker
from ..deadline import DeadlineExceeded, deadline, sooner, until
from ..errors import CircuitBreakerOpenException
from ..permit import Permit
from ..policy import Outcome, check_number
from .bulkhead import Bulkhead, BulkheadFull
from .retry import Retry

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")

Call = Callable[..., Any]  # of a function and its arguments
CallAsync = Callable[..., Awaitable[Any]]

LONGEST = 86_400.0  # s


class CallTimeout(TimeoutError):
    """An attempt has taken longer than its ``timeout``."""


class Pipeline(Generic[F]):
    """Calls through a circuit, with whatever of these is asked for around it.

    A call is made with ``call`` or ``call_async``, or the pipeline decorates a function or
    coroutine function.

    Args:
        breaker: the circuit.
        timeout: seconds for one attempt.  A coroutine is cancelled then, and CallTimeout raised.
            A blocking function cannot be stopped: it sees the time in ``remaining()`` and should
            wait no longer; when it returns later all the same, its result is returned, but the
            circuit is told of a CallTimeout.
        deadline: seconds for the whole call, with its attempts and waits; needs a ``timeout``, and
            more than that.  A deadline around the call that comes sooner holds instead.
        retry: whether and when a failure is tried again.
        bulkhead: how many attempts may be under way in this process.
        fallback: given the error, returns or awaits what is returned instead, when the circuit
            refused, the bulkhead was full, the time was over, or the circuit counts the error as a
            failure.  Other errors are the caller's own and are raised.

    Raises:
        ValueError, TypeError: a number is out of range, or ``deadline`` comes without ``timeout``.
    """

    @overload
    def __init__(
        self: Pipeline[Never],
        breaker: CircuitBreaker,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        retry: Retry | None = None,
        bulkhead: Bulkhead | None = None,
        fallback: None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Pipeline[F],
        breaker: CircuitBreaker,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        retry: Retry | None = None,
        bulkhead: Bulkhead | None = None,
        fallback: Callable[[Exception], Awaitable[F]],
    ) -> None: ...
    @overload
    def __init__(
        self: Pipeline[F],
        breaker: CircuitBreaker,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        retry: Retry | None = None,
        bulkhead: Bulkhead | None = None,
        fallback: Callable[[Exception], F],
    ) -> None: ...
    def __init__(
        self,
        breaker: CircuitBreaker,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        retry: Retry | None = None,
        bulkhead: Bulkhead | None = None,
        fallback: Callable[[Exception], Any] | None = None,
    ) -> None:
        self.breaker = breaker
        self._timeout, self._deadline = _times(timeout, deadline)
        self._retry = retry
        self._bulkhead = bulkhead
        self._fallback = fallback
        self._call = self._made()
        self._call_async = self._made_async()

    def __repr__(self) -> str:
        return f"<Pipeline through {self.breaker!r}>"

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T | F:
        """Call ``function`` and return what it, or the fallback, returns.

        Raises, unless there is a fallback:
            CircuitBreakerOpenException: the circuit does not admit the call.
            BulkheadFull: too many calls are under way.
            DeadlineExceeded: the time for the whole call, or the caller's, was over before it
                began.
        """
        return cast("T | F", self._call(function, *args, **kwargs))

    async def call_async(
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T | F:
        """The same for a coroutine function, which is cancelled when its time is over.

        Raises, beside what ``call`` does:
            CallTimeout: an attempt has taken too long.
            DeadlineExceeded: the time for the whole call, or the caller's, is over.
        """
        return cast("T | F", await self._call_async(function, *args, **kwargs))

    @overload
    def __call__(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T | F]]: ...
    @overload
    def __call__(self, function: Callable[P, T]) -> Callable[P, T | F]: ...
    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function or coroutine function.

        Raises:
            TypeError: it is a generator, which cannot be begun again; the breaker itself can guard
                it.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function!r} is a generator, which nobody can begin again when it fails halfway: "
                f"decorate it with the breaker itself"
            )
        if self._call == self.breaker.call:
            guarded: Callable[..., Any] = self.breaker(function)  # there is nothing around it
            return guarded
        if inspect.iscoroutinefunction(function):
            run_async = self._call_async

            @functools.wraps(function)
            async def composed_async(*args: Any, **kwargs: Any) -> Any:
                return await run_async(function, *args, **kwargs)

            return composed_async
        run = self._call

        @functools.wraps(function)
        def composed(*args: Any, **kwargs: Any) -> Any:
            return run(function, *args, **kwargs)

        return composed

    # ------------------------------------------------------------------ the parts, innermost first

    def _made(self) -> Call:
        made: Call = self.breaker.call
        if self._timeout is not None:
            made = _timed(self.breaker, self._timeout)
        if self._bulkhead is not None:
            made = _in_slot(made, self._bulkhead, self.breaker)
        if self._retry is not None:
            made = _repeated(made, self._retry, self.breaker)
        if self._deadline is not None:
            made = _until(made, self._deadline)
        if self._fallback is not None:
            made = _or_else(made, self._fallback, self.breaker)
        return made

    def _made_async(self) -> CallAsync:
        made: CallAsync = self.breaker.call_async
        if self._timeout is not None:
            made = _timed_async(self.breaker, self._timeout)
        if self._bulkhead is not None:
            made = _in_slot_async(made, self._bulkhead, self.breaker)
        if self._retry is not None:
            made = _repeated_async(made, self._retry, self.breaker)
        if self._deadline is not None:
            made = _until_async(made, self._deadline)
        if self._fallback is not None:
            made = _or_else_async(made, self._fallback, self.breaker)
        return made


def _times(timeout: float | None, total: float | None) -> tuple[float | None, float | None]:
    if timeout is not None:
        check_number("timeout", timeout, 0.001, LONGEST)
    if total is not None:
        check_number("deadline", total, 0.001, LONGEST)
        if timeout is None or timeout >= total:
            raise ValueError(
                f"deadline={total!r} needs a shorter timeout than itself, not {timeout!r}: an "
                f"attempt that is cut short by the deadline says nothing of the dependency, so "
                f"one that hangs would never open the circuit"
            )
    return timeout, total


# ---------------------------------------------------------------------------- the timeout


class _Limit:
    """The time of one attempt, which what is called sees as the context's deadline.

    Attributes:
        end: when it is over, monotonic seconds.
        left: seconds until then, when it began.
        cut_short: whether that is because the caller has no more time, which is not held against
            the dependency.
    """

    __slots__ = ("_token", "cut_short", "end", "left", "timeout")

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        now = time.monotonic()
        self.end = sooner(now + timeout)
        self.cut_short = self.end < now + timeout
        self.left = self.end - now
        if self.left <= 0:
            raise self.over()

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.end

    def over(self) -> TimeoutError:
        if self.cut_short:
            return DeadlineExceeded("the time that the caller has given is over")
        return CallTimeout(f"it has taken longer than {self.timeout:g} s")

    def settle(self, permit: Permit, result: object) -> None:
        """Say how an attempt ended that has returned, be it in time or not."""
        if not self.is_over:
            permit._returned(result)
        elif self.cut_short:
            permit.ignore()
        else:
            permit._ended(self.over())

    def __enter__(self) -> None:
        self._token = until.set(self.end)

    def __exit__(self, *error: object) -> None:
        until.reset(self._token)


def _timed(breaker: CircuitBreaker, timeout: float) -> Call:
    def call(function: Call, /, *args: Any, **kwargs: Any) -> Any:
        limit = _Limit(timeout)
        with breaker.guard() as permit:
            try:
                with limit:
                    result = function(*args, **kwargs)
            except Exception:
                if limit.cut_short and limit.is_over:
                    permit.ignore()
                raise
            limit.settle(permit, result)
            return result

    return call


def _timed_async(breaker: CircuitBreaker, timeout: float) -> CallAsync:
    async def call(function: CallAsync, /, *args: Any, **kwargs: Any) -> Any:
        limit = _Limit(timeout)
        async with breaker.guard() as permit:
            timer = asyncio.timeout(limit.left)
            try:
                with limit:
                    async with timer:
                        result = await function(*args, **kwargs)
            except Exception as error:
                if limit.cut_short and limit.is_over:
                    permit.ignore()
                if isinstance(error, TimeoutError) and timer.expired():
                    raise limit.over() from error
                raise
            limit.settle(permit, result)
            return result

    return call


# ---------------------------------------------------------------------------- the bulkhead


def _in_slot(inner: Call, bulkhead: Bulkhead, breaker: CircuitBreaker) -> Call:
    def call(function: Call, /, *args: Any, **kwargs: Any) -> Any:
        if bulkhead.full and breaker.refusing:
            # Nobody waits for a slot only to be refused.
            breaker.acquire().ignore()
        with bulkhead.slot():
            return inner(function, *args, **kwargs)

    return call


def _in_slot_async(inner: CallAsync, bulkhead: Bulkhead, breaker: CircuitBreaker) -> CallAsync:
    async def call(function: CallAsync, /, *args: Any, **kwargs: Any) -> Any:
        if bulkhead.full and breaker.refusing:
            (await breaker.acquire_async()).ignore()
        async with bulkhead.slot():
            return await inner(function, *args, **kwargs)

    return call


# ---------------------------------------------------------------------------- retries


def _repeated(inner: Call, retry: Retry, breaker: CircuitBreaker) -> Call:
    def call(function: Call, /, *args: Any, **kwargs: Any) -> Any:
        retry.called()
        attempt = 1
        while True:
            try:
                return inner(function, *args, **kwargs)
            except Exception as error:
                wait = retry.wait_before(attempt, error, breaker)
                if wait is None:
                    raise
            time.sleep(wait)
            attempt += 1

    return call


def _repeated_async(inner: CallAsync, retry: Retry, breaker: CircuitBreaker) -> CallAsync:
    async def call(function: CallAsync, /, *args: Any, **kwargs: Any) -> Any:
        retry.called()
        attempt = 1
        while True:
            try:
                return await inner(function, *args, **kwargs)
            except Exception as error:
                wait = retry.wait_before(attempt, error, breaker)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
            attempt += 1

    return call


# ---------------------------------------------------------------------------- the deadline


def _until(inner: Call, seconds: float) -> Call:
    def call(function: Call, /, *args: Any, **kwargs: Any) -> Any:
        with deadline(seconds):
            return inner(function, *args, **kwargs)

    return call


def _until_async(inner: CallAsync, seconds: float) -> CallAsync:
    async def call(function: CallAsync, /, *args: Any, **kwargs: Any) -> Any:
        with deadline(seconds):
            return await inner(function, *args, **kwargs)

    return call


# ---------------------------------------------------------------------------- the fallback


def _is_for_fallback(error: Exception, breaker: CircuitBreaker) -> bool:
    if isinstance(
        error, (CircuitBreakerOpenException, BulkheadFull, DeadlineExceeded, CallTimeout)
    ):
        return True
    return breaker.policy.outcome_of(error) is Outcome.FAILURE


def _or_else(inner: Call, fallback: Call, breaker: CircuitBreaker) -> Call:
    def call(function: Call, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(function, *args, **kwargs)
        except Exception as error:
            if not _is_for_fallback(error, breaker):
                raise
            instead = fallback(error)
        breaker.count_fallback()
        return instead

    if inspect.iscoroutinefunction(fallback):

        def refuse(*_: Any, **__: Any) -> Any:
            raise TypeError(f"the fallback {fallback!r} is a coroutine function: use call_async")

        return refuse
    return call


def _or_else_async(inner: CallAsync, fallback: Call, breaker: CircuitBreaker) -> CallAsync:
    async def call(function: CallAsync, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return await inner(function, *args, **kwargs)
        except Exception as error:
            if not _is_for_fallback(error, breaker):
                raise
            instead = fallback(error)
            if inspect.isawaitable(instead):
                instead = await instead
        breaker.count_fallback()
        return instead

    return call
