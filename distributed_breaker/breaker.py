"""The circuit breaker that users hold: guard, call, decorator and two-step, sync and async.

A closed call reads one attribute, runs the function and appends its outcome; it does no I/O and
takes no lock.  Everything rarer (rejections, probes, the first call of a process) goes through
``admission``.
"""

from __future__ import annotations

import functools
import json
import re
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar, overload

from . import model
from .admission import admit, admit_async, result, result_async, wait, wait_async
from .decorate import decorate
from .errors import CircuitBreakerOpenException, StoreError
from .link import Link
from .linked import FULL, Clock, LinkedCircuit, Refusal, refusal_of
from .permit import CheckGuard, Guard, Inspector, Permit, held, rides
from .policy import Outcome, Policy, State, check_number
from .session import Request
from .shadow import Bad, Decision, Era, Generation, Shadow, durations
from .snapshot import OwnView, Snapshot, snapshot_of
from .transitions import Transition
from .workers import Dispatcher, HealthCheck

P = ParamSpec("P")
T = TypeVar("T")

MAX_DETAIL = 400  # bytes, as in the script
WAIT = 1.0  # s that an operator's step may take

# The innermost guard entered by ``with breaker:`` in this context.
_entered: ContextVar[Guard | None] = ContextVar("circuit_breaker_guards", default=None)


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
        self._seconds = clock.seconds
        self._dispatcher = dispatcher
        # The blocks entered by ``with breaker:`` and not left yet, as an ordered set.
        self._blocks: dict[Guard, None] = {}
        self._listeners: tuple[Callable[[Transition], object], ...] = ()
        self._inspector: Inspector | None = None
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
            seconds = self._seconds
            now = seconds()
            if now < self._refuse_until and not (held.get() and rides(self)):
                raise self._rejection(now)
            return self._call_guarded(function, args, kwargs)
        run: Callable[..., T] = function
        clock = self._now_ns
        start = clock()
        try:
            result = run(*args, **kwargs) if kwargs else run(*args)
        except BaseException as error:
            self._raised(era, error, clock() - start)
            raise
        duration = clock() - start
        if era.plain or duration < era.fast:
            tally = era.tally
            tally.append(duration)
            if len(tally) > FULL:
                self.drain_if_free(era)
        else:
            self._returned(era, result, duration)
        return result

    async def call_async(
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Await ``function(*args, **kwargs)`` under this circuit.

        A cancelled call is ignored, but counts as slow if it lasted ``slow_call_duration``.
        """
        era = self._era
        if era is None:
            seconds = self._seconds
            now = seconds()
            if now < self._refuse_until and not (held.get() and rides(self)):
                raise self._rejection(now)
            return await self._call_guarded_async(function, args, kwargs)
        run: Callable[..., Awaitable[T]] = function
        clock = self._now_ns
        start = clock()
        try:
            result = await run(*args, **kwargs) if kwargs else await run(*args)
        except BaseException as error:
            self._raised(era, error, clock() - start)
            raise
        duration = clock() - start
        if era.plain or duration < era.fast:
            tally = era.tally
            tally.append(duration)
            if len(tally) > FULL:
                self.drain_if_free(era)
        else:
            self._returned(era, result, duration)
        return result

    def _call_guarded(
        self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> T:
        with self.guard() as permit:
            result = function(*args, **kwargs)
            permit._returned(result)
        return result

    async def _call_guarded_async(
        self, function: Callable[..., Awaitable[T]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> T:
        async with self.guard() as permit:
            result = await function(*args, **kwargs)
            permit._returned(result)
        return result

    def guard(self) -> Guard:
        """A guarded block, for ``with`` and ``async with``."""
        guard = Guard()
        guard._breaker = self
        return guard

    def __enter__(self) -> Permit:
        guard = Guard()
        guard._breaker = self
        guard.__enter__()
        return self._enter(guard)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        guard = self._leave()
        if guard is not None:
            guard.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Permit:
        guard = self.guard()
        await guard.__aenter__()
        return self._enter(guard)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _enter(self, guard: Guard) -> Permit:
        around = _entered.get()
        guard._below = around if around is None else _open_block(around)
        _entered.set(guard)
        self._blocks[guard] = None
        return guard

    def _leave(self) -> Guard | None:
        """The innermost guard of this breaker that this context has entered.

        A block that is left in another context than it was entered in (some frameworks do that)
        takes any guard of this breaker that is still open: the outcome counts all the same.
        """
        top = guard = _entered.get()
        while guard is not None and not (guard._breaker is self and guard in self._blocks):
            guard = guard._below
        try:
            if guard is None:
                return self._blocks.popitem()[0]
            del self._blocks[guard]
        except KeyError:
            return None  # Another thread has just left it.
        # Blocks need not nest: the one around this may have been left before it.
        _entered.set(_open_block(top) if guard is not top or guard._below else None)
        return guard

    def acquire(self) -> Permit:
        """Ask for the right to make one call, and settle it later with the permit's methods.

        A probe's permit that is never settled comes back when its lease ends.
        """
        era = self._era
        return Permit()._begin(self, era) if era is not None else self._admit()

    async def acquire_async(self) -> Permit:
        """The same without blocking the event loop."""
        era = self._era
        return Permit()._begin(self, era) if era is not None else await self._admit_async()

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
        return decorate(self, function)

    # ------------------------------------------------------------------ outcomes

    def _is_failure(self, result: object) -> bool:
        judge = self.policy.record_result
        return judge is not None and bool(judge(result))

    def _raised(self, era: Era, error: BaseException, duration: int) -> None:
        self._record(era, self.policy.outcome_of(error), duration, error)

    def _returned(self, era: Era, result: object, duration: int) -> None:
        """A return value that must be looked at, or a slow call."""
        outcome = Outcome.FAILURE if self._is_failure(result) else Outcome.SUCCESS
        self._record(era, outcome, duration)

    def _record(
        self,
        era: Era,
        outcome: Outcome,
        duration: int,
        error: BaseException | None = None,
        open_for: int = 0,
        elapsed: int | None = None,
        slow: bool = False,
    ) -> None:
        """Append an outcome to the era that admitted its call; a bad one is reported at once.

        ``elapsed`` (ns) is the time since the call began where that is not its duration; ``slow``
        makes it a slow call however long it was.
        """
        tally = era.tally
        if outcome is Outcome.SUCCESS and duration < self._slow_ns and not slow:
            tally.append(duration)
        else:
            item = self._item(outcome, duration, error, open_for, elapsed, slow)
            tally.append(item)
            if item.kind != "i" or open_for:
                self.drain_if_free(era)
                self._link_nudge()
                return
        if len(tally) > FULL:
            self.drain_if_free(era)

    def _item(
        self,
        outcome: Outcome,
        duration: int,
        error: BaseException | None,
        open_for: int,
        elapsed: int | None,
        slow: bool = False,
    ) -> Bad:
        began = self._clock.ms() - (duration if elapsed is None else elapsed) // 1_000_000
        kind = outcome.kind(slow or duration >= self._slow_ns)
        detail = "" if outcome is not Outcome.FAILURE else self._detail(error)
        return Bad(kind, duration, began, open_for, detail)

    def _detail(self, error: BaseException | None, **more: str) -> str:
        """What is kept of a transition's cause: short, and free of parameters and credentials."""
        detail = {"reporter": self._shadow.reporter, "host": host_name()}
        if error is not None:
            detail |= {"error": type(error).__name__[:60], "message": describe(error)}
        return bounded_json(detail | more)

    def _link_nudge(self) -> None:
        if self._link is not None:
            self._link.nudge(self)

    # ------------------------------------------------------------------ admission

    def _admit(self, *, by_check: bool = False) -> Permit:
        now = self._seconds()
        refused = now < self._refuse_until and not by_check
        if refused and not (held.get() and rides(self)):
            raise self._rejection(now)
        permit = admit(self, by_check=by_check)
        inspector = self._inspector
        if inspector is not None:
            try:
                inspector.admitted(permit)
            except BaseException as error:
                permit._ended(error)
                raise
        return permit

    async def _admit_async(self) -> Permit:
        now = self._seconds()
        if now < self._refuse_until and not (held.get() and rides(self)):
            raise self._rejection(now)
        permit = await admit_async(self)
        inspector = self._inspector
        if inspector is not None:
            try:
                await inspector.admitted_async(permit)
            except BaseException as error:
                permit._ended(error)
                raise
        return permit

    def refusal(self, decision: Decision) -> CircuitBreakerOpenException:
        """Count a rejection and make its exception."""
        return self._rejection(self._seconds(), refusal_of(decision))

    def count_rejection(self) -> None:
        """Count a call that was not made since the circuit is ``refusing``: for a caller that has
        something instead, and needs no exception."""
        rejections = self._rejections
        rejections.append(None)
        if len(rejections) > FULL:
            self.drain()

    def count_fallback(self) -> None:
        """Count a call that something else than the dependency has answered."""
        fallbacks = self._fallbacks
        fallbacks.append(None)
        if len(fallbacks) > FULL:
            self.drain()

    def _rejection(self, now: float, refusal: Refusal | None = None) -> CircuitBreakerOpenException:
        """Count a rejection and make its exception, with the present words or with others."""
        rejections = self._rejections  # as in count_rejection, without a call more
        rejections.append(None)
        if len(rejections) > FULL:
            self.drain()
        until, state, source, reason = refusal or self._refused
        wait = until - now if until > now else 0.0
        return CircuitBreakerOpenException(self.name, wait, state, source, reason)

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

    def health_check(
        self, function: Callable[[], T], interval: float | None = None
    ) -> Callable[[], T]:
        """Use ``function`` as the probe of this circuit once it has passed while closed.

        It takes no argument and raises when the dependency is unwell.  It runs in a thread of its
        own, so no user's request is sacrificed as a probe and recovery needs no traffic.  It may
        be used as a decorator.

        Args:
            function: the check.
            interval: seconds after which it is run again while the circuit is closed, for what it
                notes itself: then it is no call, and its error counts as nothing.
        """
        again = None
        if interval is not None:
            again = round(check_number("interval", interval, 0.001, 31_536_000) * 1000)
        self.check = HealthCheck(function, round(self.policy.permit_lease * 1000), again)
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
                guard = CheckGuard()
                guard._breaker = self
                with guard:
                    check.function()

            check.start(now, probe)

    # ------------------------------------------------------------------ looking

    @property
    def state(self) -> State:
        """What this process does now."""
        return self._present().state

    @property
    def refusing(self) -> bool:
        """Whether a call would be refused at this moment; asking is no call, and counts nothing."""
        if self._era is not None:
            return False
        if self._seconds() < self._refuse_until:
            return not (held.get() and rides(self))
        return self._present().action == "refuse"

    def _present(self) -> Decision:
        with self._turn, self._lock:
            now = self._clock.ms()
            self._drain(now)
            self._shadow.tick(now)
            self._refresh(now)
            return self._decision

    def snapshot(self) -> Snapshot:
        """The circuit at this moment, frozen: the fleet's counts and what this process does.

        Asks the store (at most 0.3 s); when it does not answer, the counts are this process's own
        and ``fleet`` is False.
        """
        return self._snapshot(wait(self._reading(), True))

    async def snapshot_async(self) -> Snapshot:
        """The same without blocking the event loop."""
        return self._snapshot(await wait_async(self._reading(), True))

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

    def own_view(self) -> OwnView:
        """What ``snapshot_of`` needs of this process."""
        decision = self._present()
        now = self._clock.ms()
        epoch = time.time_ns() // 1_000_000 - now
        account = self.conservation() | self.told | self.time_spent()
        return OwnView(self._shadow, decision, now, epoch, self.policy, account)

    def on_transition(self, callback: Callable[[Transition], object]) -> None:
        """Call ``callback`` with each Transition, in order, from a thread of the library's."""
        self._listeners = (*self._listeners, callback)

    @property
    def dispensable(self) -> bool:
        """Whether nothing is lost when this object goes and is made again later."""
        decision = self._decision
        usual = decision.action == "admit" and decision.source == "shared"
        return usual and not (self._listeners or self.check or self._inspected or self.has_output)

    def _changed(self, change: Transition) -> None:
        self._dispatcher.put(self._listeners, change)

    # ------------------------------------------------------------------ settings

    def adopt(self, policy: Policy) -> None:
        """Go by another policy from now on, and offer it to the fleet, which takes it unless it
        knows one with a higher ``version``.  Neither state nor outcomes are lost; ``measure`` stays
        as it was.
        """
        super().adopt(policy)
        if self._link is not None and not self.disabled:
            self._link.add(self)

    def switch(self, *, on: bool) -> None:
        """Switch the circuit off in this process, which makes it a pass-through that counts
        nothing, or on again."""
        super().switch(on=on)
        if self._link is not None and on:
            self._link.add(self)

    def inspect(self, inspector: Inspector | None) -> None:
        """Have each call that is admitted looked at before it is made, or (None) no longer.

        Calls go the long way meanwhile.  Those that have begun are not looked at.
        """
        with self._turn, self._lock:
            self._inspector, self._inspected = inspector, inspector is not None
            self._refresh(self._clock.ms())

    # ------------------------------------------------------------------ operators

    def reset(self, *, actor: str = "", reason: str = "") -> None:
        """Close the circuit for the whole fleet, whatever its state.

        Raises:
            StoreUnavailable: the store was not reached, and nothing changed here; after a timeout
                the message says that the outcome is unknown.
        """
        result(self._operate("reset", actor, reason), WAIT)

    def force_open(self, *, actor: str = "", reason: str = "", ttl: float | None = None) -> None:
        """Refuse all calls of the whole fleet until released, or for ``ttl`` seconds."""
        result(self._override("forced_open", actor, reason, ttl), WAIT)

    def force_closed(self, *, actor: str = "", reason: str = "", ttl: float | None = None) -> None:
        """Admit all calls of the whole fleet until released, or for ``ttl`` seconds."""
        result(self._override("forced_closed", actor, reason, ttl), WAIT)

    def release(self, *, actor: str = "", reason: str = "") -> None:
        """End an override: forced_open goes on to half_open, forced_closed to closed."""
        result(self._operate("release", actor, reason), WAIT)

    async def reset_async(self, *, actor: str = "", reason: str = "") -> None:
        """See ``reset``."""
        await result_async(self._operate("reset", actor, reason), WAIT)

    async def force_open_async(
        self, *, actor: str = "", reason: str = "", ttl: float | None = None
    ) -> None:
        """See ``force_open``."""
        await result_async(self._override("forced_open", actor, reason, ttl), WAIT)

    async def force_closed_async(
        self, *, actor: str = "", reason: str = "", ttl: float | None = None
    ) -> None:
        """See ``force_closed``."""
        await result_async(self._override("forced_closed", actor, reason, ttl), WAIT)

    async def release_async(self, *, actor: str = "", reason: str = "") -> None:
        """See ``release``."""
        await result_async(self._operate("release", actor, reason), WAIT)

    def _override(self, kind: str, actor: str, reason: str, ttl: float | None) -> Future[Any]:
        ms = -1 if ttl is None else round(check_number("ttl", ttl, 0.001, 31_536_000) * 1000)
        return self._operate("override", actor, reason, kind=kind, ttl=ms)

    def _operate(self, op: str, actor: str, reason: str, **arguments: Any) -> Future[Any]:
        detail = self._detail(None, actor=actor[:60], reason=reason[:200])
        if self._link is not None:
            step = {"op": op, "detail": detail, **arguments}
            return self._link.submit(Request("operate", self, step))
        done: Future[Any] = Future()
        done.set_result((self.operate(op, detail, **arguments), 0))
        return done


# ---------------------------------------------------------------------------- small parts


def _open_block(guard: Guard | None) -> Guard | None:
    """The innermost block, from this one outwards, that has not been left."""
    while guard is not None and guard not in guard._breaker._blocks:
        guard = guard._below
    return guard


def stored_circuit(fields: dict[str, str] | StoreError) -> model.Circuit | None:
    """A circuit as the store holds it; None when it has none that can be read."""
    try:
        return None if isinstance(fields, StoreError) else model.load(fields)
    except (StoreError, ValueError, LookupError):
        return None


@functools.cache
def host_name() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:40]


def bounded_json(detail: dict[str, str]) -> str:
    """JSON that fits what the script keeps of a transition; long texts are cut until it does."""
    detail = {name: text.encode(errors="replace").decode() for name, text in detail.items()}
    text = json.dumps(detail, ensure_ascii=False)
    while len(text.encode()) > MAX_DETAIL:
        longest = max(detail, key=lambda name: len(detail[name]))
        detail = detail | {longest: detail[longest][: len(detail[longest]) * 3 // 4]}
        text = json.dumps(detail, ensure_ascii=False)
    return text


def describe(error: BaseException) -> str:
    """An error's message in one short line, without statement, parameters, query strings of URLs
    and credentials."""
    try:
        # Whole response bodies stand in errors: cut before anything searches through them.
        line = str(error)[:1000].split("\n", 1)[0]
    except Exception:
        return ""
    line = re.split(r"\[(?:SQL|parameters)", line, maxsplit=1)[0]
    line = re.sub(r"\b(\w{1,20}://)[^/\s@]*@", r"\1", line)
    line = re.sub(r"\?\S*", "?", line)
    return line[:200]
