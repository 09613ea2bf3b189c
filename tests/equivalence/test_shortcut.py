"""The script's shortcut: the model's answers, and nothing left to the machine without need."""

from __future__ import annotations

import pytest
import redis

from distributed_breaker.store import code_of, encode, key_of, script
from tests.equivalence.steady import at_random, bounds, wrongly_taken
from tests.equivalence.twins import CIRCUIT, Script, differences

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")


def test_the_twins_are_equal_on_both_sides_of_the_shortcuts_bounds(script: Script) -> None:
    cases = [(b.case, None) for b in bounds() if b.for_twins]
    for difference in differences(script, cases):
        pytest.fail(str(difference))


@pytest.mark.servers("valkey")
def test_the_twins_are_equal_on_reports_at_random(script: Script) -> None:
    for difference in differences(script, ((case, None) for case in at_random(4_000, seed=1))):
        pytest.fail(str(difference))


@pytest.mark.servers("valkey")
def test_the_shortcut_takes_what_it_is_for(client: redis.Redis, namespace: str) -> None:
    assert wrongly_taken(client, namespace, script()) == ""
    assert sum(bound.taken for bound in bounds()) > 200


def test_what_is_malformed_is_refused_by_the_machine(script: Script) -> None:
    malformed = [bound.case for bound in bounds() if bound.refused]
    assert {answer.reply[0] for answer in script.answers(malformed)} == {"CBARG"}


# Where the words of a report stand, and what is none, though all its parts could be.
WRITTEN = {
    11: ("s1;s2", "s1:s2", "s1s2", "s1 ;s2", "xs1", "s1x", "s1.5", "s01", "s1 s"),
    12: ("b0:1;b1:2", "b0:1:b1:2", "b0:1b1:2", "xb0:1", "b0:1x", "b0:01", "b0:1 b1", "b01:1"),
}


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("place", WRITTEN)
def test_what_only_looks_like_a_report_is_refused(
    place: int, client: redis.Redis, namespace: str
) -> None:
    case = next(bound.case for bound in bounds() if bound.taken and bound.case.step.deltas)
    assert case.before is not None
    key = key_of(namespace, CIRCUIT)
    words = encode(case.step, "c", CIRCUIT, case.now)
    for text in WRITTEN[place]:
        client.hset(key, mapping=case.before)
        words[place - 1] = text
        with pytest.raises(redis.ResponseError, match="malformed") as refused:
            client.eval(script(), 2, key, key + ":log", *words)
        assert code_of(refused.value) == "CBARG", text
        assert client.hgetall(key) == case.before, text
