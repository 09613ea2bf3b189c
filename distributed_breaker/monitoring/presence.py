"""What the processes of a fleet are: each keeps a short document about itself in the store.

    cb:<namespace>:process:<id>    the document, as JSON; it expires
    cb:<namespace>:processes       sorted set of ids, by the time at which they were written last

Two commands per process every ten seconds or so, sent by the link, and two more every minute.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from ..breaker import host_name
from ..errors import StoreError, StoreUnavailable
from ..nodes import Command
from ..services import Services
from ..snapshot import Snapshot
from .report import iso, service_of

EVERY = 10.0  # s between two documents of one process
KEPT = 35_000  # ms for which one counts
FORGOTTEN = 120.0  # s after which ids of processes that are gone leave the set
TIDY = 6  # documents from one removal of those to the next
MOST = 1_000  # processes that are read
NAMED = 20  # circuits of each sort that a document names
NEEDED = {"id", "host", "pid", "policy_mismatch"}  # without these a document is none

log = logging.getLogger("distributed_breaker")


class Store(Protocol):
    """What is asked: a registry, or a ``Fleet``.  Both methods raise StoreUnavailable."""

    namespace: str

    def examine(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to plain commands; a StoreError stands for one that was refused."""

    def snapshot(self) -> dict[str, Snapshot]:
        """The fleet's view of every circuit."""


@cache
def version() -> str:
    """Of this library."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("distributed-breaker")
    return "?"


def _role() -> str:
    """The program's name, such as gunicorn or celery."""
    name = Path(sys.argv[0] if sys.argv else "").name
    return (Path(sys.argv[0]).parent.name if name == "__main__.py" else name)[:40] or "python"


class Presence:
    """One process's document.

    Args:
        services: of which process.
        role: what the process is for; None: its program's name.
    """

    def __init__(self, services: Services, role: str | None = None) -> None:
        self._services = services
        self._role = role or _role()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._id = uuid.uuid4().hex[:16]
        self._started_at = time.time()
        self._written = 0
        self._refused = ""

    def document(self) -> dict[str, Any]:
        """What there is to know of this process."""
        services = self._services
        breakers = [b for b in services.registry.breakers() if not b.disabled]
        ages = [age for age in (b.mirror_age for b in breakers) if age is not None]
        names = sorted({service_of(client.name) for client in services.clients()})
        return {
            "id": self._id,
            "host": host_name(),
            "pid": os.getpid(),
            "service": ", ".join(names)[:200],
            "version": version(),
            "python": platform.python_version(),
            "started_at": iso(self._started_at),
            "seen_at": iso(time.time()),
            "circuits": len(breakers),
            "mirror_age": round(max(ages), 3) if ages else None,
            "degraded": any(b.degraded for b in breakers),
            "quarantined": sorted(b.name for b in breakers if b.source == "quarantine")[:NAMED],
            "policy_mismatch": sorted(b.name for b in breakers if b.policy_mismatch)[:NAMED],
            "config_version": services.configuration.settings.config_version,
            "role": self._role,
        }

    def write(self) -> float:
        """Keep it in the store; returns the seconds until the next time."""
        commands = self._commands(json.dumps(self.document(), ensure_ascii=False))
        with suppress(StoreUnavailable):
            for answer in self._services.registry.examine(commands):
                if isinstance(answer, StoreError) and not self._refused:
                    self._refused = str(answer)
                    log.warning(
                        "the store refuses what lists the fleet's processes, see docs/alerts.md "
                        "for the rights: %s", answer,
                    )  # fmt: skip
            self._written += 1
        # A process that has just begun will soon be able to say more.
        soon = 2.0**self._written if self._written < 4 else EVERY
        return min(EVERY, soon) * random.uniform(0.8, 1.2)

    def _commands(self, text: str) -> list[Command]:
        key, ids = self._keys()
        now = time.time()
        words: list[tuple[Any, ...]] = [
            ("SET", key, text, "PX", KEPT),
            ("ZADD", ids, f"{now:.3f}", self._id),
        ]
        if self._written % TIDY == 0:
            words.append(("ZREMRANGEBYSCORE", ids, "-inf", f"{now - FORGOTTEN:.3f}"))
            words.append(("PEXPIRE", ids, round(FORGOTTEN * 1000)))
        return [Command(w[1], w) for w in words]

    def _keys(self) -> tuple[str, str]:
        namespace = self._services.registry.namespace
        return f"cb:{namespace}:process:{self._id}", f"cb:{namespace}:processes"

    def close(self) -> None:
        """Take it out of the store."""
        if not self._written:
            return
        key, ids = self._keys()
        self._written = 0
        with suppress(StoreUnavailable):
            commands = [Command(key, ("DEL", key)), Command(ids, ("ZREM", ids, self._id))]
            self._services.registry.examine(commands)

    def forked(self) -> None:
        """A child is another process."""
        self._begin_anew()


def processes(store: Store, own: Presence | None = None) -> list[dict[str, Any]]:
    """The documents of a fleet's processes, those that were written last first; at most 1,000.

    Args:
        store: a registry, or a ``Fleet``.
        own: of this process, which is all there is while the store cannot be asked, and which is
            never missing.
    """
    here = [] if own is None else [own.document()]
    prefix = f"cb:{store.namespace}:process"
    index = f"{prefix}es"
    try:
        (ids,) = store.examine([Command(index, ("ZREVRANGE", index, 0, MOST - 1))])
        if isinstance(ids, StoreError):
            return here
        keys = [f"{prefix}:{one}" for one in ids]
        found = store.examine([Command(key, ("GET", key)) for key in keys]) if keys else []
    except StoreUnavailable:
        return here
    known = {process["id"] for process in here}
    others = [p for p in map(_read, found) if p is not None and p["id"] not in known]
    return [*here, *others]


def _read(text: object) -> dict[str, Any] | None:
    """A document, None if it has expired or is none."""
    if not isinstance(text, str):
        return None
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, Mapping) and found.keys() >= NEEDED:
            return dict(found)
    return None


def mismatched(processes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By circuit, the processes that were given another policy than the fleet's."""
    found: dict[str, list[str]] = {}
    for process in processes:
        for circuit in process["policy_mismatch"]:
            found.setdefault(circuit, []).append(f"{process['host']}:{process['pid']}")
    return found
