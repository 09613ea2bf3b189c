"""A store that loses its data, or only its scripts, never closes an open circuit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.fleet.harness import CIRCUIT, Fleet, client_of, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them; tests/faults/test_keys.py and test_memory.py
# lose keys in every way that there is, on all of them too.
ALL = pytest.mark.servers("valkey", "redis8", "redis")


def watch(fleet: Fleet, client: redis.Redis, old: set[int]) -> None:
    """Until all agree that the circuit is open, nobody who knew it calls through."""
    until(lambda: (c := fleet.found(client)) is not None and c.state == "open", "it is restored")
    fleet.until_agreed(client)
    assert set(fleet.states()) == {"open"}
    rejected = fleet.totals(client)["rejected"]
    until(lambda: fleet.totals(client)["rejected"] > rejected + 50, "calls are still refused")
    fleet.do("rest")
    assert [call for call in fleet.calls("enter") if call["pid"] in old] == []
    settled = len(fleet.calls("enter"))
    assert not any(said["admitted"] for said in fleet.do("attempt"))
    assert len(fleet.calls("enter")) == settled


@ALL
@pytest.mark.parametrize("newcomer", [False, True])
def test_flushall(fleet: Fleet, client: redis.Redis, newcomer: bool) -> None:
    """pybreaker, nopanic: FLUSHALL closes it."""
    old = {process.pid for process in fleet.start(6, {})}
    fleet.trip(client)
    before = fleet.stored(client)
    fresh = fleet.start(1, blank=True) if newcomer else []
    fleet.do("hammer", fleet.processes[:6], threads=1)
    client.flushall()
    # It knows nothing, so it makes the circuit anew.  Until the others have heard of that, it may
    # be let in, but nobody else ever.
    fleet.open(fresh, {}, first="hammer", threads=1)
    watch(fleet, client, old)
    after = fleet.stored(client)
    assert after.v > before.v
    assert after.fresh
    assert 0 < after.duration <= before.duration
    assert fleet[0].do("look")["left"] <= 60_000


def test_flushall_without_any_traffic(fleet: Fleet, client: redis.Redis) -> None:
    """The poll finds it out."""
    fleet.start(3, {}, POLL=300, SLOW_FLUSH=60_000)
    fleet.trip(client)
    fleet.do("flush")  # Later reports would find it out too.
    client.flushall()
    until(lambda: (c := fleet.found(client)) is not None and c.state == "open", "it is restored")
    fleet.until_agreed(client)
    assert fleet.states() == ["open"] * 3
    assert fleet.totals(client)["calls"] == 0


@pytest.mark.parametrize("state", ["closed", "open"])
def test_a_key_that_was_evicted(fleet: Fleet, client: redis.Redis, state: str) -> None:
    """The loss of a key at any moment is harmless, and concerns no other circuit."""
    fleet.start(3, {}, POLL=300, SLOW_FLUSH=300)
    fleet.do("breaker", circuit="other", policy=None)
    fleet.do("succeed", circuit="other")
    fleet.do("flush")
    if state == "open":
        fleet.trip(client)
    others = fleet.stored(client, "other").v
    client.delete(key_of(fleet.namespace, CIRCUIT))
    until(lambda: (c := fleet.found(client)) is not None and c.state == state, "it is restored")
    fleet.until_agreed(client)
    assert fleet.states() == [state] * 3
    assert fleet.stored(client, "other").v == others
    fleet.do("fail", circuit="other")
    if state == "open":
        assert not fleet.calls("enter")


def test_flushall_again_and_again_among_newcomers(fleet: Fleet, client: redis.Redis) -> None:
    old = {process.pid for process in fleet.start(3, {})}
    fleet.trip(client)
    newcomers = fleet.start(4, blank=True)
    fleet.do("hammer", fleet.processes[:3], threads=1)
    for newcomer in newcomers:
        client.flushall()
        fleet.open([newcomer], {}, first="hammer", threads=1)
    watch(fleet, client, old)


@pytest.mark.parametrize("state", ["half_open", "forced_open", "forced_closed"])
def test_flushall_in_other_states(fleet: Fleet, client: redis.Redis, state: str) -> None:
    fleet.start(3, {"open_interval": 0.2})
    if state == "half_open":
        fleet.trip(client)
        until(lambda: fleet[0].do("attempt")["admitted"], "a probe")
    else:
        step = {"forced_open": "force_open", "forced_closed": "force_closed"}[state]
        assert fleet[0].do("operate", step=step) == ""
    fleet.until_all(state)
    client.flushall()
    newcomers = fleet.start(1, {})
    # What was learned in half-open is lost with the data, so probing begins anew.
    after = "open" if state == "half_open" else state
    until(lambda: (c := fleet.found(client)) is not None and c.state == after, "it is restored")
    fleet.until_agreed(client)
    if state == "half_open":
        assert not fleet.calls(probe=False)
        for number in range(3):
            until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe")
        fleet.until_all("closed")
    else:
        assert fleet.states(newcomers) == [state]


def test_flushall_while_closed_harms_nobody(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(4, {})
    fleet.do("succeed", count=10)
    fleet.do("flush")
    client.flushall()
    assert fleet.do("succeed", count=10) == [{"admitted": 10, "rejected": 0}] * 4
    fleet.do("flush")
    fleet.until_agreed(client)
    assert fleet.states() == ["closed"] * 4
    fleet.do("fail", count=2)
    fleet.until_all("open")


@ALL
@pytest.mark.parametrize("newcomer", [False, True])
def test_restart_empty(
    own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet], newcomer: bool
) -> None:
    server = own_server()
    fleet = fleet_of(server.url)
    with client_of(server) as client:
        old = {process.pid for process in fleet.start(4, {})}
        fleet.trip(client)
        fresh = fleet.start(1, blank=True) if newcomer else []
        fleet.do("hammer", fleet.processes[:4], threads=1)
        server.restart(empty=True)
        fleet.open(fresh, {}, first="hammer", threads=1)
        watch(fleet, client, old)


@ALL
def test_script_flush(fleet: Fleet, client: redis.Redis) -> None:
    """Stoplight #777: NOSCRIPT loops."""
    fleet.start(4, {"open_interval": 1.0})
    fleet.trip(client)
    fleet.do("logs")
    before = fleet.stored(client)
    fleet.do("hammer", threads=1, outcome="failure")
    loads = script_loads(client)
    for _ in range(3):
        client.script_flush()
        fleet.do("flush")
        fleet.do("flush")
    fleet.do("rest")
    assert script_loads(client) - loads <= 3 * 4
    for look in fleet.do("look"):
        assert not look["degraded"]
    # No half-open period was skipped: whoever called through had a permit.
    assert not fleet.calls("enter", probe=False)
    assert fleet.stored(client).v >= before.v
    assert [line for lines in fleet.do("logs") for line in lines if line["level"] != "DEBUG"] == []
    client.script_flush()
    for number in range(3):
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe")
    fleet.until_all("closed")


def script_loads(client: redis.Redis) -> int:
    stats = client.info("commandstats")
    assert isinstance(stats, dict)
    return int(stats.get("cmdstat_script|load", {}).get("calls", 0))
