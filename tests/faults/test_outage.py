"""The store is gone: killed, stopped, restarted with and without its data."""

from __future__ import annotations

import time

import pytest
import redis

from scripts.servers import Server
from tests.faults.proxy import Proxy
from tests.fleet.harness import Fleet, most_at_once, until

pytestmark = pytest.mark.servers("valkey")

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")

SLACK = 2.0  # s by which a busy machine may delay anything


def until_degraded(fleet: Fleet) -> None:
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")


def assert_conserved(fleet: Fleet) -> None:
    """C4, also while the store is away."""
    for account in fleet.do("conservation"):
        assert account["recorded"] == account["flushed"] + account["dropped"] + account["pending"]


def assert_nobody_waited(fleet: Fleet) -> None:
    assert fleet.do("waits") == [[]] * len(fleet.processes)


@ALL
@pytest.mark.parametrize("kept", [True, False], ids=["with its data", "empty"])
def test_killed_while_closed(
    broken_server: Server, fleet: Fleet, client: redis.Redis, kept: bool
) -> None:
    """redis-py's defaults, purgatory, gobreaker: an outage costs seconds per call, or is raised."""
    fleet.start(3, {"open_interval": 0.3})
    fleet.do("succeed", count=10)
    fleet.do("flush")
    client.save()
    fleet.do("waits")
    broken_server.kill()
    assert fleet.do("succeed", count=100) == [{"admitted": 100, "rejected": 0}] * 3
    until_degraded(fleet)
    # Each process protects itself by its own word, and recovers by its own probes.
    sick, *healthy = fleet
    assert sick.fail_until_refused() >= 5
    heard = sick.do("transitions")
    assert [(h["old"], h["new"], h["source"]) for h in heard] == [("closed", "open", "shadow")]
    assert fleet.do("succeed", healthy, count=10) == [{"admitted": 10, "rejected": 0}] * 2
    until(lambda: sick.do("attempt")["admitted"] and sick.do("look")["state"] == "closed", "probes")
    assert_conserved(fleet)
    assert_nobody_waited(fleet)
    broken_server.restart(empty=not kept)
    fleet.until_agreed(client)
    fleet.do("flush")
    assert fleet.states() == ["closed"] * 3
    assert_conserved(fleet)
    fleet.do("fail", count=5)
    fleet.until_all("open")


@ALL
def test_killed_while_open_stays_open_until_its_time(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """pybreaker, interlock: Redis dies and an open circuit closes."""
    fleet.start(3, {"open_interval": 1.5})
    began = time.monotonic()
    fleet.trip(client)
    fleet.do("waits")
    broken_server.kill()
    fleet.do("hammer", threads=2, hold=0.02)
    until_degraded(fleet)
    until(lambda: set(fleet.states()) == {"closed"}, "each recovers by its own probes")
    fleet.do("rest")
    first = fleet.calls("enter")[0]
    assert first["at"] >= began + 1.5
    assert first["local"]
    for process in fleet:
        assert len(fleet.calls("enter", probe=True, pid=process.pid)) == 3
        assert most_at_once(fleet.calls(probe=True, pid=process.pid)) == 1
    assert_nobody_waited(fleet)


@ALL
@pytest.mark.parametrize("kept", [True, False], ids=["with its data", "empty"])
def test_restarted_while_open(
    broken_server: Server, fleet: Fleet, client: redis.Redis, kept: bool
) -> None:
    fleet.start(3, {})
    fleet.trip(client)
    generation = fleet.stored(client).v
    client.save()
    fleet.do("hammer", threads=1)
    broken_server.kill()
    until_degraded(fleet)
    broken_server.restart(empty=not kept)
    fleet.until_agreed(client)
    assert set(fleet.states()) == {"open"}
    done = fleet.do("rest")
    assert all(said.get("admitted", 0) == 0 for said in done)
    assert not fleet.calls("enter")
    if kept:
        assert fleet.stored(client).v == generation
    else:
        assert fleet.stored(client).v > generation
    assert all(0 < look["left"] <= 60_000 for look in fleet.do("look"))


def test_forced_open_holds_while_the_store_is_away(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """An override alone decides, also while degraded, and its ttl runs locally too."""
    fleet.start(2, {})
    fleet.do("breaker", circuit="brief")
    assert fleet[0].do("operate", step="force_open") == ""
    assert fleet[0].do("operate", step="force_closed", circuit="brief", ttl=1.0) == ""
    until(
        lambda: all(look["state"] == "forced_closed" for look in fleet.do("look", circuit="brief"))
    )
    fleet.until_all("forced_open")
    broken_server.kill()
    until_degraded(fleet)
    assert {s["source"] for s in fleet.do("attempt")} == {"override"}
    until(
        lambda: all(look["state"] == "closed" for look in fleet.do("look", circuit="brief")),
        "its end",
    )
    broken_server.restart(empty=True)
    fleet.until_agreed(client)
    assert fleet.states() == ["forced_open"] * 2


@ALL
def test_stopped_while_closed_makes_no_call_wait(broken_server: Server, fleet: Fleet) -> None:
    fleet.start(3, {}, POLL=300, SLOW_FLUSH=300)
    fleet.do("succeed", count=10)
    fleet.do("flush")
    fleet.do("waits")
    broken_server.pause()
    assert fleet.do("succeed", count=50) == [{"admitted": 50, "rejected": 0}] * 3
    assert fleet[0].fail_until_refused() >= 5
    until_degraded(fleet)
    assert fleet.do("succeed", count=50)[1:] == [{"admitted": 50, "rejected": 0}] * 2
    assert_nobody_waited(fleet)
    assert_conserved(fleet)
    broken_server.resume()
    until(lambda: not any(look["degraded"] for look in fleet.do("look")), "all have returned")
    fleet.do("flush")
    assert_conserved(fleet)


@ALL
def test_stopped_while_open_makes_no_call_wait(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    fleet.start(3, {}, POLL=300, SLOW_FLUSH=300)
    fleet.trip(client)
    fleet.do("waits")
    broken_server.pause()
    assert fleet.do("succeed", count=500) == [{"admitted": 0, "rejected": 500}] * 3
    until_degraded(fleet)
    assert fleet.do("succeed", count=500) == [{"admitted": 0, "rejected": 500}] * 3
    assert_nobody_waited(fleet)
    broken_server.resume()
    fleet.until_agreed(client)
    assert fleet.states() == ["open"] * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_probe_waits_a_bounded_time_for_a_stopped_store(
    broken_server: Server, fleet: Fleet, client: redis.Redis, proxy: Proxy, asynchronous: bool
) -> None:
    fleet.start(1, {"open_interval": 0.5}, url=proxy.url)
    fleet[0].do("fail", count=5)
    fleet.until_all("open")
    held = proxy.hold("acquire")
    until(lambda: fleet[0].do("look")["left"] == 0, "the open interval is over")
    said = fleet[0].do("attempt", asynchronous=asynchronous)
    assert said["took"] < 0.3 + SLACK
    assert held.hits == 1
    # One acquire without an answer is enough to decide alone.
    until_degraded(fleet)
    if not asynchronous:
        (spent,) = fleet[0].do("waits")
        assert spent < 0.3 + SLACK
    assert fleet[0].do("attempt")["took"] < SLACK
    assert fleet[0].do("waits") == []
    held.release()
    fleet.until_agreed(client)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_first_call_of_a_process_waits_once_for_a_stopped_store(
    broken_server: Server, fleet: Fleet, client: redis.Redis, asynchronous: bool
) -> None:
    broken_server.pause()
    (process,) = fleet.start(1, blank=True)
    (said,) = fleet.open([process], {}, first="attempt", asynchronous=asynchronous)
    assert said["admitted"]
    assert said["took"] < 0.3 + SLACK
    process.do("breaker", circuit="other")
    process.do("waits")
    assert process.do("attempt", circuit="other")["admitted"]
    assert process.do("succeed", count=10) == {"admitted": 10, "rejected": 0}
    assert process.do("waits") == []
    broken_server.resume()
    fleet.until_agreed(client)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_process_that_starts_without_a_store_works(
    broken_server: Server, fleet: Fleet, client: redis.Redis, asynchronous: bool
) -> None:
    broken_server.kill()
    (process,) = fleet.start(1, blank=True)
    (said,) = fleet.open([process], {}, first="attempt", asynchronous=asynchronous)
    assert said["admitted"]
    assert said["took"] < 0.3 + SLACK
    assert process.fail_until_refused() >= 5
    assert process.do("attempt")["source"] == "shadow"
    broken_server.restart()
    fleet.until_agreed(client)


def test_many_that_lost_the_store_while_half_open_send_few_probes(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """A held permit stays valid to its lease; the others wait for a random part of the interval."""
    fleet.start(6, {"open_interval": 0.6, "success_threshold": 1})
    fleet.trip(client)
    until(lambda: fleet[0].do("begin", name="p", how="guard")["admitted"], "a probe")
    fleet.until_all("half_open")
    broken_server.kill()
    until_degraded(fleet)
    assert fleet[0].do("finish", name="p") == "returned"
    fleet.do("hammer", threads=2, hold=0.05, outcome="failure")
    until(lambda: len(fleet.calls("enter", local=True)) >= 12, "local probes")
    fleet.do("rest")
    starts = [call["at"] for call in fleet.calls("enter", local=True)[:6]]
    assert max(starts) - min(starts) > 0.01
    for process in fleet:
        assert most_at_once(fleet.calls(local=True, pid=process.pid)) <= 1


def test_an_outage_is_said_once(broken_server: Server, fleet: Fleet) -> None:
    fleet.start(2, {}, POLL=300, SLOW_FLUSH=300)
    fleet.do("logs")
    broken_server.kill()
    until_degraded(fleet)
    fleet.do("succeed", count=100)
    said = [[line for line in lines if line["level"] != "DEBUG"] for lines in fleet.do("logs")]
    assert [[line["level"] for line in lines] for lines in said] == [["WARNING"]] * 2
    assert all("local state only" in line["text"] for lines in said for line in lines)
    assert not any("Traceback" in line["text"] for lines in said for line in lines)
    broken_server.restart()
    until(lambda: not any(look["degraded"] for look in fleet.do("look")), "all have returned")
    assert [[line["level"] for line in lines] for lines in fleet.do("logs")] == [["INFO"]] * 2


def test_operators_steps_need_the_store(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """StoreUnavailable, and nothing has changed."""
    fleet.start(2, {})
    fleet.trip(client)
    broken_server.kill()
    until_degraded(fleet)
    before = fleet.do("look")
    for step in ("reset", "release", "force_open", "force_closed"):
        assert fleet[0].do("operate", step=step).startswith("StoreUnavailable: ")
    after = fleet.do("look")
    for old, new in zip(before, after, strict=True):
        assert (old["state"], old["generation"]) == (new["state"], new["generation"])
    assert not fleet.do("snapshot")[0]["fleet"]
    assert fleet[0].do("fleet_snapshot")["raised"].startswith("StoreUnavailable: ")
    broken_server.restart(empty=True)
    fleet.until_agreed(client)
    assert fleet.states() == ["open"] * 2


def test_an_operators_step_without_an_answer_says_that_the_outcome_is_unknown(
    broken_server: Server, fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    fleet.start(1, {}, url=proxy.url)
    held = proxy.hold("override")
    said = fleet[0].do("operate", step="force_open")
    assert said.startswith("StoreUnavailable: ")
    assert "unknown" in said
    held.release()
    # It was carried out, and everybody learns of it.
    fleet.until_all("forced_open")


def test_stepping_clocks_while_the_store_is_away(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    fleet.start(2, {"open_interval": 1.0})
    fleet.trip(client)
    began = time.monotonic()
    broken_server.kill()
    until_degraded(fleet)
    fleet[0].do("step_wall_clock", seconds=3600)
    fleet[1].do("step_wall_clock", seconds=-3600)
    fleet.do("hammer", threads=1)
    until(lambda: set(fleet.states()) == {"closed"}, "both recover")
    fleet.do("rest")
    assert fleet.calls("enter")[0]["at"] > began + 0.5
