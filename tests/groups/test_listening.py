"""Pushes go on to be heard, whichever server of a group is lost.  No poll comes to the rescue."""

from __future__ import annotations

from collections.abc import Callable

import redis

from distributed_breaker.store import key_of
from scripts.groups import Cluster, Group, Watched
from scripts.servers import Server
from tests.fleet.harness import CIRCUIT, Fleet
from tests.fleet.process import WorkerError, until
from tests.groups.together import heard

DEAF_BUT_FOR_PUSHES = {"POLL": 600_000}


def test_the_server_with_the_subscriptions_is_lost(
    group: Cluster | Watched, fleet_on: Callable[..., Fleet]
) -> None:
    """R9: they are made again on another, and what happened meanwhile is read."""
    fleet = fleet_on(group)
    fleet.start(3, **DEAF_BUT_FOR_PUSHES)
    until(lambda: listeners(fleet, group) == 3, "all listen")
    lost = max(group.running, key=lambda server: ears(fleet, group, server))
    lost.kill()
    group.wait_ready()
    # Who did not listen there, and had nothing to say, may not have noticed; there are no polls.
    until(lambda: all_reach_it(fleet), "all have noticed, and found their way")
    until(lambda: listeners(fleet, group) == 3, "all listen again")
    client = group.client(group.primary_of(key_of(fleet.namespace, CIRCUIT)))
    fleet.until_agreed(client)
    push_is_heard(fleet)
    fleet.audit(client, kept=False)


def test_a_replica_with_subscriptions_leaves(
    cluster: Cluster, fleet_on: Callable[..., Fleet]
) -> None:
    """It goes on, and answers every PING; no command goes there that could tell."""
    fleet = fleet_on(cluster)
    replicas = [node for node in cluster.nodes if not cluster.is_primary(node)]

    def listened_to() -> Server | None:
        return next((r for r in replicas if ears(fleet, cluster, r)), None)

    while (leaves := listened_to()) is None:
        assert len(fleet.processes) < 30
        fleet.start(2, **DEAF_BUT_FOR_PUSHES, CENSUS=0.2)
        until(lambda: listeners(fleet, cluster) == len(fleet.processes), "all listen")
    leave(cluster, leaves)
    until(lambda: not ears(fleet, cluster, leaves), "nobody listens there any more")
    until(lambda: listeners(fleet, cluster) == len(fleet.processes), "all listen again")
    push_is_heard(fleet)


def leave(cluster: Cluster, server: Server) -> None:
    """Take a replica out of a cluster, as a cluster is made smaller."""
    name = cluster.id_of(server)
    cluster.nodes.remove(server)
    cluster.ask(server, "CLUSTER", "RESET")
    for node in cluster.nodes:
        cluster.ask(node, "CLUSTER", "FORGET", name)


def ears(fleet: Fleet, group: Group, server: Server) -> int:
    """How many processes listen to pushes on a server."""
    try:
        return int(group.ask(server, "PUBSUB", "NUMSUB", f"cb:0:{fleet.namespace}")[1])
    except redis.RedisError:  # It is only just dying.
        return 0


def listeners(fleet: Fleet, group: Cluster | Watched) -> int:
    return sum(ears(fleet, group, server) for server in group.running)


def all_reach_it(fleet: Fleet) -> bool:
    """Whether what all processes have to say is acknowledged."""
    fleet.do("succeed")
    try:
        fleet.do("flush")
    except WorkerError:
        return False
    return True


def push_is_heard(fleet: Fleet) -> None:
    before = [len(heard(process, CIRCUIT)) for process in fleet]
    assert fleet[0].do("operate", step="force_open") == ""

    def all_have_heard() -> bool:
        now = [heard(process, CIRCUIT)[n:] for process, n in zip(fleet, before, strict=True)]
        return all("forced_open" in [t["new"] for t in transitions] for transitions in now)

    until(all_have_heard, "all have heard of it")
