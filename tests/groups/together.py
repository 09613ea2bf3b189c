"""Circuits that a cluster keeps on one node, so that a failover concerns them all, and looking at
them."""

from __future__ import annotations

from itertools import count

from redis.crc import key_slot

from distributed_breaker.store import key_of
from scripts.groups import SLOTS
from tests.fleet.harness import Fleet
from tests.fleet.process import Process


def slot_of(namespace: str, circuit: str) -> int:
    return key_slot(key_of(namespace, circuit).encode())


def same_node(namespace: str, first: str, *others: str) -> list[str]:
    """The first name, and names that begin like the others, all in the same third of the slots."""
    third = slot_of(namespace, first) * 3 // SLOTS
    found = [first]
    for other in others:
        names = (f"{other}-{number}" for number in count())
        found.append(next(n for n in names if slot_of(namespace, n) * 3 // SLOTS == third))
    return found


def are(fleet: Fleet, circuit: str, state: str) -> bool:
    """Whether all processes are in a state."""
    return {look["state"] for look in fleet.do("look", circuit=circuit)} == {state}


def heard(process: Process, circuit: str) -> list[dict[str, str]]:
    """The transitions of one circuit that a process's listener has heard."""
    return [t for t in process.do("transitions") if t["circuit"] == circuit]
