"""The Redis side: what goes over the wire, and what its answers and failures mean.

A stub that speaks just enough of the protocol plays the server; how real servers behave is tested
on real servers.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker import Policy
from distributed_breaker.address import redacted
from distributed_breaker.errors import StoreError
from distributed_breaker.model import Known, Reply, Run, Step
from distributed_breaker.store import (
    RedisStore,
    StoreDown,
    decode,
    encode,
    encode_batch,
    key_of,
    script,
    sha,
)
from tests.unit.clock import wait_until

HEADER = "1 1764000012000 1a2b3c4d open 1764000012000 60613 0 0 - 2 run"
ANSWER = (HEADER, "1764000012345", "60268", "closed", "run", "ok", "0", "", "")
REPLY = Reply(HEADER, 1764000012345, 60268, "closed", "run", "ok", 0, "", "")
OK = b"+OK\r\n"
NUMBERS = Policy().numbers


# ---------------------------------------------------------------------------- a stub of a server


def array(*texts: str) -> bytes:
    return b"*%d\r\n" % len(texts) + b"".join(map(bulk, texts))


def bulk(text: str) -> bytes:
    data = text.encode()
    return b"$%d\r\n%s\r\n" % (len(data), data)


def error(text: str) -> bytes:
    return f"-{text}\r\n".encode()


def hello(version: str, server: str = "redis") -> bytes:
    return array("server", server, "version", version, "proto", "2", "mode", "standalone")


Answer = Callable[[list[str]], bytes | None]


class Stub:
    """Answers each command with what ``answer`` makes of it: None is silence, empty hangs up."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.answers: dict[str, bytes | Answer | None] = {"HELLO": hello("7.4.2"), "SELECT": OK}
        self.greeting = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def seen(self, *names: str) -> list[str]:
        """The names of the commands that came, or those among them that are asked for."""
        return [c[0] for c in self.commands if not names or c[0] in names]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            connection.sendall(self.greeting)
            stream = connection.makefile("rb")
            while line := stream.readline():
                command = []
                for _ in range(int(line[1:])):
                    size = int(stream.readline()[1:])
                    command.append(stream.read(size + 2)[:-2].decode())
                self.commands.append(command)
                answer = self.answers.get(command[0], error("ERR unknown command"))
                said = answer(command) if callable(answer) else answer
                if said == b"":
                    return
                if said is not None:
                    connection.sendall(said)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with contextlib.closing(Stub()) as stub:
        yield stub


@pytest.fixture
def store(stub: Stub) -> Iterator[RedisStore]:
    with contextlib.closing(RedisStore(f"redis://127.0.0.1:{stub.port}/0", "ns")) as store:
        yield store


def sync(nonce: str = "00000001", **more: Any) -> Step:
    return Step("report", nonce, NUMBERS, reporter="me", **more)


def run_one(store: RedisStore) -> Reply | StoreError:
    (reply,) = store.run([("b", sync())])
    return reply


def down(function: Callable[[], object]) -> StoreDown:
    with pytest.raises(StoreDown) as caught:
        function()
    return caught.value


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
                kind="F", open_for=250, retry=True, deltas=(("b0", 1),), detail="d",
            ),
            ["0", "17 aaaaaaaa", "tok", "F", "250", "1", "b0:1", "d"],
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
    client = store._client_of()
    kwargs = client.connection_pool.connection_kwargs
    assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("ann", "p@ss", 3)
    sentinels = client.connection_pool.sentinel_manager.sentinels
    hosts = [s.connection_pool.connection_kwargs for s in sentinels]
    assert [(h["host"], h["port"]) for h in hosts] == [("one", 26379), ("two", 26380)]
    assert store.channel == "cb:3:ns"
    client.close()


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


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "text",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "CBSCHEMA the circuit has schema 2",
        "CBCORRUPT the circuit's header cannot be read",
        "CBARG argument batch is malformed",
        "ERR user_script:310: attempt to index a nil value",
    ],
)
def test_an_error_of_one_circuit_stands_in_its_place(
    stub: Stub, store: RedisStore, text: str
) -> None:
    answers = iter([array(*ANSWER), error(text), array(*ANSWER)])
    stub.answers["EVALSHA"] = lambda _: next(answers)
    first, failed, last = store.run([("a", sync()), ("b", sync()), ("c", sync())])
    assert first == last == REPLY
    assert isinstance(failed, StoreError)
    assert failed.code == text.split(" ")[0]
    assert stub.seen("EVALSHA") == ["EVALSHA"] * 3


DOWN = {
    "NOPERM this user has no permissions to run the 'evalsha' command": True,
    "NOAUTH Authentication required.": True,
    "WRONGPASS invalid username-password pair": True,
    "CBREFUSED a command inside the script was refused": True,
    "OOM command not allowed when used memory > 'maxmemory'.": False,
    "READONLY You can't write against a read only replica.": False,
    "LOADING Redis is loading the dataset in memory": False,
    "MASTERDOWN Link with MASTER is down": False,
    "CLUSTERDOWN The cluster is down": False,
    "NOREPLICAS Not enough good replicas to write.": False,
    "BUSY Redis is busy running a script.": False,
    "MISCONF Redis is configured to save RDB snapshots": False,
    "TRYAGAIN Multiple keys request during rehashing of slot": False,
}


@pytest.mark.parametrize("text", DOWN)
@pytest.mark.parametrize("command", ["EVALSHA", "TIME", "SMEMBERS", "SADD"])
def test_every_other_error_is_the_whole_stores(
    stub: Stub, store: RedisStore, command: str, text: str
) -> None:
    stub.answers[command] = error(text)
    ask: dict[str, Callable[[], object]] = {
        "EVALSHA": lambda: run_one(store),
        "TIME": lambda: store.poll([]),
        "SMEMBERS": store.names,
        "SADD": lambda: store.remember(["b"]),
    }
    failure = down(ask[command])
    assert (failure.code, failure.loud, failure.timeout) == (text.split(" ")[0], DOWN[text], False)
    assert stub.seen(command) == [command]


@pytest.mark.parametrize(
    ("text", "loud"),
    [
        ("NOAUTH HELLO must be called with the client already authenticated", True),
        ("LOADING Redis is loading the dataset in memory", False),
    ],
)
def test_errors_before_the_first_step(stub: Stub, store: RedisStore, text: str, loud: bool) -> None:
    stub.answers["HELLO"] = error(text)
    failure = down(lambda: run_one(store))
    assert (failure.code, failure.loud) == (text.split(" ")[0], loud)
    stub.answers |= {"HELLO": hello("7.4.2"), "EVALSHA": array(*ANSWER)}
    assert run_one(store) == REPLY


def test_too_many_clients_is_no_matter_for_an_operator(stub: Stub, store: RedisStore) -> None:
    """The server says so and hangs up; it may well be over in a second."""
    stub.greeting = error("ERR max number of clients reached")
    stub.answers["HELLO"] = b""
    failure = down(lambda: run_one(store))
    assert failure.loud is False
    assert failure.timeout is False


def test_a_refused_connection(stub: Stub) -> None:
    stub.close()
    with contextlib.closing(RedisStore(f"redis://127.0.0.1:{stub.port}/0", "ns")) as store:
        failure = down(lambda: run_one(store))
    assert (failure.code, failure.timeout, failure.loud) == ("CONNECTION", False, False)


def test_a_missing_socket(tmp_path: Path) -> None:
    with contextlib.closing(RedisStore(f"unix://{tmp_path}/absent.sock", "ns")) as store:
        assert down(lambda: run_one(store)).code == "CONNECTION"


def test_a_host_without_an_address() -> None:
    with contextlib.closing(RedisStore("redis://no-such-host.invalid:6379/0", "ns")) as store:
        failure = down(lambda: run_one(store))
    assert failure.code in ("CONNECTION", "TIMEOUT")


def test_a_lost_connection_sends_nothing_again(stub: Stub, store: RedisStore) -> None:
    """The step may have been carried out, so a retry would count it twice."""
    stub.answers["EVALSHA"] = b""
    failure = down(lambda: run_one(store))
    assert (failure.code, failure.timeout) == ("CONNECTION", False)
    assert stub.seen("EVALSHA") == ["EVALSHA"]


def test_after_a_lost_connection_the_next_step_opens_another(stub: Stub, store: RedisStore) -> None:
    stub.answers["EVALSHA"] = b""
    down(lambda: run_one(store))
    stub.answers["EVALSHA"] = array(*ANSWER)
    assert run_one(store) == REPLY


def test_silence_is_a_timeout_and_sends_nothing_again(stub: Stub, store: RedisStore) -> None:
    stub.answers["EVALSHA"] = None
    failure = down(lambda: run_one(store))
    assert (failure.code, failure.timeout, failure.loud) == ("TIMEOUT", True, False)
    assert stub.seen("EVALSHA") == ["EVALSHA"]


def test_a_late_answer_never_answers_the_next_step(stub: Stub, store: RedisStore) -> None:
    """An exception in mid-command closes the socket (redis-py #2624)."""
    stub.answers["EVALSHA"] = None
    down(lambda: run_one(store))
    late = stub.connections[-1]
    with contextlib.suppress(OSError):
        late.sendall(array(*ANSWER[:5], "late", *ANSWER[6:]))
    stub.answers["EVALSHA"] = array(*ANSWER)
    assert run_one(store) == REPLY
    assert len(stub.connections) == 2


def test_an_answer_that_is_cut_off_is_a_failure(stub: Stub, store: RedisStore) -> None:
    def half(_: list[str]) -> bytes:
        threading.Timer(0.0, stub.connections[-1].shutdown, [socket.SHUT_RDWR]).start()
        return array(*ANSWER)[:40]

    stub.answers["EVALSHA"] = half
    assert down(lambda: run_one(store)).code == "CONNECTION"


# ---------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        (error("ERR unknown command `HELLO`, with args beginning with: "), "5"),
        (error("ERR unknown command 'HELLO'"), "5"),
        (hello("5.0.14"), "5.0.14"),
        (hello("6.0.16"), "6.0.16"),
        (hello("6.1.240"), "6.1.240"),
        (hello("2.8"), "2.8"),
    ],
)
def test_a_server_that_is_too_old_is_refused_before_anything_is_asked(
    stub: Stub, store: RedisStore, answer: bytes, version: str
) -> None:
    stub.answers["HELLO"] = answer
    for ask in (lambda: run_one(store), lambda: store.poll(["b"]), store.names, store.subscribe):
        failure = down(ask)
        assert (failure.code, failure.loud) == ("CBOLD", True)
        assert version in str(failure)
        assert "6.2" in str(failure)
    assert set(stub.seen()) == {"HELLO"}


@pytest.mark.parametrize(
    "answer",
    [
        hello("6.2.0"),
        hello("6.2"),
        hello("7.0.15"),
        hello("8.2.1"),
        hello("10.0.0"),
        hello("255.255.255"),  # what a build from the development branch calls itself
        hello("9.0.0", "valkey"),
        array("server", "dragonfly"),
        hello("unstable"),
        hello(""),
        error("NOPERM this user has no permissions to run the 'hello' command"),
        error("ERR syntax error in HELLO"),
    ],
)
def test_other_servers_are_used(stub: Stub, store: RedisStore, answer: bytes) -> None:
    stub.answers["HELLO"] = answer
    stub.answers["EVALSHA"] = array(*ANSWER)
    assert run_one(store) == REPLY


def test_the_version_is_asked_once_but_again_after_close(stub: Stub, store: RedisStore) -> None:
    stub.answers["EVALSHA"] = array(*ANSWER)
    for _ in range(3):
        run_one(store)
    assert len(stub.seen("HELLO")) == 1
    store.close()
    run_one(store)
    assert len(stub.seen("HELLO")) == 2


def test_an_upgraded_server_is_used_after_all(stub: Stub, store: RedisStore) -> None:
    stub.answers["HELLO"] = hello("6.0.16")
    down(lambda: run_one(store))
    stub.answers |= {"HELLO": hello("7.2.0"), "EVALSHA": array(*ANSWER)}
    assert run_one(store) == REPLY


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


# ---------------------------------------------------------------------------- pushes

CHANNEL = "cb:0:ns"
SUBSCRIBED = b"*3\r\n" + bulk("subscribe") + bulk(CHANNEL) + b":1\r\n"


def push(text: str) -> bytes:
    return array("message", CHANNEL, text)


def test_pushes_are_heard(stub: Stub, store: RedisStore) -> None:
    stub.answers["SUBSCRIBE"] = SUBSCRIBED + push("a one") + push("b two")
    subscription = store.subscribe()
    assert stub.commands[-1] == ["SUBSCRIBE", CHANNEL]
    assert [subscription.get(5.0), subscription.get(5.0)] == ["a one", "b two"]
    assert subscription.get(0.01) is None
    subscription.close()


def test_a_subscription_has_a_connection_of_its_own(stub: Stub, store: RedisStore) -> None:
    stub.answers |= {"SUBSCRIBE": SUBSCRIBED, "EVALSHA": array(*ANSWER)}
    subscription = store.subscribe()
    assert run_one(store) == REPLY
    assert len(stub.connections) == 2
    subscription.close()


def test_a_ping_that_is_answered(stub: Stub, store: RedisStore) -> None:
    stub.answers |= {"SUBSCRIBE": SUBSCRIBED, "PING": array("pong", "")}
    subscription = store.subscribe()
    subscription.ping()
    assert subscription.get(5.0) == ""
    assert subscription.get(0.01) is None
    subscription.close()


def test_a_ping_that_is_not_answered(stub: Stub, store: RedisStore) -> None:
    stub.answers |= {"SUBSCRIBE": SUBSCRIBED, "PING": None}
    subscription = store.subscribe()
    subscription.ping()
    assert down(lambda: subscription.get(0.01)).code == "CONNECTION"
    subscription.close()


def test_a_push_is_a_sign_of_life_too(stub: Stub, store: RedisStore) -> None:
    stub.answers |= {"SUBSCRIBE": SUBSCRIBED, "PING": push("a one")}
    subscription = store.subscribe()
    subscription.ping()
    assert subscription.get(5.0) == "a one"
    subscription.close()


def test_a_lost_subscription_says_so(stub: Stub, store: RedisStore) -> None:
    """It must not subscribe again in silence: what was pushed meanwhile would be missed."""
    stub.answers["SUBSCRIBE"] = SUBSCRIBED
    subscription = store.subscribe()
    stub.connections[-1].shutdown(socket.SHUT_RDWR)
    assert down(lambda: subscription.get(5.0)).code == "CONNECTION"
    assert stub.seen("SUBSCRIBE") == ["SUBSCRIBE"]
    subscription.close()


def test_a_subscription_that_waits_can_be_woken(stub: Stub, store: RedisStore) -> None:
    stub.answers["SUBSCRIBE"] = SUBSCRIBED
    subscription = store.subscribe()
    failures: list[StoreDown] = []
    waiting = threading.Thread(
        target=lambda: failures.append(down(lambda: subscription.get(60.0))), daemon=True
    )
    waiting.start()
    wait_until(lambda: stub.seen("SUBSCRIBE"))
    subscription.wake()
    waiting.join(10)
    assert len(failures) == 1
    subscription.close()


@pytest.mark.parametrize("code", ["NOPERM", "NOAUTH"])
def test_a_subscription_that_is_not_allowed(stub: Stub, store: RedisStore, code: str) -> None:
    stub.answers["SUBSCRIBE"] = error(f"{code} no right to this channel")
    failure = down(store.subscribe)
    assert (failure.code, failure.loud) == (code, True)


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
