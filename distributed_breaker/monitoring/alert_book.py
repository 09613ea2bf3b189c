"""What the processes of a fleet must agree on so that each alert goes out once: who evaluates,
which events have been told, and what is not over.

    cb:<namespace>:alerts:evaluator                            the process that evaluates; expires
    cb:<namespace>:alerts:<kind>:<number>:<over>:<circuit>     an event that is being told, or was
    cb:<namespace>:alerts:incidents                            hash: what was told and is not over

An event is claimed for a short time, and its claim is kept when the alert is durable: so the alerts
of a process that dies in between are told by the next one that evaluates.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal

from ..errors import StoreError
from ..fleet import histories
from ..nodes import Command
from ..snapshot import Change
from .alert_rules import Event, Incident, Incidents
from .presence import Store

LEASE = 15_000  # ms for which one process evaluates, unless it goes on
CLAIM = 60_000  # ms for which an event is claimed
KEPT = 86_400_000  # ms for which it is known that an event was told
FORGOTTEN = 30 * 86_400_000  # ms after which incidents that nobody looks at are forgotten
HISTORY = 20  # transitions of a circuit that are read at a time
TOLD = "told"

Claim = Literal["mine", "told", "other"]


class Book:
    """The same for all processes of a fleet.

    Methods raise StoreUnavailable when the store is away, and StoreError when it refuses.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._id = secrets.token_hex(8)
        self._leads = False
        self._prefix = f"cb:{store.namespace}:alerts"

    def lead(self) -> bool:
        """Whether this process is the one that evaluates, from now on for the lease."""
        key = f"{self._prefix}:evaluator"
        if self._holds(key):
            self._ask(("PEXPIRE", key, LEASE))
            return True
        (won,) = self._ask(("SET", key, self._id, "NX", "PX", LEASE))
        self._leads = bool(won)
        return self._leads

    def resign(self) -> None:
        """Let another process evaluate at once."""
        key = f"{self._prefix}:evaluator"
        if self._holds(key):
            self._ask(("DEL", key))
        self._leads = False

    def _holds(self, key: str) -> bool:
        return self._leads and self._ask(("GET", key)) == [self._id]

    def incidents(self) -> Incidents:
        """What was told and is not over."""
        (found,) = self._ask(("HGETALL", f"{self._prefix}:incidents"))
        return {key: _incident(text) for key, text in dict(found).items()}

    def claim(self, event: Event) -> Claim:
        """Whether this process is to tell an event."""
        key = self._key(event)
        won, holder = self._ask(("SET", key, self._id, "NX", "PX", CLAIM), ("GET", key))
        if won:
            return "mine"
        return "told" if holder == TOLD else "other"

    def told(self, event: Event) -> None:
        """The event was told: that is remembered, and what goes on is kept."""
        key = f"{self._prefix}:incidents"
        commands: list[tuple[Any, ...]] = [("SET", self._key(event), TOLD, "PX", KEPT)]
        if event.over:
            commands.append(("HDEL", key, event.key))
        elif event.lasts:
            commands.append(("HSET", key, event.key, f"{event.number} {event.at}"))
            commands.append(("PEXPIRE", key, FORGOTTEN))
        self._ask(*commands)

    def histories(self, circuits: Sequence[str]) -> dict[str, list[Change]]:
        """The last transitions of circuits, newest first; none where they can't be read."""
        return histories(self._store, circuits, HISTORY)

    def _key(self, event: Event) -> str:
        over = "over" if event.over else "begun"
        return f"{self._prefix}:{event.kind}:{event.number}:{over}:{event.circuit}"

    def _ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        answers = self._store.examine([Command(words[1], words) for words in commands])
        for answer in answers:
            if isinstance(answer, StoreError):
                raise answer
        return answers


class OwnBook(Book):
    """The same where there is no store: for the circuits at memory://, which nobody shares."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._told: dict[str, None] = {}
        self._incidents: dict[str, Incident] = {}

    def lead(self) -> bool:
        return True

    def resign(self) -> None:
        pass

    def incidents(self) -> Incidents:
        return dict(self._incidents)

    def claim(self, event: Event) -> Claim:
        return "told" if self._key(event) in self._told else "mine"

    def told(self, event: Event) -> None:
        self._told[self._key(event)] = None
        if len(self._told) > 10_000:
            del self._told[next(iter(self._told))]
        if event.over:
            self._incidents.pop(event.key, None)
        elif event.lasts:
            self._incidents[event.key] = Incident(event.number, event.at)

    def histories(self, circuits: Sequence[str]) -> dict[str, list[Change]]:
        return {}


def _incident(text: str) -> Incident:
    number, _, at = text.partition(" ")
    try:
        return Incident(int(number), float(at))
    except ValueError:
        return Incident(0, 0.0)
