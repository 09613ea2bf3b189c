"""The commands that act on the whole fleet: reset, force-open, force-closed, release."""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import typer

from ..fleet import Done, Fleet
from ..monitoring import report, text
from ..policy import Policy
from .options import Actor, Circuit, Json, OneCircuit, OneService, Reason, Ttl
from .place import Place
from .terminal import (
    HEALTHY,
    SHOWN_NAMES,
    UNHEALTHY,
    USAGE,
    FailureError,
    busy,
    complain,
    show_json,
)


def reset(
    where: Place,
    service: OneService = None,
    circuit: OneCircuit = None,
    actor: Actor = None,
    reason: Reason = "",
    as_json: Json = False,
) -> int:
    """Close circuits in the whole fleet at once: all, a service's, or one."""
    with where.fleet() as fleet:
        held = fleet.snapshot()
        names = where.chosen(held, service, circuit)
        # What the store has lost is made closed, but for what no process uses.
        names = [n for n in names if n in held or where.circuits[n].enabled]
        if not names:
            raise FailureError(f"there is no circuit in {where.title} to reset", USAGE)
        who = actor_or_default(actor)
        steps = fleet.reset(_policies(names, where), actor=who, reason=reason)
        return _carry_out("reset", steps, who, reason, as_json)


def force_open(
    circuit: Circuit,
    where: Place,
    reason: Reason = "",
    ttl: Ttl = None,
    actor: Actor = None,
    as_json: Json = False,
) -> int:
    """Refuse all calls of the fleet until released, or for --ttl seconds."""
    return _on_one(
        "force-open", partial(Fleet.force_open, ttl=ttl), where, circuit, actor, reason, as_json
    )


def force_closed(
    circuit: Circuit,
    where: Place,
    reason: Reason = "",
    ttl: Ttl = None,
    actor: Actor = None,
    as_json: Json = False,
) -> int:
    """Let all calls of the fleet pass until released, or for --ttl seconds."""
    return _on_one(
        "force-closed", partial(Fleet.force_closed, ttl=ttl), where, circuit, actor, reason, as_json
    )


def release(
    circuit: Circuit,
    where: Place,
    reason: Reason = "",
    actor: Actor = None,
    as_json: Json = False,
) -> int:
    """End an override: forced_open goes on to half_open, forced_closed to closed."""
    return _on_one("release", Fleet.release, where, circuit, actor, reason, as_json)


def actor_or_default(actor: str | None) -> str:
    """Who steps in, for the log."""
    if actor:
        return actor
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may have no name for its user.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _on_one(
    action: str,
    step: Callable[..., Iterator[Done]],
    where: Place,
    circuit: str,
    actor: str | None,
    reason: str,
    as_json: bool,
) -> int:
    """A step on a circuit that there is: a slip of the keyboard must not make one."""
    with where.fleet() as fleet:
        where.chosen(fleet.snapshot(), None, circuit)
        who = actor_or_default(actor)
        steps = step(fleet, _policies([circuit], where), actor=who, reason=reason)
        return _carry_out(action, steps, who, reason, as_json)


def _policies(names: Iterable[str], where: Place) -> dict[str, Policy | None]:
    """The policies that circuits get which the store does not hold yet."""
    specs = where.circuits
    return {name: specs[name].policy if name in specs else None for name in names}


def _carry_out(action: str, steps: Iterator[Done], actor: str, reason: str, as_json: bool) -> int:
    with busy(action):
        # Nothing is printed meanwhile: on a terminal it would mix with the live line.
        done = list(steps)
    if not as_json:
        for one in done:
            typer.echo(text.clean(_line(one, action)))
    failed = [one for one in done if one.error]
    if as_json:
        counts = {"total": len(done), "done": len(done) - len(failed), "failed": len(failed)}
        show_json({
            "action": action,
            "timestamp": report.iso(time.time()),
            "actor": actor,
            "reason": reason,
            "circuits": {one.circuit: _shown(one) for one in done},
            "summary": counts,
        })  # fmt: skip
    if failed:
        names = ", ".join(one.circuit for one in failed[:SHOWN_NAMES])
        complain(f"{len(failed)} of {len(done)} failed: {names}.")
    return UNHEALTHY if failed else HEALTHY


def _shown(one: Done) -> dict[str, str | bool | None]:
    return {
        "before": one.before or None,
        "after": one.after or None,
        "changed": one.changed,
        "error": one.error or None,
    }


def _line(one: Done, action: str) -> str:
    if one.error:
        return f"{one.circuit}: failed: {one.error}"
    if not one.changed:
        return f"{one.circuit}: {one.after}, nothing to {action}"
    return f"{one.circuit}: {one.before or 'not in the store'} -> {one.after}"
