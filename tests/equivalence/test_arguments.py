"""What the script refuses: malformed arguments, and hashes that it cannot read.

Whatever it refuses, it leaves the circuit, its log and everybody else alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis

from distributed_breaker import model
from distributed_breaker.errors import StoreError
from distributed_breaker.model import MAX_TIME, Known, Run, Step
from distributed_breaker.policy import Policy
from distributed_breaker.store import code_of, encode, key_of, script
from tests.equivalence.small import NOON
from tests.equivalence.twins import Case, Fields, run_model

POLICY = Policy(success_threshold=2).numbers
NONCE = "0123abcd"
# The names of the arguments, as lua/README.md numbers them.
COMMON = "operation now nonce channel name known policy offer".split()
OWN = {
    "report": "era reporter batch deltas detail".split(),
    "acquire": ["token"],
    "settle": "era token kind open_for deltas detail".split(),
    "cancel": ["token"],
    "override": "forced ttl detail".split(),
    "release": ["detail"],
    "reset": ["detail"],
}
TOO_LONG = str(1_000_000_000_001)  # ms, for any duration
TOO_LATE = str(MAX_TIME + 1)
TOO_MUCH = str(9_000_000_000_000_001)
NOT_WHOLE = ("", " ", "x", "1.5", "1e3", "0x10", "+1", " 1", "1 ", "--1", "\u0661")
NOT_A_NAME = ("", " ", "a b", "a:b", "*", "a*", "ä", "a\n", "a" * 25)

MALFORMED: dict[str, tuple[str, ...]] = {
    "operation": ("", "steal", "Report", "report ", "reset\n"),
    "now": (*NOT_WHOLE[1:], "-1", "-0", TOO_LATE),
    "nonce": ("", "0123abc", "0123abcde", "0123abcg", " 123abcd", "0x23abcd"),
    "known": (
        "",
        "0",
        "0 - closed 0",
        "0 - closed 0 0 0",
        "0 - shut 0 0",
        "- - closed 0 0",
        "1.5 - closed 0 0",
        "-1 - closed 0 0",
        f"{TOO_LATE} - closed 0 0",
        f"{TOO_MUCH} - closed 0 0",
        "5 - open -1 0",
        "5 - closed -1 0",
        "5 - forced_open -2 0",
        "5 - open 1.5 0",
        f"5 - open {TOO_LONG} 0",
        "5 - open 9 -1",
        "5 - open 9 65",
        "5 - open 9 x",
    ),
    "offer": ("", "2", "-1", "01", "true"),
    "era": ("", "1", "x abcd", "-1 abcd", "1 ab cd", "1  abcd", "1 ab.d", "1.5 a", f"{TOO_MUCH} a"),
    "reporter": NOT_A_NAME,
    "token": NOT_A_NAME,
    "batch": (
        *(
            "s",
            "1",
            "1s",
            "x1",
            "ss1",
            "s0",
            "s-1",
            "s1.5",
            "s65537",
            "s1,s1",
            "s1;",
            "s1 s",
            "\u017f1",
        ),
        *("f1*", "f1*0", "f1*-5", "f1*x", "f1**5", "f1*5*5", f"f1*{TOO_LONG}", "f2*5", "s2*1"),
        *(
            "@f1@5",
            "*f1*5",
            "@f1*5",
            "f1@",
            "f1@-1",
            "f1@x",
            "f1@1.5",
            "f1@@5",
            "f1@5@5",
            f"f1@{TOO_LONG}",
            "f1@5*5",
            "f1*@5",
        ),
        *(" ".join(["s1"] * 513), "f1025", "f1024 S1", "F512 I512 f1"),
    ),
    "deltas": (
        *("rejected", "rejected:", ":1", "rejected:-1", "rejected:1.5", "rejected:1:1", "x:1"),
        *("rejected:1,b0:1", "calls:1", "trips:1", "last_failure:1", "b16:1", "Rejected:1"),
        *(f"rejected:{TOO_MUCH}", " ".join(["b0:1"] * 33)),
    ),
    "detail": ("x" * 401, "é" * 201),
    "kind": ("", "x", "ss", "s1", "success"),
    "open_for": (*NOT_WHOLE, "-1", "-0", TOO_LONG),
    "forced": ("", "open", "closed", "half_open", "Forced_open"),
    "ttl": (*NOT_WHOLE, "0", "-0", "-2", TOO_LONG),
}
# By number of the policy: the least and the greatest value.
RANGES = {
    "version": (0, 9_000_000_000_000_000),
    "failure_threshold": (1, 1_000_000),
    "failure_rate": (0, 10_000),
    "window": (1, 86_400_000),
    "minimum_calls": (1, 1_000_000),
    "slow_call_rate": (1, 10_000),
    "open_interval": (1, 2_592_000_000),
    "open_interval_max": (0, 2_592_000_000),
    "backoff_multiplier": (100, 10_000),
    "jitter": (0, 10_000),
    "success_threshold": (1, 1_000),
    "half_open_permits": (1, 16),
    "permit_lease": (1, 86_400_000),
    "quorum": (1, 8),
}
# The extremes that are still allowed.
ALLOWED: dict[str, tuple[str, ...]] = {
    "now": ("0", str(MAX_TIME)),
    "nonce": ("00000000", "ffffffff", "ABCDEF09"),
    "known": (
        "0 - closed 0 0",
        f"{MAX_TIME} - closed 0 0",
        "5 what.ever! forced_open -1 64",
        f"5 - open {int(TOO_LONG) - 1} 0",
    ),
    "era": ("0 -", f"{int(TOO_MUCH) - 1} abcdef01"),
    "reporter": ("a", "a-Z_09", "a" * 24),
    "token": ("a", "a-Z_09", "a" * 24),
    "batch": (
        *("", "s65536", "f1024 s65536 i65536", "f512 F256 S128 I128", " ".join(["s1"] * 512)),
        *("f1*1", f"i1*{int(TOO_LONG) - 1}", "f9@0", f"F1*5@{int(TOO_LONG) - 1}"),
    ),
    "deltas": ("", "rejected:0 b15:1", f"duration_us:{int(TOO_MUCH) - 1}", " ".join(["b0:1"] * 32)),
    "detail": ("", "x" * 400, "é" * 200, '{"error": "E\\n\\u0000"}', "a\nb\tc  d "),
    "kind": tuple("sSfFiI"),
    "open_for": ("0", str(int(TOO_LONG) - 1)),
    "forced": ("forced_open", "forced_closed"),
    "ttl": ("-1", "1", str(int(TOO_LONG) - 1)),
}


def plain(op: str) -> list[str]:
    """Arguments of one operation with nothing wrong in them."""
    step = Step(op, NONCE, POLICY, reporter="a", token="t", kind="f", detail="by hand")
    kind = "forced_open" if op == "override" else "s"
    return encode(replace(step, kind=kind, batch=(Run("f"),)), "channel", "c", NOON)


def changed(op: str, values: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, list[str]]]:
    """The arguments of one operation, each time with one of the values in its place."""
    for index, name in enumerate(COMMON + OWN[op]):
        for value in values.get(name, ()):
            arguments = plain(op)
            arguments[index] = value
            yield f"{op} {name}={value!r:.60}", arguments


def policies(good: bool) -> Iterator[str]:
    """Policies at the edge of what is allowed, on either side of it."""
    for name, (least, most) in RANGES.items():
        for value in (least, most) if good else (least - 1, most + 1):
            yield POLICY._replace(**{name: value}).text()
    text = POLICY.text()
    if good:
        yield from (text + " 15 16", longest(256))
        return
    yield from ("", "1", text.rpartition(" ")[0], text.replace(" ", "  ", 1), " " + text)
    yield from (text + " ", text.replace(" ", ".5 ", 1), longest(257), text.replace(" ", ","))


def longest(length: int) -> str:
    """A policy with one more word, as a newer library may have, of so many characters in all."""
    text = POLICY.text() + " "
    return text + "9" * (length - len(text))


@pytest.fixture
def half_open() -> Fields:
    """A circuit on which every operation would do something: half open, with a permit out."""
    circuit = model.Circuit(NOON - 5, NONCE, "half_open", NOON - 5, 1000, policy=POLICY)
    circuit.slots.append(model.Slot("t", NOON - 1, 30_000))
    circuit.reason = "due 5 "
    return model.dump(circuit)


class Bench:
    """Two circuits, one that exists and one that does not, and who listens to their pushes."""

    def __init__(self, client: redis.Redis, namespace: str, fields: Fields) -> None:
        self.client = client
        self.fields = fields
        self.there, self.absent = key_of(namespace, "c"), key_of(namespace, "d")
        self.sha = client.script_load(script())
        client.hset(self.there, mapping=fields)

    def run(self, all_arguments: list[list[str]], key: str) -> list[Any]:
        """Run the script with each list of arguments; errors stand in the place of replies."""
        with self.client.pipeline(transaction=False) as pipe:
            for arguments in all_arguments:
                pipe.execute_command("EVALSHA", self.sha, 2, key, key + ":log", *arguments)
            return pipe.execute(raise_on_error=False)

    def untouched(self) -> bool:
        """Whether everything is as it was."""
        rest = self.client.exists(self.absent, self.absent + ":log", self.there + ":log")
        return self.client.hgetall(self.there) == self.fields and not rest


@pytest.fixture
def bench(client: redis.Redis, namespace: str, half_open: Fields) -> Iterator[Bench]:
    it = Bench(client, namespace, half_open)
    yield it
    client.delete(*(key + end for key in (it.there, it.absent) for end in ("", ":log")))


@pytest.mark.parametrize("op", OWN)
def test_malformed_arguments_are_refused(op: str, bench: Bench) -> None:
    """Whatever is malformed is answered with CBARG and changes nothing, whether or not there is a
    circuit: no hash, no log and no expiry appear, and none changes."""
    wrong = dict(changed(op, MALFORMED))
    wrong |= {
        f"policy={text!r:.60} {len(text)}": [*plain(op)[:6], text, *plain(op)[7:]]
        for text in policies(False)
    }
    # What is absent is as malformed as what is empty; a channel or a name is not looked at.
    names = (COMMON + OWN[op])[::-1]
    first = {"channel": "known", "name": "known", "detail": "detail"}
    for count, name in enumerate(reversed(names)):
        wrong[f"{first.get(name, name)}= after {count}"] = plain(op)[:count]
    for key in (bench.there, bench.absent):
        for what, answer in zip(wrong, bench.run(list(wrong.values()), key), strict=True):
            assert isinstance(answer, redis.ResponseError), (what, answer)
            assert code_of(answer) == "CBARG", (what, answer)
            name = what.split("=")[0].split()[-1]
            assert str(answer) == f"CBARG argument {name} is malformed", what
        assert bench.untouched()


@pytest.mark.parametrize("op", OWN)
def test_extreme_arguments_are_taken(op: str, bench: Bench) -> None:
    """What lies just within the limits is carried out, so the limits are where they should be."""
    right = dict(changed(op, ALLOWED))
    right |= {f"policy {text!r}": [*plain(op)[:6], text, *plain(op)[7:]] for text in policies(True)}
    for what, arguments in right.items():
        bench.client.delete(bench.absent)
        (answer,) = bench.run([arguments], bench.absent)
        assert isinstance(answer, list), (what, answer)
        assert answer[8] == "", (what, answer)


def test_a_generation_beyond_all_clocks_is_refused_unless_it_is_the_stores(bench: Bench) -> None:
    """After a v that lies in the year 10000 no other could follow, so no client can bring one in;
    but a store that holds one already goes on working."""
    known = Known(MAX_TIME + 1, NONCE, "closed", 0, 0)
    step = Step("report", NONCE, POLICY, known)
    (refused,) = bench.run([encode(step, "channel", "c", NOON)], bench.there)
    assert code_of(refused) == "CBARG"
    for fields in (bench.fields, None):
        with pytest.raises(StoreError, match=r"^CBARG argument known is malformed$"):
            run_model(Case(fields, step, NOON))
    late = bench.fields | {"h": bench.fields["h"].replace(str(NOON - 5), str(MAX_TIME + 1), 1)}
    bench.client.hset(bench.there, mapping=late)
    (answer,) = bench.run([encode(step, "channel", "c", NOON)], bench.there)
    assert tuple(answer) == tuple(map(str, run_model(Case(late, step, NOON)).reply))


# ---------------------------------------------------------------------------- hashes

NEWER = ("2", "2 1 a closed 0 0 0 0 - 1", "17 and whatever follows", "2 " + "9 " * 30)
GARBAGE = (
    *("", "x", "1", "1 ", "-1 1 a closed 0 0 0 0 - 1", "1.5 1 a closed 0 0 0 0 - 1"),
    *("1 1 a closed 0 0 0 0 -", "1 1 a shut 0 0 0 0 - 1", "{}", "closed", "1 2 3 4 5 6 7 8 9 10"),
)
HEADER = "1 1 a closed 0 0 0 0 - 1"
# Where the numbers of a header stand, and what is less than the least of each.
NUMBERS = {0: "-1", 1: "-1", 4: "-1", 5: "-2", 6: "-1", 7: "-1", 9: "-1"}


def spoiled(position: int, word: str) -> str:
    """A header with another word at one place."""
    words = HEADER.split()
    words[position] = word
    return " ".join(words)


GARBAGE = (*GARBAGE, *(spoiled(place, word) for place in NUMBERS for word in ("x", "1.5", "1e1")))


@pytest.mark.parametrize(("headers", "code"), [(NEWER, "CBSCHEMA"), (GARBAGE, "CBCORRUPT")])
def test_headers_that_cannot_be_read_are_refused(
    headers: tuple[str, ...], code: str, bench: Bench
) -> None:
    """A newer schema is never guessed at, and garbage never taken for a circuit: both twins answer
    with the same code, and whatever the operation is, nothing is written."""
    for header in headers:
        bench.fields["h"] = header
        bench.client.hset(bench.there, "h", header)
        for op, answer in zip(OWN, bench.run([plain(op) for op in OWN], bench.there), strict=True):
            assert isinstance(answer, redis.ResponseError), (header, op, answer)
            assert code_of(answer) == code, (header, op, answer)
        assert bench.untouched(), header
        with pytest.raises(StoreError) as caught:
            model.load(bench.fields)
        assert caught.value.code == code, header
        assert str(answer) == str(caught.value)


def test_numbers_that_no_script_writes_are_no_header(bench: Bench) -> None:
    """The script takes only numbers as it writes them, and as great as it writes them."""
    for place, below in NUMBERS.items():
        for word in (below, "01", "+1", TOO_MUCH):
            if (place, word) == (0, TOO_MUCH):
                continue
            bench.client.hset(bench.there, "h", spoiled(place, word))
            for op, answer in zip(
                OWN, bench.run([plain(o) for o in OWN], bench.there), strict=True
            ):
                assert code_of(answer) == "CBCORRUPT", (place, word, op)
        for word in ("0", "1"):
            bench.client.hset(bench.there, "h", spoiled(place, word))
            (answer,) = bench.run([plain("cancel")], bench.there)
            assert isinstance(answer, list), (place, word)


DAMAGE = {
    "h": ("1 x a closed 0 0 0 0 - 1", "1 1 a closed x 0 0 0 - 1", "1 1 a closed 0 0 0 0 - x"),
    "w": (
        "x",
        "0",
        "0 0 0 0 0 1",
        *(f"0 0 1 1 1 {b}" for b in ("1:1:1", "a:1:1:1", "x0:1:1:1", "0:1:1:1x")),
    ),
    "r": ("x", "0 a", "0 a:1:1:1", "0 a:x:0:0:0", "0 x:a:1:1:1:1", "0 a:1:1:1:1:1"),
    "s": ("t", "t:1", "t:x:1", "t:1:x", "x:t:1:1", "t:1:1:1"),
    "t": ("x", "1 2 x"),
    "e": ("x", ""),
}


@pytest.mark.parametrize("field", DAMAGE)
def test_damaged_fields_spoil_nothing_else(field: str, bench: Bench) -> None:
    """A step that stumbles over a damaged field leaves the hash as it found it."""
    for text in DAMAGE[field]:
        bench.fields[field] = text
        stumbled = 0
        for op in OWN:
            bench.client.delete(bench.there, bench.there + ":log")
            bench.client.hset(bench.there, mapping=bench.fields)
            (answer,) = bench.run([plain(op)], bench.there)
            if isinstance(answer, redis.RedisError):
                stumbled += 1
                assert bench.untouched(), (text, op)
        assert stumbled, text


def test_a_key_of_another_type_is_refused(bench: Bench) -> None:
    """A key that holds no hash is somebody else's: WRONGTYPE, on every server, and left alone."""
    fill = {
        "string": ("SET", bench.absent, "x"),
        "list": ("RPUSH", bench.absent, "x"),
        "set": ("SADD", bench.absent, "x"),
        "zset": ("ZADD", bench.absent, "1", "x"),
        "stream": ("XADD", bench.absent, "1-1", "h", "x"),
    }
    for kind, command in fill.items():
        bench.client.delete(bench.absent)
        bench.client.execute_command(*command)
        before = bench.client.dump(bench.absent) if kind != "stream" else b""
        for op, answer in zip(OWN, bench.run([plain(op) for op in OWN], bench.absent), strict=True):
            assert code_of(answer) == "WRONGTYPE", (kind, op, answer)
        assert bench.client.type(bench.absent) == kind
        assert kind == "stream" or bench.client.dump(bench.absent) == before
