"""No outcome is lost, however many threads there are, and none of ours is started needlessly."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    Transition,
)
from tests.unit.clock import BRITTLE, STURDY, Boom, FakeClock, boom, fail, make_due, must_not_run
from tests.unit.ways import Way, every_way

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------- exact counts


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads take turns all the time, so that whatever can go wrong between two steps does."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(work: Callable[[int], object], threads: int) -> list[Any]:
    """Do work in so many threads that begin at the same moment."""
    barrier = threading.Barrier(threads)

    def begin(number: int) -> object:
        barrier.wait(20)
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begin, range(threads)))


@every_way
def test_many_threads_lose_no_outcome(
    registry: CircuitBreakerRegistry, busy: None, way: Way
) -> None:
    breaker = registry.breaker("b", STURDY)
    threads, calls = 6, 150

    def work(number: int) -> None:
        for i in range(calls):
            with suppress(Boom):
                way(breaker, boom if (number + i) % 3 == 0 else int)

    together(work, threads)
    snapshot = breaker.snapshot()
    assert snapshot.window == (threads * calls, threads * calls // 3, 0)
    assert snapshot.totals["calls"] == threads * calls
    assert snapshot.totals["failures"] == threads * calls // 3
    assert snapshot.local["recorded"] == snapshot.local["flushed"] == threads * calls


def test_threads_that_look_and_flush_meanwhile_lose_no_outcome(
    registry: CircuitBreakerRegistry, busy: None
) -> None:
    breaker = registry.breaker("b", STURDY)
    protected = breaker(int)

    def work(number: int) -> None:
        for i in range(400):
            if number < 4:
                protected()
            elif number < 6:
                with suppress(Boom):
                    breaker.call(boom)
            else:
                (breaker.snapshot, registry.flush, breaker.conservation)[i % 3]()

    together(work, 8)
    assert breaker.snapshot().window == (2400, 800, 0)
    assert breaker.conservation() == {
        "recorded": 2400, "flushed": 2400, "dropped": 0, "pending": 0,
    }  # fmt: skip


def test_no_outcome_is_lost_while_generations_change(
    registry: CircuitBreakerRegistry, busy: None
) -> None:
    """Whatever was admitted is counted, for its own generation or as late."""
    breaker = registry.breaker("b", Policy(failure_threshold=3, quorum=1))
    protected = breaker(int)
    done = threading.Event()
    admitted = [0] * 6
    rejected = [0] * 6

    def work(number: int) -> None:
        if number == 6:
            while not done.is_set():
                breaker.reset()
                breaker.force_open()
                breaker.release()
                breaker.force_closed()
            return
        try:
            for i in range(600):
                try:
                    if i % 3:
                        protected()
                    else:
                        breaker.call(boom)
                except CircuitBreakerOpenException:
                    rejected[number] += 1
                    continue
                except Boom:
                    pass
                admitted[number] += 1
        finally:
            if number == 0:
                done.set()

    together(work, 7)
    snapshot = breaker.snapshot()
    assert sum(admitted) + sum(rejected) == 3600
    assert snapshot.totals["calls"] == sum(admitted)
    assert snapshot.totals["rejected"] == sum(rejected)
    assert snapshot.local["recorded"] == snapshot.local["flushed"] == sum(admitted)
    # The eras of old generations are not kept once nobody can append to them any more.
    assert len(breaker._retired) <= 1


def test_half_open_admits_only_so_many_threads(
    registry: CircuitBreakerRegistry, clock: FakeClock, busy: None
) -> None:
    breaker = registry.breaker(
        "b", Policy(failure_threshold=1, success_threshold=5, half_open_permits=2, jitter=0.0)
    )
    make_due(breaker, clock)
    all_answered = threading.Barrier(16)
    running = 0

    def probe() -> None:
        nonlocal running
        running += 1
        all_answered.wait(20)

    def work(_: int) -> str:
        try:
            breaker.call(probe)
        except CircuitBreakerOpenException:
            all_answered.wait(20)
            return "refused"
        return "probed"

    results = Counter(together(work, 16))
    assert running == 2
    assert results == {"probed": 2, "refused": 14}
    assert breaker.state == "half_open"


def test_only_one_of_many_settles_of_a_permit_counts(
    registry: CircuitBreakerRegistry, clock: FakeClock, busy: None
) -> None:
    breaker = registry.breaker("b", STURDY)
    for _ in range(50):
        permit = breaker.acquire()
        together(lambda number, permit=permit: permit.success(), 4)
    assert breaker.snapshot().totals["calls"] == 50


def test_many_threads_trip_a_circuit_once(registry: CircuitBreakerRegistry, busy: None) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=50))
    heard: list[Transition] = []
    breaker.on_transition(heard.append)

    def work(_: int) -> None:
        for _ in range(100):
            with suppress(Boom, CircuitBreakerOpenException):
                breaker.call(boom)

    together(work, 8)
    registry.flush(10.0)
    assert [(t.old, t.new) for t in heard] == [("closed", "open")]
    totals = breaker.snapshot().totals
    assert totals["trips"] == 1
    assert totals["calls"] + totals["rejected"] == 800


def test_a_failure_left_to_whom_has_the_lock_trips_the_circuit(
    registry: CircuitBreakerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call fails just after another thread has drained and just before it releases the lock:
    no later call may be needed to notice that the circuit must be open."""
    breaker = registry.breaker("b", BRITTLE)
    original = breaker._shadow.decide
    failed: list[bool] = []

    def decide(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            fail(breaker)  # its try at the lock is in vain, since this thread holds it
        return original(*args, **kwargs)

    monkeypatch.setattr(breaker._shadow, "decide", decide)
    breaker.drain()
    monkeypatch.undo()
    assert failed
    with pytest.raises(CircuitBreakerOpenException):
        breaker.call(must_not_run)


# ---------------------------------------------------------------------------- threads of our own


def test_memory_starts_no_thread_without_listeners(
    registry: CircuitBreakerRegistry, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name))
    breaker = registry.breaker("b", BRITTLE)
    make_due(breaker, clock)
    breaker.call(int)
    breaker.force_open()
    breaker.release()
    breaker.reset()
    breaker.snapshot()
    registry.snapshot()
    registry.flush()
    registry.close()
    assert started == []


def test_importing_starts_nothing() -> None:
    """No thread, no connection, no signal handler; and nothing heavy is imported."""
    code = """
        import signal, sys, threading
        before = {s: signal.getsignal(s) for s in signal.valid_signals()}
        import distributed_breaker
        registry = distributed_breaker.CircuitBreakerRegistry.from_url("redis://127.0.0.1:1/0")
        assert threading.active_count() == 1, threading.enumerate()
        assert before == {s: signal.getsignal(s) for s in signal.valid_signals()}
        heavy = {"pydantic", "sqlalchemy", "requests", "httpx", "torch", "flask", "celery", "typer"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    in_a_fresh_process(code)


def in_a_fresh_process(code: str, timeout: float = 60.0) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_forked_child_does_not_inherit_a_taken_lock() -> None:
    """Another thread may hold it at the moment of the fork; in the child nobody frees it."""
    code = """
        import os, signal, warnings
        from distributed_breaker import CircuitBreakerRegistry, Policy

        warnings.simplefilter("ignore")
        registry = CircuitBreakerRegistry.from_url("memory://")
        breaker = registry.breaker("b", Policy(failure_threshold=2))
        breaker.on_transition(lambda transition: None)
        with breaker._lock, registry._lock, registry._dispatcher._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(5)
                for _ in range(2):
                    try:
                        breaker.call(int, "not a number")
                    except ValueError:
                        pass
                assert breaker.state == "open"
                registry.breaker("new")
                registry.flush()
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    """
    in_a_fresh_process(code)
