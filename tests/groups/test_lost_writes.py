"""A replica is promoted that has not got the last writes: what the processes know must win."""

from __future__ import annotations

from collections.abc import Callable

from distributed_breaker import model
from distributed_breaker.store import key_of
from scripts.groups import Cluster, Watched
from tests.fleet.harness import Fleet
from tests.fleet.process import until
from tests.groups.together import are, heard, same_node


def test_a_failover_that_loses_writes(
    group: Cluster | Watched, fleet_on: Callable[[Cluster | Watched], Fleet]
) -> None:
    """A trip that was lost is restored, a forced_open that was released does not come back, and a
    circuit that was made meanwhile is there."""
    fleet = fleet_on(group)
    tripped, released, closed, new = same_node(
        fleet.namespace, "tripped", "released", "closed", "new"
    )
    key = key_of(fleet.namespace, tripped)
    fleet.start(3, {"open_interval": 600.0}, circuit=tripped)
    for circuit in (released, closed):
        fleet.do("breaker", circuit=circuit)
    assert fleet[0].do("operate", step="force_open", circuit=released) == ""
    fleet.do("fail", fleet.processes[:2], circuit=closed, count=5)
    until(lambda: are(fleet, released, "forced_open"), "all know of the forced state")
    until(lambda: are(fleet, closed, "open"), "all know of the trip")

    primary = group.primary_of(key)
    replicas = group.replicas_of(primary)
    until(lambda: all(group.caught_up(primary, r) for r in replicas), "the replicas know of it")
    group.cut_replication(primary)
    fleet.do("fail", fleet.processes[:2], count=5)
    assert fleet[0].do("operate", step="release", circuit=released) == ""
    assert fleet[0].do("operate", step="reset", circuit=closed) == ""
    fleet.do("breaker", circuit=new)
    until(lambda: are(fleet, tripped, "open"), "all know of the trip")
    until(lambda: are(fleet, released, "half_open"), "all know of the release")
    until(lambda: are(fleet, closed, "closed"), "all know of the reset")
    until(lambda: all(look["synced"] for look in fleet.do("look", circuit=new)), "all know of it")
    known = {c: generation(fleet, c) for c in (tripped, released, closed, new)}
    for replica in replicas:
        stale = [held(fleet, group, replica, c) for c in (tripped, released, closed)]
        assert [s.header.state for s in stale if s] == ["closed", "forced_open", "open"]
        assert held(fleet, group, replica, new) is None

    client = group.client(group.lose(key))
    for circuit in known:
        fleet.until_agreed(client, circuit)
    # What was half open is open with nothing left of its interval: no permit of before counts.
    for circuit, state in ((tripped, "open"), (released, "open"), (closed, "closed")):
        assert fleet.stored(client, circuit).header.state == state
        assert are(fleet, circuit, state)
        assert fleet.stored(client, circuit).header.v >= known[circuit]  # C1, C8
    # Nobody has believed the replica for a moment.
    assert all(t["new"] != "closed" for p in fleet for t in heard(p, tripped))
    for process in fleet:
        assert [t["new"] for t in heard(process, released)].count("forced_open") <= 1
    for circuit in known:
        fleet.audit(client, circuit, kept=False)


def generation(fleet: Fleet, circuit: str) -> int:
    return max(look["generation"][0] for look in fleet.do("look", circuit=circuit))


def held(
    fleet: Fleet, group: Cluster | Watched, replica: object, circuit: str
) -> model.Circuit | None:
    """A circuit as a replica holds it."""
    client = group.client(replica)  # type: ignore[arg-type]
    client.execute_command("READONLY" if isinstance(group, Cluster) else "PING")
    return fleet.found(client, circuit)
