"""A failover that has lost which permits are out."""

from __future__ import annotations

from collections.abc import Callable

from distributed_breaker.store import key_of
from scripts.groups import Cluster, Watched
from tests.fleet.harness import CIRCUIT, Fleet, most_at_once
from tests.fleet.process import until
from tests.groups.together import are, heard

PERMITS = 2
HALF = {"open_interval": 0.2, "success_threshold": PERMITS, "permit_lease": 60.0}


def test_permits_that_the_new_primary_does_not_know_of(
    group: Cluster | Watched, fleet_on: Callable[..., Fleet]
) -> None:
    """C2: as many again may go out, no more.  S6: what comes of the lost ones closes nothing."""
    fleet = fleet_on(group)
    fleet.start(3, HALF)
    key = key_of(fleet.namespace, CIRCUIT)
    primary = group.primary_of(key)
    replicas = group.replicas_of(primary)
    until(lambda: all(group.caught_up(primary, r) for r in replicas), "the replicas know of it")
    group.cut_replication(primary)
    fleet.do("fail", fleet.processes[:2], count=5)
    until(lambda: not any("closed" in look["state"] for look in fleet.do("look")), "it trips")
    for number in range(PERMITS):
        begin(fleet, number, "lost")
    until(lambda: are(fleet, CIRCUIT, "half_open"), "all know of the probes")
    assert not fleet[2].do("attempt")["admitted"]

    client = group.client(group.lose(key))
    fleet.until_agreed(client)
    for number in range(PERMITS):
        begin(fleet, number, "kept")
    until(lambda: are(fleet, CIRCUIT, "half_open"), "all know of the probes")
    assert not any(process.do("attempt")["admitted"] for process in fleet)
    generation = fleet.stored(client).header.v
    for number in range(PERMITS):
        fleet[number].do("finish", name="lost")
    fleet.do("flush")
    assert fleet.stored(client).header.v == generation
    assert not any(process.do("attempt")["admitted"] for process in fleet)
    assert most_at_once(fleet.calls(probe=True, local=False)) == PERMITS * 2
    assert all(t["new"] != "closed" for process in fleet for t in heard(process, CIRCUIT))
    for number in range(PERMITS):
        fleet[number].do("finish", name="kept")
    fleet.until_all("closed")
    fleet.audit(client, kept=False)
    fleet.until_agreed(client)


def begin(fleet: Fleet, number: int, name: str) -> None:
    """A probe goes out from one process, and goes on."""
    process = fleet[number]
    until(lambda: process.do("begin", name=name, how="guard")["admitted"], "a probe is out")
