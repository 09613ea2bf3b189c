"""The commands that look after what waits on this host: outbox list, replay, purge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from .. import config
from ..clients.cache_base import cache_outbox
from ..clients.waiting import outbox_of
from ..fallback.outbox import Outbox
from ..monitoring.report import iso
from ..services import Services
from .options import Environment, File, Json, OneService
from .terminal import HEALTHY, UNHEALTHY, USAGE, FailureError, show_json

Parked = Annotated[bool, typer.Option("--parked", help="Only what was put aside.")]
KINDS = ("cache", "database")  # of clients whose changes wait
LIMIT = 100
LONGEST = 1.0  # s that a replay waits for a topic that is left alone


def list_(
    service: OneService = None,
    file: File = None,
    environment: Environment = None,
    parked: Parked = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Of entries per outbox.")] = LIMIT,
    as_json: Json = False,
) -> int:
    """What waits for its dependency on this host, without its values."""
    shown: dict[str, Any] = {}
    for name, outbox in _outboxes(file, environment, service):
        entries = outbox.entries(name, parked=True if parked else None, limit=limit)
        stats = outbox.stats()
        shown[name] = {
            "path": outbox.path,
            **stats["topics"].get(name, {"waiting": 0, "parked": 0, "bytes": 0, "oldest": None}),
            "damaged": stats["damaged"],
            "entries": [
                {
                    "id": entry.id,
                    "kind": entry.kind,
                    "key": entry.key,
                    "created": iso(entry.created),
                    "attempts": entry.attempts,
                    "parked": entry.parked,
                    "error": entry.error,
                }
                for entry in entries
            ],
        }
    if as_json:
        show_json({"outboxes": shown})
        return HEALTHY
    for name, found in shown.items():
        typer.echo(f"{name}: {found['waiting']} wait, {found['parked']} parked ({found['path']})")
        for entry in found["entries"]:
            state = "parked" if entry["parked"] else "waits"
            why = f" {entry['error']}" if entry["error"] else ""
            row = f"{entry['id']} {entry['created']} {entry['kind']} {entry['key']} {state}"
            typer.echo(f"  {row} attempts={entry['attempts']}{why}")
    return HEALTHY


def replay(
    service: OneService = None,
    file: File = None,
    environment: Environment = None,
    parked: Parked = False,
    as_json: Json = False,
) -> int:
    """Carry out what waits, now; with --parked also what was put aside. Processes of the service do
    it by themselves. Exits with 1 if something still waits."""
    done: dict[str, Any] = {}
    with closing(Services(file, environment=environment)) as services:
        for name, kind in _clients(services.configuration, service):
            done[name] = {"carried_out": 0, "waiting": 0}
            with closing(_outbox(services.configuration, name, kind)) as outbox:
                if not outbox.entries(name, parked=None if parked else False, limit=1):
                    continue  # and no need of the packages that its client needs
            try:
                client: Any = services.client(kind, name.partition(".")[0])
            except ImportError as error:
                raise FailureError(f"{name}: {error}", USAGE) from error
            if parked:
                client.outbox.retry(topic=name)
            replayed = client.replay()
            if replayed.left and replayed.wait <= LONGEST:
                # It was left alone after a failure, which an operator has perhaps just mended.
                time.sleep(replayed.wait)
                replayed = client.replay()
            done[name] = {"carried_out": replayed.delivered, "waiting": replayed.left}
    if as_json:
        show_json({"outboxes": done})
    else:
        for name, found in done.items():
            typer.echo(f"{name}: {found['carried_out']} carried out, {found['waiting']} still wait")
    return UNHEALTHY if any(found["waiting"] for found in done.values()) else HEALTHY


def purge(
    service: Annotated[str, typer.Option("--service", "-s", help="Of this service.")],
    file: File = None,
    environment: Environment = None,
    ids: Annotated[
        list[int] | None, typer.Option("--id", help="Only this one; may be given several times.")
    ] = None,
    parked: Parked = False,
    everything: Annotated[bool, typer.Option("--all", help="All that waits, too.")] = False,
    as_json: Json = False,
) -> int:
    """Throw away what waits, for good."""
    if not (ids or parked or everything):
        raise FailureError("say what to throw away: --id, --parked or --all", USAGE)
    purged = {
        name: outbox.purge(ids or None, name, parked_only=parked)
        for name, outbox in _outboxes(file, environment, service)
    }
    if as_json:
        show_json({"purged": purged})
    else:
        for name, count in purged.items():
            typer.echo(f"{name}: {count} thrown away")
    return HEALTHY


# ---------------------------------------------------------------------------- finding them


def _clients(configuration: config.Configuration, service: str | None) -> list[tuple[str, str]]:
    """Those whose changes wait: names and kinds."""
    found = [
        (f"{one}.{kind}", kind)
        for one, parts in configuration.services.items()
        for kind in KINDS
        if getattr(parts, kind) is not None and service in (None, one)
    ]
    if service is not None and not found:
        every = {name.partition(".")[0] for name, _ in _clients(configuration, None)}
        raise FailureError(f"service {service!r} has nothing that waits", USAGE, sorted(every))
    return found


def _outboxes(
    file: File, environment: Environment, service: str | None
) -> Iterator[tuple[str, Outbox]]:
    values = config.load(file, environment=environment).configuration
    for name, kind in _clients(values, service):
        with closing(_outbox(values, name, kind)) as outbox:
            yield name, outbox


def _outbox(values: config.Configuration, name: str, kind: str) -> Outbox:
    section = getattr(values.services[name.partition(".")[0]], kind)
    return cache_outbox(name, section) if kind == "cache" else outbox_of(name, section.outbox_path)
