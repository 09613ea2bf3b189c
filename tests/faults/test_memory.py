"""A server whose memory is full: real evictions, and real refusals."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.fleet.harness import PATIENT, Fleet, until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")
ADJUST = {**PATIENT, "POLL": 300, "SLOW_FLUSH": 300}

PIECE = "x" * 100_000  # bytes of somebody else's data
ROOM = 1_500_000  # bytes


def limit(client: redis.Redis, policy: str) -> None:
    """Leave a little room, and say what shall happen when it is used up."""
    memory: Any = client.info("memory")
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", memory["used_memory"] + ROOM)


def full(client: redis.Redis) -> bool:
    """Write more of somebody else's lasting data; whether there is no room for it."""
    try:
        client.append("theirs", PIECE)
    except redis.ResponseError:
        return True
    return False


class Evictions:
    """Somebody else's writing, which drives our keys out again and again."""

    def __init__(self, fleet: Fleet, client: redis.Redis, circuits: list[str]) -> None:
        self._client = client
        self._keys = {name: key_of(fleet.namespace, name) for name in circuits}
        self.seen = dict.fromkeys(circuits, 0)
        self._present = dict.fromkeys(circuits, True)
        self._written = 0

    def go_on(self) -> None:
        """Write more, and see which circuits have gone."""
        self._written += 1
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(f"theirs:{self._written}", PIECE)
            for key in self._keys.values():
                pipe.exists(key)
            _, *present = pipe.execute()
        for name, here in zip(self._keys, present, strict=True):
            self.seen[name] += self._present[name] and not here
            self._present[name] = bool(here)


@pytest.mark.parametrize("policy", ["allkeys-random", "allkeys-lru"])
def test_evictions_under_load_are_harmless(
    broken_server: Server, fleet: Fleet, client: redis.Redis, policy: str
) -> None:
    """The loss of a key at any moment: an open circuit stays open for all, a closed one closed."""
    fleet.start(3, {})
    fleet.do("breaker", circuit="calm", policy=None)
    fleet.do("succeed", circuit="calm")
    fleet.trip(client)
    limit(client, policy)
    client.config_set("maxmemory-samples", 1)  # Otherwise what is in use is rarely evicted.
    fleet.do("hammer", threads=1)
    evictions = Evictions(fleet, client, ["payments", "calm"])

    def enough() -> bool:
        evictions.go_on()
        assert fleet.do("succeed", circuit="calm") == [{"admitted": 1, "rejected": 0}] * 3
        return min(evictions.seen.values()) >= 3

    until(enough, "both circuits were evicted three times")
    client.config_set("maxmemory", 0)
    done = fleet.do("rest")
    assert not any(said.get("admitted") for said in done)
    for circuit, state in (("payments", "open"), ("calm", "closed")):
        fleet.until_agreed(client, circuit)
        assert {look["state"] for look in fleet.do("look", circuit=circuit)} == {state}
        fleet.audit(client, circuit, kept=False)
    assert not fleet.calls("enter")


def test_eviction_of_what_expires_among_lasting_data(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """With volatile-*, our keys are the only ones that can be evicted, so all of them are, and
    then the server is full: the circuit's state lives in the processes until there is room."""
    fleet.start(3, {})
    fleet.trip(client)
    fleet.do("hammer", threads=1)
    limit(client, "volatile-random")
    until(lambda: full(client), "there is no room")
    until(lambda: fleet.found(client) is None, "it was evicted")
    until(lambda: {look["down"] for look in fleet.do("look")} == {"OOM"}, "all are degraded")
    assert fleet.states() == ["open"] * 3
    client.delete("theirs")
    fleet.until_agreed(client)
    done = fleet.do("rest")
    assert not any(said.get("admitted") for said in done)
    assert fleet.states() == ["open"] * 3
    fleet.audit(client, kept=False)
    assert not fleet.calls("enter")


def test_a_full_server_that_evicts_nothing(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """noeviction: nothing is lost by it, all degrade for as long as it lasts, and come back."""
    fleet.start(3, {})
    fleet.do("breaker", circuit="calm", policy=None)
    fleet.do("succeed", circuit="calm")
    fleet.trip(client)
    fleet.do("flush")
    limit(client, "noeviction")
    fleet.do("hammer", threads=1)
    until(lambda: full(client), "there is no room")
    until(lambda: {look["down"] for look in fleet.do("look")} == {"OOM"}, "all are degraded")
    for _ in range(10):
        assert fleet.do("succeed", circuit="calm") == [{"admitted": 1, "rejected": 0}] * 3
    assert fleet[0].fail_until_refused(circuit="calm") >= 5
    client.delete("theirs")
    for circuit in ("payments", "calm"):
        fleet.until_agreed(client, circuit)
    done = fleet.do("rest")
    assert not any(said.get("admitted") for said in done)
    assert fleet.states() == ["open"] * 3
    fleet.audit(client)
    fleet.audit(client, "calm")
    said = fleet.do("look", circuit="calm")
    assert {look["shared"] for look in said} == {"closed"}
