"""What threads may rely on: no lock and no I/O on the fast paths, none while users' code runs,
and no outcome lost, however many threads there are."""

from __future__ import annotations

import builtins
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    Transition,
)
from tests.unit.clock import BRITTLE, STURDY, Boom, FakeClock, boom, fail, make_due, must_not_run
from tests.unit.ways import Way, by_call, by_decorator, every_way

ROOT = Path(__file__).parents[2]


class CountingLock:
    """Counts how often the thread that made it takes a lock, or even tries to.

    It stands before the lock that it replaces, which another thread may hold at that moment.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._owner = threading.get_ident()
        self.taken = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if threading.get_ident() == self._owner:
            self.taken += 1
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


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


@contextmanager
def profiled() -> Iterator[Counter[str]]:
    """Counts the calls of C functions by name, as far as the interpreter tells."""
    calls: Counter[str] = Counter()

    def note(_: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            calls[argument.__name__] += 1

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


FORBIDDEN = {
    "acquire", "acquire_lock", "__enter__", "release", "release_lock", "sendall", "recv",
    "recv_into", "connect", "select", "poll", "open", "read", "write", "sleep", "wait", "put",
    "start_new_thread", "fork", "urandom", "getpid", "gethostname",
}  # fmt: skip


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
