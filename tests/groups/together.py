"""Names of circuits that a cluster keeps on one node, so that a failover concerns them all."""

from __future__ import annotations

from itertools import count

from redis.crc import key_slot

from distributed_breaker.store import key_of
from scripts.groups import SLOTS


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
