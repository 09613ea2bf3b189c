"""Permits of a shared circuit: exact, leased, never leaked; and health checks as probes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    Policy,
    StoreUnavailable,
    admission,
    model,
)
from tests.unit.clock import BRITTLE, Boom, FakeClock, refused, succeed, wait_until
from tests.unit.fake_store import GONE, Process, Server, accounts, make_shared_due

# ---------------------------------------------------------------------------- permits


def slots(fake_server: Server) -> int:
    with fake_server.lock:
        return len(fake_server.circuits["b"].slots)


def due(start: Callable[[], Process], clock: FakeClock) -> tuple[Process, CircuitBreaker]:
    """A process, and its breaker of a shared circuit whose open interval is over."""
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    return process, breaker


def test_one_acquire_is_in_flight_at_a_time(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    """R3: the others are refused meanwhile, without a wait, though more permits are free."""
    process = start()
    breaker = process.synced(Policy(failure_threshold=1, success_threshold=3, jitter=0.0))
    make_shared_due(breaker, clock)
    held = Held(process)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(breaker.acquire)
        held.wait()
        for _ in range(5):
            refused(breaker)
        held.go_on()
        assert asking.result(10).is_probe
    assert fake_server.operations.count("acquire") == 1
    clock.advance(1.0)
    assert breaker.acquire().is_probe


def test_a_denial_is_obeyed_until_its_wait_is_over(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    """R4: nobody asks again before."""
    one, two = start().synced(BRITTLE), start().synced(BRITTLE)
    make_shared_due(one, clock)
    permit = one.acquire()
    wait_until(lambda: two.state == "half_open")
    wait = refused(two).retry_after
    assert 0.0 < wait <= 0.5
    asked = fake_server.operations.count("acquire")
    assert asked == 2
    clock.advance(wait - 0.001)
    for _ in range(5):
        refused(two)
    assert fake_server.operations.count("acquire") == asked
    clock.advance(0.001)
    refused(two)
    assert fake_server.operations.count("acquire") == asked + 1
    permit.success()
    wait_until(lambda: two.state == "closed")


class LastMoment(Future[str]):
    """The answer comes just when the waiter has run out of patience."""

    def result(self, timeout: float | None = None) -> str:
        if not self.done():
            self.set_result("granted")
            raise FutureTimeout
        return super().result(timeout)


def test_an_answer_at_the_last_moment_is_taken() -> None:
    """It can no longer be cancelled, so the permit that it brings would leak."""
    assert admission.wait(LastMoment(), True) == "granted"


async def test_a_task_cancelled_as_its_grant_arrives_leaks_no_permit(
    start: Callable[[], Process],
    fake_server: Server,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, breaker = due(start, clock)
    futures: list[Future[Any]] = []
    submit = process.registry._link.submit  # type: ignore[union-attr]

    def watch(request: Any) -> Future[Any]:
        future = submit(request)
        if request.kind == "acquire":
            futures.append(future)
        return future

    monkeypatch.setattr(process.registry._link, "submit", watch)
    task = asyncio.create_task(breaker.acquire_async())
    while not futures:
        await asyncio.sleep(0)
    wait_until(futures[0].done)  # the event loop has not heard of it, since it is busy here
    assert slots(fake_server) == 1
    task.cancel()
    # Which of the two comes first is Python's affair: 3.11 gives the task its answer.
    with suppress(asyncio.CancelledError):
        (await task).ignore()
    wait_until(lambda: slots(fake_server) == 0)


class Held:
    """A store that does not go on with an acquire before it is told to."""

    def __init__(self, process: Process) -> None:
        self._store = process.store
        self._asked, self._go_on = threading.Event(), threading.Event()
        self._store.before_acquire = self._hold

    def _hold(self) -> None:
        self._asked.set()
        assert self._go_on.wait(20)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def wait(self) -> None:
        assert self._asked.wait(20)

    def go_on(self) -> None:
        self._store.before_acquire = lambda: None
        self._go_on.set()


def given_back(fake_server: Server) -> None:
    """A permit was given, and it has come back without waiting for its lease."""
    wait_until(lambda: "acquire" in fake_server.operations)
    wait_until(lambda: slots(fake_server) == 0)
    assert fake_server.circuits["b"].state == "half_open"


async def test_a_task_cancelled_while_it_asks_leaks_no_permit(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    process, breaker = due(start, clock)
    held = Held(process)
    task = asyncio.create_task(breaker.acquire_async())
    while not held.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.go_on()
    given_back(fake_server)
    clock.advance(1.0)
    wait_until(lambda: breaker.snapshot().shared_state == "half_open")
    assert breaker.acquire().is_probe


def test_an_acquire_given_up_just_before_its_grant_leaks_no_permit(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    process, breaker = due(start, clock)
    held = Held(process)
    waiting = admission._admission(breaker, False)
    next(waiting)
    held.wait()
    waiting.close()
    held.go_on()
    given_back(fake_server)


def test_an_interrupted_wait_leaks_no_permit(
    start: Callable[[], Process],
    fake_server: Server,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by Ctrl-C, or by a time limit that a signal handler raises."""
    process, breaker = due(start, clock)
    held = Held(process)

    def interrupted(*_: object) -> None:
        held.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(admission, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        breaker.acquire()
    held.go_on()
    given_back(fake_server)
    assert caught.traceback  # a traceback that is kept keeps the frames


def test_a_grant_that_was_long_on_its_way_is_dead_on_arrival(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    """R1: its lease began when it was asked for, and somebody else may have the permit by now."""
    process, breaker = due(start, clock)
    process.store.before_acquire = lambda: clock.advance(29.0)  # of 30, which leaves no margin
    refused(breaker)
    process.store.before_acquire = lambda: None
    given_back(fake_server)


def test_a_grant_within_its_margin_is_used(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    process, breaker = due(start, clock)
    process.store.before_acquire = lambda: clock.advance(28.0)
    permit = breaker.acquire()
    process.store.before_acquire = lambda: None
    assert permit.is_probe
    permit.success()
    wait_until(lambda: breaker.state == "closed")


def test_where_the_store_goes_away_while_asked_the_shadow_decides(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process, breaker = due(start, clock)
    process.store.failing = GONE
    with suppress(CircuitBreakerOpenException):
        breaker.acquire()
    wait_until(lambda: breaker.degraded)
    assert breaker.snapshot().source == "shadow"
    clock.advance(15.0)  # at most a quarter of the interval, by which probes are spread
    assert breaker.acquire().is_probe


def test_a_settle_that_fails_is_sent_until_the_lease_ends(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    """R5; then it is given up and counted as dropped."""
    process, breaker = due(start, clock)
    permit = breaker.acquire()
    process.registry.flush(10.0)
    before = accounts(breaker)
    process.store.failing = GONE
    permit.success()
    with pytest.raises(StoreUnavailable):
        process.registry.flush(10.0)
    assert accounts(breaker) == before | {"recorded": before["recorded"] + 1, "pending": 1}

    def gone() -> bool:
        clock.advance(5.0)
        with suppress(StoreUnavailable):
            process.registry.flush(0.1)
        return accounts(breaker)["pending"] == 0

    wait_until(gone)
    assert accounts(breaker)["dropped"] == before["dropped"] + 1


def test_a_childs_copy_of_a_probe_ends_without_its_parents_permit(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    """C2: the parent, whose permit it is, may still be calling; the child's outcome is late."""
    process, breaker = due(start, clock)
    permit = breaker.acquire()
    breaker.forked("child")
    permit.success()
    process.registry.flush(10)
    assert slots(fake_server) == 1
    assert "settle" not in fake_server.operations
    late = model.TOTALS.index("late")
    assert fake_server.circuits["b"].totals[late] == 1
    assert accounts(breaker) == {"recorded": 1, "flushed": 1, "dropped": 0, "pending": 0}


def test_a_settle_that_arrives_late_still_closes(
    start: Callable[[], Process], fake_server: Server, clock: FakeClock
) -> None:
    process, breaker = due(start, clock)
    permit = breaker.acquire()
    process.store.failing = GONE
    permit.success()
    wait_until(lambda: breaker.degraded)
    process.store.failing = None

    def closed() -> bool:
        clock.advance(0.5)
        process.registry._link._wake.set()  # type: ignore[union-attr]
        return fake_server.circuits["b"].state == "closed"

    wait_until(closed)
    wait_until(lambda: breaker.state == "closed")


# ---------------------------------------------------------------------------- health checks


class Check:
    def __init__(self) -> None:
        self.well = True
        self.calls = 0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self) -> None:
        self.calls += 1
        self.goes_on.wait(30)
        if not self.well:
            raise Boom


def idle(process: Process) -> bool:
    """No check is running."""
    check = process.breaker().check
    return check is not None and check.free(0)


def checked(start: Callable[[], Process]) -> tuple[Process, CircuitBreaker, Check]:
    """A breaker whose health check has passed while closed, so that it is the probe."""
    process = start()
    breaker = process.synced(BRITTLE)
    check = Check()
    assert breaker.health_check(check) is check
    process.registry.flush(10.0)
    wait_until(lambda: check.calls == 1 and idle(process))
    return process, breaker, check


def test_a_health_check_closes_a_circuit_without_traffic(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process, breaker, check = checked(start)
    process.registry.flush(10.0)
    make_shared_due(breaker, clock)
    assert refused(breaker).state == "open", "no user's request is sacrificed as a probe"
    process.registry.flush(10.0)
    wait_until(lambda: breaker.state == "closed")
    assert check.calls == 2


def test_a_health_check_looks_again_while_closed(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    check = Check()
    breaker.health_check(check, interval=30)
    for number, well in enumerate((True, False, True), start=1):
        check.well = well
        process.registry.flush(10.0)
        wait_until(lambda number=number: check.calls == number and idle(process))  # type: ignore[misc]
        clock.advance(29)
        process.registry.flush(10.0)
        assert idle(process)
        assert check.calls == number
        clock.advance(1)
    assert breaker.state == "closed", "it is no call"
    assert breaker.check is not None
    assert breaker.check.passed, "what has passed once is the probe"


def test_a_health_check_that_fails_opens_again(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process, breaker, check = checked(start)
    generation = breaker.snapshot().generation
    make_shared_due(breaker, clock)
    check.well = False
    process.registry.flush(10.0)
    wait_until(lambda: check.calls == 2 and idle(process))
    wait_until(lambda: breaker.snapshot().generation >= generation + 3)
    assert refused(breaker).retry_after > 50.0


def test_a_health_check_that_never_passed_is_not_the_probe(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    check = Check()
    check.well = False
    breaker.health_check(check)
    process.registry.flush(10.0)
    wait_until(lambda: check.calls == 1 and idle(process))
    make_shared_due(breaker, clock)
    succeed(breaker)  # a call is
    wait_until(lambda: breaker.state == "closed")


def test_a_health_check_that_hangs_lets_calls_probe(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    """Found by simulation: nobody but the check might probe, and it never came back."""
    process, breaker, check = checked(start)
    make_shared_due(breaker, clock)
    check.goes_on.clear()
    process.registry.flush(10.0)
    wait_until(lambda: check.calls == 2)
    assert refused(breaker).state in ("open", "half_open")
    clock.advance(BRITTLE.permit_lease + 1)
    process.registry.flush(10.0)

    def admitted() -> bool:
        try:
            return breaker.call(lambda: True)
        except CircuitBreakerOpenException:
            clock.advance(0.1)
            return False

    wait_until(admitted)
    wait_until(lambda: breaker.state == "closed")
    check.goes_on.set()
    wait_until(lambda: idle(process))
