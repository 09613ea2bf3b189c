"""What a server may answer instead of carrying out a step, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.faults.proxy import Proxy, stub
from tests.fleet.harness import CIRCUIT, Fleet, Process, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them.  Elsewhere a proxy or a stub answers in the
# server's place.
ALL = pytest.mark.servers("valkey", "redis8", "redis")


def loud(process: Process) -> list[str]:
    """What was logged as an error since the last time."""
    return [line["text"] for line in process.do("logs") if line["level"] == "ERROR"]


def protects_itself(process: Process, circuit: str | None = None) -> None:
    """It goes on without the store: nothing is raised, and its own failures stop its own calls."""
    more = {"circuit": circuit} if circuit else {}
    assert process.do("succeed", count=20, **more) == {"admitted": 20, "rejected": 0}
    process.fail_until_refused(**more)
    assert process.do("attempt", **more)["state"] == "open"


PASSING = [
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "NOREPLICAS Not enough good replicas to write.",
    "BUSY Redis is busy running a script.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "MISCONF Errors writing to the AOF file: No space left on device",
]
LASTING = [
    "NOAUTH Authentication required.",
    "NOPERM User x has no permissions to run the 'evalsha' command",
]


@pytest.mark.parametrize("text", PASSING + LASTING, ids=lambda text: text.split()[0])
def test_a_server_that_refuses_every_command(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, text: str
) -> None:
    (process,) = fleet.start(1, {}, url=proxy.url)
    # A refusal to keep the circuit's name is said for itself; it is not what is looked for here.
    until(lambda: proxy.seen["SADD"] >= 1, "the circuit's name is kept")
    process.do("logs")
    code = text.split()[0]
    proxy.fail("*", text)
    assert process.do("fail") == {"admitted": 1, "rejected": 0}
    until(lambda: process.do("look")["down"] == code, "it is degraded at once", 10)
    protects_itself(process)
    proxy.seen.clear()
    until(lambda: proxy.seen["TIME"] + proxy.seen["HELLO"] >= 3, "it has tried to return")
    said = [line for line in process.do("logs") if line["level"] in ("WARNING", "ERROR")]
    levels = [line["level"] for line in said]
    assert levels == ["ERROR" if text in LASTING else "WARNING"], said
    assert code in said[0]["text"]
    proxy.clear()
    until(lambda: not process.do("look")["degraded"], "it has returned")
    # It has protected itself, and goes on so; the store has not heard of any trip.
    assert process.do("look")["shared"] == "closed"
    assert process.do("operate", step="reset") == ""
    fleet.until_all("closed")
    assert process.do("waits") == []


@pytest.mark.parametrize("text", PASSING, ids=lambda text: text.split()[0])
def test_a_server_that_refuses_only_to_write(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, text: str
) -> None:
    """As a replica, a full server and a full disk do: TIME is answered, steps are not."""
    (process,) = fleet.start(1, {}, url=proxy.url)
    process.do("logs")
    proxy.fail("report", text)
    process.do("fail")
    until(lambda: process.do("look")["degraded"], "it is degraded")
    proxy.seen.clear()
    until(lambda: proxy.seen["report"] >= 3, "it has tried to return")
    said = [line for line in process.do("logs") if line["level"] in ("WARNING", "ERROR")]
    assert len(said) == 1
    proxy.clear()
    until(lambda: not process.do("look")["degraded"], "it has returned")
    fleet.until_agreed(client)


def test_what_is_pushed_holds_also_while_steps_are_refused(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """C7: degraded, but not deaf."""
    deaf, other = fleet.start(1, {}, url=proxy.url) + fleet.start(1, {})
    until(lambda: proxy.seen["SUBSCRIBE"], "it subscribes")
    proxy.fail("report", PASSING[1])
    deaf.do("fail")
    until(lambda: deaf.do("look")["degraded"], "it is degraded")
    assert deaf.do("attempt")["admitted"]
    other.do("fail", count=5)
    until(lambda: other.do("look")["shared"] == "open", "the trip")
    until(lambda: not deaf.do("attempt")["admitted"], "the push")
    assert deaf.do("look")["degraded"]
    assert deaf.do("attempt")["source"] == "shadow"


@ALL
@pytest.mark.parametrize("first", ["closed", "open"])
def test_the_primary_becomes_a_replica(
    broken_server: Server, fleet: Fleet, client: redis.Redis, first: str
) -> None:
    """A sync without news is answered by a replica too; that must not become a loop of returning,
    being refused and losing what was recorded."""
    fleet.start(2, {"failure_threshold": 20 if first == "open" else 100_000})
    if first == "open":
        fleet.trip(client)
    fleet.do("flush")
    fleet.do("logs")
    client.replicaof("127.0.0.1", 1)
    fleet.do("hammer", threads=1, outcome="failure", pause=0.02)
    steps = calls_of(client, "evalsha")
    until(lambda: calls_of(client, "evalsha") > steps + 8, "it was refused again and again")
    done = fleet.do("rest")
    if first == "closed":
        assert all(set(said) == {"admitted", "slowest"} for said in done)
    else:
        assert all("admitted" not in said for said in done)
    assert "" not in fleet.do("operate", step="force_open")
    said = [line for lines in fleet.do("logs") for line in lines if line["level"] == "WARNING"]
    assert len(said) <= 2
    assert fleet.states() == [first] * 2
    client.replicaof("NO", "ONE")
    fleet.until_agreed(client)
    fleet.do("flush")
    for account in fleet.do("conservation"):
        assert account["recorded"] == account["flushed"] + account["dropped"]
        # What a refused batch held is lost, so few may be sent.
        assert account["dropped"] <= 20
    assert fleet.states() == [first] * 2


@ALL
def test_a_server_without_room(broken_server: Server, fleet: Fleet, client: redis.Redis) -> None:
    """maxmemory with noeviction, for real."""
    (process,) = fleet.start(1, {})
    process.do("logs")
    client.config_set("maxmemory", 1)
    process.do("fail")
    until(lambda: process.do("look")["down"] == "OOM", "it is degraded at once", 10)
    protects_itself(process)
    assert [line["level"] for line in process.do("logs") if line["level"] != "DEBUG"] == ["WARNING"]
    client.config_set("maxmemory", 0)
    until(lambda: not process.do("look")["degraded"], "it has returned")
    assert process.do("operate", step="reset") == ""
    fleet.until_all("closed")


def calls_of(client: redis.Redis, command: str) -> int:
    stats: Any = client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


def test_a_server_that_has_no_room_for_connections(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    (process,) = fleet.start(1, {}, url=proxy.url)
    proxy.greeting = b"-ERR max number of clients reached\r\n"
    proxy.reset()
    until(lambda: process.do("look")["degraded"], "it is degraded")
    protects_itself(process)
    assert process.do("look")["down"]
    proxy.greeting = b""
    until(lambda: not process.do("look")["degraded"], "it has returned")


@pytest.mark.parametrize(
    ("hello", "loud_word"),
    [
        (b"*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n5.0.0\r\n", "5.0.0"),
        (b"-ERR unknown command `HELLO`, with args beginning with: \r\n", "6.2"),
    ],
    ids=["says so", "knows no HELLO"],
)
def test_a_server_that_is_too_old(
    fleet_of: Callable[[str], Fleet], hello: bytes, loud_word: str
) -> None:
    with stub({"HELLO": hello, "*": b"-ERR unknown command\r\n"}) as old:
        fleet = fleet_of(old.url)
        (process,) = fleet.start(1, blank=True)
        (said,) = fleet.open([process], {}, first="attempt")
        assert said["admitted"]
        protects_itself(process)
        assert process.do("look")["down"] == "CBOLD"
        old.seen.clear()
        until(lambda: old.seen["HELLO"] >= 2, "it looks again, for the case of an upgrade")
        (line,) = loud(process)
        assert loud_word in line
        assert set(old.seen) == {"HELLO"}


@pytest.mark.parametrize(
    "talk",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\x01\xff\r\n",
        b"$-7\r\n",
        b"+OK\r\n",
        b":7\r\n",
        b"*0\r\n",
    ],
    ids=["http", "binary", "negative", "ok", "number", "empty"],
)
def test_something_that_is_no_redis_at_all(fleet_of: Callable[[str], Fleet], talk: bytes) -> None:
    with stub({"*": talk}) as stranger:
        fleet = fleet_of(stranger.url)
        (process,) = fleet.start(1, blank=True)
        (said,) = fleet.open([process], {}, first="attempt")
        assert said["admitted"]
        protects_itself(process)
        stranger.seen.clear()
        until(lambda: sum(stranger.seen.values()) >= 3, "it looks again")
        said = [line for line in process.do("logs") if line["level"] in ("WARNING", "ERROR")]
        assert len(said) == 1
        assert "Traceback" not in said[0]["text"]


def test_a_script_that_the_server_cannot_keep(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Stoplight #777: NOSCRIPT loops."""
    proxy.fail("EVALSHA", "NOSCRIPT No matching script. Please use EVAL.")
    (process,) = fleet.start(1, blank=True)
    (said,) = fleet.open([process], {}, url=proxy.url, first="attempt")
    assert said["admitted"]
    protects_itself(process)
    until(lambda: proxy.seen["SCRIPT"] >= 3, "it has tried to return")
    # Each try loads the script once and runs the step once more.
    assert proxy.seen["EVALSHA"] <= 2 * proxy.seen["SCRIPT"] + 2
    proxy.clear()
    until(lambda: not process.do("look")["degraded"], "it has returned")


def harm(client: redis.Redis, key: str, how: str) -> None:
    if how == "WRONGTYPE":
        client.delete(key)
        client.set(key, "a string")
    elif how == "CBSCHEMA":
        header = str(client.hget(key, "h"))
        client.hset(key, "h", "2" + header[1:] + " more")
    else:
        client.hset(key, "h", "nonsense")


@ALL
@pytest.mark.parametrize("how", ["WRONGTYPE", "CBSCHEMA", "CBCORRUPT"])
@pytest.mark.parametrize("when", ["before", "while used"])
def test_a_key_that_cannot_be_used_concerns_its_circuit_alone(
    fleet: Fleet, client: redis.Redis, how: str, when: str
) -> None:
    key = key_of(fleet.namespace, CIRCUIT)
    (other,) = fleet.start(1, {}, circuit="other")
    if when == "before":
        client.hset(key, "h", "1 1 00000000 closed 1 0 0 0 - 1")
        harm(client, key, how)
    first, second = fleet.start(2, {}, synced=False, BROKEN_RETRY=300, SLOW_FLUSH=300)
    if when == "while used":
        until(lambda: all(p.do("look")["shared"] for p in (first, second)), "a sync")
        harm(client, key, how)
    assert first.do("attempt")["admitted"]
    assert first.do("fail") == {"admitted": 1, "rejected": 0}
    until(lambda: first.do("look")["broken"] == how, "its circuit is degraded")
    assert first.do("look")["down"] == ""
    assert first.do("succeed") == {"admitted": 1, "rejected": 0}
    protects_itself(first)
    assert first.do("operate", step="reset").startswith(f"StoreUnavailable: {how}")
    # Other circuits go on, in the same process too.
    first.do("breaker", circuit="other")
    until(lambda: first.do("look", circuit="other")["shared"] == "closed", "a sync")
    other.do("fail", count=5)
    first.do("fail", count=5, circuit="other")
    until(lambda: first.do("look", circuit="other")["shared"] == "open", "they share this one")
    (line,) = loud(first)
    assert how in line
    # Monitoring says what it can.
    assert CIRCUIT in first.do("fleet_snapshot")
    assert first.do("snapshot")["state"] == "open"
    # When the key was mended, it is found again, also by those that have much to tell.
    client.delete(key)
    until(lambda: not any(p.do("look")["broken"] for p in (first, second)), "its repair")
    until(lambda: fleet.found(client) is not None, "it is made anew")


def test_an_answer_to_something_else_is_never_taken(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """redis-py #2624: an unread reply answers the next command."""
    fleet.start(1, {}, url=proxy.url)
    fleet.do("breaker", circuit="other", policy=None)
    fleet.do("succeed", count=3)
    held = proxy.hold("report", times=1)
    with pytest.raises(AssertionError, match="StoreUnavailable"):
        fleet[0].do("flush", timeout=0.5)
    held.release()
    # One timeout degrades at once if a first sync was in it, and not if it came alone.
    until(lambda: not fleet[0].do("look")["degraded"], "the store is back")
    for _ in range(20):
        assert fleet[0].do("operate", step="force_open", circuit="other") == ""
        shot = fleet[0].do("snapshot", circuit="other")
        assert shot["shared_state"] == "forced_open"
        assert fleet[0].do("snapshot")["shared_state"] == "closed"
        assert fleet[0].do("operate", step="reset", circuit="other") == ""
    assert fleet.states() == ["closed"]
