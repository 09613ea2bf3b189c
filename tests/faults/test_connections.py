"""Connections that the server ends, refuses, or lets wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import redis

from scripts.servers import Server
from tests.fleet.harness import PATIENT, Fleet, until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")

LASTING = {"failure_threshold": 100_000}


def clients(client: redis.Redis, what: str) -> list[dict[str, Any]]:
    """Other connections of this kind, ``normal`` or ``pubsub``."""
    listed: Any = client.client_list(_type=what)
    own = str(client.client_id())
    return [entry for entry in listed if entry["id"] != own]


def kill(client: redis.Redis, *kinds: str) -> None:
    for kind in kinds:
        client.client_kill_filter(_type=kind, skipme=True)


def said_aloud(fleet: Fleet) -> list[str]:
    """All but what is for debugging, since the last time."""
    lines = [line for lines in fleet.do("logs") for line in lines]
    return [line["text"] for line in lines if line["level"] != "DEBUG"]


def test_connections_that_are_killed_again_and_again(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """CLIENT KILL in the midst of traffic: what it costs is counted, and nothing twice."""
    fleet.start(3, LASTING)
    fleet.do("hammer", threads=2, outcome="failure")
    for number in range(12):
        counted = fleet.totals(client)["calls"]
        kill(client, *[("normal",), ("pubsub",), ("normal", "pubsub")][number % 3])
        until(lambda n=counted: fleet.totals(client)["calls"] > n, "they go on")
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    fleet.until_agreed(client)
    fleet.audit(client)
    assert fleet.states() == ["closed"] * 3


@pytest.mark.parametrize("what", ["report", "acquire", "settle"])
def test_a_connection_that_is_killed_in_the_middle_of_a_step(
    broken_server: Server, fleet: Fleet, client: redis.Redis, what: str
) -> None:
    """CLIENT KILL by id, while the server holds the step back: it is never carried out."""
    fleet.adjust |= PATIENT | {"POLL": 600_000, "SLOW_FLUSH": 600_000}
    policy = {"open_interval": 0.2, "success_threshold": 2, "permit_lease": 600.0}
    (process,) = fleet.start(1, policy if what != "report" else LASTING)
    process.do("flush")
    if what != "report":
        process.do("fail", count=5)
        fleet.until_all("open")
    if what == "settle":
        until(lambda: process.do("begin", name="p", how="guard")["admitted"], "a probe")
    if what == "acquire":
        until(lambda: process.do("look")["left"] == 0, "the open interval is over")
    process.do("flush")
    client.client_pause(60_000, all=False)
    if what == "report":
        process.do("fail", count=3)
    elif what == "settle":
        assert process.do("finish", name="p") == "returned"
    else:
        process.post("attempt")

    def held_back() -> list[dict[str, Any]]:
        return [c for c in clients(client, "normal") if c["cmd"] == "evalsha" and "b" in c["flags"]]

    (held,) = until(held_back, "a step is held back")
    assert client.client_kill_filter(_id=held["id"]) == 1
    if what == "acquire":
        said = process.answer()
        assert not said["admitted"] or said["local"]
    client.client_unpause()
    fleet.until_agreed(client)
    sums = fleet.audit(client)
    # What was under way is lost, and known to be.
    assert fleet.totals(client)["calls"] == sums["flushed"]
    if what == "report":
        assert sums["dropped"] > 0
    if what == "acquire":
        until(lambda: process.do("attempt") and process.do("look")["state"] == "closed", "recovery")
    if what == "settle":
        assert sums["dropped"] == 0
        assert (fleet.stored(client).state, fleet.stored(client).successes) == ("half_open", 1)
        assert fleet.totals(client)["probes"] == 1


def test_an_idle_connection_that_the_server_closes_is_no_outage(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """As with ``timeout``, or a load balancer that forgets: the next step opens another."""
    fleet.start(3, LASTING, **PATIENT, POLL=600_000, SLOW_FLUSH=600_000)
    fleet.do("flush")
    fleet.do("logs")
    for number in range(5):
        kill(client, "normal")
        until(lambda: not clients(client, "normal"), "they are closed")
        fleet.do("succeed")
        fleet.do("flush")
        assert fleet.totals(client)["calls"] == 3 * (number + 1)
    assert not any(look["degraded"] for look in fleet.do("look"))
    assert said_aloud(fleet) == []
    assert fleet.audit(client)["dropped"] == 0


# It lasts long, and it is redis-py that notices, whatever the server is.
@pytest.mark.servers("valkey")
def test_a_server_that_ends_idle_connections(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """``timeout 1``, and polls every two seconds."""
    client.config_set("timeout", 1)
    fleet.start(2, {}, READ_TIMEOUT=10.0)
    fleet.do("flush")
    fleet.do("logs")
    old = {entry["id"] for entry in clients(client, "normal")}

    def renewed() -> bool:
        now = {entry["id"] for entry in clients(client, "normal")}
        return len(now - old) >= 2 and not now & old

    until(renewed, "both have another connection")
    fleet.do("succeed", count=3)
    assert not any(look["degraded"] for look in fleet.do("look"))
    assert said_aloud(fleet) == []
    assert fleet.audit(client)["dropped"] == 0


def test_a_server_that_takes_no_more_clients(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """maxclients, for real."""
    fleet.adjust["READ_TIMEOUT"] = 10.0  # A busy machine must not look like another outage.
    fleet.start(3, {})
    fleet.do("breaker", circuit="calm", policy=None)
    fleet.do("succeed", circuit="calm")
    fleet.trip(client)
    client.config_set("maxclients", 1)
    kill(client, "normal", "pubsub")
    fleet.do("hammer", threads=1)
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")
    assert fleet.do("succeed", circuit="calm") == [{"admitted": 1, "rejected": 0}] * 3
    assert fleet.states() == ["open"] * 3
    (newcomer,) = fleet.start(1, blank=True)
    (said,) = fleet.open([newcomer], {}, circuit="new", first="attempt")
    assert said["admitted"]
    client.config_set("maxclients", 10_000)
    for circuit in ("payments", "calm", "new"):
        fleet.do("breaker", circuit=circuit, policy=None)
        fleet.until_agreed(client, circuit)
    done = fleet.do("rest", fleet.processes[:3])
    assert not any(said.get("admitted") for said in done)
    assert fleet.states(fleet.processes[:3]) == ["open"] * 3
    assert not fleet.calls("enter", circuit="payments")
    for process in fleet:
        said = [line["text"] for line in process.do("logs") if line["level"] == "WARNING"]
        assert len(said) == 1
    for circuit in ("payments", "calm", "new"):
        fleet.audit(client, circuit)


def test_a_subscriber_that_is_too_slow_is_dropped_and_reads_what_it_missed(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """client-output-buffer-limit: the server ends a subscription that does not take its pushes."""
    slow, other = fleet.start(2, {}, POLL=600_000, SLOW_FLUSH=600_000)
    channel = f"cb:0:{fleet.namespace}"
    until(lambda: client.publish(channel, "") == 2, "both subscribe")
    client.config_set("client-output-buffer-limit", "pubsub 32768 0 0")
    slow.freeze()
    flood = "nobody " + "x" * 20_000
    until(lambda: client.publish(channel, flood) == 1, "the slow one is dropped")
    assert other.do("operate", step="force_open") == ""
    slow.thaw()
    fleet.until_all("forced_open")
    until(lambda: client.publish(channel, "") == 2, "both subscribe again")
    assert not any(look["degraded"] for look in fleet.do("look"))
    assert other.do("operate", step="reset") == ""
    fleet.until_all("closed")
    fleet.audit(client)


def test_a_server_that_sleeps(
    own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet]
) -> None:
    """DEBUG SLEEP: as long as a slow disk or a fork of much memory may take."""
    server = own_server(args=["--enable-debug-command", "yes"])
    fleet = fleet_of(server.url)
    with server.client(decode_responses=True) as client, server.client() as sleeper:
        fleet.start(3, LASTING)
        fleet.do("hammer", threads=1, outcome="failure")
        counted = fleet.totals(client)["calls"]
        for _ in range(2):
            sleep = threading.Thread(target=sleeper.execute_command, args=("DEBUG", "SLEEP", "0.7"))
            sleep.start()
            sleep.join()
            until(lambda: not any(look["degraded"] for look in fleet.do("look")), "they are back")
        done = fleet.do("rest")
        assert all(set(said) == {"admitted", "slowest"} for said in done)
        fleet.until_agreed(client)
        fleet.audit(client)
        assert fleet.totals(client)["calls"] > counted
        assert fleet.states() == ["closed"] * 3
