"""Results of calls that began in an older generation change nothing but a counter."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from tests.fleet.harness import Fleet, Process, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")

WAYS = ("call", "guard", "acquire", "async")
ENDS = ("success", "failure")


def begin_all(process: Process) -> None:
    """Begin calls of every kind, one for each way in which they will end."""
    for way in WAYS:
        for end in ENDS:
            assert process.do("begin", name=f"{way} {end}", how=way)["admitted"]


def finish(process: Process, *ends: str) -> None:
    """End the calls that end so, and tell the store."""
    for way in WAYS:
        for end in ends:
            said = process.do("finish", name=f"{way} {end}", outcome=end)
            assert said == ("returned" if end == "success" else "BrokenError")
    process.do("flush")


def lasting(fleet: Fleet, client: redis.Redis) -> tuple[Any, ...]:
    """What a late result must not change."""
    c = fleet.stored(client)
    return (c.v, c.nonce, c.state, c.since, c.duration, c.attempt, c.successes, c.run, c.ring)


@ALL
def test_while_open(fleet: Fleet, client: redis.Redis) -> None:
    """resilience4j #1090, circuitbreaker: a late success closes it.  pybreaker: a late failure
    pushes the time of opening forward."""
    late, *_ = fleet.start(3, {})
    begin_all(late)
    fleet.do("fail", fleet.processes[1:], count=5)
    fleet.until_all("open")
    before, left = lasting(fleet, client), [look["left"] for look in fleet.do("look")]
    counted = fleet.totals(client)
    finish(late, *ENDS)
    assert lasting(fleet, client) == before
    assert fleet.states() == ["open"] * 3
    assert all(look["left"] <= most for look, most in zip(fleet.do("look"), left, strict=True))
    after = fleet.totals(client)
    assert after["late"] - counted["late"] == len(WAYS) * len(ENDS)
    assert after["calls"] - counted["calls"] == len(WAYS) * len(ENDS)


@ALL
def test_while_half_open(fleet: Fleet, client: redis.Redis) -> None:
    late, *_ = fleet.start(3, {"open_interval": 0.3})
    begin_all(late)
    fleet.do("fail", fleet.processes[1:], count=5)
    fleet.until_all("open")  # Before, a success might be let in and break the run of failures.
    until(lambda: fleet[1].do("attempt")["admitted"], "a probe")
    fleet.until_all("half_open")
    before = lasting(fleet, client)
    assert before[6] == 1  # successes
    finish(late, *ENDS)
    assert lasting(fleet, client) == before
    assert fleet.totals(client)["probes"] == 1
    for process in (fleet[1], fleet[2]):
        until(lambda p=process: p.do("attempt")["admitted"], "a probe")
    fleet.until_all("closed")


def test_after_it_has_closed_again(fleet: Fleet, client: redis.Redis) -> None:
    late, *_ = fleet.start(3, {"open_interval": 0.2, "failure_threshold": 4})
    begin_all(late)
    fleet.do("fail", fleet.processes[1:], count=5)
    fleet.until_all("open")
    assert fleet[2].do("operate", step="reset") == ""
    fleet.until_all("closed")
    before = lasting(fleet, client)
    finish(late, "failure")
    assert fleet.states() == ["closed"] * 3
    assert lasting(fleet, client) == before
    finish(late, "success")
    assert lasting(fleet, client) == before


@pytest.mark.parametrize("end", ENDS)
def test_of_a_probe_after_another_one_has_failed(
    fleet: Fleet, client: redis.Redis, end: str
) -> None:
    fleet.start(4, {"open_interval": 1.0, "success_threshold": 2})
    fleet.trip(client)
    for number, way in ((0, "guard"), (1, "async")):
        until(lambda n=number, w=way: fleet[n].do("begin", name="p", how=w)["admitted"], "a probe")
    fleet[0].do("finish", name="p", outcome="failure")
    until(lambda: fleet.stored(client).state == "open", "it has reopened")
    before = lasting(fleet, client)
    fleet[1].do("finish", name="p", outcome=end)
    late = fleet.totals(client)["late"]
    fleet[1].do("flush")
    assert fleet.totals(client)["late"] >= late
    assert lasting(fleet, client) == before
    # Also in the next half-open period it is no success.
    until(lambda: fleet[2].do("attempt")["admitted"], "a probe")
    fleet[2].do("flush")
    assert fleet.stored(client).successes == 1


def test_bad_calls_that_end_together_with_the_trip_do_not_extend_it(
    fleet: Fleet, client: redis.Redis
) -> None:
    """Everybody's failures arrive at once; those behind the trip in the same batch are late."""
    fleet.start(8, {"failure_threshold": 8})
    fleet.do("fail", count=6)
    fleet.until_all("open")
    before = lasting(fleet, client)
    fleet.do("flush")
    assert lasting(fleet, client) == before
    totals = fleet.totals(client)
    assert totals["trips"] == 1
    # The quorum lets one process count for 4 of the 8, so a few more than 8 may have been needed.
    *_, run, _ = map(int, fleet.log(client)[-1]["evidence"].split())
    assert 8 <= run <= 12
    assert totals["failures"] == totals["late"] + run
