"""When the store returns, evidence is merged, never state: and only evidence that still holds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis

from tests.faults.proxy import Proxy
from tests.fleet.harness import PATIENT, Fleet, Process, until

pytestmark = pytest.mark.servers("valkey")
ADJUST = PATIENT

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")


def cut_off(fleet: Fleet, proxy: Proxy, policy: dict[str, Any]) -> list[Process]:
    """Two processes that cannot reach the store; both were active before, so the quorum is two."""
    cut = fleet.start(2, policy, url=proxy.url)
    fleet.do("succeed", cut)
    fleet.do("flush", cut)
    proxy.refuse()
    until(lambda: all(look["degraded"] for look in fleet.do("look", cut)), "degraded")
    return cut


def come_back(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    proxy.connect()
    fleet.until_agreed(client)
    fleet.do("flush")
    for account in fleet.do("conservation"):
        assert account["recorded"] == account["flushed"] + account["dropped"]


@ALL
def test_fresh_failures_trip_when_they_are_merged(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    cut = cut_off(fleet, proxy, {})
    fleet.do("fail", cut, count=4)
    assert fleet.states() == ["closed"] * 2
    proxy.connect()
    fleet.until_all("open")
    assert fleet.log(client)[-1]["cause"] == "run"
    assert fleet.totals(client)["late"] <= 2


@ALL
def test_old_failures_do_not(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    """The original: old outcomes trip it again right after recovery."""
    cut = cut_off(fleet, proxy, {"window": 0.4})
    fleet.do("fail", cut, count=4)
    old = time.monotonic() + 0.5
    until(lambda: time.monotonic() > old, "they are older than the window")
    come_back(fleet, client, proxy)
    assert fleet.states() == ["closed"] * 2
    stored = fleet.stored(client)
    assert (stored.run, fleet.totals(client)["late"]) == (0, 8)
    assert fleet.totals(client)["trips"] == 0


def test_failures_before_the_own_trip_do_not(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Each process has protected itself, and recovers by itself; the fleet's circuit stays."""
    cut = cut_off(fleet, proxy, {"open_interval": 0.3})
    for process in cut:
        assert process.fail_until_refused() >= 5
    come_back(fleet, client, proxy)
    assert fleet.totals(client)["trips"] == 0
    assert {look["shared"] for look in fleet.do("look")} == {"closed"}
    for process in cut:
        until(lambda p=process: p.do("attempt") and p.do("look")["state"] == "closed", "recovery")
    fleet.do("flush")
    assert fleet.totals(client)["trips"] == 0


@pytest.mark.parametrize("latency", [0.0, 0.1], ids=["fast", "slow"])
def test_failures_before_the_present_state_do_not(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, latency: float
) -> None:
    """The dependency came back, and so did the circuit, while these processes were cut off.

    What is under way for long must not look younger than it is.
    """
    (other,) = fleet.start(1, {})
    cut = cut_off(fleet, proxy, {})
    fleet.do("fail", cut, count=4)
    assert other.do("operate", step="force_open") == ""
    assert other.do("operate", step="reset") == ""
    proxy.latency = latency
    come_back(fleet, client, proxy)
    assert fleet.states() == ["closed"] * 3
    assert fleet.stored(client).run == 0
    assert fleet.totals(client)["trips"] == 0
    # New ones count.
    fleet.do("fail", cut, count=4)
    fleet.until_all("open")


def test_successes_are_merged_too(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    cut = cut_off(fleet, proxy, {"failure_threshold": 100})
    fleet.do("fail", cut, count=3)
    fleet.do("succeed", cut, count=30)
    come_back(fleet, client, proxy)
    totals = fleet.totals(client)
    dropped = sum(account["dropped"] for account in fleet.do("conservation"))
    assert totals["calls"] == 2 + 66 - dropped
    assert totals["dropped"] == dropped <= 2
    assert fleet.stored(client).run == 0


def test_a_state_that_only_one_process_saw_is_never_written(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Its own open state is not the fleet's, when it comes back."""
    (other,) = fleet.start(1, {})
    cut = cut_off(fleet, proxy, {})
    other.do("succeed")
    other.do("flush")
    before = fleet.stored(client)
    assert cut[0].fail_until_refused() >= 5
    come_back(fleet, client, proxy)
    assert fleet.stored(client).v == before.v
    assert other.do("attempt")["admitted"]
    assert cut[0].do("attempt")["source"] == "quarantine"
    assert other.do("operate", step="reset") == ""
    # A newer generation ends the quarantine.
    until(lambda: cut[0].do("look")["state"] == "closed", "the reset is heard of")


def test_an_operators_reset_during_the_outage_is_not_undone(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """A process that was cut off while the circuit was open comes back after it was reset."""
    (other,) = fleet.start(1, {})
    cut = cut_off(fleet, proxy, {})
    proxy.connect()
    fleet.until_agreed(client)
    fleet.do("fail", cut, count=5)
    fleet.until_all("open")
    proxy.refuse()
    until(lambda: all(look["degraded"] for look in fleet.do("look", cut)), "degraded")
    assert other.do("operate", step="reset") == ""
    assert not cut[0].do("attempt")["admitted"]
    come_back(fleet, client, proxy)
    assert fleet.states() == ["closed"] * 3
    assert fleet.log(client)[-1]["cause"] == "reset"
