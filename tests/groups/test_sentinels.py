"""What only Sentinels do: die themselves, and turn an old primary into a replica."""

from __future__ import annotations

from collections.abc import Callable

from distributed_breaker.store import sha
from scripts.groups import Watched, port_of
from tests.fleet.harness import CIRCUIT, Fleet
from tests.fleet.process import until
from tests.groups.together import are


def test_sentinels_that_are_dead_or_silent(
    watched: Watched, fleet_on: Callable[..., Fleet]
) -> None:
    """One that answers is enough to find the primary; who has found it needs none."""
    fleet = fleet_on(watched)
    client = watched.client(watched.primary_of(""))
    watched.sentinels[0].kill()
    watched.sentinels[1].pause()
    fleet.start(2)
    watched.sentinels[2].kill()
    watched.sentinels[1].kill()
    fleet.do("fail", count=5)
    fleet.until_all("open")
    assert fleet.audit(client)["dropped"] == 0
    (newcomer,) = fleet.start(1, synced=False)
    assert newcomer.do("succeed")["admitted"] == 1  # R11: it decides by itself
    watched.sentinels[2].restart(empty=False)
    fleet.until_agreed(client)
    assert newcomer.do("succeed")["admitted"] == 0


def test_the_primary_becomes_a_replica(watched: Watched, fleet_on: Callable[..., Fleet]) -> None:
    """READONLY: the connection is as good as ever, only the server behind it has changed."""
    fleet = fleet_on(watched)
    fleet.start(3, {"open_interval": 0.5})
    fleet.do("hammer", pause=0.005)
    old = watched.primary_of("")
    new = watched.switch("")
    # The Sentinels do the same, ten seconds later; unlike them we close no connections.
    watched.ask(old, "REPLICAOF", "127.0.0.1", port_of(new))
    client = watched.client(new)
    until(lambda: watched.ask(new, "SCRIPT", "EXISTS", sha()) == [1], "the new primary is used")
    fleet.do("rest")
    until(lambda: trips(fleet), "the fleet trips")
    fleet.until_agreed(client)
    assert fleet.stored(client).header.state in ("open", "half_open")
    fleet.audit(client, kept=False)


def trips(fleet: Fleet) -> bool:
    """Whether all know of a trip.  Successes of the hammering may come between, and failures that a
    process has seen alone put it into quarantine, so a few tries may be needed."""
    fleet.do("fail", fleet.processes[:2], count=5)
    return are(fleet, CIRCUIT, "open")
