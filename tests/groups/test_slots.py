"""What only a cluster does: slots that move, slots that nobody serves, pushes through all nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from distributed_breaker.store import key_of, sha
from scripts.groups import Cluster
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet
from tests.fleet.process import until
from tests.groups.together import are, slot_of


def test_a_slot_moves_under_load(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """MOVED, ASK and TRYAGAIN: nothing is lost, also not while the circuit is on one node and its
    log on another."""
    fleet = fleet_on(cluster)
    fleet.start(3, **PATIENT)
    fleet.do("hammer", outcome="success", pause=0.002)
    slot = slot_of(fleet.namespace, CIRCUIT)
    source = cluster.primary_of(key_of(fleet.namespace, CIRCUIT))
    to = next(n for n in cluster.nodes if n is not source and cluster.is_primary(n))
    counts = []

    def look() -> None:
        """Outcomes are counted, whichever node has the circuit."""
        fleet.do("fail")
        fleet.do("succeed")
        fleet.do("flush")
        counts.append(sum(p.do("conservation")["flushed"] for p in fleet))

    cluster.move_slot(slot, to, during=look)
    look()
    assert len(counts) == 4  # before the circuit moved, before its log did, and after
    assert counts == sorted(set(counts))
    fleet.do("rest")
    client = cluster.client(to)
    assert cluster.primary_of(key_of(fleet.namespace, CIRCUIT)) is to
    assert fleet.audit(client)["dropped"] == 0
    fleet.until_agreed(client)
    fleet.do("fail", fleet.processes[:2], count=5)
    fleet.until_all("open")


def test_a_circuit_is_made_in_a_slot_that_is_moving(
    cluster: Cluster, fleet_on: Callable[..., Fleet]
) -> None:
    """Neither node has its keys: the old one says ASK, and the new one TRYAGAIN."""
    fleet = fleet_on(cluster)
    source = cluster.primary_of(key_of(fleet.namespace, CIRCUIT))
    to = next(n for n in cluster.nodes if n is not source and cluster.is_primary(n))

    def begin() -> None:
        fleet.start(2, **PATIENT)
        fleet.do("fail", count=5)
        fleet.until_all("open")

    cluster.move_slot(slot_of(fleet.namespace, CIRCUIT), to, during=begin)
    assert fleet.audit(cluster.client(to))["dropped"] == 0
    fleet.until_agreed(cluster.client(to))


def test_nobody_serves_the_slot(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """CLUSTERDOWN is an outage like any other: the shadows decide, and all agree afterwards."""
    fleet = fleet_on(cluster)
    fleet.start(3, {"open_interval": 600.0})
    fleet.do("breaker", circuit="open")
    fleet.do("fail", fleet.processes[:2], circuit="open", count=5)
    until(lambda: are(fleet, "open", "open"), "all know of the trip")
    fleet.do("hammer", fleet.processes[:2], pause=0.01)
    key = key_of(fleet.namespace, CIRCUIT)
    primary = cluster.primary_of(key)
    replica = cluster.replica_of(primary)
    replica.kill()
    primary.kill()
    other = next(n for n in cluster.running if cluster.is_primary(n))
    until(lambda: "cluster_state:fail" in str(cluster.ask(other, "CLUSTER", "INFO")), "it is down")
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "all decide by themselves")
    # Nodes that are alive say CLUSTERDOWN of all slots, so the other circuit is no better off.
    codes = {look["down"] for look in fleet.do("look", circuit="open")}
    assert codes <= {"CLUSTERDOWN", "CONNECTION", "TIMEOUT"}
    assert are(fleet, "open", "open")
    primary.restart(empty=False)
    cluster.wait_ready()
    fleet.until_agreed(cluster.client(primary))
    fleet.until_agreed(cluster.client(cluster.primary_of(key_of(fleet.namespace, "open"))), "open")
    assert are(fleet, "open", "open")
    fleet.do("rest")
    fleet.audit(cluster.client(primary), kept=False)


def test_pushes_are_heard_on_any_node(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """Also on replicas, and though the script was loaded on one node only."""
    fleet = fleet_on(cluster)
    fleet.start(2, **PATIENT)
    channel = f"cb:0:{fleet.namespace}"
    with contextlib.ExitStack() as stack:
        ears = []
        for node in cluster.nodes:
            ear = stack.enter_context(contextlib.closing(cluster.client(node).pubsub()))
            ear.subscribe(channel)
            assert ear.get_message(timeout=10.0)
            ears.append(ear)
        fleet.do("fail", count=5)
        for ear in ears:
            pushed = until(lambda ear=ear: ear.get_message(timeout=1.0), "a push")
            assert pushed["data"].split()[:1] == [CIRCUIT]
    loaded = [n for n in cluster.nodes if cluster.ask(n, "SCRIPT", "EXISTS", sha()) == [1]]
    assert loaded == [cluster.primary_of(key_of(fleet.namespace, CIRCUIT))]
