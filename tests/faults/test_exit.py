"""A process that ends right after a call: its outcome is in the store."""

from __future__ import annotations

import time

import pytest
import redis

from scripts.servers import Server
from tests.faults.proxy import Proxy
from tests.fleet.harness import Fleet, until

pytestmark = pytest.mark.servers("valkey")


@pytest.mark.parametrize("how", ["normal", "sys.exit", "error"])
def test_a_process_that_ends(fleet: Fleet, client: redis.Redis, how: str) -> None:
    (process,) = fleet.start(1, {"failure_threshold": 100})
    process.do("succeed", count=40)
    process.do("fail", count=2)
    process.exit(how)
    totals = fleet.totals(client)
    assert (totals["calls"], totals["failures"], totals["dropped"]) == (42, 2, 0)


@pytest.mark.parametrize("how", ["normal", "sys.exit", "error"])
def test_a_child_of_multiprocessing_that_ends(fleet: Fleet, client: redis.Redis, how: str) -> None:
    """It skips atexit."""
    (parent,) = fleet.start(1, {"failure_threshold": 100})
    parent.do("succeed", count=7)
    (child,) = parent.fork(how="multiprocessing")
    child.do("succeed", count=40)
    child.do("fail", count=2)
    child.exit(how)
    until(lambda: fleet.totals(client)["calls"] >= 42, "the child's outcomes", 2)
    parent.do("flush")
    totals = fleet.totals(client)
    assert (totals["calls"], totals["failures"], totals["dropped"]) == (49, 2, 0)


def test_a_process_that_ends_at_its_first_call(fleet: Fleet, client: redis.Redis) -> None:
    (process,) = fleet.start(1, blank=True)
    fleet.open([process], {}, first="succeed", count=3)
    process.exit()
    assert fleet.totals(client)["calls"] == 3


def test_a_probe_just_before_the_end_is_settled(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(2, {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 3600.0})
    fleet.trip(client)
    until(lambda: fleet[0].do("attempt")["admitted"], "a probe")
    fleet[0].exit()
    fleet.until_all("closed", fleet.processes[1:])


def test_calls_after_close_go_on(fleet: Fleet, client: redis.Redis) -> None:
    """On the last mirror and the shadow, without threads, and never raising."""
    closed, opened = fleet.start(2, {})
    assert closed.do("breaker", circuit="other") is None
    closed.do("succeed", count=3)
    for _ in range(2):
        closed.do("close")
    assert closed.do("succeed", count=50) == {"admitted": 50, "rejected": 0}
    assert closed.fail_until_refused() >= 5
    assert closed.do("attempt")["source"] == "shadow"
    assert closed.do("attempt", circuit="other")["admitted"]
    assert closed.do("operate", step="reset").startswith("StoreUnavailable: ")
    assert closed.do("snapshot")["fleet"] is False
    assert not [t for t in closed.do("look")["threads"] if t == "circuit-breaker-link"]
    assert opened.do("operate", step="force_open") == ""
    opened.do("close")
    assert not opened.do("attempt")["admitted"]


@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_a_process_ends_soon_though_the_store_is_away(
    broken_server: Server, fleet: Fleet, what: str
) -> None:
    fleet.start(2, {})
    fleet.do("succeed", count=5)
    broken_server.kill() if what == "killed" else broken_server.pause()
    fleet.do("fail")
    began = time.monotonic()
    for process in fleet:
        process.exit()
    assert time.monotonic() - began < 10


def test_a_process_ends_though_a_flush_gets_no_answer(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    (process,) = fleet.start(1, {}, url=proxy.url)
    proxy.hold("report")
    process.do("succeed", count=5)
    process.exit()
    # It was carried out all the same, once.
    until(lambda: fleet.totals(client)["calls"] == 5, "the report")
