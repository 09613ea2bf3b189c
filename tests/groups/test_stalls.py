"""Primaries that stand still for a while or hand over in order: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable

from distributed_breaker.store import key_of
from scripts.groups import PRIMARY, Cluster, Watched
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet
from tests.fleet.process import until
from tests.groups.together import slot_of

REPLICA = "replica"  # see scripts/groups.py
NEVER = 600_000  # ms
NO_TRIP = {"failure_threshold": 1_000_000}


def test_a_primary_that_stands_still(
    group: Cluster | Watched, fleet_on: Callable[..., Fleet]
) -> None:
    """Too short for a failover.  It carries out late what nobody waits for any more; were that sent
    again, to it or to another, it would be counted twice (S10)."""
    without_failovers(group)
    fleet = fleet_on(group)
    fleet.start(3, NO_TRIP, READ_TIMEOUT=0.25)
    primary = group.primary_of(key_of(fleet.namespace, CIRCUIT))
    fleet.do("hammer", outcome="failure", pause=0.005)
    primary.pause()
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")
    assert all(process.do("attempt")["admitted"] for process in fleet)  # R11: by their own word
    primary.resume()
    fleet.do("rest")
    client = group.client(primary)
    fleet.until_agreed(client)
    said = fleet.audit(client)
    assert said["dropped"] > 0
    assert group.primary_of(key_of(fleet.namespace, CIRCUIT)) is primary


def test_a_failover_in_order(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """The primary waits for its replica, so what was acknowledged before and after is all there."""
    fleet = fleet_on(cluster)
    fleet.start(3, NO_TRIP)
    fleet.do("hammer", outcome="failure", pause=0.005)
    new = cluster.switch(key_of(fleet.namespace, CIRCUIT))
    client = cluster.client(new)
    before = fleet.totals(client)["calls"]
    until(lambda: fleet.totals(client)["calls"] > before, "they have followed")
    fleet.do("rest")
    fleet.until_agreed(client)
    fleet.audit(client)


def test_slots_that_move_as_a_whole(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """As Valkey 9 moves them by itself: no ASK and no TRYAGAIN, a pause and then MOVED."""
    fleet = fleet_on(cluster)
    fleet.start(3, NO_TRIP, **PATIENT)
    slot = slot_of(fleet.namespace, CIRCUIT)
    source = cluster.primary_of(key_of(fleet.namespace, CIRCUIT))
    to = next(n for n in cluster.nodes if n is not source and cluster.is_primary(n))
    for node in cluster.nodes:  # They speak to each other as the user who replicates.
        cluster.ask(node, "ACL", "SETUSER", REPLICA, "+@all", "~*", "&*")
    fleet.do("hammer", outcome="failure", pause=0.005)
    where = ("SLOTSRANGE", slot, slot, "NODE", cluster.id_of(to))
    cluster.ask(source, "CLUSTER", "MIGRATESLOTS", *where)
    until(lambda: cluster.primary_of(key_of(fleet.namespace, CIRCUIT)) is to, "it has moved")
    client = cluster.client(to)
    before = fleet.totals(client)["calls"]
    until(lambda: fleet.totals(client)["calls"] > before, "they have followed")
    fleet.do("rest")
    assert fleet.audit(client)["dropped"] == 0
    fleet.until_agreed(client)


def without_failovers(group: Cluster | Watched) -> None:
    if isinstance(group, Cluster):
        for node in group.nodes:
            group.ask(node, "CONFIG", "SET", "cluster-node-timeout", NEVER)
    else:
        for sentinel in group.sentinels:
            group.ask(sentinel, "SENTINEL", "SET", PRIMARY, "down-after-milliseconds", NEVER)
