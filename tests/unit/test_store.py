"""The Redis side: what goes over the wire, and how its answers are read.

A stub plays the server; how real servers behave is tested on real servers.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker.address import redacted
from distributed_breaker.errors import StoreError
from distributed_breaker.model import Known, Run, Step
from distributed_breaker.store import RedisStore, decode, encode, encode_batch, key_of, script, sha
from tests.unit.stub import (
    ANSWER,
    HEADER,
    NUMBERS,
    OK,
    REPLY,
    Stub,
    array,
    bulk,
    down,
    error,
    run_one,
    sync,
)

# ---------------------------------------------------------------------------- the wire form

POLICY_TEXT = "0 5 5000 60000 10 5000 60000 0 200 1000 3 3 30000 2"
KNOWN = Known(17, "aaaaaaaa", "open", 1234, 2)
COMMON = ["", "0000000f", "cb:0:ns", "b", "17 aaaaaaaa open 1234 2", POLICY_TEXT]


@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        (
            Step(
                "report", "0000000f", NUMBERS, KNOWN, offer=True, era=(16, "bbbbbbbb"),
                reporter="me", batch=(Run("s", 3), Run("f", 1, 500), Run("I", 2, 0, 70)),
                deltas=(("rejected", 4), ("b3", 1)), detail='{"a": 1}',
            ),
            ["1", "16 bbbbbbbb", "me", "s3 f1*500 I2@70", "rejected:4 b3:1", '{"a": 1}'],
        ),
        (
            Step("report", "0000000f", NUMBERS, KNOWN, reporter="me"),
            ["0", "0 -", "me", "", "", ""],
        ),
        (Step("acquire", "0000000f", NUMBERS, KNOWN, token="tok"), ["0", "tok"]),
        (Step("cancel", "0000000f", NUMBERS, KNOWN, token="tok"), ["0", "tok"]),
        (
            Step(
                "settle", "0000000f", NUMBERS, KNOWN, era=(17, "aaaaaaaa"), token="tok",
                kind="F", open_for=250, deltas=(("b0", 1),), detail="d",
            ),
            ["0", "17 aaaaaaaa", "tok", "F", "250", "b0:1", "d"],
        ),
        (
            Step("override", "0000000f", NUMBERS, KNOWN, kind="forced_open", ttl=-1, detail="d"),
            ["0", "forced_open", "-1", "d"],
        ),
        (Step("release", "0000000f", NUMBERS, KNOWN, detail="d"), ["0", "d"]),
        (Step("reset", "0000000f", NUMBERS, KNOWN), ["0", ""]),
    ],
    ids=lambda value: value.op if isinstance(value, Step) else "",
)  # fmt: skip
def test_steps_are_encoded_as_specified(step: Step, arguments: list[str]) -> None:
    """The order of ``lua/README.md``, section 5."""
    assert encode(step, "cb:0:ns", "b") == [step.op, *COMMON, *arguments]


def test_a_time_of_ones_own_is_for_tests() -> None:
    assert encode(sync(), "c", "b", 1764000000000)[1] == "1764000000000"
    assert encode(sync(), "c", "b")[1] == ""


runs = st.builds(
    Run,
    st.sampled_from("sfiSFI"),
    st.integers(1, 65_536),
    st.sampled_from([0, 0, 1, 10**12]),
    st.sampled_from([-1, 0, 1, 10**12]),
)


@given(st.lists(runs, max_size=20))
def test_a_batch_reads_back(batch: list[Run]) -> None:
    text = encode_batch(batch)
    again = [
        re.fullmatch(r"([sfiSFI])(\d+)(?:\*(\d+))?(?:@(\d+))?", word) for word in text.split(" ")
    ]
    if not batch:
        assert text == ""
        return
    assert [
        Run(m[1], int(m[2]), int(m[3] or 0), -1 if m[4] is None else int(m[4]))
        for m in again
        if m is not None
    ] == batch


def test_an_answer_is_decoded() -> None:
    assert decode(ANSWER) == REPLY
    assert decode([*ANSWER, "what a newer script adds"]) == REPLY


def test_keys_of_one_circuit_share_a_slot() -> None:
    assert key_of("ns", "web.db") == "cb:{ns:web.db}"


def test_the_script_is_the_one_in_the_repository() -> None:
    path = Path(__file__).parents[2] / "lua" / "breaker.lua"
    assert script() == path.read_text(encoding="utf-8")
    assert re.fullmatch(r"[0-9a-f]{40}", sha())


# ---------------------------------------------------------------------------- running steps


def test_steps_go_out_as_evalsha_in_one_go(stub: Stub, store: RedisStore) -> None:
    stub.answers["EVALSHA"] = array(*ANSWER)
    steps = [("a", sync()), ("b", Step("acquire", "00000002", NUMBERS, token="tok"))]
    assert store.run(steps) == [REPLY, REPLY]
    for command, (name, step) in zip(stub.commands[1:], steps, strict=True):
        key = f"cb:{{ns:{name}}}"
        assert command == ["EVALSHA", sha(), "2", key, key + ":log", *encode(step, "cb:0:ns", name)]


def test_nothing_else_is_sent(stub: Stub, store: RedisStore) -> None:
    """A user with the least rights has none for CLIENT SETINFO, INFO, COMMAND and the like."""
    stub.answers["EVALSHA"] = array(*ANSWER)
    run_one(store)
    run_one(store)
    assert stub.seen() == ["HELLO", "EVALSHA", "EVALSHA"]


def test_the_database_and_its_channel(stub: Stub) -> None:
    """Pub/sub ignores databases, so the channel's name holds the number."""
    stub.answers["EVALSHA"] = array(*ANSWER)
    for url in (f"redis://127.0.0.1:{stub.port}/5", f"redis://127.0.0.1:{stub.port}?db=5"):
        stub.commands.clear()
        with contextlib.closing(RedisStore(url, "ns")) as store:
            assert store.channel == "cb:5:ns"
            run_one(store)
        assert stub.commands[0] == ["SELECT", "5"]


@pytest.mark.parametrize("option", ["decode_responses=false", "protocol=3", "encoding=latin-1"])
def test_options_of_a_url_do_not_break_the_protocol(stub: Stub, option: str) -> None:
    stub.answers["EVALSHA"] = array(*ANSWER)
    url = f"redis://127.0.0.1:{stub.port}/0?{option}"
    with contextlib.closing(RedisStore(url, "ns")) as store:
        assert run_one(store) == REPLY


@pytest.mark.parametrize(
    ("user", "authenticated"),
    [
        (":p%40ss%2Fword", ["AUTH", "p@ss/word"]),
        ("ann:p%3Ass", ["AUTH", "ann", "p:ss"]),
    ],
)
def test_escaped_credentials(stub: Stub, user: str, authenticated: list[str]) -> None:
    stub.answers["EVALSHA"] = array(*ANSWER)
    stub.answers["AUTH"] = OK
    url = f"redis://{user}@127.0.0.1:{stub.port}/0"
    with contextlib.closing(RedisStore(url, "ns")) as store:
        run_one(store)
    assert stub.commands[0] == authenticated


def test_escaped_credentials_behind_a_sentinel() -> None:
    store = RedisStore("redis+sentinel://ann:p%40ss@one,two:26380/mymaster/3", "ns")
    options = store._address.options
    assert (options["username"], options["password"], options["db"]) == ("ann", "p@ss", 3)
    assert store._address.hosts == (("one", 26379), ("two", 26380))
    assert store._address.primary == "mymaster"
    assert store.channel == "cb:3:ns"


# ---------------------------------------------------------------------------- NOSCRIPT


def test_an_unknown_script_is_loaded_and_the_step_sent_again(stub: Stub, store: RedisStore) -> None:
    loaded: list[str] = []

    def load(command: list[str]) -> bytes:
        assert command[1].upper() == "LOAD"
        loaded.append(command[2])
        return bulk(sha())

    stub.answers["SCRIPT"] = load
    stub.answers["EVALSHA"] = lambda _: array(*ANSWER) if loaded else error("NOSCRIPT No matching")
    assert run_one(store) == REPLY
    assert loaded == [script()]
    first, second = (c for c in stub.commands if c[0] == "EVALSHA")
    assert first == second


def test_a_script_that_is_never_known_is_not_sent_for_ever(stub: Stub, store: RedisStore) -> None:
    stub.answers["EVALSHA"] = error("NOSCRIPT No matching script")
    stub.answers["SCRIPT"] = bulk(sha())
    assert down(lambda: run_one(store)).code == "NOSCRIPT"
    assert stub.seen("EVALSHA", "SCRIPT") == ["EVALSHA", "SCRIPT", "EVALSHA"]


def test_only_what_was_not_carried_out_is_sent_again(stub: Stub, store: RedisStore) -> None:
    """A flush of scripts in the middle of a pipeline: the first step was counted already."""
    answers = iter([array(*ANSWER), error("NOSCRIPT No"), array(*ANSWER)])
    stub.answers["EVALSHA"] = lambda _: next(answers)
    stub.answers["SCRIPT"] = bulk(sha())
    assert store.run([("a", sync()), ("b", sync())]) == [REPLY, REPLY]
    names = [c[3] for c in stub.commands if c[0] == "EVALSHA"]
    assert names == ["cb:{ns:a}", "cb:{ns:b}", "cb:{ns:b}"]


def test_a_script_that_may_not_be_loaded_is_the_whole_stores_failure(
    stub: Stub, store: RedisStore
) -> None:
    stub.answers["EVALSHA"] = error("NOSCRIPT No matching script")
    stub.answers["SCRIPT"] = error("NOPERM this user has no permissions to run 'script|load'")
    failure = down(lambda: run_one(store))
    assert (failure.code, failure.loud) == ("NOPERM", True)


# ---------------------------------------------------------------------------- other commands


def test_poll_reads_the_time_and_the_headers(stub: Stub, store: RedisStore) -> None:
    def hget(command: list[str]) -> bytes:
        assert command[2] == "h"
        known = {"cb:{ns:a}": bulk(HEADER), "cb:{ns:b}": b"$-1\r\n"}
        return known.get(command[1], error("WRONGTYPE Operation against a key"))

    stub.answers |= {"TIME": array("1764000000", "123456"), "HGET": hget}
    assert store.poll(["a", "b", "c"]) == (1764000000123, [HEADER, None, None])
    assert store.poll([]) == (1764000000123, [])


def test_read_reads_all_fields(stub: Stub, store: RedisStore) -> None:
    def hgetall(command: list[str]) -> bytes:
        known = {"cb:{ns:a}": array("h", HEADER, "w", "0 0"), "cb:{ns:b}": array()}
        return known.get(command[1], error("WRONGTYPE Operation against a key"))

    stub.answers |= {"TIME": array("1764000000", "999999"), "HGETALL": hgetall}
    now, (a, b, c) = store.read(["a", "b", "c"])
    assert now == 1764000000999
    assert (a, b) == ({"h": HEADER, "w": "0 0"}, {})
    assert isinstance(c, StoreError)
    assert c.code == "WRONGTYPE"


def test_names_are_remembered_per_namespace(stub: Stub, store: RedisStore) -> None:
    stub.answers |= {"SADD": b":2\r\n", "SMEMBERS": array("b", "a")}
    store.remember(["a", "b"])
    assert store.names() == ["a", "b"]
    assert stub.commands[-2:] == [
        ["SADD", "cb:ns:circuits", "a", "b"],
        ["SMEMBERS", "cb:ns:circuits"],
    ]


def test_the_log_is_read_newest_first(stub: Stub, store: RedisStore) -> None:
    entry = b"*2\r\n" + bulk("5-1") + array("cause", "run", "at", "5")
    stub.answers["XREVRANGE"] = b"*1\r\n" + entry
    assert store.log("b", 7) == [{"cause": "run", "at": "5"}]
    assert stub.commands[-1] == ["XREVRANGE", "cb:{ns:b}:log", "+", "-", "COUNT", "7"]


# ---------------------------------------------------------------------------- redaction


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:hunter2@host:6379/0", "redis://host:6379/0"),
        ("rediss://:hunter2@host/0?ssl_cert_reqs=none", "rediss://host/0"),
        ("redis+sentinel://u:hunter2@one:1,two:2/m/0", "redis+sentinel://one:1,two:2/m/0"),
        ("unix:///run/redis.sock?password=hunter2", "unix:///run/redis.sock"),
    ],
)
def test_a_url_is_shown_without_credentials(url: str, shown: str) -> None:
    assert redacted(url) == shown


@given(st.text(st.sampled_from("abc:/?#[]@!$&'()*+,;=% "), max_size=12))
def test_no_password_shows_whatever_its_characters(middle: str) -> None:
    """Also one whose characters should have been escaped."""
    shown = redacted(f"redis://user:secret{middle}secret@host:6379/0")
    assert "secret" not in shown
