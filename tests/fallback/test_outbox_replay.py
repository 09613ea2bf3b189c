"""What an outbox promises to those who deliver: order, attempts, backoff, leases."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.fallback import outbox as module
from distributed_breaker.fallback import outbox_lease
from distributed_breaker.fallback.outbox import (
    Entry,
    Outbox,
    Replayed,
)
from tests.fallback.outboxes import (
    LEASE,
    Make,
    delivered,
    fill,
    ids,
    interrupt,
    park,
)
from tests.unit.clock import Boom, FakeClock, boom, must_not_run

# ---------------------------------------------------------------------------- failures


def test_a_failure_ends_the_replay_and_keeps_the_order(outbox: Outbox, clock: FakeClock) -> None:
    first, second, third = fill(outbox)
    seen: list[int] = []

    def deliver(entry: Entry) -> None:
        seen.append(entry.id)
        if entry.id == second:
            raise Boom("down")

    assert outbox.replay("t", deliver) == Replayed(1, 0, 2, False, "Boom: down", 0.5)
    assert seen == [first, second]
    (entry, _) = outbox.entries()
    assert (entry.id, entry.attempts, entry.error) == (second, 1, "Boom: down")
    clock.advance(0.5)
    assert delivered(outbox) == [second, third]


def test_backoff_doubles_for_all_processes_and_ends_with_a_success(
    outbox: Outbox, make: Make, clock: FakeClock
) -> None:
    first, second, third = fill(outbox)
    other = make(backoff_max=3.0)
    for wait, box in ((0.5, outbox), (1.0, other), (2.0, outbox), (3.0, other)):
        assert box.replay("t", boom).wait == wait
        clock.advance(wait - 0.25)
        left_alone = make(backoff_max=3.0).replay("t", must_not_run)
        assert left_alone == (0, 0, 3, False, "Boom: the dependency is down", 0.25)
        clock.advance(0.25)
    assert delivered(other, limit=1) == [first]
    assert other.replay("t", boom).wait == 0.5
    assert outbox.stats()["topics"]["t"]["waiting"] == 2
    clock.advance(0.5)
    assert delivered(outbox) == [second, third]


def test_chance_shortens_the_backoff(make: Make) -> None:
    outbox = make(chance=lambda: 0.5, backoff=8.0)
    fill(outbox)
    assert outbox.replay("t", boom).wait == 6.0


def test_a_backoff_from_a_clock_that_was_ahead_is_void(outbox: Outbox, clock: FakeClock) -> None:
    expected = fill(outbox)
    outbox.replay("t", boom)
    clock.advance(-100.0)
    assert delivered(outbox) == expected


def test_a_last_attempt_parks(
    make: Make, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = make(attempts=2)
    first, second, third = fill(outbox)
    assert outbox.replay("t", boom).parked == 0
    assert not caplog.records
    clock.advance(60)
    assert outbox.replay("t", boom)[:3] == (0, 1, 2)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    clock.advance(60)
    assert delivered(outbox) == [second, third]
    (entry,) = outbox.entries(parked=True)
    assert (entry.id, entry.attempts, entry.parked) == (first, 2, True)


def test_a_refusal_of_a_circuit_is_held_against_nobody(outbox: Outbox, clock: FakeClock) -> None:
    expected = fill(outbox, 1)

    def refuse(entry: Entry) -> NoReturn:
        raise CircuitBreakerOpenException("c", retry_after=7.0)

    for _ in range(25):
        assert outbox.replay("t", refuse).wait == 7.0
        clock.advance(7.0)
    assert outbox.entries()[0].attempts == 0
    assert outbox.replay("t", boom).wait == 0.5
    clock.advance(0.5)
    assert delivered(outbox) == expected


def test_an_error_that_has_no_text_is_stored(outbox: Outbox) -> None:
    class Mute(Exception):
        def __str__(self) -> NoReturn:
            raise RuntimeError

    def mute(entry: Entry) -> NoReturn:
        raise Mute

    fill(outbox, 1)
    assert outbox.replay("t", mute).error == "Mute"
    assert outbox.entries()[0].error == "Mute"


@pytest.mark.parametrize("text", ["\ud800" * 10, "x" * 10_000])
def test_an_error_of_any_text_is_stored(outbox: Outbox, text: str) -> None:
    def fail(entry: Entry) -> NoReturn:
        raise Boom(text)

    fill(outbox, 1)
    assert outbox.replay("t", fail).error == outbox.entries()[0].error
    assert outbox.entries()[0].error.startswith("Boom: ")


def test_an_interruption_loses_nothing_and_holds_nobody_up(outbox: Outbox, make: Make) -> None:
    expected = fill(outbox)
    with pytest.raises(KeyboardInterrupt):
        outbox.replay("t", interrupt)
    assert [entry.attempts for entry in outbox.entries()] == [0, 0, 0]
    assert delivered(make()) == expected


def test_a_coroutine_function_delivers_nothing(outbox: Outbox) -> None:
    async def deliver(entry: Entry) -> None: ...

    expected = fill(outbox)
    with pytest.raises(TypeError, match="nobody awaits it"):
        outbox.replay("t", deliver)
    assert delivered(outbox) == expected


# ---------------------------------------------------------------------------- parked ones


def test_parked_ones_are_passed_over(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    expected = fill(outbox)

    def deliver(entry: Entry) -> None:
        if entry.id != expected[1]:
            park(entry)

    assert outbox.replay("t", deliver) == Replayed(1, 2, 0, False, "", 0.0)
    assert outbox.waiting() == 0
    assert [entry.error for entry in outbox.entries()] == ["Parked: no such account"] * 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_retried_ones_wait_in_their_old_places(outbox: Outbox) -> None:
    first, second = fill(outbox, 2)
    outbox.replay("t", park)
    third, fourth = fill(outbox, 2)
    assert outbox.retry([second, third, 99]) == 1
    assert outbox.entries(parked=False)[0].attempts == 0
    assert outbox.retry(topic="u") == 0
    assert outbox.retry() == 1
    assert delivered(outbox) == [first, second, third, fourth]


def test_one_that_is_retried_during_a_replay_is_next(outbox: Outbox) -> None:
    first, second, third = fill(outbox)
    outbox.replay("t", park, limit=1)
    seen: list[int] = []

    def deliver(entry: Entry) -> None:
        seen.append(entry.id)
        outbox.retry()

    outbox.replay("t", deliver)
    assert seen == [second, first, third]


def test_purge_deletes_what_it_is_told(outbox: Outbox) -> None:
    first, second, third, fourth = fill(outbox, 4)
    other = fill(outbox, 2, "u")
    outbox.replay("t", park, limit=2)
    with pytest.raises(ValueError, match="all topics"):
        outbox.purge()
    assert outbox.purge([first, third], parked_only=True) == 1
    assert outbox.purge([fourth, *other], topic="t") == 1
    assert ids(outbox) == [second, third, *other]
    assert outbox.purge(parked_only=True) == 1
    assert outbox.purge(topic="u") == 2
    assert list(outbox.stats()["topics"]) == ["t"]
    assert delivered(outbox) == [third]


def test_one_that_is_purged_while_it_is_delivered_is_gone(outbox: Outbox) -> None:
    fill(outbox, 2)

    def deliver(entry: Entry) -> NoReturn:
        outbox.purge([entry.id])
        boom()

    assert outbox.replay("t", deliver)[:3] == (0, 0, 1)


# ---------------------------------------------------------------------------- leases


def test_one_at_a_time_delivers_a_topic(outbox: Outbox, make: Make) -> None:
    """Another process, and another thread or an inner call of the same one."""
    fill(outbox, 1)
    fill(outbox, 1, "u")
    other = make()
    inner: list[Replayed] = []

    def deliver(entry: Entry) -> None:
        inner.extend(box.replay("t", must_not_run) for box in (other, outbox))
        inner.append(other.replay("u", lambda entry: None))

    assert outbox.replay("t", deliver).delivered == 1
    assert inner == [Replayed(0, 0, 1, True, "", 0.0)] * 2 + [Replayed(1, 0, 0, False, "", 0.0)]
    fill(outbox, 1)
    assert len(delivered(other)) == 1


def test_a_lease_that_has_run_out_is_taken_over(
    outbox: Outbox, make: Make, clock: FakeClock
) -> None:
    """Its holder was only frozen: when it goes on, it has nothing to say any more."""
    first, second = fill(outbox, 2)
    other = make()
    seen: list[Entry] = []
    inner: list[Replayed] = []

    def fail(entry: Entry) -> NoReturn:
        seen.append(entry)
        boom()

    def deliver(entry: Entry) -> None:
        for seconds in (LEASE - 0.001, 0.001):
            clock.advance(seconds)
            inner.append(other.replay("t", fail))

    assert outbox.replay("t", deliver)[:4] == (0, 0, 2, True)
    assert [outcome.busy for outcome in inner] == [True, False]
    assert [(entry.id, entry.attempts) for entry in seen] == [(first, 1)]
    assert "within its lease" in seen[0].error
    assert [entry.attempts for entry in outbox.entries()] == [2, 0]
    clock.advance(60)
    assert delivered(other) == [first, second]


def test_a_slow_delivery_counts_when_nobody_took_over(outbox: Outbox, clock: FakeClock) -> None:
    fill(outbox)
    assert outbox.replay("t", lambda entry: clock.advance(2 * LEASE)).delivered == 3


def test_each_delivery_begins_with_a_fresh_lease(
    outbox: Outbox, make: Make, clock: FakeClock
) -> None:
    fill(outbox)
    other = make()

    def deliver(entry: Entry) -> None:
        clock.advance(LEASE - 1)
        assert other.replay("t", must_not_run).busy

    assert outbox.replay("t", deliver).delivered == 3


def test_one_frozen_between_two_deliveries_begins_no_other(
    outbox: Outbox, make: Make, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(outbox)
    other, calls = make(), []

    def attempt(deliver: Any, entry: Entry) -> Any:
        outcome = real(deliver, entry)
        monkeypatch.setattr(module, "monotonic", freeze)
        return outcome

    def freeze() -> float:
        clock.advance(LEASE + 1)
        calls.extend(delivered(other))
        return 0.0

    real = module.attempt
    monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setattr(module, "monotonic", lambda: 0.0)
    seen: list[Entry] = []
    outcome = outbox.replay("t", seen.append, seconds=60.0)
    assert outcome.busy
    assert len(seen) == 1
    assert len(calls) == 2


def test_an_entry_that_kills_each_process_is_parked_at_last(make: Make, clock: FakeClock) -> None:
    outbox = make(attempts=2)
    first, second = fill(outbox, 2)
    for _ in range(2):
        # All that is left of a process that died in a delivery.
        head = module.Lease(outbox._file, "t", outbox._rules).take().head
        assert head is not None
        assert head.id == first
        clock.advance(LEASE)
    assert delivered(outbox) == [second]
    assert ids(outbox, parked=True) == [first]


def test_a_lease_from_a_clock_that_was_ahead_is_void(
    outbox: Outbox, make: Make, clock: FakeClock
) -> None:
    expected = fill(outbox, 1)
    other = make()
    taken: list[list[int]] = []

    def deliver(entry: Entry) -> None:
        for seconds in (1.0, LEASE):  # A small step parts nobody from a lease.
            clock.advance(-seconds)
            taken.append(delivered(other))

    assert outbox.replay("t", deliver).busy
    assert taken == [[], expected]


def test_a_lease_is_as_long_as_its_holder_said(make: Make, clock: FakeClock) -> None:
    long, short = make(lease=10 * LEASE), make(lease=LEASE / 10)
    fill(long, 1)

    def deliver(entry: Entry) -> None:
        clock.advance(9 * LEASE)
        assert short.replay("t", must_not_run).busy

    assert long.replay("t", deliver).delivered == 1


# ---------------------------------------------------------------------------- bounds of a replay


def test_a_replay_makes_so_many_deliveries(outbox: Outbox) -> None:
    expected = fill(outbox, 4)
    seen: list[Entry] = []
    assert outbox.replay("t", seen.append, limit=3) == Replayed(3, 0, 1, False, "", 0.0)
    assert delivered(outbox) == expected[3:]


def test_a_replay_lasts_so_long(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(outbox, 4)
    ticks = FakeClock()
    monkeypatch.setattr(module, "monotonic", ticks)
    outcome = outbox.replay("t", lambda entry: ticks.advance(1.0), seconds=2.0)
    assert (outcome.delivered, outcome.left) == (2, 2)


@pytest.mark.parametrize("options", [{"limit": 0}, {"seconds": -1.0}, {"seconds": float("nan")}])
def test_bounds_of_no_use_are_refused(outbox: Outbox, options: dict[str, Any]) -> None:
    fill(outbox, 1)
    with pytest.raises(ValueError, match=next(iter(options))):
        outbox.replay("t", must_not_run, **options)


@pytest.mark.parametrize(
    ("most", "longest", "expected"),
    [
        (3, 1e9, [False, False, True, False, False, True, False, True]),
        (100, 0.0, [True] * 8),
        (100, 1e9, [False] * 7 + [True]),
    ],
)
def test_few_deletions_can_be_undone_by_a_power_loss(
    outbox: Outbox,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    longest: float,
    expected: list[bool],
) -> None:
    """Those that are not synced yet: a bounded number, for a bounded time, none at the end."""
    monkeypatch.setattr(outbox_lease, "MOST_UNSYNCED", most)
    monkeypatch.setattr(outbox_lease, "LONGEST_UNSYNCED", longest)
    fill(outbox, 7)
    synced = written(outbox, monkeypatch)
    assert outbox.replay("t", lambda entry: None).delivered == 7
    assert synced == [True, *expected]  # the lease is taken first and given back last


@pytest.mark.parametrize("fail", [boom, park])
def test_how_a_delivery_failed_is_synced(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, fail: Callable[[Entry], NoReturn]
) -> None:
    fill(outbox, 1)
    synced = written(outbox, monkeypatch)
    outbox.replay("t", fail)
    assert synced == [True] * 3


def written(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each transaction from now on, whether it is synced."""
    synced: list[bool] = []
    write = outbox._file.write

    def watched(work: Any, *, mend: bool = False, sync: bool = True) -> Any:
        synced.append(sync)
        return write(work, mend=mend, sync=sync)

    monkeypatch.setattr(outbox._file, "write", watched)
    return synced


def test_a_delivery_may_use_the_outbox(outbox: Outbox) -> None:
    fill(outbox, 1)

    def deliver(entry: Entry) -> None:
        if entry.kind == "k":
            assert outbox.waiting("t") == 1
            outbox.add("t", "more", None)

    assert outbox.replay("t", deliver).delivered == 2
