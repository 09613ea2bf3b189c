"""A circuit's key that is lost, renamed, set to expire, or put back from an old copy.

Losing the key at any moment must be harmless: an open circuit stays open for all, a probe that is
out cannot decide about another generation, and a closed circuit stays closed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from distributed_breaker.store import key_of
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet, until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")
ADJUST = {**PATIENT, "POLL": 300, "SLOW_FLUSH": 300}

AWAY = "somewhere:else"
HARMS: dict[str, Callable[[redis.Redis, str], object]] = {
    "DEL": lambda client, key: client.delete(key),
    "EXPIRE": lambda client, key: client.pexpire(key, 1),
    "RENAME": lambda client, key: client.rename(key, AWAY),
    "FLUSHDB": lambda client, key: client.flushdb(),
    "FLUSHALL": lambda client, key: client.flushall(),
}
EVERY_HARM = pytest.mark.parametrize("harm", HARMS)
SOME = pytest.mark.parametrize("harm", ["DEL", "EXPIRE", "FLUSHALL"])


def lose(fleet: Fleet, client: redis.Redis, harm: str) -> None:
    """Take the key away, and wait until somebody has made it again."""
    before = fleet.stored(client)

    def made_again() -> bool:
        found = fleet.found(client)
        # Within one ms, one who has not heard of the last loss makes it again with the same v.
        return found is not None and found.nonce != before.nonce and found.v >= before.v

    HARMS[harm](client, key_of(fleet.namespace, CIRCUIT))
    until(made_again, "it is made again")


@SOME
def test_while_closed(fleet: Fleet, client: redis.Redis, harm: str) -> None:
    fleet.start(3, {"failure_threshold": 100_000})
    fleet.do("hammer", threads=1, outcome="failure")
    for _ in range(2):
        lose(fleet, client, harm)
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    fleet.until_agreed(client)
    assert fleet.states() == ["closed"] * 3
    sums = fleet.audit(client, kept=False)
    assert sums["dropped"] == 0
    assert fleet.totals(client)["calls"] <= sums["flushed"]
    # However short the old key's time was, the new one lives long.
    left = client.pttl(key_of(fleet.namespace, CIRCUIT))
    assert int(str(left)) > 24 * 3_600_000


@EVERY_HARM
def test_while_open(fleet: Fleet, client: redis.Redis, harm: str) -> None:
    """pybreaker, nopanic: FLUSHALL closes it."""
    fleet.start(3, {})
    fleet.trip(client)
    fleet.do("hammer", threads=1)
    for _ in range(2):
        lose(fleet, client, harm)
        assert fleet.stored(client).state == "open"
    done = fleet.do("rest")
    assert not any(said.get("admitted") for said in done)
    fleet.until_agreed(client)
    assert fleet.states() == ["open"] * 3
    assert not fleet.calls("enter")
    assert all(0 < look["left"] <= 60_000 for look in fleet.do("look"))
    fleet.audit(client, kept=False)


@SOME
def test_while_a_probe_is_out(fleet: Fleet, client: redis.Redis, harm: str) -> None:
    """Its permit is gone with the key, so its outcome decides nothing, and another may probe."""
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 600.0}
    prober, *others = fleet.start(3, policy)
    fleet.trip(client)
    until(lambda: prober.do("begin", name="p", how="guard")["admitted"], "a probe")
    fleet.until_all("half_open")
    lose(fleet, client, harm)
    fleet.until_agreed(client)
    assert not fleet.calls("enter", probe=False)
    until(lambda: others[0].do("attempt")["admitted"], "a probe of another generation")
    fleet.until_all("closed")
    before = fleet.stored(client)
    assert prober.do("finish", name="p", outcome="failure") == "BrokenError"
    fleet.audit(client, kept=False)
    after = fleet.stored(client)
    assert (after.v, after.nonce, after.state, after.run) == (before.v, before.nonce, "closed", 0)
    assert len(fleet.calls("enter")) == 2


def test_a_closed_copy_that_is_put_back_closes_nothing(fleet: Fleet, client: redis.Redis) -> None:
    """As a stale replica or a restored backup does it."""
    fleet.start(3, {})
    fleet.do("flush")
    key = key_of(fleet.namespace, CIRCUIT)
    client.copy(key, AWAY)
    fleet.trip(client)
    fleet.do("hammer", threads=1)
    for _ in range(3):
        newest = fleet.stored(client).v
        client.copy(AWAY, key, replace=True)
        until(lambda v=newest: fleet.stored(client).v > v, "the newest state is put back")
        assert fleet.stored(client).state == "open"
    fleet.do("rest")
    fleet.until_agreed(client)
    assert fleet.states() == ["open"] * 3
    assert not fleet.calls("enter")
    fleet.audit(client, kept=False)


def test_an_open_copy_that_is_put_back_opens_nothing(fleet: Fleet, client: redis.Redis) -> None:
    """What an operator has released or reset stays so."""
    fleet.start(3, {})
    assert fleet[0].do("operate", step="force_open") == ""
    fleet.until_all("forced_open")
    key = key_of(fleet.namespace, CIRCUIT)
    client.copy(key, AWAY)
    assert fleet[0].do("operate", step="reset") == ""
    fleet.until_all("closed")
    newest = fleet.stored(client).v
    fleet.do("hammer", threads=1)
    client.rename(AWAY, key)
    until(lambda: fleet.stored(client).v > newest, "the newest state is put back")
    fleet.until_agreed(client)
    done = fleet.do("rest")
    assert fleet.states() == ["closed"] * 3
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    fleet.audit(client, kept=False)
