"""What a shadow reports: every outcome once, in order, within the bounds of the script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_breaker import model
from distributed_breaker.model import Run, Step
from distributed_breaker.shadow import (
    MAX_COUNT,
    MAX_PENDING,
    NO_GENERATION,
    Bad,
    Era,
    Item,
    durations,
)
from tests.unit.shadows import (
    CURRENT,
    NOW,
    OPEN,
    POLICY,
    SECOND,
    STATES,
    STORE,
    Process,
    degraded,
    header,
    healed,
    known,
    sent,
    settle,
)


def within_bounds(steps: list[Step]) -> None:
    for step in steps:
        assert len(step.batch) <= model.MAX_TOKENS
        assert sum(run.count for run in step.batch if run.kind in "fFSI") <= model.MAX_BAD
        for run in step.batch:
            assert 1 <= run.count <= MAX_COUNT
            assert run.open_for == 0 or run.count == 1
            assert run.age >= -1


# ---------------------------------------------------------------------------- what goes out


def test_outcomes_go_out_in_order_as_runs() -> None:
    process = Process().adopt(header())
    process.record("ssffsiiF")
    (step,) = process.shadow.outgoing(process.now)
    assert step.batch == (Run("s", 2), Run("f", 2), Run("s"), Run("i", 2), Run("F"))
    assert (step.op, step.era, step.reporter) == ("report", CURRENT, "me")
    assert step.known == known(header())
    assert process.shadow.outgoing(process.now) == []


def test_each_generation_has_batches_of_its_own() -> None:
    process = Process().adopt(header())
    old = process.era()
    process.record("f")
    process.hear(header(v=101, nonce="bbbbbbbb"))
    process.record("s")
    process.record("f", old)
    steps = process.shadow.outgoing(process.now)
    assert [(step.era, step.batch) for step in steps] == [
        (CURRENT, (Run("f"),)),
        ((101, "bbbbbbbb"), (Run("s"),)),
        (CURRENT, (Run("f"),)),
    ]


def test_open_for_stands_alone() -> None:
    process = Process().adopt(header())
    process.record("f")
    process.record("f", open_for=5 * SECOND)
    process.record("f")
    (step,) = process.shadow.outgoing(process.now)
    assert step.batch == (Run("f"), Run("f", 1, 5 * SECOND), Run("f"))


def test_deltas_go_out_once_and_also_without_outcomes() -> None:
    process = Process().adopt(OPEN, 9 * SECOND)
    process.shadow.counted("rejected", 3)
    process.shadow.counted("rejected", 4)
    (step,) = process.shadow.outgoing(process.now)
    assert (step.batch, dict(step.deltas)) == ((), {"rejected": 7})
    assert process.shadow.outgoing(process.now) == []


def test_durations_go_out_with_the_first_batch_only() -> None:
    process = Process().adopt(header())
    old = process.era()
    old.append(3_000_000)
    process.shadow.absorb(old, process.now)
    process.hear(header(v=101))
    new = process.era()
    new.append(5_000_000)
    process.shadow.absorb(new, process.now)
    first, second = process.shadow.outgoing(process.now)
    assert dict(first.deltas) == {"duration_us": 8_000, "b2": 1, "b3": 1}
    assert second.deltas == ()


def test_a_policy_is_offered_until_it_was_heard() -> None:
    process = Process()
    assert process.shadow.step("report", NOW).offer is True
    circuit, _ = process.sync(None, STORE)
    assert process.shadow.step("report", NOW).offer is False
    assert circuit.policy == process.policy
    assert Process(explicit=False).shadow.step("report", NOW).offer is False


def test_the_stored_policy_is_used_by_the_shadow_too() -> None:
    stored, _ = Process(policy=POLICY.numbers._replace(version=5, failure_threshold=2)).sync(
        None, STORE
    )
    process = Process()
    process.sync(stored, STORE)
    assert process.shadow.policy.failure_threshold == 2
    assert process.shadow.policy_mismatch
    process.record("ff")
    assert process.decide().source == "quarantine"


def test_the_pending_runs_are_bounded_and_the_oldest_become_late() -> None:
    process = degraded(header())
    for _ in range(MAX_PENDING):
        process.wait(1).record("fs")
    assert len(process.shadow.pending) == MAX_PENDING
    assert process.shadow.waiting == 2 * MAX_PENDING
    assert process.shadow.stale == Counter({"f": MAX_PENDING // 2, "s": MAX_PENDING // 2})


def test_good_outcomes_alone_take_hardly_any_room() -> None:
    process = degraded(header())
    for _ in range(1_000):
        process.wait(1).record("s")
    assert len(process.shadow.pending) <= 2
    assert process.shadow.waiting == 1_000


def test_a_merged_run_is_not_younger_than_its_oldest_call() -> None:
    """Otherwise evidence could pass for younger than the store's present state."""
    process = degraded(header()).wait(SECOND)
    began = process.now
    process.record("f")
    process.wait(900).record("f")
    healed(process.wait(SECOND))
    ages = [age for *_, age in sent(process)]
    assert max(ages) == process.now - began


def test_a_fast_success_may_be_as_old_as_the_last_drain() -> None:
    """It carries no time of its own, so the oldest that it can be is taken."""
    process = degraded(header()).wait(SECOND)
    era = process.era()
    drained = process.now
    era.append(2_000_000_000)
    process.wait(5 * SECOND)
    process.shadow.absorb(era, process.now)
    assert process.shadow.pending[-1].began == drained - 2 * SECOND


def test_batches_stay_within_the_scripts_bounds() -> None:
    process = Process().adopt(header("forced_closed"), -1)
    sequence = ("fs" * 120, "s" * 70_000, "S" * 3_000, "i" * 10, "fS" * 130)
    for kinds in sequence:
        process.record(kinds)
    steps = process.shadow.outgoing(process.now)
    within_bounds(steps)
    assert len(steps) > 3
    text = "".join(run.kind * run.count for step in steps for run in step.batch)
    assert text == "".join(sequence), "in order"


def test_batches_hold_at_most_so_many_runs() -> None:
    process = Process().adopt(header("forced_closed"), -1)
    process.record("is" * (MAX_PENDING // 2))
    process.shadow.pending.extendleft(list(process.shadow.pending)[:100])
    steps = process.shadow.outgoing(process.now)
    within_bounds(steps)
    assert [len(step.batch) for step in steps] == [model.MAX_TOKENS, 100]


def test_late_counts_stay_within_the_scripts_bounds() -> None:
    process = Process().adopt(header())
    process.shadow.stale.update({"f": 3_000, "s": 200_000, "i": 5})
    steps = process.shadow.outgoing(process.now)
    within_bounds(steps)
    assert {step.era for step in steps} == {NO_GENERATION}
    assert sum(run.count for step in steps for run in step.batch) == 203_005


def test_a_lost_batch_is_dropped_and_told_later() -> None:
    process = Process().adopt(header())
    process.record("ffs")
    (step,) = process.shadow.outgoing(process.now)
    process.shadow.lost(step)
    assert (process.shadow.dropped, process.shadow.waiting) == (3, 0)
    (step,) = process.shadow.outgoing(process.now)
    assert (step.batch, dict(step.deltas)) == ((), {"dropped": 3})


def test_a_lost_sync_drops_nothing() -> None:
    process = Process().adopt(header())
    process.shadow.lost(process.shadow.step("report", process.now))
    assert process.shadow.dropped == 0
    assert process.shadow.outgoing(process.now) == []


items: st.SearchStrategy[Item] = st.one_of(
    st.integers(0, 5 * 10**9),
    st.builds(
        Bad,
        st.sampled_from("fFSiI"),
        st.integers(0, 5 * 10**9),
        st.integers(NOW - 60 * SECOND, NOW),
        st.sampled_from([0, 0, 0, 500]),
    ).map(lambda bad: bad if bad.kind in "fF" else bad._replace(open_for=0)),
)
events = st.one_of(
    st.tuples(st.just("record"), st.lists(items, max_size=20)),
    st.tuples(st.just("late"), st.lists(items, max_size=5)),
    st.tuples(st.just("flood"), st.integers(1, 1_200)),
    st.tuples(st.just("send"), st.none()),
    st.tuples(st.just("ack"), st.booleans()),
    st.tuples(st.just("hear"), st.sampled_from(STATES)),
    st.tuples(st.sampled_from(["degrade", "heal"]), st.none()),
    st.tuples(st.just("probe"), st.sampled_from("sfiS")),
    st.tuples(st.just("wait"), st.integers(0, 70 * SECOND)),
)


@settings(max_examples=60)
@given(st.lists(events, max_size=25), st.floats(0, 0.999))
def test_every_outcome_is_flushed_dropped_or_pending(
    happenings: list[tuple[str, Any]], chance: float
) -> None:
    """C4 in the shadow: through any sending, losing, degrading and healing; and by kind."""
    process = Process(chance=chance).adopt(header())
    shadow = process.shadow
    first = process.era()
    recorded: Counter[str] = Counter()
    left: Counter[str] = Counter()  # what has gone out, by kind
    in_flight: list[Step] = []

    def absorb(era: Era, tally: list[Item]) -> None:
        for item in tally:
            era.append(item)
            recorded["s" if isinstance(item, int) else item.kind] += 1
        assert shadow.absorb(era, process.now) == len(tally)

    for what, value in happenings:
        if what == "record":
            absorb(process.era(), value)
        elif what == "late":
            absorb(first, value)
        elif what == "flood":
            absorb(process.era(), [Bad("fS"[i % 2], 0, process.now) for i in range(value)])
        elif what == "send":
            steps = shadow.outgoing(process.now)
            within_bounds(steps)
            in_flight += steps
            for step in steps:
                for run in step.batch:
                    left[run.kind] += run.count
        elif what == "ack" and in_flight:
            (shadow.acknowledged if value else shadow.lost)(in_flight.pop(0))
        elif what == "hear":
            v = shadow.generation[0] + 1
            shadow.hear(header(value, v=v), 9 * SECOND, process.now)
        elif what == "degrade":
            shadow.degrade(process.now)
        elif what == "heal" and shadow.degraded:
            shadow.heal(process.now)
        elif what == "probe" and process.decide().action == "probe":
            settle(process, "token", value)
            recorded[value] += 1
        elif what == "wait":
            process.wait(value)
        flying = sum(run.count for step in in_flight for run in step.batch)
        assert recorded.total() == shadow.flushed + shadow.dropped + shadow.waiting + flying
        assert left + process.pending() + shadow.stale == recorded
        assert len(shadow.pending) <= MAX_PENDING


# ---------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("spent", "deltas"),
    [
        ([], {}),
        ([0, 0], {}),
        ([1], {"b0": 1, "duration_us": 0}),
        ([2**20 - 1], {"b0": 1, "duration_us": 1048}),
        ([2**20], {"b1": 1, "duration_us": 1048}),
        ([2**35 - 1, 2**35, 2**50], {"b15": 3, "duration_us": (2**36 - 1 + 2**50) // 1000}),
        ([0, 2**25], {"b0": 1, "b6": 1, "duration_us": 33554}),
    ],
)
def test_durations_by_powers_of_two(spent: list[int], deltas: dict[str, int]) -> None:
    assert durations(spent) == deltas


def test_an_era_keeps_what_is_appended_while_it_is_taken() -> None:
    era = Era(CURRENT, CURRENT, NOW)
    take: Callable[[], list[Item]] = era.take
    era.append(1)
    assert take() == [1]
    era.append(2)
    era.append(3)
    assert take() == [2, 3]
    assert take() == []
