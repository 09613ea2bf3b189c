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
    2: ("{now}.0", " {now}", "{now} ", "+{now}", "0{now}", "0x19ab52bc000"),
    7: ("x", "1 2 3", "x{policy}"),
    8: ("", "2", "01"),
    10: ("a:1763999999997:4:3:1 me",),
    11: ("s1;s2", "s1:s2", "s1s2", "s1 ;s2", "xs1", "s1x", "s1.5", "s01", "s1 s"),
    12: ("b0:1;b1:2", "b0:1:b1:2", "b0:1b1:2", "xb0:1", "b0:1x", "b0:01", "b0:1 b1", "b01:1"),
}


class Bench:
    """A circuit that the shortcut would take, and the words of a report on it."""

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        taken = (bound.case for bound in bounds() if bound.taken)
        case = next(case for case in taken if case.step.deltas and case.step.batch)
        assert case.before is not None
        self.now, self.fields = case.now, dict(case.before)
        self.words = encode(case.step, "c", CIRCUIT, case.now)
        self.client, self.key = client, key_of(namespace, CIRCUIT)

    def refuses(self, words: list[str], **fields: str) -> None:
        before = self.fields | fields
        self.client.hset(self.key, mapping=before)
        with pytest.raises(redis.ResponseError) as refused:
            self.client.eval(script(), 2, self.key, self.key + ":log", *words)
        assert code_of(refused.value) == "CBARG", words
        assert self.client.hgetall(self.key) == before, words


@pytest.fixture
def bench(client: redis.Redis, namespace: str) -> Bench:
    return Bench(client, namespace)


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("place", WRITTEN)
def test_what_only_looks_like_a_report_is_refused(place: int, bench: Bench) -> None:
    assert " a:1763999999997:4:3:1 me:" in bench.fields["r"], "place 10 spans two of them"
    for text in WRITTEN[place]:
        words = list(bench.words)
        words[place - 1] = text.format(now=bench.now, policy=bench.words[6])
        stored = {"p": words[6]} if place == 7 else {}
        bench.refuses(words, **stored)


@pytest.mark.servers("valkey")
def test_a_report_that_breaks_off_is_refused(bench: Bench) -> None:
    for length in range(1, 13):
        bench.refuses(bench.words[:length])


@pytest.mark.servers("valkey")
def test_another_operation_is_no_report(bench: Bench) -> None:
    """Its arguments stand where a report's do: these would say that nothing has happened."""
    empty = ["settle", *bench.words[1:9], "token", "", "", "", ""]
    bench.refuses(empty)


INSTEAD = """
local server = redis
local redis = {
  call = server.call, error_reply = server.error_reply,
  pcall = function(command, ...)
    if command ~= '%s' then return server.pcall(command, ...) end
    return %s
  end,
}
"""


def alone(
    bench: Bench, words: list[str], command: str, answer: str, *, machine: bool = False
) -> object:
    """What the shortcut does when a command has this answer; or the machine, without a shortcut."""
    shortcut, _, rest = script().partition("local answer = steady()")
    bench.client.hset(bench.key, mapping=bench.fields)
    text = shortcut + ("local answer" + rest if machine else "return steady() or 'left'")
    text = INSTEAD % (command, answer) + text
    return bench.client.eval(text, 2, bench.key, bench.key + ":log", *words)


@pytest.mark.servers("valkey")
def test_the_servers_clock_is_read_to_the_millisecond(bench: Bench) -> None:
    """As every report in real life has it: tests give the time along."""
    words = [bench.words[0], "", *bench.words[2:]]
    for passed, micro in ((0, 0), (0, 999), (1, 1_000), (999, 999_999)):
        time = f"{{'{bench.now // 1_000}', '{micro}'}}"
        for machine in (False, True):
            found = alone(bench, words, "TIME", time, machine=machine)
            assert isinstance(found, list)
            assert found[1] == str(bench.now + passed)
    assert alone(bench, words, "TIME", "{err = 'ERR no clock'}") == "left"


@pytest.mark.servers("valkey")
def test_a_write_that_fails_is_told_with_its_code(bench: Bench) -> None:
    for said, code in (("-READONLY a replica", "READONLY"), ("ERR no such right", "CBREFUSED")):
        with pytest.raises(redis.ResponseError) as refused:
            alone(bench, bench.words, "HSET", f"{{err = '{said}'}}")
        assert code_of(refused.value) == code
