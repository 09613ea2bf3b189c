"""What errors, silence, lost connections and old servers mean; and pushes that stop coming."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed_breaker.errors import StoreDown, StoreError
from distributed_breaker.store import RedisStore
from tests.unit.clock import wait_until
from tests.unit.stub import ANSWER, REPLY, Stub, array, bulk, down, error, hello, run_one, sync

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


def test_a_dead_server_costs_little() -> None:
    """Seconds for a connection and for an answer, and nothing is tried twice behind our back."""
    with contextlib.closing(RedisStore("redis://localhost", "ns")) as store:
        settings = store._address.client().connection_pool.connection_kwargs
    assert settings["socket_connect_timeout"] == 0.5
    assert settings["socket_timeout"] == 0.25
    assert settings["retry"].get_retries() == 0


@pytest.mark.parametrize("patience", [0.5])
def test_silence_is_a_timeout_and_sends_nothing_again(stub: Stub, store: RedisStore) -> None:
    stub.answers["EVALSHA"] = None
    failure = down(lambda: run_one(store))
    assert (failure.code, failure.timeout, failure.loud) == ("TIMEOUT", True, False)
    assert stub.seen("EVALSHA") == ["EVALSHA"]


@pytest.mark.parametrize("patience", [0.5])
def test_a_late_answer_never_answers_the_next_step(stub: Stub, store: RedisStore) -> None:
    """An exception in mid-command closes the socket (redis-py #2624)."""
    stub.answers["EVALSHA"] = None
    down(lambda: run_one(store))
    late = stub.connections[-1]
    with contextlib.suppress(OSError):
        late.sendall(array(*ANSWER[:5], "late", *ANSWER[6:]))
    stub.answers["EVALSHA"] = array(*ANSWER)
    store._nodes._client.connection_pool.connection_kwargs["socket_timeout"] = 10.0
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
