"""Who decides: the mirror of the shared state, the local machine, or both.

The shadow is pure, so these tests pass in time and chance, and play the store with the model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker import State, model
from distributed_breaker.model import Header
from distributed_breaker.shadow import Decision
from tests.unit.shadows import (
    FORCED,
    NOW,
    OPEN,
    POLICY,
    SECOND,
    STATES,
    STORE,
    Process,
    header,
    known,
    quarantined,
    reply,
    settle,
)

# ---------------------------------------------------------------------------- adopting headers


def test_the_first_header_is_adopted_whatever_it_is() -> None:
    for state in STATES:
        for fresh in (False, True):
            process = Process()
            head = header(state, fresh=fresh)
            assert process.hear(head, 5 * SECOND) is False
            assert process.shadow.header == head


@pytest.mark.parametrize("mine", STATES)
@pytest.mark.parametrize("theirs", STATES)
def test_a_newer_generation_is_adopted(mine: str, theirs: str) -> None:
    process = Process().adopt(header(mine, v=100), 5 * SECOND)
    head = header(theirs, v=101, nonce="bbbbbbbb")
    assert process.hear(head, 7 * SECOND) is False
    assert process.shadow.header == head
    assert process.shadow.generation == (101, "bbbbbbbb")


@pytest.mark.parametrize("theirs", STATES)
def test_an_older_generation_is_not_adopted_but_asked_about(theirs: str) -> None:
    """C1: a mirror's v never falls.  The store must have lost writes: a sync restores them."""
    mine = header("open", v=100)
    process = Process().adopt(mine, 5 * SECOND)
    assert process.hear(header(theirs, v=99, nonce="bbbbbbbb"), 9 * SECOND) is True
    assert process.shadow.header == mine
    assert process.decide().until == process.now + 5 * SECOND


def test_an_older_generation_in_a_reply_is_ignored() -> None:
    """An answer that was overtaken by a push; asking again would go on for ever."""
    process = Process().adopt(header(v=100))
    asked_with = known(header(v=98))
    assert process.shadow.hear(header("open", v=99), 9, process.now, asked_with) is False
    assert process.shadow.header == header(v=100)


def test_the_same_generation_is_followed_by_its_counter() -> None:
    process = Process().adopt(header("half_open", successes=0, n=5))
    process.hear(header("half_open", successes=2, n=7))
    assert process.shadow.header == header("half_open", successes=2, n=7)
    process.hear(header("half_open", successes=1, n=6))
    assert process.shadow.header == header("half_open", successes=2, n=7)


def test_the_same_generation_heard_again_confirms_the_mirror() -> None:
    process = Process().adopt(header())
    process.wait(5 * SECOND).hear(header())
    assert process.shadow.heard == process.now


def test_a_timer_is_never_lengthened_by_the_same_generation() -> None:
    process = Process().adopt(OPEN, 30 * SECOND)
    process.hear(OPEN, 50 * SECOND)
    assert process.decide().until == process.now + 30 * SECOND
    process.hear(OPEN, 20 * SECOND)
    assert process.decide().until == process.now + 20 * SECOND


def test_an_equal_v_with_another_nonce_waits_for_our_own_reply() -> None:
    """Two histories met: a push cannot tell which of them the store holds, an answer can.

    Found by simulation: nobody asked for that answer, and a process without traffic held on to a
    generation that was lost, for as long as it had none.
    """
    mine, other = header("open", nonce="aaaaaaaa"), header("closed", nonce="bbbbbbbb", n=9)
    process = Process().adopt(mine, 5 * SECOND)
    assert process.hear(other) is True, "the store must be asked"
    assert process.shadow.header == mine
    foreign = known(header(v=99))
    process.shadow.hear(other, 0, process.now, foreign)
    assert process.shadow.header == mine, "that answer did not know of ours"
    process.shadow.hear(other, 0, process.now, known(mine, 5 * SECOND))
    assert process.shadow.header == other


@pytest.mark.parametrize(
    ("mine", "left"),
    [("open", 5 * SECOND), ("half_open", 0), ("forced_open", -1), ("forced_open", 5 * SECOND),
     ("forced_closed", -1), ("forced_closed", 5 * SECOND)],
)  # fmt: skip
@pytest.mark.parametrize("theirs", STATES)
def test_a_fresh_header_does_not_undo_what_is_protected(mine: str, left: int, theirs: str) -> None:
    """R12: otherwise one newcomer after FLUSHALL would close an open circuit for all."""
    head = header(mine, v=100)
    process = Process().adopt(head, left)
    before = process.decide()
    fresh = header(theirs, v=200, nonce="bbbbbbbb", fresh=True)
    assert process.hear(fresh, 9 * SECOND) is True, "a sync must follow at once"
    assert process.shadow.header == head
    assert process.decide() == before
    # The sync carries the old knowledge …
    step = process.shadow.step("report", process.now)
    assert step.known == known(head, left)
    # … and only its reply is adopted.
    foreign = known(header(v=99))
    process.shadow.hear(fresh, 9 * SECOND, process.now, foreign)
    assert process.shadow.header == head
    process.shadow.hear(fresh, 9 * SECOND, process.now, step.known)
    assert process.shadow.header == fresh


@pytest.mark.parametrize("mine", ["closed", "forced_open", "forced_closed"])
def test_a_fresh_header_is_adopted_where_nothing_is_to_protect(mine: str) -> None:
    process = Process().adopt(header(mine), 1 * SECOND).wait(1 * SECOND)
    fresh = header("open", v=200, fresh=True, duration=9 * SECOND)
    assert process.hear(fresh, 9 * SECOND) is False
    assert process.shadow.header == fresh


def test_after_a_flushall_the_open_state_comes_back() -> None:
    """End to end with the model: a newcomer makes the circuit anew, the mirror restores it."""
    process = Process()
    circuit, _ = process.sync(None, STORE)
    operator = process.shadow.step("override", process.now, kind="forced_open", ttl=-1)
    done = model.step(circuit, operator, STORE)
    process.shadow.answered(operator, done.reply, process.now)
    assert process.decide().state is State.FORCED_OPEN

    newcomer = Process()
    anew, _ = newcomer.sync(None, STORE + 5 * SECOND)
    assert anew.state == "closed"
    process.wait(5 * SECOND)
    assert process.hear(anew.header) is True
    restored, again = process.sync(anew, STORE + 5 * SECOND)
    assert restored.state == "forced_open"
    assert again is False
    assert process.decide().state is State.FORCED_OPEN
    assert restored.v > done.circuit.v or restored.v > anew.v


@given(
    st.lists(
        st.tuples(
            st.sampled_from(STATES),
            st.integers(95, 105),
            st.sampled_from(["aaaaaaaa", "bbbbbbbb"]),
            st.booleans(),
            st.integers(0, 3),
            st.sampled_from(["push", "reply", "old reply", "degrade", "heal", "wait"]),
            st.integers(-1, 9 * SECOND),
        ),
        max_size=30,
    )
)
def test_a_mirrors_v_never_falls(events: list[tuple[Any, ...]]) -> None:
    process = Process()
    process.shadow.synced = True
    v = 0
    old = known(header(v=1))
    for state, newer, nonce, fresh, n, how, left in events:
        head = header(state, v=newer, nonce=nonce, fresh=fresh, n=n)
        if how == "push":
            process.hear(head, left)
        elif how == "reply":
            process.shadow.hear(head, left, process.now, process.shadow.known(process.now))
        elif how == "old reply":
            process.shadow.hear(head, left, process.now, old)
        elif how == "degrade":
            process.shadow.degrade(process.now)
        elif how == "heal":
            process.shadow.heal(process.now)
        else:
            process.wait(SECOND)
        if process.shadow.header is not None:
            assert process.shadow.header.v >= v
            v = process.shadow.header.v
        old = process.shadow.known(process.now)
        decision = process.decide()
        assert decision.action in ("admit", "refuse", "ask", "probe", "sync")
        assert decision.until == 0 or decision.until > process.now


# ---------------------------------------------------------------------------- deciding


def test_nothing_is_decided_before_the_first_answer() -> None:
    assert Process().decide().action == "sync"


def test_a_header_that_was_only_pushed_is_no_first_answer() -> None:
    process = Process()
    process.hear(header())
    assert process.decide().action == "sync"


@pytest.mark.parametrize(
    ("head", "left", "decision"),
    [
        (header(), 0, Decision("admit", State.CLOSED, "shared")),
        (OPEN, 9, Decision("refuse", State.OPEN, "shared", NOW + 9, "too many failures in a row")),
        (OPEN, 0, Decision("ask", State.OPEN, "shared")),
        (header("half_open"), 0, Decision("ask", State.HALF_OPEN, "shared")),
        (FORCED, -1, Decision("refuse", State.FORCED_OPEN, "override", 0, "forced open")),
        (FORCED, 9, Decision("refuse", State.FORCED_OPEN, "override", NOW + 9, "forced open")),
        (FORCED, 0, Decision("ask", State.HALF_OPEN, "shared")),
        (header("forced_closed"), -1, Decision("admit", State.FORCED_CLOSED, "override")),
        (header("forced_closed"), 9, Decision("admit", State.FORCED_CLOSED, "override")),
        (header("forced_closed"), 0, Decision("admit", State.CLOSED, "shared")),
    ],
)
def test_what_the_mirror_decides(head: Header, left: int, decision: Decision) -> None:
    assert Process().adopt(head, left).decide() == decision


def test_deciding_changes_nothing() -> None:
    process = Process().adopt(OPEN, 0)
    assert [process.decide() for _ in range(3)] == [process.decide()] * 3
    assert process.shadow.asking is False


def test_one_acquire_is_in_flight_at_a_time() -> None:
    """R3: the others are rejected meanwhile."""
    process = Process().adopt(OPEN, 0)
    process.shadow.asking = True
    assert process.decide()[:3] == ("refuse", State.OPEN, "shared")
    process.shadow.asking = False
    assert process.decide().action == "ask"


def test_a_denial_is_obeyed_until_its_wait_is_over() -> None:
    """R4."""
    process = Process().adopt(header("half_open"))
    process.shadow.wait_until = process.now + 300
    assert process.decide()[:4] == ("refuse", State.HALF_OPEN, "shared", process.now + 300)
    assert process.wait(299).decide().action == "refuse"
    assert process.wait(1).decide().action == "ask"


def test_a_denial_that_brings_another_generation_is_obeyed() -> None:
    """R4: others have the permits of the half-open circuit of which this process hears first."""
    process = Process().adopt(OPEN, 0)
    step = process.shadow.step("acquire", process.now, token="mine")
    denial = reply(header("half_open", v=101))._replace(verdict="deny", value=300)
    process.shadow.answered(step, denial, process.now)
    assert process.decide()[:4] == ("refuse", State.HALF_OPEN, "shared", process.now + 300)


def test_a_denial_of_a_generation_that_is_over_says_nothing() -> None:
    process = Process().adopt(OPEN, 0)
    step = process.shadow.step("acquire", process.now, token="mine")
    process.hear(header("half_open", v=102))
    denial = reply(header("half_open", v=101))._replace(verdict="deny", value=300)
    process.shadow.answered(step, denial, process.now)
    assert process.decide().action == "ask"


def test_a_denial_ends_with_its_generation() -> None:
    process = Process().adopt(header("half_open"))
    process.shadow.wait_until = process.now + 300
    process.hear(header("half_open", v=101))
    assert process.decide().action == "ask"


def test_a_health_check_probes_in_place_of_calls() -> None:
    process = Process().adopt(OPEN, 0)
    process.shadow.probed_by_check = True
    assert process.decide().action == "refuse"
    assert process.decide(by_check=True).action == "ask"


# ---------------------------------------------------------------------------- quarantine


def test_a_local_trip_under_a_closed_fleet_is_a_quarantine() -> None:
    process = Process().adopt(header())
    process.record("ff")
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")
    process.record("f")
    decision = process.decide()
    assert decision[:3] == ("refuse", State.OPEN, "quarantine")
    assert decision.until == process.now + 60 * SECOND


def test_the_quorum_is_the_fleets_affair() -> None:
    """The local machine is alone by nature: it trips by its own outcomes whatever the quorum."""
    process = quarantined(policy=POLICY.numbers._replace(quorum=8))
    assert process.decide().source == "quarantine"


def test_a_quarantined_process_probes_one_at_a_time() -> None:
    process = quarantined().wait(60 * SECOND)
    assert process.decide()[:3] == ("probe", State.OPEN, "quarantine")
    assert process.shadow.local_acquire("one", process.now).verdict == "grant"
    decision = process.decide()
    assert decision[:3] == ("refuse", State.HALF_OPEN, "quarantine")
    assert process.now < decision.until <= process.now + 500
    process.wait(10 * SECOND)  # its lease
    assert process.decide().action == "probe"


def test_a_quarantine_ends_with_enough_good_probes() -> None:
    process = quarantined().wait(60 * SECOND)
    settle(process, "one", "s")
    assert process.decide().source == "quarantine"
    settle(process, "two", "s")
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")


def test_a_quarantine_goes_on_with_a_bad_probe() -> None:
    process = quarantined().wait(60 * SECOND)
    settle(process, "one", "f")
    assert process.decide()[:3] == ("refuse", State.OPEN, "quarantine")


def test_the_outcomes_of_local_probes_are_reported_like_others() -> None:
    process = quarantined()
    before = process.pending()
    process.wait(60 * SECOND)
    settle(process, "one", "s")
    settle(process, "two", "f")
    assert process.pending() - before == Counter("sf")
    assert process.shadow.pending[-1].era == process.shadow.generation


@pytest.mark.parametrize("state", STATES)
def test_a_newer_generation_ends_a_quarantine(state: str) -> None:
    process = quarantined()
    process.hear(header(state, v=101), 9 * SECOND)
    assert process.decide().source != "quarantine"
    process.hear(header(v=102))
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")


def test_a_newer_generation_empties_the_shadow() -> None:
    process = Process().adopt(header())
    process.record("ff")
    process.hear(header(v=101))
    process.record("ff")
    assert process.decide().action == "admit"
    process.record("f")
    assert process.decide().source == "quarantine"


def test_an_override_decides_alone() -> None:
    """Also over a quarantine that is younger than it."""
    process = Process().adopt(header("forced_closed"), -1)
    process.record("f" * 50)
    assert process.decide() == ("admit", State.FORCED_CLOSED, "override", 0, "")
    process = quarantined()
    process.hear(header("forced_open", v=101), -1)
    assert process.decide()[:3] == ("refuse", State.FORCED_OPEN, "override")


def test_late_results_do_not_trip_the_local_machine() -> None:
    process = Process().adopt(header())
    late = process.era()
    process.hear(header(v=101))
    process.record("fff", late)
    assert process.decide() == ("admit", State.CLOSED, "shared", 0, "")
    assert {p.era for p in process.shadow.pending} == {(100, "aaaaaaaa")}


def test_a_smaller_success_threshold_does_not_confuse_a_quarantine() -> None:
    """The fleet's policy changes while local probes have succeeded."""
    process = quarantined(policy=POLICY.numbers._replace(success_threshold=3))
    process.wait(60 * SECOND)
    settle(process, "one", "s")
    settle(process, "two", "s")
    step = process.shadow.step("report", process.now)
    smaller = POLICY.numbers._replace(success_threshold=2, half_open_permits=2)
    process.shadow.answered(step, reply(header(), policy=smaller.text()), process.now)
    assert process.decide().action == "probe"
    settle(process, "three", "s")
    assert process.decide().action == "admit"


# ---------------------------------------------------------------------------- alone


def test_alone_needs_no_answer() -> None:
    assert Process(alone=True).decide() == ("admit", State.CLOSED, "shared", 0, "")


def test_alone_the_policys_own_permits_count() -> None:
    process = Process(alone=True)
    process.record("fff")
    process.wait(60 * SECOND)
    assert process.shadow.local_acquire("one", process.now).verdict == "grant"
    assert process.shadow.local_acquire("two", process.now).verdict == "grant"
    assert process.shadow.local_acquire("three", process.now).verdict == "deny"


def test_alone_nothing_waits() -> None:
    process = Process(alone=True)
    process.record("fsfi")
    assert (process.shadow.waiting, process.shadow.flushed) == (0, 4)
    assert process.shadow.outgoing(process.now) == []
