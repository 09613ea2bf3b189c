"""Who decides: the mirror of the shared state, the local machine, or both.

The shadow is pure, so these tests pass in time and chance, and play the store with the model.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_breaker import Policy, State, model
from distributed_breaker.model import Circuit, Header, Known, Reply, Run, Step
from distributed_breaker.policy import Numbers
from distributed_breaker.shadow import (
    MAX_COUNT,
    MAX_PENDING,
    NO_GENERATION,
    Bad,
    Decision,
    Era,
    Generation,
    Item,
    Shadow,
    durations,
)

NOW = 5_000_000  # the process's own clock, ms
STORE = 1_764_000_000_000  # the store's clock at that moment: nobody ever compares the two
SECOND = 1_000
POLICY = Policy(
    failure_threshold=3, failure_rate=None, success_threshold=2, jitter=0.0, permit_lease=10.0
)
STATES = ("closed", "open", "half_open", "forced_open", "forced_closed")


def header(state: str = "closed", v: int = 100, nonce: str = "aaaaaaaa", **more: Any) -> Header:
    values: dict[str, Any] = {
        "since": STORE, "duration": 0, "attempt": 0, "successes": 0, "fresh": False, "n": 1,
        "cause": "run",
    } | more  # fmt: skip
    return Header(v, nonce, state, **values)


def known(head: Header, left: int = 0) -> Known:
    return Known(head.v, head.nonce, head.state, left, head.attempt)


@dataclass
class Process:
    """One shadow with its time, and how it is used."""

    policy: Numbers = POLICY.numbers
    chance: float = 0.0
    explicit: bool = True
    alone: bool = False
    now: int = NOW
    shadow: Shadow = field(init=False)

    def __post_init__(self) -> None:
        nonces = itertools.count(1)
        self.shadow = Shadow(
            self.policy,
            "me",
            lambda: f"{next(nonces):08x}",
            lambda: self.chance,
            self.now,
            alone=self.alone,
            explicit=self.explicit,
        )

    def adopt(self, head: Header, left: int = 0) -> Process:
        """Adopt a state as the reply to the first sync does."""
        self.shadow.synced = True
        assert self.shadow.hear(head, left, self.now, self.shadow.known(self.now)) is False
        assert self.shadow.header == head
        return self

    def hear(self, head: Header, left: int = 0) -> bool:
        return self.shadow.hear(head, left, self.now)

    def wait(self, ms: int) -> Process:
        self.now += ms
        return self

    def decide(self, **more: Any) -> Decision:
        return self.shadow.decide(self.now, **more)

    def era(self) -> Era:
        return Era(self.shadow.generation, self.shadow.local_generation, self.now)

    def record(self, kinds: str, era: Era | None = None, **more: Any) -> None:
        """Absorb outcomes that began now: letters as on the wire."""
        era = era or self.era()
        for kind in kinds:
            era.append(0 if kind == "s" else Bad(kind, 0, self.now, **more))
        assert self.shadow.absorb(era, self.now) == len(kinds)

    def pending(self) -> Counter[str]:
        return Counter({p.kind: 0 for p in self.shadow.pending}) + Counter(
            kind for p in self.shadow.pending for kind in p.kind * p.count
        )

    def sync(self, circuit: Circuit | None, store_now: int) -> tuple[Circuit, bool]:
        """One step with a store that is the model."""
        step = self.shadow.step("report", self.now)
        done = model.step(circuit, step, store_now)
        return done.circuit, self.shadow.answered(step, done.reply, self.now)


def reply(head: Header, remaining: int = 0, policy: str = "") -> Reply:
    circuit = Circuit(*head[:9])
    circuit.reason = f"{head.cause} 0 "
    return Reply(model.dump_header(circuit), STORE, remaining, head.state, "", "ok", 0, policy)


OPEN = header("open", duration=60 * SECOND)
FORCED = header("forced_open", duration=-1, cause="forced_open")


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
    """Two histories met: a push cannot tell which of them the store holds, an answer can."""
    mine, other = header("open", nonce="aaaaaaaa"), header("closed", nonce="bbbbbbbb", n=9)
    process = Process().adopt(mine, 5 * SECOND)
    assert process.hear(other) is False
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


def quarantined(**more: Any) -> Process:
    """The fleet's circuit is closed, and this process alone has seen failures."""
    process = Process(**more).adopt(header())
    process.record("fff")
    return process


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


def settle(process: Process, token: str, kind: str) -> None:
    assert process.shadow.local_acquire(token, process.now).verdict == "grant"
    item = Bad(kind, 0, process.now)
    process.shadow.local_settle(
        token, process.shadow.local_generation, item, process.now, process.shadow.generation
    )


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


# ---------------------------------------------------------------------------- degraded


def degraded(head: Header | None, left: int = 0, **more: Any) -> Process:
    process = Process(**more)
    if head is not None:
        process.adopt(head, left)
    process.shadow.degrade(process.now)
    assert process.shadow.degraded
    return process


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


def healed(
    process: Process, head: Header | None = None, left: int = 0, lasted: int = 60 * SECOND
) -> Process:
    """The store is back: a sync, then evidence.  ``head`` None: the state has not changed.
    ``lasted``: for how long the store's state had lasted when it answered."""
    shadow = process.shadow
    again = head or shadow.header
    assert again is not None
    asked_with = shadow.known(process.now)
    shadow.hear(again, left, process.now, asked_with, again.since + lasted)
    shadow.synced = True
    shadow.heal(process.now)
    assert not shadow.degraded
    return process


def sent(process: Process) -> list[tuple[Generation, str, int, int]]:
    """What goes out: era, kind, count and age of each run."""
    return [
        (step.era, run.kind, run.count, run.age)
        for step in process.shadow.outgoing(process.now)
        for run in step.batch
    ]


CURRENT = (100, "aaaaaaaa")


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
    process.shadow.rejected(3)
    process.shadow.rejected(4)
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


def within_bounds(steps: list[Step]) -> None:
    for step in steps:
        assert len(step.batch) <= model.MAX_TOKENS
        assert sum(run.count for run in step.batch if run.kind in "fFSI") <= model.MAX_BAD
        for run in step.batch:
            assert 1 <= run.count <= MAX_COUNT
            assert run.open_for == 0 or run.count == 1
            assert run.age >= -1


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
