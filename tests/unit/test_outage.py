"""When the store counts as gone, and the way back: the pure part of the link."""

from __future__ import annotations

import pytest

from distributed_breaker.outage import LONGEST_RETRY, NEXT_LOOK, RETURN_SPREAD, Outage


def longest(least: float, most: float) -> float:
    """Chance at its worst: every pause is as long as it can be."""
    return most


@pytest.fixture
def outage() -> Outage:
    return Outage(longest)


def test_an_error_of_the_store_is_never_tolerated(outage: Outage) -> None:
    assert not outage.tolerates(timeout=False, at_once=False)


def test_one_timeout_is_tolerated_and_two_in_a_row_are_not(outage: Outage) -> None:
    assert outage.tolerates(timeout=True, at_once=False)
    assert not outage.tolerates(timeout=True, at_once=False)


def test_an_answer_between_two_timeouts_forgives_the_first(outage: Outage) -> None:
    assert outage.tolerates(timeout=True, at_once=False)
    outage.answered()
    assert outage.tolerates(timeout=True, at_once=False)


def test_a_timeout_that_somebody_waited_for_is_not_tolerated(outage: Outage) -> None:
    assert not outage.tolerates(timeout=True, at_once=True)


def test_it_begins_once(outage: Outage) -> None:
    assert outage.begin("CONNECTION", 1_000)
    assert not outage.begin("TIMEOUT", 2_000)
    assert outage.code == "TIMEOUT"


def test_pauses_double_up_to_a_bound(outage: Outage) -> None:
    outage.begin("CONNECTION", 0)
    pauses = [outage.look_at]
    for _ in range(20):
        outage.pause(0)
        pauses.append(outage.look_at)
    assert pauses[:4] == [100, 200, 400, 800]
    assert set(pauses[5:]) == {LONGEST_RETRY}


def test_two_good_answers_and_a_wait_come_before_the_sync(outage: Outage) -> None:
    outage.begin("CONNECTION", 0)
    assert not outage.good_answer(1_000)
    assert outage.look_at == 1_000 + NEXT_LOOK
    assert not outage.good_answer(2_000)
    assert outage.look_at == 2_000 + RETURN_SPREAD
    assert outage.good_answer(3_000)
    assert outage.code, "it is over only when the sync has succeeded"
    outage.end()
    assert outage.code == ""


def test_a_failed_look_starts_again(outage: Outage) -> None:
    outage.begin("CONNECTION", 0)
    outage.good_answer(0)
    outage.good_answer(0)
    outage.pause(0)
    assert not outage.good_answer(0)
