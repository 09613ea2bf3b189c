"""Users with the least rights, and passwords of the Sentinels' own."""

from __future__ import annotations

from collections.abc import Callable

from distributed_breaker.store import key_of
from scripts.groups import Cluster, Watched
from tests.faults.test_rights import PASSWORD, USER, grant, works_through
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet
from tests.groups.together import slot_of

GUARD, HIS_PASSWORD = "guard", "p/a@s#s?"
DISCOVERY = "sentinel|get-master-addr-by-name"


def test_the_least_rights_behind_sentinels(
    watched: Watched, fleet_on: Callable[..., Fleet]
) -> None:
    """On the servers those that one server asks for, on the Sentinels one more."""
    client = watched.client(watched.primary_of(""))
    for server in watched.servers:
        grant(watched.client(server))
        watched.ask(server, "ACL", "SETUSER", "default", "-evalsha")
    for sentinel in watched.sentinels:
        watched.ask(sentinel, "ACL", "SETUSER", GUARD, "reset", "on", f">{HIS_PASSWORD}",
                    "-@all", f"+{DISCOVERY}")  # fmt: skip
        watched.ask(sentinel, "ACL", "SETUSER", "default", f"-{DISCOVERY}")
    fleet = fleet_on(watched)
    fleet.url = as_user(watched.url)
    fleet.url += f"?sentinel_username={GUARD}&sentinel_password=p%2Fa%40s%23s%3F"
    fleet.start(2, {}, **PATIENT)
    works_through(fleet)
    assert fleet[0].do("fleet_snapshot") == {CIRCUIT: "closed"}
    assert fleet.audit(client)["dropped"] == 0
    said = "\n".join(fleet.do("say_all"))
    assert not any(secret in said for secret in (PASSWORD, HIS_PASSWORD, "p%2Fa"))


def test_the_least_rights_in_a_cluster(cluster: Cluster, fleet_on: Callable[..., Fleet]) -> None:
    """Two more than one server asks for; one of them while a slot moves."""
    for node in cluster.nodes:
        grant(cluster.client(node))
        cluster.ask(node, "ACL", "SETUSER", USER, "+cluster|slots", "+asking")
        cluster.ask(node, "ACL", "SETUSER", "default", "-evalsha")
    fleet = fleet_on(cluster)
    fleet.url = as_user(cluster.url)
    fleet.start(2, {}, **PATIENT)
    works_through(fleet)
    source = cluster.primary_of(key_of(fleet.namespace, CIRCUIT))
    to = next(n for n in cluster.nodes if n is not source and cluster.is_primary(n))

    def look() -> None:
        fleet.do("succeed")
        fleet.do("flush")

    cluster.move_slot(slot_of(fleet.namespace, CIRCUIT), to, during=look)
    look()
    assert fleet[0].do("fleet_snapshot") == {CIRCUIT: "closed"}
    assert fleet.audit(cluster.client(to))["dropped"] == 0


def as_user(url: str) -> str:
    return url.replace("://", f"://{USER}:{PASSWORD}@")
