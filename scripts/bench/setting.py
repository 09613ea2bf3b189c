"""How to measure: on which server, how thoroughly, and beside which peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .peers import (
    Aiobreaker,
    AiobreakerRedis,
    Circuitbreaker,
    Interlock,
    InterlockRedis,
    Nopanic,
    NopanicRedis,
    NopanicTimed,
    Purgatory,
    PurgatoryRedis,
    Pybreaker,
    PybreakerRedis,
)
from .subjects import Subject, version

PEERS: tuple[type[Subject], ...] = (
    Circuitbreaker,
    Pybreaker,
    Purgatory,
    Interlock,
    Nopanic,
    NopanicTimed,
    Aiobreaker,
    PybreakerRedis,
    PurgatoryRedis,
    InterlockRedis,
    NopanicRedis,
    AiobreakerRedis,
)
IN_MEMORY = tuple(peer for peer in PEERS if not peer.shared)
SHARED = tuple(peer for peer in PEERS if peer.shared)


def missing() -> list[str]:
    """The packages of peers that are not installed."""
    packages = {package for peer in PEERS for package in peer.packages}
    return sorted(package for package in packages if not version(package))


def present(peers: tuple[type[Subject], ...]) -> list[type[Subject]]:
    """Those of the peers that are installed."""
    return [peer for peer in peers if all(map(version, peer.packages))]


def limits() -> list[str]:
    """What the peers can't do in any topic, and why."""
    return [
        "circuitbreaker has no shared storage and no `async with`.",
        "pybreaker has no asyncio: `call_async` is for Tornado's coroutines, and holds a thread's "
        "lock over the await.",
        "aiobreaker has no `with`.",
        "nopanic-redis guards decorated functions and single calls only: no blocks, no generators.",
        "interlock-cb has no generators; with Redis a breaker is either blocking or asyncio, and "
        "the blocking one is measured.",
        "purgatory has no call and no generators.",
    ]


@dataclass(frozen=True)
class Setting:
    """``quick``: rough figures of all topics in less than two minutes."""

    server: str
    quick: bool

    def either(self, quick: float, full: float) -> float:
        """A number of seconds, by how thorough the run is."""
        return quick if self.quick else full

    def count(self, quick: int, full: int) -> int:
        """A number of repetitions, by how thorough the run is."""
        return quick if self.quick else full

    @property
    def in_memory(self) -> Sequence[type[Subject]]:
        """The installed peers that keep their state in the process."""
        return present(IN_MEMORY)

    @property
    def shared(self) -> Sequence[type[Subject]]:
        """The installed peers that keep their state in Redis."""
        return present(SHARED)
