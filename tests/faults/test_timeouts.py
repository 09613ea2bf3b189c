"""Answers that come late, or never: at most once, always accounted for."""

from __future__ import annotations

import pytest
import redis

from tests.faults.proxy import Proxy
from tests.fleet.harness import Fleet, Process, until

pytestmark = pytest.mark.servers("valkey")


def account(process: Process) -> dict[str, int]:
    """C4, checked."""
    said: dict[str, int] = process.do("conservation")
    assert said["recorded"] == said["flushed"] + said["dropped"] + said["pending"]
    return said


def settled(process: Process) -> dict[str, int]:
    """The account, once nothing is pending."""
    until(lambda: account(process)["pending"] == 0, "everything is acknowledged or lost")
    return account(process)


def test_one_late_answer_does_not_degrade(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    (process,) = fleet.start(1, {}, url=proxy.url)
    process.do("flush")
    held = proxy.hold("report", times=1)
    process.do("fail", count=2)
    lost = until(lambda: account(process)["dropped"], "the answer is given up")
    held.release()
    process.do("fail", count=2)
    process.do("flush")
    assert not process.do("look")["degraded"]
    assert account(process) == {
        "recorded": 4, "flushed": 4 - lost, "dropped": lost, "pending": 0,
    }  # fmt: skip
    # It was carried out though, and not sent again: each outcome is in the store at most once.
    assert fleet.totals(client)["failures"] == 4
    process.do("flush")
    assert fleet.totals(client)["dropped"] == lost


def test_two_late_answers_in_a_row_degrade(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    (process,) = fleet.start(1, {}, url=proxy.url)
    process.do("flush")
    held = proxy.hold("*")
    process.do("fail", count=2)
    until(lambda: process.do("look")["degraded"], "degraded after two timeouts")
    assert process.do("look")["down"] == "TIMEOUT"
    assert process.do("succeed", count=10) == {"admitted": 10, "rejected": 0}
    assert process.do("waits") == []
    held.release()
    fleet.until_agreed(client)
    assert settled(process)["recorded"] == 12


def test_a_connection_that_breaks_after_the_step_was_carried_out(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    (process,) = fleet.start(1, {"failure_threshold": 100}, url=proxy.url)
    process.do("flush")
    rule = proxy.cut("report")
    process.do("fail", count=3)
    until(lambda: rule.hits == 1, "the cut")
    fleet.until_agreed(client)
    process.do("flush")
    said = settled(process)
    totals = fleet.totals(client)
    assert said["recorded"] == 3
    # Nothing is counted twice; what was dropped is counted as such.
    assert said["flushed"] <= totals["failures"] <= 3
    assert totals["dropped"] == said["dropped"] > 0


def test_a_settle_is_sent_until_it_is_acknowledged(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """R5; and S5: it counts once, though it is sent more than once.  That it was counted the first
    time cannot be known by its process, which says so by counting it as dropped."""
    fleet.start(1, {"open_interval": 0.3, "success_threshold": 2}, url=proxy.url)
    process = fleet[0]
    process.do("fail", count=5)
    fleet.until_all("open")
    until(lambda: process.do("begin", name="p", how="guard")["admitted"], "a probe")
    rule = proxy.cut("settle", times=2)
    assert process.do("finish", name="p") == "returned"
    until(lambda: rule.hits == 2 and settled(process), "it is acknowledged")
    assert settled(process)["dropped"] == 1
    fleet.until_agreed(client)
    assert fleet.stored(client).successes == 1
    assert fleet.totals(client)["probes"] == 1
    until(lambda: process.do("attempt")["admitted"], "a second probe")
    fleet.until_all("closed")


def test_a_settle_survives_a_short_outage(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    fleet.start(2, {"open_interval": 0.2, "success_threshold": 1}, url=proxy.url)
    fleet.trip(client)
    until(lambda: fleet[0].do("begin", name="p", how="guard")["admitted"], "a probe")
    proxy.refuse()
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "degraded")
    assert fleet[0].do("finish", name="p") == "returned"
    proxy.connect()
    fleet.until_all("closed")
    assert fleet.totals(client)["probes"] == 1


def test_a_grant_that_comes_late_is_given_back(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """R2: an acquire that times out is a rejection, followed by a cancel."""
    policy = {"open_interval": 0.3, "success_threshold": 1, "permit_lease": 3600.0}
    late, other = fleet.start(1, policy, url=proxy.url) + fleet.start(1, policy)
    fleet.trip(client)
    held = proxy.hold("acquire", times=1)
    until(lambda: late.do("attempt") and held.hits == 1, "an acquire")
    held.release()
    assert not fleet.calls("enter", pid=late.pid, local=False)
    until(lambda: other.do("attempt")["admitted"], "the permit was given back")
    until(lambda: other.do("look")["state"] == "closed", "recovery")


def test_a_grant_that_has_expired_on_its_way_starts_no_probe(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """R1: without it two probes could run on one permit."""
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 0.05}
    slow, quick = fleet.start(1, policy, url=proxy.url) + fleet.start(1, policy)
    fleet.trip(client)
    proxy.latency = 0.1
    until(lambda: slow.do("attempt") and proxy.seen["acquire"] >= 3, "acquires")
    assert not fleet.calls("enter")
    assert not slow.do("look")["degraded"]
    until(lambda: quick.do("attempt")["admitted"], "a probe of the other process")
    until(lambda: slow.do("look")["state"] == "closed", "recovery")


def test_only_one_acquire_is_under_way(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    """R3: the other calls of the process are rejected meanwhile, and do not wait."""
    fleet.start(1, {"open_interval": 0.2}, url=proxy.url)
    process = fleet[0]
    process.do("fail", count=5)
    fleet.until_all("open")
    held = proxy.hold("acquire", times=1)
    process.do("hammer", threads=8)
    until(lambda: held.hits == 1, "an acquire")
    process.do("rest")
    held.release()
    assert proxy.seen["acquire"] <= 2
    assert len(process.do("waits")) <= 2


def test_many_connections_resets_lose_nothing_unnoticed(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    fleet.start(2, {"failure_threshold": 1000}, url=proxy.url)
    for _ in range(15):
        fleet.do("fail")
        fleet.do("succeed", count=3)
        proxy.reset()
    fleet.until_agreed(client)
    fleet.do("flush")
    flushed = dropped = 0
    for process in fleet:
        said = settled(process)
        assert said["recorded"] == 60
        flushed += said["flushed"]
        dropped += said["dropped"]
    totals = fleet.totals(client)
    assert flushed <= totals["calls"] <= flushed + dropped
    assert totals["dropped"] == dropped
