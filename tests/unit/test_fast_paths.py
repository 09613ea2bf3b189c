"""A closed call that succeeds and a rejection take no lock and do no I/O, and no lock is held while
users' code runs.
"""

from __future__ import annotations

import builtins
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    Transition,
)
from tests.unit.clock import BRITTLE, Boom, FakeClock, boom, fail, make_due, must_not_run
from tests.unit.instruments import FORBIDDEN, CountingLock, profiled
from tests.unit.ways import Way, by_call, by_decorator, every_way


@pytest.fixture
def locks(registry: CircuitBreakerRegistry) -> Callable[[CircuitBreaker], list[CountingLock]]:
    """Replaces every lock that a call could meet."""

    def replace(breaker: CircuitBreaker) -> list[CountingLock]:
        made = []
        for owner in (breaker, registry, registry._dispatcher):
            made.append(CountingLock(owner._lock))
            owner._lock = made[-1]  # type: ignore[assignment]
        return made

    return replace


@pytest.fixture
def no_io(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise AssertionError("I/O in a guarded call")

    monkeypatch.setattr(socket, "socket", denied)
    monkeypatch.setattr(socket, "create_connection", denied)
    monkeypatch.setattr(builtins, "open", denied)
    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(threading.Thread, "start", denied)
    monkeypatch.setattr(time, "sleep", denied)


# ---------------------------------------------------------------------------- the fast paths


@every_way
@pytest.mark.parametrize(
    "policy",
    [Policy(), Policy(measure=False), Policy(slow_call_duration=10.0), Policy(record_result=bool)],
    ids=["plain", "unmeasured", "slow rule", "judged"],
)
def test_a_closed_call_that_succeeds_takes_no_lock_and_does_no_io(
    registry: CircuitBreakerRegistry,
    locks: Callable[[CircuitBreaker], list[CountingLock]],
    no_io: None,
    way: Way,
    policy: Policy,
) -> None:
    breaker = registry.breaker("b", policy)
    breaker.on_transition(must_not_run)
    way(breaker, lambda: None)
    replaced = locks(breaker)
    with profiled() as calls:
        for _ in range(100):
            way(breaker, lambda: None)
    assert [lock.taken for lock in replaced] == [0, 0, 0]
    assert not FORBIDDEN & set(calls)
    assert breaker.snapshot().window.calls == 101


@every_way
@pytest.mark.parametrize("state", ["open", "forced_open", "half_open"])
def test_a_rejection_takes_no_lock_and_does_no_io(
    registry: CircuitBreakerRegistry,
    clock: FakeClock,
    locks: Callable[[CircuitBreaker], list[CountingLock]],
    no_io: None,
    way: Way,
    state: str,
) -> None:
    breaker = registry.breaker("b", BRITTLE)
    if state == "open":
        fail(breaker)
    elif state == "half_open":
        make_due(breaker, clock)
        breaker.acquire()
    else:
        breaker.force_open(actor="me")
    with suppress(CircuitBreakerOpenException):
        way(breaker, must_not_run)
    assert breaker.state == state
    replaced = locks(breaker)
    with profiled() as calls:
        for _ in range(100):
            with suppress(CircuitBreakerOpenException):
                way(breaker, must_not_run)
    assert [lock.taken for lock in replaced] == [0, 0, 0]
    assert not FORBIDDEN & set(calls)
    assert breaker.snapshot().totals["rejected"] == 101


def test_a_failure_never_waits_for_the_lock(registry: CircuitBreakerRegistry) -> None:
    """Who cannot have it leaves the outcome to whom has it."""
    breaker = registry.breaker("b", BRITTLE)
    with breaker._lock, ThreadPoolExecutor(1) as pool, pytest.raises(Boom):
        pool.submit(breaker.call, boom).result(10)
    assert breaker.state == "open"


def test_the_fast_paths_count_as_instrumented(
    registry: CircuitBreakerRegistry, locks: Callable[[CircuitBreaker], list[CountingLock]]
) -> None:
    """That the instruments of the tests above see something where there is something to see."""
    breaker = registry.breaker("b", BRITTLE)
    replaced = locks(breaker)
    breaker.on_transition(lambda _: None)
    with profiled() as calls:
        fail(breaker)
        assert breaker.state == "open"
    assert replaced[0].taken
    assert replaced[2].taken
    assert FORBIDDEN & set(calls)


# ---------------------------------------------------------------------------- users' code


def in_another_thread(function: Callable[[], object]) -> None:
    """Run it to its end in another thread; if that must wait for us, this fails."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "another thread had to wait for users' code"
    assert not failures, failures


@pytest.mark.parametrize("due", [False, True])
@every_way
def test_no_lock_is_held_while_the_function_runs(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way, due: bool
) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=1, success_threshold=5, jitter=0.0))
    if due:
        make_due(breaker, clock)

    def use() -> None:
        breaker.call(lambda: None)
        assert breaker.state == ("half_open" if due else "closed")
        breaker.snapshot()
        breaker.acquire().ignore()
        registry.breaker("b")
        registry.breaker("new")
        registry.flush()
        registry.snapshot()

    way(breaker, lambda: in_another_thread(use))


@pytest.mark.parametrize("due", [False, True])
@pytest.mark.parametrize("way", [by_call, by_decorator], ids=lambda way: way.__name__)
def test_no_lock_is_held_while_a_result_is_judged(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way, due: bool
) -> None:
    judged: list[object] = []

    def judge(result: object) -> bool:
        in_another_thread(lambda: breaker.snapshot())
        judged.append(breaker.state)
        return False

    breaker = registry.breaker(
        "b", Policy(failure_threshold=1, success_threshold=2, record_result=judge, jitter=0.0)
    )
    if due:
        make_due(breaker, clock)
    way(breaker, lambda: None)
    assert judged == ["half_open" if due else "closed"]


@pytest.mark.parametrize("due", [False, True])
@every_way
def test_no_lock_is_held_while_an_error_is_looked_at(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way, due: bool
) -> None:
    breaker = registry.breaker("b", BRITTLE)
    if due:
        make_due(breaker, clock)

    class Curious(Boom):
        def __str__(self) -> str:
            in_another_thread(lambda: breaker.snapshot())
            return f"the circuit is {breaker.state}"

    def function() -> None:
        raise Curious

    with pytest.raises(Curious):
        way(breaker, function)
    trip = breaker.snapshot().last_trip
    assert trip is not None
    assert trip.detail["message"] == f"the circuit is {'half_open' if due else 'closed'}"


def test_no_lock_is_held_while_a_listener_runs(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("b", BRITTLE)
    entered, leave = threading.Event(), threading.Event()

    def listener(_: Transition) -> None:
        entered.set()
        assert leave.wait(20)

    breaker.on_transition(listener)
    make_due(breaker, clock)
    assert entered.wait(10)

    def use() -> None:
        breaker.call(lambda: None)
        assert breaker.state == "closed"
        breaker.force_open()
        breaker.on_transition(lambda _: None)
        registry.breaker("other").snapshot()

    in_another_thread(use)
    leave.set()
    registry.flush(10.0)
