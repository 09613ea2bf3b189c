"""What is worth an alert, decided from made-up views of a fleet on a made-up clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from distributed_breaker.alert_keys import Alerts, Rule
from distributed_breaker.monitoring.alert_limits import Limiter
from distributed_breaker.monitoring.alert_rules import Event, Incident, Incidents, Watcher
from distributed_breaker.monitoring.alert_texts import Setting, document
from distributed_breaker.policy import State
from distributed_breaker.snapshot import NO_CALLS, Change, Snapshot

NOW = 1_000_000.0
SETTING = Setting("shop", "test", "web-1")


def seen(state: State, generation: int = 1, since: float = NOW, **more: Any) -> Snapshot:
    return Snapshot(
        "a", state, state, "shared", generation=generation, since=since, cause="run", **more
    )


def change(old: State, new: State, generation: int, at: float) -> Change:
    return Change(at, old.value, new.value, generation, "run", NO_CALLS, 0, 1, {})


class Fleet:
    """A watcher and what it has told so far."""

    def __init__(self, incidents: Incidents | None = None, **settings: Any) -> None:
        self.watcher = Watcher()
        self.incidents: Incidents = incidents or {}
        self.settings = Alerts(**settings)

    def look(
        self,
        snapshot: Snapshot | None,
        now: float = NOW,
        history: Sequence[Change] = (),
        mismatched: dict[str, list[str]] | None = None,
    ) -> list[tuple[str, int, bool]]:
        snapshots = {} if snapshot is None else {"a": snapshot}
        histories = {"a": history} if self.watcher.changed(snapshots, now) else {}
        events = self.watcher.events(
            snapshots, histories, self.incidents, mismatched, self.settings, now
        )
        return [(event.kind, event.number, event.over) for event in events]


def test_a_short_trip_between_two_looks_is_told_in_full() -> None:
    fleet = Fleet()
    assert fleet.look(seen(State.CLOSED, 1, NOW - 100)) == []
    history = [
        change(State.OPEN, State.CLOSED, 3, NOW + 2),
        change(State.CLOSED, State.OPEN, 2, NOW + 1),
        change(State.OPEN, State.CLOSED, 1, NOW - 100),
    ]
    told = fleet.look(seen(State.CLOSED, 3, NOW + 2), NOW + 5, history)
    assert told == [("open", 2, False), ("open", 3, True)]
    assert fleet.look(seen(State.CLOSED, 3, NOW + 2), NOW + 10, history) == []


def test_who_begins_to_evaluate_looks_back_a_minute() -> None:
    history = [
        change(State.OPEN, State.CLOSED, 3, NOW - 10),
        change(State.CLOSED, State.OPEN, 2, NOW - 20),
        change(State.OPEN, State.CLOSED, 1, NOW - 90),
        change(State.CLOSED, State.OPEN, 0, NOW - 100),
    ]
    told = Fleet().look(seen(State.CLOSED, 3, NOW - 10), NOW, history)
    assert told == [("open", 2, False), ("open", 3, True)]


def test_what_goes_on_is_not_told_again_and_what_is_over_is() -> None:
    known = {"open a": Incident(1, NOW - 500)}
    assert Fleet(dict(known)).look(seen(State.OPEN, 5, NOW - 300)) == []
    assert Fleet(dict(known)).look(seen(State.FORCED_CLOSED, 5, NOW - 300)) == [
        ("forced_closed", 5, False)
    ]
    assert Fleet(dict(known)).look(seen(State.CLOSED, 5, NOW - 300)) == [("open", 5, True)]
    assert Fleet(dict(known)).look(None) == [("open", 1, True)]  # the store holds it no more


def test_an_event_that_may_not_be_told_is_looked_at_again() -> None:
    fleet = Fleet()
    opened = seen(State.OPEN, 2)
    assert fleet.look(opened) == [("open", 2, False)]
    fleet.watcher.forget("a")
    fleet.incidents.clear()  # another process had claimed it, and died
    assert fleet.look(opened, NOW + 1) == [("open", 2, False)]


def test_a_circuit_that_is_switched_off_is_closed_and_one_that_cannot_be_read_is_nothing() -> None:
    fleet = Fleet()
    assert fleet.look(replace(seen(State.OPEN), source="disabled")) == []
    unreadable = replace(seen(State.CLOSED, 2), source="shadow", shared_state=None)
    assert Fleet({"open a": Incident(1, NOW)}).look(unreadable) == []


def test_half_open_for_too_long() -> None:
    fleet = Fleet(stuck_half_open_after=60.0)
    stuck = seen(State.HALF_OPEN, 4)
    assert ("stuck_half_open", 4, False) not in fleet.look(stuck, NOW + 59)
    assert fleet.look(stuck, NOW + 60) == [("stuck_half_open", 4, False)]
    assert fleet.look(stuck, NOW + 90) == []
    assert fleet.look(seen(State.OPEN, 5), NOW + 95) == [
        ("open", 5, False),
        ("stuck_half_open", 5, True),
    ]


def counted(calls: int, rejected: int, fallbacks: int) -> Snapshot:
    totals = {"calls": calls, "rejected": rejected, "fallbacks": fallbacks}
    return seen(State.CLOSED, since=NOW - 100, totals=totals)


def test_fallbacks_of_the_last_minute() -> None:
    fleet = Fleet(fallback_share=0.5, fallback_minimum=20)
    told: list[tuple[str, int, bool]] = []
    told += fleet.look(counted(1_000, 0, 1), NOW)
    told += fleet.look(counted(1_005, 5, 11), NOW + 5)
    assert told == []  # ten requests are too few
    assert fleet.look(counted(1_010, 12, 13), NOW + 10) == [
        ("fallback_share", int((NOW + 10) // 60), False)
    ]
    assert fleet.look(counted(1_020, 12, 20), NOW + 15) == []
    # Just below the threshold is not yet over.
    assert fleet.look(counted(1_030, 12, 20), NOW + 20) == []
    ended = fleet.look(counted(1_090, 12, 20), NOW + 25)
    assert ended == [("fallback_share", int((NOW + 25) // 60), True)]


def test_fallbacks_end_with_the_requests_but_not_before_a_minute_was_seen() -> None:
    fleet = Fleet({"fallback_share a": Incident(1, NOW - 100)})
    for second in range(0, 50, 10):
        assert fleet.look(counted(1_000, 0, 900), NOW + second) == []
    assert fleet.look(counted(1_000, 0, 900), NOW + 50)[0][2] is True


def test_counters_that_begin_anew() -> None:
    fleet = Fleet()
    fleet.look(counted(1_000, 0, 900), NOW)
    assert fleet.look(counted(30, 0, 1), NOW + 10) == []


def test_policies_that_differ_for_long() -> None:
    fleet = Fleet(mismatch_after=100.0)
    closed = seen(State.CLOSED, since=NOW - 100)
    number = int(NOW // 60)
    assert fleet.look(closed, NOW, mismatched={"a": ["web-1:7"]}) == []
    assert fleet.look(closed, NOW + 50, mismatched={}) == []  # a rolling deploy
    assert fleet.look(closed, NOW + 60, mismatched={"a": ["web-1:7"]}) == []
    assert fleet.look(closed, NOW + 110, mismatched={"a": ["web-1:7"]}) == []
    assert fleet.look(closed, NOW + 160, mismatched={"a": ["web-1:7"]}) == [
        ("policy_mismatch", number + 1, False)
    ]
    assert fleet.look(closed, NOW + 170, mismatched=None) == []  # not known
    assert fleet.look(closed, NOW + 170, mismatched={})[0][2] is True


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("kind", Rule().on)
def test_every_kind_says_something(kind: str, over: bool) -> None:
    about = {"value": "60%", "probes": 1, "state": "open", "processes": ["web-1:7"]}
    event = Event(kind, "pay.http", 7, over, NOW + 60, about, Incident(5, NOW) if over else None)
    found = document(event, "all", Rule(), SETTING)
    assert "$" not in found["title"] + found["text"]
    assert found["event"] == ("resolved" if over else "firing")
    assert found["incident"] == f"shop/{kind}/pay.http/{5 if over else 7}"
    assert found["duration"] == (60.0 if over else None)


def test_a_template_that_gets_no_value_shows_none() -> None:
    event = Event("open", "a", 7, False, NOW)
    found = document(event, "all", Rule(title="$circuit:$error:$duration", text="x"), SETTING)
    assert found["title"] == "a::"


def test_room_comes_back_and_the_digest_takes_of_it() -> None:
    limiter, rule = Limiter(), Rule(limit=2, per=10.0)
    alert = document(Event("open", "a", 7, False, NOW), "all", rule, SETTING)

    def passes(at: float) -> bool:
        return limiter.passes("hook", rule, alert, NOW + at)

    def digests(at: float) -> list[int]:
        found = limiter.digests({"all": rule}, SETTING, NOW + at)
        return [digest["count"] for _, digest in found]

    assert [passes(0), passes(1), passes(2), passes(3)] == [True, True, False, False]
    assert digests(9) == []
    assert not passes(10.5)  # what was held back before goes first
    assert digests(10.5) == [3]
    assert digests(10.6) == []
    assert not passes(10.7)
    assert digests(11) == [1]
    assert passes(21)
