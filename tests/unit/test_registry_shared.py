"""Registries that share a store: what one process does, and what the others see of it.

Each registry here stands for a process.  The store is a fake that runs the model.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    StoreUnavailable,
    Transition,
    admission,
)
from distributed_breaker.store import StoreDown
from tests.unit.clock import (
    BRITTLE,
    STURDY,
    Boom,
    FakeClock,
    boom,
    fail,
    must_not_run,
    open_and_refused,
    refused,
    succeed,
    wait_until,
)
from tests.unit.fake_store import FakeStore, Server
from tests.unit.test_breaker_threads import FORBIDDEN, CountingLock, profiled
from tests.unit.ways import Way, every_way

TIMEOUT = StoreDown("TIMEOUT", "no answer")
GONE = StoreDown("CONNECTION", "refused")


class Process:
    def __init__(self, server: Server, clock: FakeClock) -> None:
        self.store = FakeStore(server)
        self.registry = CircuitBreakerRegistry(self.store, "test", clock)  # type: ignore[arg-type]

    def breaker(self, policy: Policy | None = None, name: str = "b") -> CircuitBreaker:
        return self.registry.breaker(name, policy)

    def synced(self, policy: Policy | None = None, name: str = "b") -> CircuitBreaker:
        """A breaker that has heard of the store."""
        breaker = self.breaker(policy, name)
        breaker.first_answer.result(10)
        return breaker


@pytest.fixture
def server(clock: FakeClock) -> Server:
    return Server(clock)


@pytest.fixture
def start(server: Server, clock: FakeClock) -> Iterator[Callable[[], Process]]:
    processes: list[Process] = []

    def start() -> Process:
        processes.append(Process(server, clock))
        return processes[-1]

    yield start
    for process in processes:
        process.registry.close()


def accounts(breaker: CircuitBreaker) -> dict[str, int]:
    account = breaker.conservation()
    assert account["recorded"] == account["flushed"] + account["dropped"] + account["pending"]
    return account


def test_a_trip_is_seen_by_every_process(start: Callable[[], Process]) -> None:
    one, two = start(), start()
    mine, theirs = one.synced(BRITTLE), two.synced(BRITTLE)
    fail(mine)
    wait_until(lambda: theirs.state == "open")
    assert refused(theirs).source == "shared"
    assert mine.snapshot().generation == theirs.snapshot().generation


def test_a_fresh_process_never_calls_through_an_open_circuit(start: Callable[[], Process]) -> None:
    sick = start().synced(BRITTLE)
    fail(sick)
    wait_until(lambda: sick.snapshot().shared_state == "open")
    for _ in range(20):
        assert refused(start().breaker(BRITTLE)).state == "open"


def test_operators_act_on_every_process(start: Callable[[], Process], clock: FakeClock) -> None:
    breakers = [start().synced(BRITTLE) for _ in range(3)]
    for what, state in [
        ("force_open", "forced_open"),
        ("release", "half_open"),
        ("force_closed", "forced_closed"),
        ("reset", "closed"),
    ]:
        getattr(breakers[1], what)(actor="ann", reason="why")
        assert breakers[1].state == state
        wait_until(lambda state=state: all(b.state == state for b in breakers))  # type: ignore[misc]


def test_permits_are_exact_across_processes(start: Callable[[], Process], clock: FakeClock) -> None:
    policy = Policy(failure_threshold=1, success_threshold=3, half_open_permits=2, jitter=0.0)
    breakers = [start().synced(policy) for _ in range(4)]
    fail(breakers[0])
    wait_until(lambda: all(b.state == "open" for b in breakers))
    clock.advance(60.0)
    permits = []
    for breaker in breakers:
        with suppress(CircuitBreakerOpenException):
            permits.append(breaker.acquire())
    assert len(permits) == 2
    assert all(breaker.state == "half_open" for breaker in breakers)
    for permit in permits:
        permit.success()
    clock.advance(1.0)  # over the wait that the refused were given
    wait_until(lambda: breakers[0].snapshot().shared_state == "half_open")
    succeed(breakers[3])
    wait_until(lambda: all(b.state == "closed" for b in breakers))


def test_what_was_recorded_before_a_flush_is_in_the_store(
    start: Callable[[], Process], server: Server
) -> None:
    process = start()
    breaker = process.synced(STURDY)
    succeed(breaker, 30)
    fail(breaker, 20)
    process.registry.flush(10.0)
    assert accounts(breaker) == {"recorded": 50, "flushed": 50, "dropped": 0, "pending": 0}
    snapshot = breaker.snapshot()
    assert snapshot.fleet
    assert snapshot.window == (50, 20, 0)
    assert snapshot.totals["calls"] == 50


@pytest.mark.parametrize("carried_out", [False, True])
def test_what_was_lost_is_counted_as_dropped(
    start: Callable[[], Process], server: Server, carried_out: bool
) -> None:
    """The store has carried it out, or not: nobody knows, so it is never sent again."""
    process = start()
    breaker = process.synced(STURDY)
    succeed(breaker, 10)
    process.registry.flush(10.0)
    succeed(breaker, 10)
    process.store.lose_replies = carried_out
    process.store.fail_next = TIMEOUT
    with pytest.raises(StoreUnavailable):
        process.registry.flush(10.0)
    assert accounts(breaker) == {"recorded": 20, "flushed": 10, "dropped": 10, "pending": 0}
    succeed(breaker, 5)
    process.registry.flush(10.0)
    assert accounts(breaker) == {"recorded": 25, "flushed": 15, "dropped": 10, "pending": 0}
    totals = breaker.snapshot().totals
    assert totals["calls"] == (25 if carried_out else 15)
    assert totals["dropped"] == 10


@pytest.mark.parametrize("what", ["reset", "force_open", "force_closed", "release"])
def test_an_operators_timeout_says_that_the_outcome_is_unknown(
    start: Callable[[], Process], what: str
) -> None:
    process = start()
    breaker = process.synced(STURDY)
    process.store.failing = TIMEOUT
    with pytest.raises(StoreUnavailable, match="unknown"):
        getattr(breaker, what)(actor="ann")
    assert breaker.state == "closed"


def test_an_operators_refusal_is_not_called_unknown(start: Callable[[], Process]) -> None:
    process = start()
    breaker = process.synced(STURDY)
    process.store.failing = GONE
    with pytest.raises(StoreUnavailable) as caught:
        breaker.force_open(actor="ann")
    assert "unknown" not in str(caught.value)
    assert breaker.state == "closed"


def test_without_a_policy_the_stored_one_rules(start: Callable[[], Process]) -> None:
    start().synced(Policy(failure_threshold=2, jitter=0.0))
    breaker = start().synced()
    snapshot = breaker.snapshot()
    assert snapshot.policy is not None
    assert snapshot.policy.failure_threshold == 2
    assert snapshot.policy_mismatch is False
    fail(breaker, 2)
    assert open_and_refused(breaker).state == "open"


def test_a_lower_version_does_not_replace_a_higher_one(start: Callable[[], Process]) -> None:
    start().synced(Policy(failure_threshold=2, version=7))
    older = start().synced(Policy(failure_threshold=9, version=6))
    snapshot = older.snapshot()
    assert snapshot.policy is not None
    assert snapshot.policy.failure_threshold == 2
    assert snapshot.policy_mismatch is True
    newer = start().synced(Policy(failure_threshold=3, version=8))
    assert newer.snapshot().policy_mismatch is False
    assert older.policy.failure_threshold == 9, "what the user gave is not changed"


def test_the_registry_sees_circuits_of_other_processes(start: Callable[[], Process]) -> None:
    one, two = start(), start()
    sick = one.synced(BRITTLE, "sick")
    fail(sick)
    two.synced(BRITTLE, "well")
    one.registry.flush(10.0)
    two.registry.flush(10.0)
    snapshots = two.registry.snapshot(10.0)
    assert {name: s.state.value for name, s in snapshots.items()} == {
        "sick": "open", "well": "closed",
    }  # fmt: skip
    assert snapshots["sick"].last_trip is not None
    assert snapshots["sick"].mirror_age is None


def test_the_snapshot_tells_the_evidence_of_the_last_trip(start: Callable[[], Process]) -> None:
    breaker = start().synced(Policy(failure_threshold=3))
    succeed(breaker, 2)
    fail(breaker, 3)
    wait_until(lambda: breaker.snapshot().shared_state == "open")
    trip = breaker.snapshot().last_trip
    assert trip is not None
    assert (trip.cause, trip.window, trip.run, trip.reporters) == ("run", (5, 3, 0), 3, 1)
    assert trip.detail["error"] == "Boom"


def test_each_process_hears_a_transition_once(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    heard: dict[int, list[Transition]] = {0: [], 1: []}
    breakers = [start().synced(BRITTLE) for _ in range(2)]
    for number, breaker in enumerate(breakers):
        breaker.on_transition(heard[number].append)
    fail(breakers[0])
    wait_until(lambda: breakers[0].snapshot().source == "shared" and heard[1])
    breakers[1].reset(actor="ann")
    wait_until(lambda: all(b.state == "closed" for b in breakers))
    wait_until(lambda: all(steps and steps[-1].new == "closed" for steps in heard.values()))
    for transitions in heard.values():
        assert [t.new for t in transitions if t.source == "shared"][-2:] == ["open", "closed"]
        assert len(transitions) <= 3  # a trip may be seen first by the local machine


def test_a_process_that_alone_is_sick_is_quarantined(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    policy = Policy(failure_threshold=4, success_threshold=1, jitter=0.0, failure_rate=None)
    well, sick = start(), start()
    good, bad = well.synced(policy), sick.synced(policy)
    succeed(good)
    well.registry.flush(10.0)
    fail(bad, 4)
    sick.registry.flush(10.0)
    assert open_and_refused(bad).source == "quarantine"
    snapshot = bad.snapshot()
    assert (snapshot.state, snapshot.shared_state, snapshot.source) == (
        "open", "closed", "quarantine",
    )  # fmt: skip
    succeed(good)
    clock.advance(60.0)
    succeed(bad)  # its own probe
    assert bad.snapshot().source == "shared"


# ---------------------------------------------------------------------------- permits


def make_shared_due(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker)
    wait_until(lambda: breaker.snapshot().shared_state == "open" and refused(breaker))
    clock.advance(60.0)


def slots(server: Server) -> int:
    with server.lock:
        return len(server.circuits["b"].slots)


def test_one_acquire_is_in_flight_at_a_time(
    start: Callable[[], Process], server: Server, clock: FakeClock
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
    assert server.operations.count("acquire") == 1
    clock.advance(1.0)
    assert breaker.acquire().is_probe


def test_a_denial_is_obeyed_until_its_wait_is_over(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    """R4: nobody asks again before."""
    one, two = start().synced(BRITTLE), start().synced(BRITTLE)
    make_shared_due(one, clock)
    permit = one.acquire()
    wait_until(lambda: two.state == "half_open")
    wait = refused(two).retry_after
    assert 0.0 < wait <= 0.5
    asked = server.operations.count("acquire")
    assert asked == 2
    clock.advance(wait - 0.001)
    for _ in range(5):
        refused(two)
    assert server.operations.count("acquire") == asked
    clock.advance(0.001)
    refused(two)
    assert server.operations.count("acquire") == asked + 1
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
    start: Callable[[], Process], server: Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
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
    assert slots(server) == 1
    task.cancel()
    # Which of the two comes first is Python's affair: 3.11 gives the task its answer.
    with suppress(asyncio.CancelledError):
        (await task).ignore()
    wait_until(lambda: slots(server) == 0)


class Held:
    """A store that does not go on with the next batch of steps before it is told to."""

    def __init__(self, process: Process) -> None:
        self._store = process.store
        self._asked, self._go_on = threading.Event(), threading.Event()
        self._store.before_run = self._hold

    def _hold(self) -> None:
        self._asked.set()
        assert self._go_on.wait(20)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def wait(self) -> None:
        assert self._asked.wait(20)

    def go_on(self) -> None:
        self._store.before_run = lambda: None
        self._go_on.set()


def given_back(server: Server) -> None:
    """A permit was given, and it has come back without waiting for its lease."""
    wait_until(lambda: "acquire" in server.operations)
    wait_until(lambda: slots(server) == 0)
    assert server.circuits["b"].state == "half_open"


async def test_a_task_cancelled_while_it_asks_leaks_no_permit(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    held = Held(process)
    task = asyncio.create_task(breaker.acquire_async())
    while not held.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.go_on()
    given_back(server)
    clock.advance(1.0)
    wait_until(lambda: breaker.snapshot().shared_state == "half_open")
    assert breaker.acquire().is_probe


def test_an_acquire_given_up_just_before_its_grant_leaks_no_permit(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    held = Held(process)
    waiting = admission._admission(breaker, False)
    next(waiting)
    held.wait()
    waiting.close()
    held.go_on()
    given_back(server)


def test_an_interrupted_wait_leaks_no_permit(
    start: Callable[[], Process], server: Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C, or by a time limit that a signal handler raises."""
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    held = Held(process)

    def interrupted(*_: object) -> None:
        held.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(admission, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        breaker.acquire()
    held.go_on()
    given_back(server)
    assert caught.traceback  # a traceback that is kept keeps the frames


def test_a_grant_that_was_long_on_its_way_is_dead_on_arrival(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    """R1: its lease began when it was asked for, and somebody else may have the permit by now."""
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    process.store.before_run = lambda: clock.advance(29.0)  # of 30, which leaves no margin
    refused(breaker)
    process.store.before_run = lambda: None
    given_back(server)


def test_a_grant_within_its_margin_is_used(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    process.store.before_run = lambda: clock.advance(28.0)
    permit = breaker.acquire()
    process.store.before_run = lambda: None
    assert permit.is_probe
    permit.success()
    wait_until(lambda: breaker.state == "closed")


def test_where_the_store_goes_away_while_asked_the_shadow_decides(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    process.store.failing = GONE
    with suppress(CircuitBreakerOpenException):
        breaker.acquire()
    wait_until(lambda: breaker.degraded)
    assert breaker.snapshot().source == "shadow"
    clock.advance(15.0)  # at most a quarter of the interval, by which probes are spread
    assert breaker.acquire().is_probe


def test_a_settle_that_fails_is_sent_until_the_lease_ends(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    """R5; then it is given up and counted as dropped."""
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
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


def test_a_settle_that_arrives_late_still_closes(
    start: Callable[[], Process], server: Server, clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    make_shared_due(breaker, clock)
    permit = breaker.acquire()
    process.store.failing = GONE
    permit.success()
    wait_until(lambda: breaker.degraded)
    process.store.failing = None

    def closed() -> bool:
        clock.advance(0.5)
        process.registry._link._wake.set()  # type: ignore[union-attr]
        return server.circuits["b"].state == "closed"

    wait_until(closed)
    wait_until(lambda: breaker.state == "closed")


# ---------------------------------------------------------------------------- health checks


class Check:
    def __init__(self) -> None:
        self.well = True
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if not self.well:
            raise Boom


def idle(process: Process) -> bool:
    """No check is running."""
    check = process.breaker().check
    return check is not None and check.free(0)


def test_a_health_check_closes_a_circuit_without_traffic(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    check = Check()
    assert breaker.health_check(check) is check
    process.registry.flush(10.0)
    wait_until(lambda: check.calls == 1 and idle(process))
    process.registry.flush(10.0)
    make_shared_due(breaker, clock)
    assert refused(breaker).state == "open", "no user's request is sacrificed as a probe"
    process.registry.flush(10.0)
    wait_until(lambda: breaker.state == "closed")
    assert check.calls == 2


def test_a_health_check_that_fails_opens_again(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    check = Check()
    breaker.health_check(check)
    process.registry.flush(10.0)
    wait_until(lambda: check.calls == 1 and idle(process))
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


# ---------------------------------------------------------------------------- the fast paths


@every_way
def test_a_shared_closed_call_takes_no_lock_and_does_no_io(
    start: Callable[[], Process], server: Server, way: Way
) -> None:
    process = start()
    breaker = process.synced(STURDY)
    way(breaker, lambda: None)
    wait_until(lambda: server.subscriptions)
    lock = CountingLock(breaker._lock)
    breaker._lock = lock  # type: ignore[assignment]
    with profiled() as calls:
        for _ in range(100):
            way(breaker, lambda: None)
    assert lock.taken == 0
    assert not FORBIDDEN & set(calls)
    process.registry.flush(10.0)
    assert accounts(breaker)["flushed"] == 101


@every_way
def test_a_shared_rejection_takes_no_lock_and_does_no_io(
    start: Callable[[], Process], server: Server, way: Way
) -> None:
    process = start()
    breaker = process.synced(BRITTLE)
    breaker.force_open(actor="me")
    refused(breaker)
    commands = server.commands
    with profiled() as calls:
        for _ in range(100):
            with pytest.raises(CircuitBreakerOpenException):
                way(breaker, must_not_run)
    del calls["__enter__"], calls["__exit__"]
    assert not FORBIDDEN & set(calls)
    assert server.commands - commands < 5  # of the link's own, not 100


def test_failures_of_the_store_never_reach_a_call(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    process = start()
    breaker = process.synced(Policy(failure_threshold=2, success_threshold=1, jitter=0.0))
    for failing in (TIMEOUT, GONE, StoreDown("NOPERM", "no right"), StoreDown("OOM", "full")):
        process.store.failing = failing
        succeed(breaker)
        with pytest.raises(Boom):
            breaker.call(boom)
        succeed(breaker)
    fail(breaker, 2)
    assert open_and_refused(breaker).state == "open"


def test_close_reports_what_was_recorded(start: Callable[[], Process], server: Server) -> None:
    process = start()
    breaker = process.synced(STURDY)
    succeed(breaker, 7)
    process.registry.close()
    assert server.circuits["b"].totals[0] == 7
    assert accounts(breaker)["flushed"] == 7
    succeed(breaker)
    assert accounts(breaker)["recorded"] == 8
