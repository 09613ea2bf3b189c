"""A process that starts while the circuit is not closed never calls through, nor changes it."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from tests.fleet.harness import Fleet, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")

# A newcomer may bring the fleet's policy, none, or another one.
POLICIES: list[dict[str, Any] | None] = [{}, None, {"failure_threshold": 50, "open_interval": 0.01}]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=["same", "none", "other"])
def test_its_first_call_is_rejected(
    fleet: Fleet, client: redis.Redis, policy: dict[str, Any] | None, asynchronous: bool
) -> None:
    """interlock: a fresh process calls through until its first poll.  pybreaker #26, purgatory: a
    new process closes or overwrites an open circuit."""
    fleet.start(2, {})
    fleet.trip(client)
    before = fleet.stored(client)
    (newcomer,) = fleet.start(1, blank=True)
    (said,) = fleet.open([newcomer], policy, first="attempt", asynchronous=asynchronous)
    assert (said["admitted"], said["state"], said["source"]) == (False, "open", "shared")
    assert 30 < said["retry_after"] <= 60
    assert not fleet.calls("enter")
    after = fleet.stored(client)
    assert (after.v, after.nonce, after.state, after.since, after.duration) == (
        before.v, before.nonce, "open", before.since, before.duration,
    )  # fmt: skip
    assert fleet.states() == ["open"] * 3


@ALL
def test_a_cold_start_of_many_at_once(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(2, {})
    fleet.trip(client)
    newcomers = fleet.start(8, blank=True)
    fleet.open(newcomers, {}, first="hammer", threads=4)
    until(lambda: fleet.totals(client)["rejected"] > 200, "many calls were refused")
    done = fleet.do("rest", newcomers)
    assert all(said.get("admitted", 0) == 0 for said in done)
    assert not fleet.calls("enter")
    # Only the very first calls may wait, for one answer at most.
    assert all(len(waits) <= 4 for waits in fleet.do("waits", newcomers))


def test_a_cold_start_of_many_tasks_at_once(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(2, {})
    fleet.trip(client)
    newcomers = fleet.start(4, blank=True)
    for said in fleet.open(newcomers, {}, first="attempt_many", count=100):
        assert {(s["admitted"], s["source"]) for s in said} == {(False, "shared")}
    assert not fleet.calls("enter")


def test_it_gets_no_permit_when_all_are_out(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(2, {"open_interval": 0.2, "half_open_permits": 1})
    fleet.trip(client)
    until(lambda: fleet[0].do("begin", name="p")["admitted"], "a probe")
    newcomers = fleet.start(4, blank=True)
    said = fleet.open(newcomers, None, first="attempt")
    assert not any(s["admitted"] for s in said)
    assert len(fleet.calls("enter")) == 1


def test_forced_open_holds_for_it_too(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(1, {})
    assert fleet[0].do("operate", step="force_open") == ""
    newcomers = fleet.start(4, blank=True)
    said = fleet.open(newcomers, {}, first="attempt")
    assert {(s["admitted"], s["state"], s["source"]) for s in said} == {
        (False, "forced_open", "override")
    }


def test_a_closed_circuit_admits_its_first_call(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(1, {})
    newcomers = fleet.start(8, blank=True)
    said = fleet.open(newcomers, {}, first="attempt")
    assert all(s["admitted"] for s in said)
    fleet.do("flush")
    assert fleet.totals(client)["calls"] == 8


def test_an_unknown_circuit_made_by_many_at_once_is_made_once(
    fleet: Fleet, client: redis.Redis
) -> None:
    newcomers = fleet.start(8, blank=True)
    said = fleet.open(newcomers, {}, first="attempt")
    assert all(s["admitted"] for s in said)
    fleet.until_agreed(client)
    assert [entry["cause"] for entry in fleet.log(client)] == ["created"]
    fleet.do("flush")
    assert fleet.totals(client)["calls"] == 8
