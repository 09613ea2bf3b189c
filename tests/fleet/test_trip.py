"""When a fleet's circuit trips, and when one process alone stops calling."""

from __future__ import annotations

import pytest
import redis

from tests.fleet.harness import CIRCUIT, Fleet, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")


@ALL
@pytest.mark.parametrize("each", [1, 2])
def test_failures_spread_over_processes_trip_for_all(
    fleet: Fleet, client: redis.Redis, each: int
) -> None:
    """interlock: ten processes with nine failures each never trip."""
    fleet.start(8, {"failure_threshold": 8 * each})
    fleet.do("fail", count=each)
    fleet.until_all("open")
    refused = fleet.do("attempt")
    assert not any(said["admitted"] for said in refused)
    assert {said["source"] for said in refused} == {"shared"}
    assert all(50 < said["retry_after"] <= 60 for said in refused)
    stored = fleet.stored(client)
    assert stored.totals[9] == 1  # trips
    assert fleet.totals(client)["failures"] == 8 * each
    # The store's transition was heard once by everybody, and nobody stopped before by itself.
    for heard in fleet.do("transitions"):
        assert [(h["old"], h["new"], h["source"]) for h in heard] == [("closed", "open", "shared")]


def test_good_and_bad_calls_of_all_add_up_to_one_rate(fleet: Fleet, client: redis.Redis) -> None:
    policy = {"failure_threshold": 100, "failure_rate": 0.5, "minimum_calls": 32}
    fleet.start(8, policy)
    for _ in range(2):
        fleet.do("succeed")
        fleet.do("fail")
    fleet.do("flush")
    fleet.until_all("open")
    assert [entry["cause"] for entry in fleet.log(client)] == ["created", "rate"]


def test_one_failure_less_than_the_threshold_trips_nobody(
    fleet: Fleet, client: redis.Redis
) -> None:
    fleet.start(8, {"failure_threshold": 9})
    fleet.do("fail")
    fleet.do("flush")
    assert fleet.states() == ["closed"] * 8
    assert fleet.totals(client)["failures"] == 8
    assert fleet.totals(client)["trips"] == 0
    fleet[3].do("fail")
    fleet.until_all("open")


@ALL
def test_one_sick_process_is_quarantined_and_trips_nobody_else(
    fleet: Fleet, client: redis.Redis
) -> None:
    """Polly #287: one bad node poisons all."""
    sick, *healthy = fleet.start(9, {"open_interval": 0.5})
    fleet.do("succeed", healthy)
    fleet.do("flush", healthy)
    assert sick.fail_until_refused() >= 5
    refused = sick.do("attempt")
    if not refused["admitted"]:  # A slow machine may have let the open interval pass.
        assert (refused["state"], refused["source"]) == ("open", "quarantine")
    assert sick.do("look")["shared"] == "closed"
    for _ in range(3):  # It stays sick: its own probes fail, and still nobody else is concerned.
        assert all(said["admitted"] for said in fleet.do("attempt", healthy))
        until(lambda: sick.do("attempt", outcome="failure")["admitted"], "a local probe")
    assert fleet.states(healthy) == ["closed"] * 8
    fleet.do("flush")
    assert fleet.totals(client)["trips"] == 0
    assert not any(fleet.do("transitions", healthy))

    def recovers() -> bool:
        sick.do("attempt")
        return sick.do("look")["state"] == "closed"

    until(recovers, "its own probes end the quarantine")
    fleet.do("flush")
    assert fleet.totals(client)["trips"] == 0
    assert [entry["cause"] for entry in fleet.log(client)] == ["created"]
    assert not any(fleet.do("transitions", healthy))
    heard = [(h["old"], h["new"]) for h in sick.do("transitions")]
    assert heard[0] == ("closed", "open")
    assert heard[-1] == ("half_open", "closed")
    # Its local probes took none of the fleet's permits.
    assert fleet.totals(client)["probes"] == 0


def test_two_processes_that_see_it_trip_the_fleet(fleet: Fleet) -> None:
    first, second, *healthy = fleet.start(8, {})
    fleet.do("succeed", healthy)
    fleet.do("flush", healthy)
    first.do("fail", count=5)
    first.do("flush")
    assert fleet.states(healthy) == ["closed"] * 6
    second.do("fail", count=5)
    fleet.until_all("open")


def test_a_process_that_is_alone_decides_alone(fleet: Fleet) -> None:
    fleet.start(1, {})
    fleet[0].do("fail", count=5)
    fleet.until_all("open")
    assert fleet[0].do("attempt")["source"] == "shared"


def test_the_same_name_in_two_namespaces_is_two_circuits(fleet: Fleet, client: redis.Redis) -> None:
    """pybreaker #88."""
    here, there = fleet.start(2, {})
    there.do("other_namespace", namespace=fleet.namespace + "-b")
    assert there.do("attempt")["admitted"]
    here.do("fail", count=5)
    until(lambda: here.do("look")["shared"] == "open", "the trip")
    there.do("flush")
    assert there.do("attempt")["admitted"]
    assert there.do("fleet_snapshot") == {CIRCUIT: "closed"}
    client.publish(f"cb:0:{fleet.namespace}-b", f"{CIRCUIT} nonsense")
    there.do("flush")
    assert there.do("attempt")["admitted"]


def test_circuits_of_one_namespace_are_independent(fleet: Fleet) -> None:
    fleet.start(4, {})
    fleet.do("breaker", circuit="stock", policy=None)
    fleet.do("fail", fleet.processes[:2], count=5)
    fleet.until_all("open")
    assert all(said["admitted"] for said in fleet.do("attempt", circuit="stock"))
    assert fleet[0].do("fleet_snapshot") == {CIRCUIT: "open", "stock": "closed"}


def test_calls_run_side_by_side(fleet: Fleet) -> None:
    """pybreaker #3: a lock is held during the call."""
    (process,) = fleet.start(1, {})
    ways = ("call", "guard", "acquire", "async")
    for way in ways:
        for number in range(3):
            assert process.do("begin", name=f"{way} {number}", how=way)["admitted"]
    assert process.do("succeed", count=10) == {"admitted": 10, "rejected": 0}
    process.do("flush")
    process.do("fail", count=4)
    assert process.do("look")["state"] == "closed"
    for way in ways:
        for number in range(3):
            assert process.do("finish", name=f"{way} {number}") == "returned"


def test_a_fallback_runs_under_no_lock(fleet: Fleet, client: redis.Redis) -> None:
    """The original: fallbacks run under a lock.  Here they run where the refusal was caught, and
    while some take for ever, others are refused, probe, and close the circuit."""
    fleet.start(2, {"open_interval": 0.5})
    fleet.trip(client)
    for number in range(4):
        fleet[0].do("fall_back", name=str(number))
    until(lambda: fleet[0].do("attempt") and fleet.states() == ["closed"] * 2, "recovery")
    fleet[0].do("flush")
    for number in range(4):
        assert fleet[0].do("finish", name=str(number)) == "returned"


def test_excluded_errors_are_neither_successes_nor_failures(
    fleet: Fleet, client: redis.Redis
) -> None:
    """pybreaker: excluded errors count as success.  They neither trip it nor end a run of
    failures, and in half-open they neither close it nor open it again."""
    fleet.start(2, {"open_interval": 0.3, "success_threshold": 1})
    fleet.do("attempt", outcome="excluded")
    fleet.do("flush")
    assert fleet.totals(client)["ignored"] == 2
    for _ in range(2):
        fleet.do("attempt", outcome="failure")
        fleet.do("flush")
        for _ in range(3):
            fleet.do("attempt", outcome="excluded")
        fleet.do("flush")
    assert (fleet.stored(client).state, fleet.stored(client).run) == ("closed", 4)
    fleet[0].do("attempt", outcome="failure")
    fleet.until_all("open")
    until(lambda: fleet[0].do("attempt", outcome="excluded")["admitted"], "a probe")
    fleet[0].do("flush")
    stored = fleet.stored(client)
    assert (stored.state, stored.successes, stored.slots) == ("half_open", 0, [])
    until(lambda: fleet[1].do("attempt")["admitted"], "the permit was given back")
    fleet.until_all("closed")


def test_a_listener_that_raises_is_nobody_elses_problem(fleet: Fleet) -> None:
    """pybreaker: a raising listener breaks the call."""
    fleet.start(2, {})
    fleet.do("bad_listener")
    fleet.do("fail", count=5)
    fleet.until_all("open")
    assert fleet[0].do("operate", step="reset") == ""
    fleet.until_all("closed")
    assert fleet.do("succeed") == [{"admitted": 1, "rejected": 0}] * 2
    fleet.do("flush")
    for heard in fleet.do("transitions"):
        assert [h["new"] for h in heard][-2:] == ["open", "closed"]


def test_a_rejection_logs_nothing(fleet: Fleet) -> None:
    """litellm #40620: a traceback per rejected call pins a core."""
    fleet.start(2, {})
    fleet[0].do("fail", count=5)
    fleet[1].do("fail", count=5)
    fleet.until_all("open")
    fleet.do("logs")
    done = fleet.do("succeed", count=1000)
    assert done == [{"admitted": 0, "rejected": 1000}] * 2
    assert fleet.do("logs") == [[], []]
