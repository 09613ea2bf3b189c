"""A fleet lives on a group of servers as it lives on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distributed_breaker.store import key_of
from scripts.groups import Cluster, Watched
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet
from tests.fleet.process import until


@pytest.mark.parametrize("started", ["valkey", "redis8"], indirect=True)
def test_the_life_of_a_circuit(
    group: Cluster | Watched, fleet_on: Callable[[Cluster | Watched], Fleet]
) -> None:
    """Trip, probes, recovery, an operator's steps and snapshots, heard by push alone."""
    fleet = fleet_on(group)
    fleet.start(4, {"open_interval": 0.2}, **PATIENT, POLL=600_000)
    client = group.client(group.primary_of(key_of(fleet.namespace, CIRCUIT)))
    fleet.do("succeed", count=3)
    fleet.do("flush")  # or a success that is told later may come between the failures
    fleet.do("fail", fleet.processes[:2], count=5)

    def heard() -> bool:
        return all("open" in [t["new"] for t in p.do("transitions")] for p in fleet)

    until(heard, "all have heard of the trip")
    assert [entry["new"] for entry in fleet.log(client)][:2] == ["closed", "open"]

    def closed() -> bool:
        return fleet[3].do("attempt")["admitted"] and fleet[3].do("look")["shared"] == "closed"

    until(closed, "three probes close it")
    fleet.until_all("closed")

    assert fleet[0].do("operate", step="force_open", reason="maintenance") == ""
    fleet.until_all("forced_open")
    assert fleet[1].do("succeed") == {"admitted": 0, "rejected": 1}
    assert fleet[1].do("operate", step="release") == ""
    fleet.until_all("half_open")
    assert fleet[2].do("operate", step="reset") == ""
    fleet.until_all("closed")

    assert fleet[3].do("fleet_snapshot") == {CIRCUIT: "closed"}
    assert fleet.audit(client)["dropped"] == 0
    fleet.until_agreed(client)


def test_many_circuits_at_once(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """Circuits of all nodes go out in one round, and each answer belongs to its circuit."""
    fleet = fleet_on(cluster)
    names = [f"circuit-{number}" for number in range(30)]
    fleet.start(2, circuit=names[0], **PATIENT)
    for name in names[1:]:
        fleet.do("breaker", circuit=name)
    for name in names[::2]:
        fleet.do("fail", circuit=name, count=5)
    fleet.do("flush")
    owners = set()
    for number, name in enumerate(names):
        owner = cluster.primary_of(key_of(fleet.namespace, name))
        owners.add(owner)
        stored = fleet.stored(cluster.client(owner), name)
        assert str(stored.header.state) == ("closed" if number % 2 else "open"), name
    assert len(owners) == 3
    said = fleet[1].do("fleet_snapshot")
    assert said == {name: "closed" if n % 2 else "open" for n, name in enumerate(names)}
