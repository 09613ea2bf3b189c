"""Fork after use: the child is a process of its own, and nothing is counted twice or forgotten."""

from __future__ import annotations

import pytest
import redis

from scripts.servers import Server
from tests.faults.proxy import Proxy
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet, Process, until

pytestmark = pytest.mark.servers("valkey")
ADJUST = PATIENT

WAYS = pytest.mark.parametrize("how", ["os", "multiprocessing"])


def fork(fleet: Fleet, parent: Process, count: int = 1, how: str = "os") -> list[Process]:
    children = parent.fork(count, how)
    fleet.processes += children
    return children


def account(process: Process) -> dict[str, int]:
    """C4, checked."""
    said: dict[str, int] = process.do("conservation")
    assert said["recorded"] == said["flushed"] + said["dropped"] + said["pending"]
    return said


@WAYS
def test_what_waits_in_the_parent_is_sent_by_the_parent_alone(
    fleet: Fleet, client: redis.Redis, how: str
) -> None:
    """R10."""
    (parent,) = fleet.start(1, {})
    parent.do("succeed", count=5)
    parent.do("flush")
    parent.do("succeed", count=70)
    (child,) = fork(fleet, parent, how=how)
    assert account(child) == {"recorded": 0, "flushed": 0, "dropped": 0, "pending": 0}
    child.do("succeed", count=9)
    child.do("flush")
    parent.do("flush")
    assert account(parent) == {"recorded": 75, "flushed": 75, "dropped": 0, "pending": 0}
    assert account(child) == {"recorded": 9, "flushed": 9, "dropped": 0, "pending": 0}
    assert fleet.totals(client)["calls"] == 84
    assert fleet.totals(client)["dropped"] == 0


@WAYS
def test_the_child_is_another_reporter_with_threads_of_its_own(
    fleet: Fleet, client: redis.Redis, how: str
) -> None:
    (parent,) = fleet.start(1, {})
    parent.do("succeed")
    (child,) = fork(fleet, parent, how=how)
    # Without a call the child starts nothing.
    assert child.do("look")["threads"] == ["MainThread"]
    assert child.do("attempt")["admitted"]
    threads = child.do("look")["threads"]
    assert {"circuit-breaker-link", "circuit-breaker-pushes"} <= set(threads)
    assert child.do("look")["reporter"] != parent.do("look")["reporter"]
    child.do("flush")
    parent.do("flush")
    assert {r.id for r in fleet.stored(client).reporters} == {
        child.do("look")["reporter"],
        parent.do("look")["reporter"],
    }
    # Two reporters make a quorum: the child alone trips nobody but itself.
    child.do("fail", count=5)
    child.do("flush")
    assert parent.do("look")["shared"] == "closed"
    parent.do("fail", count=5)
    fleet.until_all("open")


@WAYS
def test_a_child_of_an_open_circuit_never_calls_through(
    fleet: Fleet, client: redis.Redis, how: str
) -> None:
    """It counts as unsynced, so its first call asks the store."""
    (parent,) = fleet.start(1, {})
    parent.do("fail", count=5)
    fleet.until_all("open")
    children = fork(fleet, parent, 3, how)
    for said in fleet.do("attempt", children):
        assert (said["admitted"], said["state"], said["source"]) == (False, "open", "shared")
    fleet.until_all("open")


def test_a_child_hears_what_happens_while_it_has_made_no_call(fleet: Fleet) -> None:
    """What the parent knew at the fork is not what the child goes by."""
    (parent,) = fleet.start(1, {})
    parent.do("succeed")
    (child,) = fork(fleet, parent)
    assert parent.do("operate", step="force_open") == ""
    said = child.do("attempt")
    assert (said["admitted"], said["state"]) == (False, "forced_open")


def test_a_childs_connections_are_its_own(fleet: Fleet, client: redis.Redis) -> None:
    """The parent's answers do not arrive in the child, nor the child's in the parent."""
    (parent,) = fleet.start(1, {"failure_threshold": 100_000})
    parent.do("flush")
    children = fork(fleet, parent, 4)
    fleet.do("hammer", threads=1, outcome="failure")
    for _ in range(10):
        fleet.do("flush")
        assert [shot["shared_state"] for shot in fleet.do("snapshot")] == ["closed"] * 5
    fleet.do("rest")
    fleet.do("flush")
    accounts = [account(process) for process in (parent, *children)]
    assert all(a["dropped"] == a["pending"] == 0 for a in accounts)
    assert fleet.totals(client)["calls"] == sum(a["recorded"] for a in accounts)
    assert not any(line for lines in fleet.do("logs") for line in lines if line["level"] == "ERROR")


def test_forks_in_the_midst_of_traffic(fleet: Fleet, client: redis.Redis) -> None:
    """Whatever lock a thread of the parent holds at that moment, the child works."""
    (parent,) = fleet.start(1, {"failure_threshold": 100_000})
    for outcome in ("success", "failure"):
        parent.do("hammer", threads=4, outcome=outcome, pause=0.0)
        children = fork(fleet, parent, 8)
        parent.do("rest")
        for child in children:
            assert account(child)["recorded"] == 0
        done = fleet.do("fail", children, count=10)
        assert done == [{"admitted": 10, "rejected": 0}] * 8
        fleet.do("flush", children)
        for child in children:
            assert account(child) == {"recorded": 10, "flushed": 10, "dropped": 0, "pending": 0}
    parent.do("flush")
    recorded = account(parent)["recorded"]
    assert account(parent) == {
        "recorded": recorded, "flushed": recorded, "dropped": 0, "pending": 0,
    }  # fmt: skip
    assert fleet.totals(client)["calls"] == recorded + 160
    assert fleet.totals(client)["dropped"] == 0


def test_a_grandchild(fleet: Fleet, client: redis.Redis) -> None:
    (parent,) = fleet.start(1, {})
    parent.do("succeed", count=2)
    (child,) = fork(fleet, parent)
    child.do("succeed", count=3)
    (grandchild,) = fork(fleet, child, how="multiprocessing")
    grandchild.do("succeed", count=4)
    fleet.do("flush")
    assert [account(process)["flushed"] for process in fleet] == [2, 3, 4]
    assert fleet.totals(client)["calls"] == 9


def test_a_fork_before_the_first_use(fleet: Fleet, client: redis.Redis) -> None:
    """A server that loads the application and then forks, such as gunicorn --preload."""
    parent, *_ = fleet.start(1, blank=True)
    fleet.open([parent], {}, first="fork", tickets=[])
    children = fork(fleet, parent, 4)
    assert all(said["admitted"] for said in fleet.do("attempt", children))
    fleet.do("flush", children)
    fleet.do("fail", children, count=5)
    fleet.until_all("open", children)
    until(lambda: not parent.do("attempt")["admitted"], "the parent knows too")


def test_a_probe_of_the_parent_is_not_the_childs(fleet: Fleet, client: redis.Redis) -> None:
    """A permit is held by one process; the child rides on nothing."""
    policy = {"open_interval": 0.2, "success_threshold": 1, "permit_lease": 3600.0}
    fleet.start(1, policy)
    parent = fleet[0]
    parent.do("fail", count=5)
    fleet.until_all("open")
    until(lambda: parent.do("begin", name="p", how="guard")["admitted"], "a probe")
    (child,) = fork(fleet, parent)
    assert not child.do("attempt")["admitted"]
    assert parent.do("finish", name="p") == "returned"
    fleet.until_all("closed")
    assert fleet.totals(client)["probes"] == 1


@WAYS
def test_a_fork_while_the_store_is_away(
    broken_server: Server, fleet: Fleet, client: redis.Redis, how: str
) -> None:
    (parent,) = fleet.start(1, {})
    parent.do("succeed")
    parent.do("flush")
    broken_server.kill()
    until(lambda: parent.do("look")["degraded"], "degraded")
    parent.do("succeed", count=4)
    (child,) = fork(fleet, parent, how=how)
    assert child.do("succeed", count=4) == {"admitted": 4, "rejected": 0}
    assert child.fail_until_refused() >= 5
    assert parent.do("attempt")["admitted"]
    broken_server.restart()
    fleet.until_agreed(client)
    fleet.do("flush")
    assert account(parent)["recorded"] == 6
    assert account(child)["recorded"] >= 9
    assert CIRCUIT in child.do("fleet_snapshot")


def test_a_child_of_a_degraded_parent_asks_the_store(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """It counts as unsynced whatever its parent had to do without."""
    parent, other = fleet.start(1, {}, url=proxy.url) + fleet.start(1, {})
    proxy.refuse()
    until(lambda: parent.do("look")["degraded"], "degraded")
    assert other.do("operate", step="force_open") == ""
    (child,) = fork(fleet, parent)
    proxy.connect()
    said = child.do("attempt")
    assert (said["admitted"], said["state"]) == (False, "forced_open")


def test_a_child_is_no_less_protective_than_its_parent(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """C7: while the store is away the child goes by what its parent knew and saw."""
    (parent,) = fleet.start(1, {})
    parent.do("fail", count=5)
    fleet.until_all("open")
    broken_server.kill()
    until(lambda: parent.do("look")["degraded"], "degraded")
    children = fork(fleet, parent, 2)
    said = fleet.do("attempt", children)
    assert not any(s["admitted"] for s in said)
    assert all(s["took"] < 0.3 + 2.0 for s in said)
