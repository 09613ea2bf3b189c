"""The circuit breaker that users hold: guard, call, decorator and two-step, sync and async.

A closed call reads one attribute, runs the function and appends its outcome; it does no I/O and
takes no lock.  Everything rarer (rejections, probes, the first call of a process) goes through
``_admission``, written once as a generator of futures to wait for, and driven by a blocking and
by an asynchronous driver.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import os
import re
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar, cast, overload

from . import model
from .errors import CircuitBreakerOpenException, StoreError, StoreUnavailable
from .link import FIRST_ANSWER, Link, Request
from .linked import FULL, Clock, LinkedCircuit, Transition
from .model import Reply
from .policy import Outcome, Policy, State
from .shadow import NO_GENERATION, Bad, Decision, Era, Generation, Shadow, durations
from .snapshot import Snapshot, snapshot_of
from .workers import Dispatcher, HealthCheck

P = ParamSpec("P")
T = TypeVar("T")

OPERATOR_TIMEOUT = 1.0  # s that an operator's step may take
MARGIN = 20  # R1: a probe starts only while more than 1/20 of its lease is left

# The circuits whose permit this context holds: inner calls ride on it and are not counted.
_riding: ContextVar[tuple[CircuitBreaker, ...]] = ContextVar("circuit_breaker_permits", default=())
# The guards entered by ``with breaker:`` in this context, innermost last.
_entered: ContextVar[tuple[Guard, ...]] = ContextVar("circuit_breaker_guards", default=())


class Permit:
    """The right to make one call, and the place to say how it ended.

    The first of ``success``, ``failure`` and ``ignore`` counts; later ones do nothing.
    """

    __slots__ = ("_began", "_breaker", "_done", "_era", "_local", "_shared", "_start", "_token",
                 "_until")  # fmt: skip

    def __init__(
        self,
        breaker: CircuitBreaker,
        era: Era | None,
        token: str = "",
        local: Generation | None = None,
        shared: Generation = NO_GENERATION,
        until: int = 0,
    ) -> None:
        self._breaker = breaker
        self._era = era
        self._token = token
        self._local = local  # generation of the local machine, when that gave the permit
        self._shared = shared
        self._until = until
        self._done = False
        self._began = breaker._clock.ms()
        self._start = breaker._now_ns()

    @property
    def is_probe(self) -> bool:
        """Whether this is a trial call of a half-open circuit."""
        return bool(self._token)

    def success(self) -> None:
        """The call succeeded."""
        self._settle(Outcome.SUCCESS, self._elapsed())

    def failure(self, exc: BaseException | None = None, open_for: float | None = None) -> None:
        """The call failed.

        Args:
            exc: the error, for the record; how it is classified is not asked again.
            open_for: seconds for which the dependency asked to be left alone (Retry-After): the
                circuit opens at once for that long, without quorum, up to the policy's bound.

        Raises:
            ValueError: open_for is not a positive number of seconds.
        """
        if open_for is not None and not 0 < open_for < float("inf"):
            raise ValueError(f"open_for={open_for!r} must be a positive number of seconds")
        self._settle(Outcome.FAILURE, self._elapsed(), exc, open_for)

    def ignore(self) -> None:
        """The call says nothing about the dependency; a held permit is given back."""
        self._settle(Outcome.IGNORED, self._elapsed())

    def _elapsed(self) -> int:
        return self._breaker._now_ns() - self._start

    def _ended(self, error: BaseException | None, result: object = None) -> None:
        """Settle by how a block or function ended."""
        if self._done:
            return
        if error is not None:
            self._settle_error(error, self._elapsed())
        else:
            self._settle_result(result, self._elapsed())

    def _settle_result(self, result: object, duration: int) -> None:
        failed = self._breaker._is_failure(result)
        self._settle(Outcome.FAILURE if failed else Outcome.SUCCESS, duration)

    def _settle_error(self, error: BaseException, duration: int) -> None:
        self._settle(self._breaker.policy.outcome_of(error), duration, error)

    def _settle(
        self,
        outcome: Outcome,
        duration: int,
        error: BaseException | None = None,
        open_for: float | None = None,
    ) -> None:
        if self._done:
            return
        self._done = True
        breaker = self._breaker
        wait = 0 if open_for is None else max(1, round(open_for * 1000))
        if self._era is not None:
            breaker._record(self._era, outcome, duration, self._began, error, wait)
        elif self._token:
            item = breaker._item(outcome, duration, self._began, error, wait)
            if self._local is not None:
                breaker.settle_locally(self._token, self._local, item, self._shared)
                breaker._link_nudge()
            else:
                breaker._settle_shared(self._token, self._shared, item, self._until)


class Guard:
    """A guarded block: ``with breaker.guard() as call`` or ``async with``.

    ``call.failure()`` and ``call.ignore()`` override what the block's end says.
    """

    __slots__ = ("_breaker", "_by_check", "_permit", "_ride")

    def __init__(self, breaker: CircuitBreaker, by_check: bool = False) -> None:
        self._breaker = breaker
        self._by_check = by_check
        self._permit: Permit | None = None
        self._ride: tuple[CircuitBreaker, ...] | None = None

    def __enter__(self) -> Permit:
        breaker = self._breaker
        era = breaker._era
        permit = Permit(breaker, era) if era is not None else breaker._admit(self._by_check)
        return self._began(permit)

    async def __aenter__(self) -> Permit:
        breaker = self._breaker
        era = breaker._era
        permit = Permit(breaker, era) if era is not None else await breaker._admit_async()
        return self._began(permit)

    def _began(self, permit: Permit) -> Permit:
        self._permit = permit
        if permit._token:
            self._ride = _riding.get()
            _riding.set((*self._ride, self._breaker))
        return permit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        permit, self._permit = self._permit, None
        if self._ride is not None:
            _riding.set(self._ride)
            self._ride = None
        if permit is not None:
            permit._ended(error)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)


class CircuitBreaker(LinkedCircuit):
    """One circuit, as this process uses it.  Made by ``CircuitBreakerRegistry.breaker``.

    Protect calls with the breaker as a decorator (functions, coroutine functions, generators,
    async generators, methods), with ``call`` and ``call_async``, with ``guard()`` or the breaker
    itself as a (possibly asynchronous) context manager, or in two steps with ``acquire()``.

    Every one of them raises CircuitBreakerOpenException when the circuit does not admit the call,
    and nothing else of its own: a store that cannot be reached never shows.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        shadow: Shadow,
        clock: Clock,
        link: Link | None,
        dispatcher: Dispatcher,
    ) -> None:
        self._link = link
        # int() is 0: a policy that does not measure pays no clock.
        self._now_ns: Callable[[], int] = clock.ns if policy.measure else int
        self._dispatcher = dispatcher
        self._listeners: tuple[Callable[[Transition], object], ...] = ()
        slow = policy.slow_call_duration
        self._slow_ns = None if slow is None else round(slow * 1e9)
        # Whether a return value or a duration must be looked at before it counts as a success.
        self._plain = slow is None and policy.record_result is None
        super().__init__(name, policy, shadow, clock)

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self.name!r} {self.state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the breaker of circuit {self.name!r} cannot be pickled: it belongs to this process; "
            f"call registry.breaker({self.name!r}) in the other one"
        )

    # ------------------------------------------------------------------ calls

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` under this circuit and return what it returns.

        Raises:
            CircuitBreakerOpenException: the circuit does not admit the call.
        """
        era = self._era
        if era is None:
            return self._call_guarded(function, args, kwargs)
        start = self._now_ns()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            self._raised(era, error, start)
            raise
        if self._plain:
            era.append(self._now_ns() - start)
            if len(era.tally) > FULL:
                self.drain_if_free(era)
        else:
            self._returned(era, result, start)
        return result

    async def call_async(
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await ``function(*args, **kwargs)`` under this circuit.

        A cancelled call is ignored, but counts as slow if it lasted ``slow_call_duration``.
        """
        era = self._era
        if era is None:
            return await self._call_guarded_async(function, args, kwargs)
        start = self._now_ns()
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            self._raised(era, error, start)
            raise
        if self._plain:
            era.append(self._now_ns() - start)
            if len(era.tally) > FULL:
                self.drain_if_free(era)
        else:
            self._returned(era, result, start)
        return result

    def _call_guarded(
        self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> T:
        guard = Guard(self)
        with guard as permit:
            result = function(*args, **kwargs)
            permit._ended(None, result)
        return result

    async def _call_guarded_async(
        self, function: Callable[..., Awaitable[T]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> T:
        async with Guard(self) as permit:
            result = await function(*args, **kwargs)
            permit._ended(None, result)
        return result

    def guard(self) -> Guard:
        """A guarded block, for ``with`` and ``async with``."""
        return Guard(self)

    def __enter__(self) -> Permit:
        guard = Guard(self)
        permit = guard.__enter__()
        _entered.set((*_entered.get(), guard))
        return permit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        *outer, guard = _entered.get()
        _entered.set(tuple(outer))
        guard.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Permit:
        guard = Guard(self)
        permit = await guard.__aenter__()
        _entered.set((*_entered.get(), guard))
        return permit

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def acquire(self) -> Permit:
        """Ask for the right to make one call, and settle it later with the permit's methods.

        A probe's permit that is never settled comes back when its lease ends.
        """
        era = self._era
        return Permit(self, era) if era is not None else self._admit()

    async def acquire_async(self) -> Permit:
        """The same without blocking the event loop."""
        era = self._era
        return Permit(self, era) if era is not None else await self._admit_async()

    # ------------------------------------------------------------------ decorator

    @overload
    def __call__(self, function: Callable[P, T]) -> Callable[P, T]: ...
    @overload
    def __call__(self, function: Any) -> Any: ...
    def __call__(self, function: Any) -> Any:
        """Protect a function, coroutine function, generator, async generator or method.

        Generators are admitted at the first ``next``; their outcome comes at the end, an early
        close is ignored, and their duration is the time inside ``next`` only.
        """
        if isinstance(function, staticmethod | classmethod):
            return type(function)(self(function.__func__))
        if not callable(function):
            raise TypeError(f"{function!r} cannot be called, so it cannot be protected")
        if inspect.isasyncgenfunction(function):
            return self._wrap_async_generator(function)
        if inspect.isgeneratorfunction(function):
            return self._wrap_generator(function)
        if inspect.iscoroutinefunction(function) or (
            inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
        ):
            return self._wrap_coroutine(function)
        return self._wrap_function(function)

    def _wrap_function(self, function: Callable[..., T]) -> Callable[..., T]:
        if not self._plain:
            return self._wrap_judged_function(function)
        clock = self._now_ns

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> T:
            era = self._era
            if era is None:
                return self._call_guarded(function, args, kwargs)
            start = clock()
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self._raised(era, error, start)
                raise
            era.append(clock() - start)
            if len(era.tally) > FULL:
                self.drain_if_free(era)
            return result

        return guarded

    def _wrap_judged_function(self, function: Callable[..., T]) -> Callable[..., T]:
        clock = self._now_ns

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> T:
            era = self._era
            if era is None:
                return self._call_guarded(function, args, kwargs)
            start = clock()
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self._raised(era, error, start)
                raise
            self._returned(era, result, start)
            return result

        return guarded

    def _wrap_coroutine(self, function: Callable[..., Awaitable[T]]) -> Callable[..., Any]:
        clock = self._now_ns

        @functools.wraps(function)
        async def guarded(*args: Any, **kwargs: Any) -> T:
            era = self._era
            if era is None:
                return await self._call_guarded_async(function, args, kwargs)
            start = clock()
            try:
                result = await function(*args, **kwargs)
            except BaseException as error:
                self._raised(era, error, start)
                raise
            self._returned(era, result, start)
            return result

        return guarded

    def _wrap_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            permit = self.acquire()
            inner = function(*args, **kwargs)
            resume, value, spent = inner.send, None, 0
            while True:
                start = self._now_ns()
                try:
                    item = resume(value)
                except StopIteration as end:
                    permit._settle_result(end.value, spent + self._now_ns() - start)
                    return end.value
                except BaseException as error:
                    permit._settle_error(error, spent + self._now_ns() - start)
                    raise
                spent += self._now_ns() - start
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

    def _wrap_async_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            permit = await self.acquire_async()
            inner = function(*args, **kwargs)
            resume, value, spent = inner.asend, None, 0
            while True:
                start = self._now_ns()
                try:
                    item = await resume(value)
                except StopAsyncIteration:
                    permit._settle_result(None, spent + self._now_ns() - start)
                    return
                except BaseException as error:
                    permit._settle_error(error, spent + self._now_ns() - start)
                    raise
                spent += self._now_ns() - start
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

    # ------------------------------------------------------------------ outcomes

    def _is_failure(self, result: object) -> bool:
        judge = self.policy.record_result
        return judge is not None and bool(judge(result))

    def _raised(self, era: Era, error: BaseException, start: int) -> None:
        duration = self._now_ns() - start
        began = self._clock.ms() - duration // 1_000_000
        self._record(era, self.policy.outcome_of(error), duration, began, error)

    def _returned(self, era: Era, result: object, start: int) -> None:
        """A return value that must be looked at, or whose duration may be slow."""
        duration = self._now_ns() - start
        outcome = Outcome.FAILURE if self._is_failure(result) else Outcome.SUCCESS
        began = self._clock.ms() - duration // 1_000_000
        self._record(era, outcome, duration, began)

    def _record(
        self,
        era: Era,
        outcome: Outcome,
        duration: int,
        began: int,
        error: BaseException | None = None,
        open_for: int = 0,
    ) -> None:
        """Append an outcome to the era that admitted its call; a bad one is reported at once."""
        item = self._item(outcome, duration, began, error, open_for)
        if item.kind == "s":
            era.append(duration)
            if len(era.tally) > FULL:
                self.drain_if_free(era)
            return
        era.append(item)
        if item.kind != "i" or open_for:
            self.drain_if_free(era)
            self._link_nudge()

    def _item(
        self,
        outcome: Outcome,
        duration: int,
        began: int,
        error: BaseException | None,
        open_for: int,
    ) -> Bad:
        slow = self._slow_ns is not None and duration >= self._slow_ns
        detail = "" if outcome is not Outcome.FAILURE else self._detail(error)
        return Bad(outcome.kind(slow), duration, began, open_for, detail)

    def _detail(self, error: BaseException | None, **more: str) -> str:
        """What is kept of a transition's cause: short, and free of parameters and credentials."""
        detail = {"reporter": self._shadow.reporter, "host": _host()}
        if error is not None:
            detail |= {"error": type(error).__name__, "message": describe(error)}
        return json.dumps(detail | more, ensure_ascii=True)

    def _link_nudge(self) -> None:
        if self._link is not None:
            self._link.nudge(self)

    # ------------------------------------------------------------------ admission

    def _admission(self, by_check: bool) -> Generator[tuple[Future[Any], bool], Any, Permit]:
        """Admit a call that the one attribute did not admit; written once for sync and async.

        Yields (future, whether to wait for it at most FIRST_ANSWER seconds) and is sent its result,
        or None when it did not come in time or failed.
        """
        if self in _riding.get():
            return Permit(self, None)
        waited = False
        while True:
            decision = self.decide(by_check=by_check)
            era = self._era
            if decision.action == "admit":
                if era is not None:
                    return Permit(self, era)
            elif decision.action == "refuse":
                raise self._refusal(decision)
            elif decision.action == "probe":
                token = _token()
                decision, local, shared = self.acquire_locally(token)
                if decision.action == "probe":
                    return Permit(self, None, token, local, shared)
                if decision.action == "refuse":
                    raise self._refusal(decision)
            elif decision.action == "ask":
                permit = yield from self._ask(decision)
                if permit is not None:
                    return permit
            else:
                link = self._link
                assert link is not None
                if waited or link.impatient or link.down or not link.ensure_started():
                    link.missed_first_answer(self)
                else:
                    waited = True
                    yield self.first_answer, False

    def _ask(self, decision: Decision) -> Generator[tuple[Future[Any], bool], Any, Permit | None]:
        """Ask the store for a permit; None when the circuit turned out to be closed."""
        link = self._link
        assert link is not None
        arguments = {"op": "acquire", "token": _token()}
        future = link.submit(Request("acquire", self, arguments))
        answer = yield future, True
        if answer is None:
            # R2: an acquire that times out is a rejection; the link cancels it when it can.
            raise self._refusal(
                decision._replace(reason="the store did not grant a permit in time")
            )
        reply, sent = cast(tuple[Reply, int], answer)
        if reply.verdict == "go":
            return None
        if reply.verdict == "grant":
            until = sent + reply.value - reply.value // MARGIN
            if self._clock.ms() < until:
                header = model.load_header(reply.header)
                generation = (header.v, header.nonce)
                return Permit(self, None, arguments["token"], None, generation, until)
            # R1: a grant that was delayed on its way is dead on arrival.
            link.submit(Request("cancel", self, {"op": "cancel", "token": arguments["token"]}))
        raise self._refusal(self.decide_again(decision))

    def decide_again(self, decision: Decision) -> Decision:
        """The present refusal, or the old decision with what has become known."""
        with self._lock:
            now = self._shadow.decide(self._clock.ms())
        return now if now.action == "refuse" else decision._replace(reason="all permits are out")

    def _admit(self, by_check: bool = False) -> Permit:
        if self._clock.ms() < self._refuse_until and not _riding.get():
            raise self._refusal(self._decision)
        admission = self._admission(by_check)
        try:
            future, owned = next(admission)
            while True:
                future, owned = admission.send(_wait(future, owned))
        except StopIteration as end:
            return cast(Permit, end.value)

    async def _admit_async(self) -> Permit:
        if self._clock.ms() < self._refuse_until and not _riding.get():
            raise self._refusal(self._decision)
        admission = self._admission(False)
        try:
            future, owned = next(admission)
            while True:
                future, owned = admission.send(await _wait_async(future, owned))
        except StopIteration as end:
            return cast(Permit, end.value)

    def _refusal(self, decision: Decision) -> CircuitBreakerOpenException:
        """Count a rejection and make its exception."""
        rejections = self._rejections
        rejections.append(None)
        if len(rejections) > FULL:
            self.drain()
        wait = max(0, decision.until - self._clock.ms()) / 1000 if decision.until else 0.0
        return CircuitBreakerOpenException(
            self.name, wait, decision.state.value, decision.source, decision.reason
        )

    def _settle_shared(self, token: str, era: Generation, item: Bad, until: int) -> None:
        """R5: a settle is sent at once, and again until the lease ends."""
        self.settle_begun()
        link = self._link
        assert link is not None
        deltas = durations([item.duration])
        arguments = {
            "op": "settle", "token": token, "era": era, "kind": item.kind,
            "open_for": item.open_for, "deltas": tuple(deltas.items()), "detail": item.detail,
        }  # fmt: skip
        link.submit(Request("settle", self, arguments, expires=until))

    # ------------------------------------------------------------------ health checks

    def health_check(self, function: Callable[[], T]) -> Callable[[], T]:
        """Use ``function`` as the probe of this circuit once it has passed while closed.

        It takes no argument and raises when the dependency is unwell.  It runs in a thread of its
        own, so no user's request is sacrificed as a probe and recovery needs no traffic.  It may
        be used as a decorator.
        """
        self.check = HealthCheck(function, round(self.policy.permit_lease * 1000))
        return function

    def run_check(self, now: int) -> None:
        check = self.check
        if check is None:
            return
        wanted = self.check_wanted(now)
        if wanted == "learn":

            def learn() -> None:
                check.function()
                check.passed = True

            check.start(now, learn)
        elif wanted == "probe":

            def probe() -> None:
                with Guard(self, by_check=True):
                    check.function()

            check.start(now, probe)

    # ------------------------------------------------------------------ looking

    @property
    def state(self) -> State:
        """What this process does now."""
        return self._present().state

    def _present(self) -> Decision:
        with self._lock:
            now = self._clock.ms()
            self._drain(now)
            self._shadow.tick(now)
            change = self._refresh(now)
            decision = self._decision
        self._settled(change)
        return decision

    def snapshot(self) -> Snapshot:
        """The circuit at this moment, frozen: the fleet's counts and what this process does.

        Asks the store (at most 0.3 s); when it does not answer, the counts are this process's own
        and ``fleet`` is False.
        """
        return self._snapshot(_wait(self._reading(), True))

    async def snapshot_async(self) -> Snapshot:
        """The same without blocking the event loop."""
        return self._snapshot(await _wait_async(self._reading(), True))

    def _reading(self) -> Future[Any]:
        if self._link is not None:
            return self._link.read(self)
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def _snapshot(self, read: tuple[int, Any, list[dict[str, str]]] | None) -> Snapshot:
        if read is None:
            return snapshot_of(self.name, None, 0, self.own_view())
        now, fields, log = read
        return snapshot_of(self.name, stored_circuit(fields), now, self.own_view(), log)

    def own_view(self) -> tuple[Shadow, Decision, int, Policy, dict[str, int]]:
        """What ``snapshot_of`` needs of this process."""
        decision = self._present()
        return self._shadow, decision, self._clock.ms(), self.policy, self.conservation()

    def on_transition(self, callback: Callable[[Transition], object]) -> None:
        """Call ``callback`` with each Transition, in order, from a thread of the library's."""
        self._listeners = (*self._listeners, callback)

    def _changed(self, change: Transition) -> None:
        for listener in self._listeners:
            self._dispatcher.put(listener, change)

    # ------------------------------------------------------------------ operators

    def reset(self, *, actor: str = "", reason: str = "") -> None:
        """Close the circuit for the whole fleet, whatever its state.

        Raises:
            StoreUnavailable: the store was not reached, and nothing changed here; after a timeout
                the message says that the outcome is unknown.
        """
        result(self._operate("reset", actor, reason))

    def force_open(self, *, actor: str = "", reason: str = "", ttl: float | None = None) -> None:
        """Refuse all calls of the whole fleet until released, or for ``ttl`` seconds."""
        result(self._operate("override", actor, reason, "forced_open", ttl))

    def force_closed(self, *, actor: str = "", reason: str = "", ttl: float | None = None) -> None:
        """Admit all calls of the whole fleet until released, or for ``ttl`` seconds."""
        result(self._operate("override", actor, reason, "forced_closed", ttl))

    def release(self, *, actor: str = "", reason: str = "") -> None:
        """End an override: forced_open goes on to half_open, forced_closed to closed."""
        result(self._operate("release", actor, reason))

    async def reset_async(self, *, actor: str = "", reason: str = "") -> None:
        """See ``reset``."""
        await result_async(self._operate("reset", actor, reason))

    async def force_open_async(
        self, *, actor: str = "", reason: str = "", ttl: float | None = None
    ) -> None:
        """See ``force_open``."""
        await result_async(self._operate("override", actor, reason, "forced_open", ttl))

    async def force_closed_async(
        self, *, actor: str = "", reason: str = "", ttl: float | None = None
    ) -> None:
        """See ``force_closed``."""
        await result_async(self._operate("override", actor, reason, "forced_closed", ttl))

    async def release_async(self, *, actor: str = "", reason: str = "") -> None:
        """See ``release``."""
        await result_async(self._operate("release", actor, reason))

    def _operate(
        self, op: str, actor: str, reason: str, kind: str = "i", ttl: float | None = None
    ) -> Future[Any]:
        if ttl is not None and not 0.001 <= ttl <= 31_536_000:
            raise ValueError(f"ttl={ttl!r} must lie between 0.001 and 31536000 seconds, or be None")
        ms = -1 if ttl is None else round(ttl * 1000)
        detail = self._detail(None, actor=actor[:100], reason=reason[:200])
        if self._link is not None:
            arguments: dict[str, Any] = {"op": op, "detail": detail}
            if op == "override":
                arguments |= {"kind": kind, "ttl": ms}
            return self._link.submit(Request("operate", self, arguments))
        done: Future[Any] = Future()
        done.set_result((self.operate(op, kind, ms, detail), 0))
        return done


# ---------------------------------------------------------------------------- waiting


def _wait(future: Future[Any], owned: bool) -> Any:
    try:
        return future.result(FIRST_ANSWER)
    except FutureTimeout:
        if owned:
            future.cancel()
        return None
    except StoreUnavailable:
        return None


async def _wait_async(future: Future[Any], owned: bool) -> Any:
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.wait_for(waiting if owned else asyncio.shield(waiting), FIRST_ANSWER)
    except (TimeoutError, StoreUnavailable):
        return None


def result(future: Future[Any], timeout: float = OPERATOR_TIMEOUT) -> Any:
    """An answer that only an operator waits for; StoreUnavailable when none comes in time."""
    try:
        return future.result(timeout)
    except FutureTimeout:
        future.cancel()
        raise _too_late(timeout) from None


async def result_async(future: Future[Any], timeout: float = OPERATOR_TIMEOUT) -> Any:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout)
    except TimeoutError:
        raise _too_late(timeout) from None


def _too_late(timeout: float) -> StoreUnavailable:
    return StoreUnavailable(
        f"no answer from the store within {timeout:g} s: it is unknown whether it was carried out"
    )


# ---------------------------------------------------------------------------- small parts


def stored_circuit(fields: dict[str, str] | StoreError) -> model.Circuit | None:
    """A circuit as the store holds it; None when it has none that can be read."""
    try:
        return None if isinstance(fields, StoreError) else model.load(fields)
    except (StoreError, ValueError):
        return None


def _token() -> str:
    return os.urandom(8).hex()


@functools.cache
def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64]


def describe(error: BaseException) -> str:
    """An error's message in one short line, without statement, parameters and credentials."""
    try:
        line = str(error).split("\n", 1)[0]
    except Exception:
        return ""
    line = re.split(r"\[(?:SQL|parameters)", line, maxsplit=1)[0]
    line = re.sub(r"(\w+://)[^/\s@]*@", r"\1", line)
    return line[:200]
