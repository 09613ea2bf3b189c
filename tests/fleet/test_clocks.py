"""A clock that steps by a minute, on any side, neither closes, wedges nor opens a circuit."""

from __future__ import annotations

import time

import pytest
import redis

from tests.fleet.harness import Fleet, until

pytestmark = pytest.mark.servers("valkey")

STEPS = pytest.mark.parametrize("seconds", [-60, 60])


@STEPS
@pytest.mark.parametrize("stepped", ["one", "all"])
def test_processes_clocks_do_not_matter(
    fleet: Fleet, client: redis.Redis, seconds: int, stepped: str
) -> None:
    """nopanic, baldur: clock skew between hosts opens the gate early."""
    fleet.start(3, {"open_interval": 1.5})
    chosen = fleet.processes[:1] if stepped == "one" else fleet.processes
    fleet.do("fail", count=1)
    fleet.do("step_wall_clock", chosen, seconds=seconds)
    fleet.do("flush")
    assert fleet.states() == ["closed"] * 3
    # It trips later than this, and so it is open for at least so long.
    closed_until = time.monotonic()
    fleet.trip(client)
    fleet.do("step_wall_clock", chosen, seconds=seconds)
    looks = fleet.do("look")
    if time.monotonic() < closed_until + 1.4:
        assert [look["state"] for look in looks] == ["open"] * 3
    assert all(look["left"] <= 1500 for look in looks)
    refused = fleet[0].do("attempt", outcome="failure")
    assert refused["admitted"] or 0 <= refused["retry_after"] <= 1.5
    until(lambda: fleet[0].do("begin", name="p", how="guard")["admitted"], "a probe", 20)
    assert fleet.calls("enter")[0]["at"] > closed_until + 1.49  # never early
    fleet.do("step_wall_clock", chosen, seconds=-2 * seconds)
    fleet.until_all("half_open")
    assert fleet[0].do("finish", name="p") == "returned"
    for number in (1, 2):
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe")
    fleet.until_all("closed")


@STEPS
def test_the_stores_clock_while_closed(fleet: Fleet, client: redis.Redis, seconds: int) -> None:
    fleet.start(4, {})
    fleet.do("fail", fleet.processes[:2], count=2)
    fleet.do("flush")
    generation = fleet.stored(client).v
    fleet.do("step_store_clock", milliseconds=seconds * 1000)
    fleet.do("succeed", count=3)
    fleet.do("flush")
    assert fleet.states() == ["closed"] * 4
    assert fleet.stored(client).v == generation
    fleet.do("fail", count=2)
    fleet.until_all("open")
    assert fleet.stored(client).v > generation


@STEPS
def test_the_stores_clock_while_open(fleet: Fleet, client: redis.Redis, seconds: int) -> None:
    fleet.start(4, {"open_interval": 300.0})
    fleet.trip(client)
    before = fleet.stored(client)
    fleet.do("hammer", threads=1)
    fleet.do("step_store_clock", milliseconds=seconds * 1000)
    for _ in range(3):
        fleet.do("flush")
    until(lambda: fleet.totals(client)["rejected"] > 100, "calls are refused")
    fleet.do("rest")
    after = fleet.stored(client)
    assert (after.v, after.state, after.duration) == (before.v, "open", 300_000)
    assert fleet.states() == ["open"] * 4
    assert not fleet.calls("enter")
    assert all(0 < look["left"] <= 300_000 for look in fleet.do("look"))
    (newcomer,) = fleet.start(1, blank=True)
    newcomer.do("step_store_clock", milliseconds=seconds * 1000)
    (said,) = fleet.open([newcomer], {}, first="attempt")
    assert not said["admitted"]
    assert 0 < said["retry_after"] <= 300
    assert fleet[0].do("operate", step="reset") == ""
    fleet.until_all("closed")


@STEPS
def test_the_stores_clock_cannot_wedge_an_open_circuit(
    fleet: Fleet, client: redis.Redis, seconds: int
) -> None:
    fleet.start(3, {"open_interval": 1.0})
    fleet.trip(client)
    fleet.do("step_store_clock", milliseconds=seconds * 1000)
    for number in range(3):
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe", 20)
    fleet.until_all("closed")


@STEPS
def test_the_stores_clock_while_half_open(fleet: Fleet, client: redis.Redis, seconds: int) -> None:
    policy = {"open_interval": 0.2, "half_open_permits": 2, "permit_lease": 600.0}
    fleet.start(4, policy)
    fleet.trip(client)
    for number in (0, 1):
        until(lambda n=number: fleet[n].do("begin", name="p")["admitted"], "a probe")
    fleet.do("hammer", fleet.processes[2:], threads=2)
    fleet.do("step_store_clock", milliseconds=seconds * 1000)
    rejected = fleet.totals(client)["rejected"]
    fleet.do("flush")
    until(lambda: fleet.totals(client)["rejected"] > rejected + 200, "calls are refused")
    fleet.do("rest", fleet.processes[2:])
    assert len(fleet.calls("enter")) == 2
    stored = fleet.stored(client)
    assert (stored.state, len(stored.slots)) == ("half_open", 2)
    for number in (0, 1):
        assert fleet[number].do("finish", name="p") == "returned"
    until(lambda: fleet[3].do("attempt")["admitted"], "a probe")
    fleet.until_all("closed")


def test_a_clock_set_back_does_not_stretch_a_lease(fleet: Fleet, client: redis.Redis) -> None:
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 1.0}
    fleet.start(2, policy)
    fleet.trip(client)
    until(lambda: fleet[0].do("begin", name="p")["admitted"], "a probe")
    fleet.do("step_store_clock", milliseconds=-60_000)
    until(lambda: fleet[1].do("attempt")["admitted"], "the permit is usable again", 20)
    fleet.until_all("closed")


@STEPS
def test_a_trip_by_a_clock_that_is_set_right_again(
    fleet: Fleet, client: redis.Redis, seconds: int
) -> None:
    """Failover to a host whose clock is wrong, and back."""
    fleet.start(3, {"open_interval": 1.0})
    fleet.do("step_store_clock", milliseconds=seconds * 1000)
    fleet.trip(client)
    fleet.do("step_store_clock", milliseconds=0)
    fleet.do("flush")
    before = fleet.stored(client).v
    assert all(look["left"] <= 1000 for look in fleet.do("look"))
    for number in range(3):
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe", 20)
    fleet.until_all("closed")
    assert fleet.stored(client).v > before


@STEPS
def test_one_skewed_reader_among_many(fleet: Fleet, client: redis.Redis, seconds: int) -> None:
    """The store's clock jumps to and fro: one process sees another time than the others."""
    fleet.start(4, {"open_interval": 300.0})
    fleet[0].do("step_store_clock", milliseconds=seconds * 1000)
    fleet.do("succeed", count=3)
    fleet.do("flush")
    fleet.trip(client)
    generation = fleet.stored(client).v
    for _ in range(3):
        fleet.do("attempt")
        fleet.do("flush")
    assert fleet.stored(client).v == generation
    assert fleet.states() == ["open"] * 4
    assert all(0 < look["left"] <= 300_000 for look in fleet.do("look"))
    assert not fleet.calls("enter")
    assert fleet[0].do("operate", step="reset") == ""
    fleet.until_all("closed")
