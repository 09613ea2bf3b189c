"""A change of what a process does with one circuit's calls, and its line in the log."""

from __future__ import annotations

import logging
from typing import NamedTuple

from .policy import State

log = logging.getLogger("distributed_breaker.transitions")


class Transition(NamedTuple):
    """A change of what this process does with one circuit's calls."""

    circuit: str
    old: State
    new: State
    source: str
    cause: str
    generation: int


def log_transition(change: Transition) -> None:
    """Say it in one line, whose fields stand in the record as well.

    A process that opens a circuit by itself is in quarantine until the fleet follows: then its
    state stays and the source changes, which is a line, too.  Calls that are refused are not
    logged: while a circuit is open there may be thousands a second.
    """
    refuses = change.new in (State.OPEN, State.FORCED_OPEN) and change.new is not change.old
    level = logging.WARNING if refuses else logging.INFO
    fields = {
        "circuit": change.circuit,
        "service": change.circuit.partition(".")[0],
        "old": change.old.value,
        "new": change.new.value,
        "source": change.source,
        "cause": change.cause,
        "generation": change.generation,
    }
    because = f", {change.cause}" if change.cause else ""
    log.log(
        level,
        "circuit %s: %s → %s (%s%s)",
        change.circuit,
        fields["old"],
        fields["new"],
        change.source,
        because,
        extra=fields,
    )
