"""A primary is replaced while circuits are closed, open and half open."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distributed_breaker.store import key_of, sha
from scripts.groups import Cluster, Watched
from tests.fleet.harness import POLICY, Fleet, most_at_once
from tests.fleet.process import until
from tests.groups.together import are, heard, same_node

PERMITS = 2
HALF = {"open_interval": 0.2, "success_threshold": PERMITS, "permit_lease": 60.0}


@pytest.mark.parametrize("how", ["switch", "lose"])
def test_a_failover(
    group: Cluster | Watched, fleet_on: Callable[[Cluster | Watched], Fleet], how: str
) -> None:
    """By hand while the primary is well (``switch``), or after its SIGKILL (``lose``)."""
    fleet = fleet_on(group)
    calm, open_, half = same_node(fleet.namespace, "calm", "open", "half")
    key = key_of(fleet.namespace, calm)
    fleet.start(3, circuit=calm)
    fleet.do("breaker", circuit=open_, policy=POLICY | {"open_interval": 600.0})
    fleet.do("breaker", circuit=half, policy=POLICY | HALF)
    for circuit in (open_, half):
        fleet.do("fail", fleet.processes[:2], circuit=circuit, count=5)
    until(lambda: are(fleet, open_, "open"), "all know of the trip")
    prober = fleet[0]
    begin = {"name": "probe", "how": "guard", "circuit": half}
    until(lambda: prober.do("begin", **begin)["admitted"], "a probe is out")
    until(lambda: are(fleet, half, "half_open"), "all know of the probe")

    # The other processes probe all the while, and each of those probes fails or is given back.
    fleet.do("hammer", fleet.processes[:2], circuit=calm, pause=0.005)
    fleet[2].do("hammer", circuit=half, outcome="excluded", hold=0.05, pause=0.02)
    old = group.primary_of(key)
    new = getattr(group, how)(key)
    assert new is not old
    client = group.client(new)
    # All come over, also where the old primary goes on. The script is not replicated: the first one
    # to come had to load it.
    until(lambda: group.ask(new, "SCRIPT", "EXISTS", sha()) == [1], "the new primary is used")
    for circuit in (calm, open_, half):
        fleet.until_agreed(client, circuit)
    assert are(fleet, open_, "open")
    assert str(fleet.stored(client, open_).header.state) == "open"
    assert all(p.do("succeed", circuit=open_)["admitted"] == 0 for p in fleet)
    assert all(t["new"] != "closed" for p in fleet for t in heard(p, open_))

    prober.do("finish", name="probe")
    fleet.do("rest")
    assert most_at_once(fleet.calls(circuit=half, probe=True, local=False)) <= PERMITS * 2
    until(lambda: closes(fleet, half), "the half-open circuit closes")
    for circuit in (calm, open_, half):
        fleet.audit(client, circuit, kept=False)
        fleet.until_agreed(client, circuit)


def closes(fleet: Fleet, circuit: str) -> bool:
    fleet.do("attempt", circuit=circuit)
    return are(fleet, circuit, "closed")
