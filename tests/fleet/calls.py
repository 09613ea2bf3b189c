"""The calls that one process of a test's fleet makes, as commands of ``worker.py``."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
)
from distributed_breaker.permit import Permit

BOUND = 10.0  # s that any command may take
SHOWN = ("circuit", "probe", "local", "of")  # what is noted of an admitted call


class BrokenError(Exception):
    """What the protected function raises when it is told to fail."""


class ExcludedError(Exception):
    """What every policy here ignores: the caller's own mistake, such as a bad request."""


class LongCall:
    """A guarded call that goes on until it is told how to end."""

    def __init__(self) -> None:
        self.began: Future[dict[str, Any]] = Future()  # how it was admitted, or not
        self.told: Future[str] = Future()
        self.ended: Future[str] = Future()  # the name of what it raised, or "returned"
        self.task: Future[Any] | None = None  # asynchronous calls only

    def end(self) -> None:
        """Return or raise, as told."""
        outcome = self.told.result()
        if outcome == "failure":
            raise BrokenError("told to fail")
        if outcome == "excluded":
            raise ExcludedError("told to make a mistake")
        if outcome == "interrupt":
            raise asyncio.CancelledError


class Calls:
    """Protected calls: short ones, long ones, and many at a time.

    Each that is let through is noted in a file that all processes share.
    """

    registry: CircuitBreakerRegistry
    _first: str  # the circuit that is meant when none is named
    _file: int

    def _begin_calls_anew(self) -> None:
        self._long: dict[str, LongCall] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hammers: list[threading.Thread] = []
        self._raised: list[str] = []  # by hammering calls, though nothing but a rejection may be
        self._resting = threading.Event()
        self._counted: Counter[str] = Counter()
        self._slowest = 0.0

    def _breaker(self, circuit: str | None) -> CircuitBreaker:
        return self.registry.breaker(circuit or self._first)

    def _note(self, event: str, **more: Any) -> None:
        line = {"event": event, "pid": os.getpid(), "at": time.monotonic(), **more}
        # One write to a file opened for appending is never torn, not even by another process's.
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def _calls(self, count: int, circuit: str | None, problem: str = "") -> dict[str, int]:
        breaker = self._breaker(circuit)

        def protected() -> None:
            self._note("call", circuit=breaker.name)
            if problem:
                raise BrokenError(problem)

        done: Counter[str] = Counter(admitted=0, rejected=0)
        for _ in range(count):
            try:
                breaker.call(protected)
            except BrokenError:
                done["admitted"] += 1
            except CircuitBreakerOpenException:
                done["rejected"] += 1
            else:
                done["admitted"] += 1
        return dict(done)

    def do_succeed(self, count: int = 1, circuit: str | None = None) -> dict[str, int]:
        """Make calls that succeed; says how many were admitted and rejected."""
        return self._calls(count, circuit)

    def do_fail(
        self, count: int = 1, circuit: str | None = None, message: str = "told to fail"
    ) -> dict[str, int]:
        """Make calls that fail."""
        return self._calls(count, circuit, message)

    def do_attempt(
        self, circuit: str | None = None, outcome: str = "success", asynchronous: bool = False
    ) -> dict[str, Any]:
        """Make one call and say in detail how it was admitted or rejected."""
        if asynchronous:
            return asyncio.run(self._attempt_async(self._breaker(circuit), outcome))
        return self._attempt(self._breaker(circuit), outcome, 0.0)

    def _attempt(self, breaker: CircuitBreaker, outcome: str, hold: float) -> dict[str, Any]:
        asked = time.monotonic()
        try:
            with breaker.guard() as permit:
                said = self._admitted(permit, breaker, asked)
                if hold:
                    time.sleep(hold)  # the call's work
                self._note("leave", **{name: said[name] for name in SHOWN})
                if outcome == "failure":
                    raise BrokenError("told to fail")
                if outcome == "excluded":
                    raise ExcludedError("told to make a mistake")
        except CircuitBreakerOpenException as error:
            said = _rejected(error)
        except (BrokenError, ExcludedError):
            pass
        return said | {"took": time.monotonic() - asked}

    def do_attempt_many(
        self, count: int, outcome: str = "success", hold: float = 0.0, circuit: str | None = None
    ) -> list[dict[str, Any]]:
        """The same as tasks of one event loop, all at once."""

        async def attempt() -> list[dict[str, Any]]:
            breaker = self._breaker(circuit)
            tasks = [self._attempt_async(breaker, outcome, hold) for _ in range(count)]
            return list(await asyncio.gather(*tasks))

        return asyncio.run(attempt())

    async def _attempt_async(
        self, breaker: CircuitBreaker, outcome: str, hold: float = 0.0
    ) -> dict[str, Any]:
        asked = time.monotonic()
        try:
            async with breaker.guard() as permit:
                said = self._admitted(permit, breaker, asked)
                if hold:
                    await asyncio.sleep(hold)  # the call's work
                if outcome == "failure":
                    raise BrokenError("told to fail")
                if outcome == "excluded":
                    raise ExcludedError("told to make a mistake")
        except CircuitBreakerOpenException as error:
            said = _rejected(error)
        except (BrokenError, ExcludedError):
            pass
        return said | {"took": time.monotonic() - asked}

    def _admitted(self, permit: Permit, breaker: CircuitBreaker, asked: float) -> dict[str, Any]:
        lease, era = permit._lease, permit._era
        generation = lease.shared if lease is not None else era.shared if era is not None else ()
        shown = {
            "circuit": breaker.name,
            "probe": permit.is_probe,
            "local": lease is not None and lease.local is not None,
            "of": str(generation),
        }
        self._note("enter", **shown, asked=asked)
        return {"admitted": True, "state": "", "source": "", **shown}

    def do_hammer(
        self,
        start: float = 0.0,
        threads: int = 2,
        outcome: str = "success",
        hold: float = 0.0,
        pause: float = 0.002,
        circuit: str | None = None,
    ) -> None:
        """Make calls in threads, all the time, from ``start`` (monotonic s) until ``rest``."""
        breaker = self._breaker(circuit)

        def hammer() -> None:
            while time.monotonic() < start:
                pass  # A busy wait: all processes begin at the same moment.
            while not self._resting.is_set():
                try:
                    said = self._attempt(breaker, outcome, hold)
                except BaseException:
                    self._raised.append(traceback.format_exc())
                    raise
                self._slowest = max(self._slowest, said["took"] - hold)
                self._counted["admitted" if said["admitted"] else said["source"]] += 1
                self._resting.wait(pause)

        self._resting.clear()
        self._counted.clear()
        self._slowest = 0.0
        self._hammers = [threading.Thread(target=hammer, daemon=True) for _ in range(threads)]
        for thread in self._hammers:
            thread.start()

    def do_rest(self) -> dict[str, Any]:
        """End hammering; says what became of the calls, rejections by who decided them."""
        self._resting.set()
        for thread in self._hammers:
            thread.join(BOUND)
            assert not thread.is_alive(), "a call does not end"
        assert not self._raised, self._raised[0]
        return {**self._counted, "slowest": self._slowest}

    # ------------------------------------------------------------------ long calls

    def do_begin(self, name: str, how: str = "call", circuit: str | None = None) -> dict[str, Any]:
        """Begin a call that goes on until ``finish``; a probe that hangs, where the circuit is
        half open.  ``how``: ``call``, ``guard``, ``acquire``, ``async``."""
        long = self._long[name] = LongCall()
        breaker = self._breaker(circuit)
        if how == "async":
            coroutine = self._long_async(breaker, long)
            long.task = asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())
        else:
            target = {"call": self._long_call, "guard": self._long_guard,
                      "acquire": self._long_acquire}[how]  # fmt: skip
            threading.Thread(target=self._run, args=(target, breaker, long), daemon=True).start()
        return long.began.result(BOUND)

    def do_fall_back(self, name: str, circuit: str | None = None) -> None:
        """Make a call that is refused, and go on with a fallback until ``finish``."""
        breaker, long = self._breaker(circuit), LongCall()
        self._long[name] = long

        def call() -> None:
            try:
                breaker.call(lambda: None)
            except CircuitBreakerOpenException:
                long.began.set_result({})
                long.told.result()
            long.ended.set_result("returned")

        threading.Thread(target=call, daemon=True).start()
        long.began.result(BOUND)

    def do_finish(self, name: str, outcome: str = "success") -> str:
        """End a long call; says what came out of it."""
        long = self._long.pop(name)
        long.told.set_result(outcome)
        return long.ended.result(BOUND)

    def do_cancel(self, name: str) -> str:
        """Cancel a long call in asyncio."""
        long = self._long.pop(name)
        assert long.task is not None
        long.task.cancel()
        return long.ended.result(BOUND)

    def _run(self, target: Callable[..., None], breaker: CircuitBreaker, long: LongCall) -> None:
        try:
            target(breaker, long)
        except CircuitBreakerOpenException as error:
            long.began.set_result(_rejected(error))
        except BaseException as error:
            long.ended.set_result(type(error).__name__)
        else:
            long.ended.set_result("returned")

    def _long_call(self, breaker: CircuitBreaker, long: LongCall) -> None:
        def protected() -> None:
            self._note("enter", circuit=breaker.name)
            long.began.set_result({"admitted": True})
            long.end()

        breaker.call(protected)

    def _long_guard(self, breaker: CircuitBreaker, long: LongCall) -> None:
        asked = time.monotonic()
        with breaker.guard() as permit:
            long.began.set_result(self._admitted(permit, breaker, asked))
            long.end()

    def _long_acquire(self, breaker: CircuitBreaker, long: LongCall) -> None:
        asked = time.monotonic()
        permit = breaker.acquire()
        long.began.set_result(self._admitted(permit, breaker, asked))
        try:
            long.end()
        except BrokenError as error:
            permit.failure(error)
            raise
        permit.success()

    async def _long_async(self, breaker: CircuitBreaker, long: LongCall) -> None:
        asked = time.monotonic()
        try:
            async with breaker.guard() as permit:
                long.began.set_result(self._admitted(permit, breaker, asked))
                await asyncio.wrap_future(long.told)
                long.end()
        except CircuitBreakerOpenException as error:
            long.began.set_result(_rejected(error))
        except BaseException as error:
            long.ended.set_result(type(error).__name__)
            raise
        else:
            long.ended.set_result("returned")

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self._loop


def _rejected(error: CircuitBreakerOpenException) -> dict[str, Any]:
    return {"admitted": False, "state": error.state, "source": error.source,
            "retry_after": error.retry_after, "reason": error.reason}  # fmt: skip
