"""What an outbox promises to those who add to it: durable order, payloads, bounds."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_breaker.fallback.outbox import (
    Entry,
    Item,
    Outbox,
    OutboxError,
    OutboxFull,
    Replayed,
)
from tests.fallback.outboxes import (
    NOTHING,
    Make,
    delivered,
    fill,
    ids,
    park,
)
from tests.unit.clock import FakeClock, boom, must_not_run

# ---------------------------------------------------------------------------- adding, looking


def test_what_is_added_waits_until_it_is_delivered(outbox: Outbox, clock: FakeClock) -> None:
    number = outbox.add("t", "set", {"a": [1, None]}, key="q")
    (entry,) = outbox.entries()
    assert entry == (number, "t", "set", "q", {"a": [1, None]}, clock(), 0, False, "", entry.uid)
    assert outbox.waiting() == outbox.waiting("t") == 1
    seen: list[Entry] = []
    assert outbox.replay("t", seen.append) == Replayed(1, 0, 0, False, "", 0.0)
    assert seen == [entry]
    assert outbox.entries() == []
    assert outbox.waiting() == 0
    assert outbox.replay("t", must_not_run) == NOTHING


def test_the_order_of_a_topic_is_that_of_adding(outbox: Outbox, make: Make) -> None:
    other = make()
    expected = [box.add("t", "k", None) for box in (outbox, other, outbox, other)]
    assert expected == sorted(expected)
    assert delivered(other) == expected


def test_ids_are_not_used_again_when_all_is_delivered(outbox: Outbox) -> None:
    (first,) = fill(outbox, 1)
    delivered(outbox)
    assert fill(outbox, 1) == [first + 1]


def test_topics_have_nothing_to_do_with_each_other(outbox: Outbox) -> None:
    fill(outbox, 2, "t")
    other = fill(outbox, 1, "u")
    outbox.replay("t", boom)
    assert delivered(outbox, "u") == other
    assert (outbox.waiting("t"), outbox.waiting("u"), outbox.waiting()) == (2, 0, 2)


def test_add_many_adds_all_or_none(outbox: Outbox) -> None:
    with pytest.raises(TypeError, match="'bad' is not JSON"):
        outbox.add_many("t", [("good", 1), ("bad", object())])  # type: ignore[list-item]
    assert outbox.waiting() == 0
    assert outbox.add_many("t", []) == []
    outbox.add_many("t", [("a", 1), ("b", 2, "q"), Item("c", 3)])
    assert [(e.kind, e.key) for e in outbox.entries()] == [("a", ""), ("b", "q"), ("c", "")]


def test_keys_are_found_while_they_wait(outbox: Outbox) -> None:
    outbox.add("t", "k", 1, key="q")
    outbox.add("u", "k", 2, key="only there")
    newest = outbox.add("t", "k", 3, key="q")
    assert outbox.holds("t", "q")
    assert not outbox.holds("t", "only there")
    found = outbox.latest("t", "q")
    assert found is not None
    assert (found.id, found.payload) == (newest, 3)
    assert outbox.latest("t", "r") is None
    outbox.replay("t", park)
    assert not outbox.holds("t", "q")
    assert outbox.latest("t", "q") is None


def test_entries_come_in_pages(outbox: Outbox) -> None:
    all_ids = fill(outbox, 5)
    assert ids(outbox, limit=2) == all_ids[:2]
    assert ids(outbox, limit=2, after=all_ids[1]) == all_ids[2:4]
    assert ids(outbox, topic="u") == []
    outbox.replay("t", park, limit=1)
    assert ids(outbox, parked=True) == all_ids[:1]
    assert ids(outbox, parked=False) == all_ids[1:]


def test_stats_say_what_there_is(outbox: Outbox, clock: FakeClock) -> None:
    outbox.add("t", "kind", "é", key="q")
    clock.advance(5)
    fill(outbox, 1)
    fill(outbox, 1, "u")
    outbox.replay("u", park)
    size = len(b'tkindq"\xc3\xa9"') + len("tk0")
    clock.advance(1)
    assert outbox.stats() == {
        "path": outbox.path,
        "works": True,
        "trouble": "",
        "damaged": [],
        "topics": {
            "t": {"waiting": 2, "parked": 0, "bytes": size, "oldest": 6.0},
            "u": {"waiting": 0, "parked": 1, "bytes": 3, "oldest": None},
        },
    }


def test_a_closed_outbox_opens_again(outbox: Outbox) -> None:
    expected = fill(outbox)
    outbox.close()
    outbox.close()
    assert delivered(outbox) == expected


def test_many_threads_lose_nothing(outbox: Outbox) -> None:
    returned: list[list[int]] = [[] for _ in range(8)]

    def add(ours: list[int]) -> None:
        ours += [outbox.add("t", "k", number) for number in range(5)]

    threads = [threading.Thread(target=add, args=(ours,)) for ours in returned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(ours == sorted(ours) and len(ours) == 5 for ours in returned)
    assert ids(outbox) == sorted(itertools.chain(*returned))


# ---------------------------------------------------------------------------- payloads

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outbox]:
    with contextlib.closing(Outbox(tmp_path_factory.mktemp("box") / "outbox.db")) as outbox:
        yield outbox


@settings(deadline=None, max_examples=50)
@given(payloads=st.lists(JSON, min_size=1), key=st.text(max_size=20))
def test_payloads_come_back_as_they_were(shared: Outbox, payloads: list[Any], key: str) -> None:
    first, *_ = shared.add_many("t", [("k", payload, key) for payload in payloads])
    there = shared.entries(limit=10_000, after=first - 1)
    # repr tells 1 from 1.0 and True, and 0.0 from -0.0.
    assert repr([entry.payload for entry in there]) == repr(payloads)
    assert {entry.key for entry in there} == {key}


ROUND: list[Any] = []
ROUND.append(ROUND)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (float("nan"), ValueError),
        ([float("-inf")], ValueError),
        ({1: 2}, TypeError),
        ((1, 2), TypeError),
        ({"a": {1, 2}}, TypeError),
        (b"bytes", TypeError),
        ("\ud800", ValueError),
        (ROUND, ValueError),
        (DEEP, ValueError),
        (10**5000, ValueError),
    ],
    ids=["nan", "inf", "key", "tuple", "set", "bytes", "surrogate", "round", "deep", "huge"],
)
def test_what_json_would_not_give_back_is_refused(
    outbox: Outbox, payload: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="the payload of kind 'k'"):
        outbox.add("t", "k", payload)
    assert outbox.waiting() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "k", 1), "topic has 0 characters"),
        (("t" * 201, "k", 1), "topic has 201 characters"),
        (("t", "", 1), "kind has 0"),
        ((b"t", "k", 1), "topic must be text"),
        (("t", "k\udc80", 1), "kind holds lone surrogates"),
    ],
)
def test_names_that_cannot_be_stored_are_refused(
    outbox: Outbox, arguments: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        outbox.add(*arguments)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"most_entries": 0}, ValueError),
        ({"most_bytes": 1.5}, TypeError),
        ({"attempts": 0}, ValueError),
        ({"lease": 0.0}, ValueError),
        ({"backoff": float("nan")}, ValueError),
        ({"backoff": 2.0, "backoff_max": 1.0}, ValueError),
    ],
)
def test_options_out_of_bounds_are_refused(
    make: Make, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(**options)


def test_what_cannot_be_read_as_json_is_parked(outbox: Outbox) -> None:
    first, second = fill(outbox, 2)
    outbox._file.write(lambda db: db.execute("UPDATE entries SET payload = '{' WHERE id = 1"))
    assert delivered(outbox) == [second]
    assert outbox.stats()["topics"]["t"]["parked"] == 1
    with pytest.raises(OutboxError, match="entry 1 cannot be read: purge it"):
        outbox.entries()
    outbox.purge([first])
    assert outbox.entries() == []


# ---------------------------------------------------------------------------- bounds


def test_there_is_room_for_so_many_entries_in_all_topics(outbox: Outbox, make: Make) -> None:
    small = make(most_entries=3)
    outbox.add("t", "k", 1)
    outbox.add("u", "k", 1)
    outbox.replay("u", park)
    with pytest.raises(OutboxFull, match=r"most_entries=3: 1 wait and 1 are parked"):
        fill(small, 2)
    assert small.waiting() == 1
    fill(small, 1)
    with pytest.raises(OutboxFull, match="let them be delivered"):
        small.add("v", "k", 1)
    delivered(small)
    small.add("v", "k", 1)


def test_items_without_an_end_are_refused(make: Make) -> None:
    with pytest.raises(OutboxFull):
        make(most_entries=10).add_many("t", itertools.repeat(("k", 1)))


def test_there_is_room_for_so_many_bytes(make: Make) -> None:
    small = make(most_bytes=20)
    small.add("t", "k", "x" * 10)
    with pytest.raises(OutboxFull, match=r"most_bytes=20.*\(14 bytes\)"):
        small.add("t", "k", "é" * 2)
    small.add("t", "k", "é")
    assert small.stats()["topics"]["t"]["bytes"] == 20
