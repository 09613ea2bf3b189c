"""Without the store the local machine decides, and when it returns, evidence is merged."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker import Policy, State, model
from distributed_breaker.model import Header
from distributed_breaker.shadow import NO_GENERATION
from tests.unit.shadows import (
    CURRENT,
    FORCED,
    NOW,
    OPEN,
    POLICY,
    SECOND,
    STORE,
    Process,
    degraded,
    header,
    healed,
    quarantined,
    sent,
    settle,
)

# ---------------------------------------------------------------------------- degraded


@pytest.mark.parametrize("head", [None, header()], ids=["never heard", "closed"])
def test_degraded_from_closed_the_local_machine_decides(head: Header | None) -> None:
    process = degraded(head)
    assert process.decide() == ("admit", State.CLOSED, "shadow", 0, "")
    process.record("ff")
    assert process.decide().action == "admit"
    process.record("f")
    assert process.decide()[:4] == ("refuse", State.OPEN, "shadow", process.now + 60 * SECOND)


def test_failures_before_and_after_the_loss_of_the_store_add_up() -> None:
    process = Process().adopt(header())
    process.record("ff")
    process.shadow.degrade(process.now)
    process.record("f")
    assert process.decide()[:3] == ("refuse", State.OPEN, "shadow")


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_an_open_circuit_stays_open_at_least_for_its_remaining_time(chance: float) -> None:
    process = degraded(OPEN, 25 * SECOND, chance=chance)
    decision = process.decide()
    assert decision[:3] == ("refuse", State.OPEN, "shadow")
    assert process.now + 25 * SECOND <= decision.until <= process.now + 40 * SECOND
    assert process.wait(25 * SECOND - 1).decide().action == "refuse"
    assert process.wait(15 * SECOND + 1).decide().action == "probe"


def test_the_starts_of_probes_are_spread() -> None:
    """So that many processes that lost the store together do not all probe at once."""
    ends = {degraded(OPEN, 0, chance=i / 10).decide().until for i in range(1, 10)}
    assert len(ends) == 9


@pytest.mark.parametrize(("chance", "left"), [(0.25, 15), (0.5, 30), (0.999, 59)])
def test_half_open_becomes_open_for_a_random_part_of_the_interval(chance: float, left: int) -> None:
    process = degraded(header("half_open"), chance=chance)
    decision = process.decide()
    assert decision[:3] == ("refuse", State.OPEN, "shadow")
    assert left * SECOND <= decision.until - process.now < (left + 1) * SECOND


def test_half_open_with_no_chance_is_due_at_once() -> None:
    assert degraded(header("half_open"), chance=0.0).decide()[:2] == ("probe", State.OPEN)


def test_the_attempt_is_taken_over() -> None:
    policy = POLICY.numbers._replace(open_interval_max=600 * SECOND)
    process = degraded(header("open", attempt=2, duration=240 * SECOND), 0, policy=policy)
    settle(process, "one", "f")
    assert process.decide().until == process.now + 480 * SECOND


@pytest.mark.parametrize("left", [-1, 100 * SECOND])
def test_a_forced_state_keeps_deciding_while_degraded(left: int) -> None:
    process = degraded(FORCED, left)
    until = 0 if left < 0 else process.now + left
    for _ in range(3):
        assert process.decide()[:4] == ("refuse", State.FORCED_OPEN, "override", until)
        process.wait(30 * SECOND)
    process = degraded(header("forced_closed"), left)
    process.record("f" * 50)
    for _ in range(3):
        assert process.decide()[:3] == ("admit", State.FORCED_CLOSED, "override")
        process.wait(30 * SECOND)


def test_a_ttl_runs_out_while_degraded() -> None:
    """What follows forced_open is a probe, never a closed circuit."""
    process = degraded(FORCED, 10 * SECOND, chance=0.0).wait(10 * SECOND)
    assert process.decide()[:3] == ("probe", State.OPEN, "shadow")
    process = degraded(header("forced_closed"), 10 * SECOND).wait(10 * SECOND)
    assert process.decide() == ("admit", State.CLOSED, "shadow", 0, "")


def test_a_quarantine_goes_on_while_degraded() -> None:
    process = quarantined()
    until = process.decide().until
    process.shadow.degrade(process.now)
    assert process.decide()[:4] == ("refuse", State.OPEN, "shadow", until)


def test_degrading_twice_changes_nothing() -> None:
    process = degraded(OPEN, 25 * SECOND)
    before = process.decide()
    process.wait(SECOND).shadow.degrade(process.now)
    assert process.decide() == before


def test_local_probes_go_one_at_a_time_while_degraded() -> None:
    process = degraded(OPEN, 0, policy=POLICY.numbers._replace(success_threshold=5))
    assert process.shadow.local_acquire("one", process.now).verdict == "grant"
    assert process.decide()[:2] == ("refuse", State.HALF_OPEN)
    assert process.shadow.local_acquire("two", process.now).verdict == "deny"


def test_degraded_asks_nobody() -> None:
    for head in (OPEN, header("half_open"), header(), FORCED):
        process = degraded(head, 0)
        assert process.decide().action in ("admit", "probe", "refuse")


def test_losing_the_store_gives_up_the_acquire_in_flight() -> None:
    process = Process().adopt(OPEN, 0)
    process.shadow.asking = True
    process.shadow.degrade(process.now)
    process.shadow.heal(process.now)
    assert process.decide().action == "ask"


def test_what_is_heard_while_degraded_protects_beyond_its_time() -> None:
    """C7: a process that cannot ask for permits probes the circuit of which it hears by itself."""
    process = degraded(header(), chance=0.5)
    process.hear(header("open", v=101), 30 * SECOND)
    assert process.wait(30 * SECOND).decide()[:2] == ("refuse", State.OPEN)
    assert process.wait(8 * SECOND).decide()[:2] == ("probe", State.OPEN)


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_half_open_that_is_heard_while_degraded_is_no_invitation(chance: float) -> None:
    process = degraded(header(), chance=chance)
    process.hear(header("half_open", v=101))
    assert process.decide().action == ("refuse" if chance else "probe")


def test_an_open_circuit_heard_of_while_degraded_is_obeyed() -> None:
    """Commands fail and pushes still come, as without the right to run scripts: C7."""
    process = degraded(header())
    process.hear(header("open", v=101, duration=30 * SECOND), 30 * SECOND)
    assert process.decide()[:2] == ("refuse", State.OPEN)
    assert process.decide().until >= process.now + 30 * SECOND
    process.wait(30 * SECOND - 1)
    assert process.decide().action == "refuse"


@given(
    st.sampled_from(["open", "forced_open"]),
    st.integers(1, 300 * SECOND),
    st.floats(0, 0.999),
    st.lists(st.integers(1, 20 * SECOND), max_size=20),
)
def test_degraded_is_never_less_protective_than_what_was_known(
    state: str, left: int, chance: float, waits: list[int]
) -> None:
    """C7."""
    process = degraded(header(state, duration=left), left, chance=chance)
    ends = process.now + left
    for ms in waits:
        process.wait(ms)
        if process.now < ends:
            assert process.decide().action == "refuse"
            assert process.decide().until >= ends


def test_alone_is_never_degraded() -> None:
    process = Process(alone=True)
    process.shadow.degrade(process.now)
    assert not process.shadow.degraded


# ---------------------------------------------------------------------------- healing


def test_evidence_that_has_grown_too_old_before_it_is_sent_is_late() -> None:
    process = degraded(header()).wait(SECOND)
    process.record("s")
    healed(process.wait(28 * SECOND))
    assert process.wait(SECOND + 1_001).pending() == {"s": 1}
    assert sent(process) == [(NO_GENERATION, "s", 1, -1)]


def test_what_was_seen_meanwhile_is_evidence_with_its_age() -> None:
    process = degraded(header()).wait(SECOND)
    process.record("f")
    process.wait(5 * SECOND).record("s")
    process.wait(2 * SECOND)
    healed(process)
    assert sent(process) == [(CURRENT, "f", 1, 7 * SECOND), (CURRENT, "s", 1, 2 * SECOND)]


def test_evidence_belongs_to_the_generation_that_the_store_has_now() -> None:
    process = degraded(header()).wait(SECOND)
    process.record("f")
    healed(process.wait(SECOND), header(v=200, nonce="cccccccc"))
    assert sent(process) == [((200, "cccccccc"), "f", 1, SECOND)]


def test_what_began_before_the_state_of_the_store_is_no_evidence() -> None:
    """The store's state began at the latest when we heard of it, less what it had lasted then."""
    process = degraded(header()).wait(SECOND)
    process.record("f")
    process.wait(2 * SECOND).record("f")
    healed(process.wait(SECOND), header(v=200, nonce="cccccccc"), lasted=2 * SECOND)
    assert [(era, age) for era, _, _, age in sent(process)] == [
        ((200, "cccccccc"), SECOND),
        ((0, "-"), -1),
    ]


@pytest.mark.parametrize(("window", "oldest"), [(60.0, 30 * SECOND), (12.0, 12 * SECOND)])
def test_evidence_is_not_older_than_the_window_and_half_a_minute(
    window: float, oldest: int
) -> None:
    policy = Policy(failure_threshold=9, failure_rate=None, window=window).numbers
    process = degraded(header(), policy=policy).wait(SECOND)
    process.record("f")
    process.wait(2 * SECOND).record("S")
    process.wait(oldest - 2 * SECOND)
    healed(process)
    assert sent(process) == [(CURRENT, "S", 1, oldest - 2 * SECOND), (NO_GENERATION, "f", 1, -1)]


def test_only_what_began_after_the_last_local_transition_is_evidence() -> None:
    """A dependency that came back together with Redis must not be tripped by what was before."""
    process = degraded(header()).wait(SECOND)
    process.record("fff")  # the local machine trips
    assert process.decide().state is State.OPEN
    process.wait(60 * SECOND)
    settle(process, "one", "s")
    settle(process, "two", "s")
    assert process.decide().state is State.CLOSED
    process.wait(SECOND).record("f")
    healed(process.wait(SECOND))
    outcomes = sent(process)
    assert [entry for entry in outcomes if entry[0] == CURRENT] == [(CURRENT, "f", 1, SECOND)]
    late = Counter({kind: count for era, kind, count, _ in outcomes if era == NO_GENERATION})
    assert late == Counter("fffss")


def test_late_results_are_no_evidence() -> None:
    """They began before the last local transition, whatever their time says: without measuring,
    a call knows only when it ended."""
    process = degraded(header()).wait(SECOND)
    late = process.era()
    process.record("fff")
    process.wait(60 * SECOND)
    settle(process, "one", "s")
    settle(process, "two", "s")
    process.wait(SECOND).record("f", late)
    process.wait(SECOND).record("F")
    healed(process.wait(SECOND))
    assert [kind for era, kind, *_ in sent(process) if era == CURRENT] == ["F"]


def test_what_trips_the_shadow_is_no_evidence_itself() -> None:
    process = degraded(header()).wait(SECOND)
    process.record("fff")
    healed(process.wait(SECOND))
    assert {era for era, *_ in sent(process)} == {NO_GENERATION}


def test_calls_that_began_before_the_store_was_lost_keep_their_order() -> None:
    process = Process().adopt(header())
    process.wait(SECOND).record("sfsf")
    process.shadow.degrade(process.now)
    process.wait(SECOND).record("sff"[:2])
    healed(process.wait(SECOND))
    assert "".join(kind * count for _, kind, count, _ in sent(process)) == "sfsfsf"


def test_the_store_refuses_evidence_from_before_its_own_present_state() -> None:
    """End to end with the model: reset while this process was away."""
    process = Process()
    circuit, _ = process.sync(None, STORE)
    process.shadow.degrade(process.now)
    process.wait(SECOND).record("f")
    reset = model.step(circuit, Process().shadow.step("reset", NOW), STORE + 2 * SECOND).circuit
    process.wait(2 * SECOND).record("f")
    process.wait(SECOND)
    _, again = process.sync(reset, STORE + 4 * SECOND)
    assert again is False
    process.shadow.heal(process.now)
    for step in process.shadow.outgoing(process.now):
        reset = model.step(reset, step, STORE + 4 * SECOND).circuit
    assert model.counts(reset) == (1, 1, 0)
    assert reset.totals[model.INDEX["late"]] == 1


def test_a_local_trip_goes_on_as_a_quarantine_under_the_same_generation() -> None:
    process = degraded(header()).wait(SECOND)
    process.record("fff")
    until = process.decide().until
    healed(process.wait(SECOND))
    assert process.decide()[:4] == ("refuse", State.OPEN, "quarantine", until)


def test_a_newer_generation_on_return_empties_the_shadow() -> None:
    process = degraded(header()).wait(SECOND)
    process.record("fff")
    healed(process.wait(SECOND), header(v=101))
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")


def test_on_return_the_mirror_decides_again() -> None:
    process = degraded(OPEN, 20 * SECOND, chance=0.9).wait(10 * SECOND)
    healed(process, OPEN, 10 * SECOND)
    assert process.decide()[:4] == ("refuse", State.OPEN, "shared", process.now + 10 * SECOND)
    process.hear(header(v=101))
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")


def test_recovery_after_the_store_returns_is_not_undone() -> None:
    """The dependency and the store died together and come back together (promise of section 8)."""
    process = Process(policy=POLICY.numbers._replace(quorum=1))
    circuit, _ = process.sync(None, STORE)
    process.shadow.degrade(process.now)
    process.wait(SECOND).record("fff")
    process.wait(61 * SECOND)
    settle(process, "one", "s")
    settle(process, "two", "s")
    process.wait(SECOND).record("sss")
    store_now = STORE + (process.now - NOW)
    circuit, _ = process.sync(circuit, store_now)
    process.shadow.heal(process.now)
    for step in process.shadow.outgoing(process.now):
        done = model.step(circuit, step, store_now)
        process.shadow.answered(step, done.reply, process.now)
    assert circuit.state == "closed"
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")
