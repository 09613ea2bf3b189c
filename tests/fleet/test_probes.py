"""Half-open: permits are exact across the fleet, and a dead prober cannot wedge the circuit."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import redis

from tests.fleet.harness import Fleet, most_at_once, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")


def end_of_interval(fleet: Fleet) -> float:
    """When the open interval ends, in seconds of the monotonic clock that all processes share."""
    return time.monotonic() + max(look["left"] for look in fleet.do("look")) / 1000


@ALL
@pytest.mark.parametrize("permits", [1, 3])
def test_when_the_interval_ends_no_more_probes_run_than_there_are_permits(
    fleet: Fleet, client: redis.Redis, permits: int
) -> None:
    """pybreaker #24, purgatory, opossum: half-open admits every process."""
    fleet.start(8, {"open_interval": 0.4, "half_open_permits": permits})
    fleet.trip(client)
    # All begin at the moment when it ends; a probe takes long and fails, so that the circuit opens
    # again and the moment comes back many times.
    fleet.do("hammer", start=end_of_interval(fleet), outcome="failure", hold=0.03)
    until(lambda: fleet.totals(client)["half_opens"] >= 4, "four half-open periods")
    fleet.do("rest")
    admitted = Counter(call["of"] for call in fleet.calls("enter", probe=True))
    assert len(admitted) >= 4
    assert not fleet.calls("enter", probe=False)
    assert not fleet.calls("enter", local=True)
    # One failed probe ends its generation, so no generation has more of them than permits.
    assert max(admitted.values()) <= permits


def test_many_tasks_of_one_loop_are_no_more_probes_than_permits(
    fleet: Fleet, client: redis.Redis
) -> None:
    fleet.start(4, {"open_interval": 0.2, "half_open_permits": 2})
    fleet.trip(client)

    def admitted() -> Counter[str]:
        fleet.do("attempt_many", count=40, outcome="failure", hold=0.02)
        return Counter(call["of"] for call in fleet.calls("enter"))

    until(lambda: len(admitted()) >= 3, "three half-open periods")
    assert max(admitted().values()) <= 2


def test_many_probes_in_turn_are_never_more_at_once_than_permits(
    fleet: Fleet, client: redis.Redis
) -> None:
    fleet.start(8, {"open_interval": 0.3, "half_open_permits": 3, "success_threshold": 25})
    fleet.trip(client)
    fleet.do("hammer", start=end_of_interval(fleet), hold=0.02)
    fleet.until_all("closed")
    fleet.do("rest")
    probes = fleet.calls("enter", probe=True)
    assert {call["of"] for call in probes} == {probes[0]["of"]}
    assert len(probes) == 25
    assert most_at_once(fleet.calls(probe=True)) <= 3


def test_probes_that_hang_hold_back_everybody_else(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(8, {"open_interval": 0.3, "half_open_permits": 2})
    fleet.trip(client)
    until(lambda: fleet[0].do("begin", name="a")["admitted"], "a first probe")
    assert until(lambda: fleet[1].do("begin", name="b", how="guard")["admitted"], "a second")
    fleet.do("hammer", fleet.processes[2:], threads=4)
    until(lambda: fleet.totals(client)["rejected"] > 300, "many have been refused")
    done = fleet.do("rest", fleet.processes[2:])
    assert all(said.get("admitted", 0) == 0 for said in done)
    assert fleet.states() == ["half_open"] * 8
    assert fleet[0].do("finish", name="a") == "returned"
    assert fleet[1].do("finish", name="b") == "returned"
    until(lambda: fleet[7].do("attempt")["admitted"], "the third success")
    fleet.until_all("closed")
    assert fleet.totals(client)["probes"] == 3


@ALL
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_dead_prober_costs_at_most_one_lease(fleet: Fleet, client: redis.Redis, how: str) -> None:
    """resilience4j #903, #935, interlock, nopanic: a killed prober wedges the fleet."""
    lease = 0.8
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": lease}
    prober, *others = fleet.start(4, policy)
    fleet.trip(client)
    until(lambda: prober.do("begin", name="p", how="guard")["admitted"], "a probe")
    prober.kill() if how == "killed" else prober.freeze()
    (held,) = fleet.calls("enter")
    fleet.do("hammer", others, threads=1)
    until(lambda: len(fleet.calls("enter", probe=True)) > 1, "the permit is usable again", 10.0)
    again = fleet.calls("enter", probe=True)[1]
    # The lease began after the dead one had asked, and ended before the next one was let in.
    # The clocks that are compared count in milliseconds.
    assert again["at"] >= held["asked"] + lease - 0.005
    fleet.until_all("closed", others)
    fleet.do("rest", others)
    assert again["at"] < held["at"] + lease + 5.0
    if how == "frozen":
        prober.thaw()
        generation = fleet.stored(client)
        assert prober.do("finish", name="p", outcome="failure") == "BrokenError"
        prober.do("flush")
        # It came too late: nothing has changed.
        stored = fleet.stored(client)
        assert (stored.state, stored.v) == ("closed", generation.v)


def test_a_cancelled_probe_gives_its_permit_back_at_once(fleet: Fleet, client: redis.Redis) -> None:
    """A cancelled task leaks its permit, elsewhere."""
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 3600.0}
    prober, other = fleet.start(2, policy)
    fleet.trip(client)
    until(lambda: prober.do("begin", name="p", how="async")["admitted"], "a probe")
    assert not other.do("attempt")["admitted"]
    assert prober.do("cancel", name="p") == "CancelledError"
    until(lambda: other.do("attempt")["admitted"], "the permit is free again")
    fleet.until_all("closed")


def test_three_successes_however_far_apart_close_it(fleet: Fleet, client: redis.Redis) -> None:
    """Half-open waits as long as it must: no timeout and no window forgets a success."""
    fleet.start(4, {"window": 60.0, "permit_lease": 30.0})
    fleet.trip(client)
    hour = 3_600_000
    for number in (1, 2, 3):
        fleet.do("step_store_clock", milliseconds=number * hour)
        if number == 1:
            # Nobody's mirror can know that an hour has passed; an operator's steps lead there too.
            assert fleet[3].do("operate", step="force_open") == ""
            assert fleet[3].do("operate", step="release") == ""
            fleet.until_all("half_open")
        fleet.do("flush")
        assert fleet.states() == ["half_open"] * 4
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe")
        fleet[number].do("flush")
    fleet.until_all("closed")
    assert fleet.totals(client)["probes"] == 3
    causes = [entry["cause"] for entry in fleet.log(client)]
    assert causes == ["created", "run", "forced_open", "released", "recovered"]


@ALL
def test_three_successes_with_expired_leases_between_close_it(
    fleet: Fleet, client: redis.Redis
) -> None:
    policy = {"open_interval": 0.2, "half_open_permits": 1, "permit_lease": 0.2}
    fleet.start(4, policy)
    fleet.trip(client)
    for number in (0, 1, 2):
        # Between two successes somebody takes the permit and never settles it.
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe")
        if number < 2:
            until(lambda n=number: fleet[3].do("begin", name=str(n))["admitted"], "a leak")
    fleet.until_all("closed")


@ALL
def test_one_failure_reopens_it_for_all(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(4, {"open_interval": 0.3, "open_interval_max": 60.0, "backoff_multiplier": 100.0})
    fleet.trip(client)
    until(lambda: fleet[0].do("attempt")["admitted"], "a first success")
    until(lambda: fleet[1].do("attempt")["admitted"], "a second success")
    fleet.until_all("half_open")
    until(lambda: fleet.stored(client).successes == 2, "both have been settled")
    before = fleet.stored(client)
    until(lambda: fleet[2].do("attempt", outcome="failure")["admitted"], "the third fails")
    fleet.until_all("open")
    after = fleet.stored(client)
    assert (after.attempt, after.duration) == (1, 30_000)
    assert after.v > before.v
    refused = fleet.do("attempt")
    assert {(said["admitted"], said["reason"]) for said in refused} == {(False, "a probe failed")}
    assert all(20 < said["retry_after"] <= 30 for said in refused)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_ignored_probe_neither_closes_nor_opens(
    fleet: Fleet, client: redis.Redis, asynchronous: bool
) -> None:
    """pybreaker: excluded errors count as success."""
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 3600.0}
    first, second = fleet.start(2, policy)
    fleet.trip(client)
    how = "async" if asynchronous else "guard"
    until(lambda: first.do("begin", name="p", how=how)["admitted"], "a probe")
    assert first.do("finish", name="p", outcome="interrupt") == "CancelledError"
    first.do("flush")
    stored = fleet.stored(client)
    assert (stored.state, stored.successes, stored.slots) == ("half_open", 0, [])
    until(lambda: second.do("attempt")["admitted"], "the permit is free")
    fleet.until_all("closed")


def test_a_health_check_closes_it_without_traffic(
    fleet: Fleet, client: redis.Redis, tmp_path: Path
) -> None:
    sick = tmp_path / "sick"
    fleet.start(3, {"open_interval": 0.2, "success_threshold": 2})
    fleet.do("health_check", sick=str(sick))
    until(lambda: len({c["pid"] for c in fleet.calls("check")}) == 3, "each has passed once")
    sick.touch()
    fleet.do("fail", count=5)
    until(lambda: fleet.totals(client)["half_opens"] >= 2, "checks probe, and fail")
    # User's calls are never the probe here.
    assert not any(said["admitted"] for said in fleet.do("attempt"))
    sick.unlink()
    fleet.until_all("closed")
    assert not fleet.calls("enter")
