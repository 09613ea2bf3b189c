"""The commands that look at the configuration file: config show, validate, schema, diff."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import config
from ..monitoring import doctor, report
from ..snapshot import Snapshot
from .options import Environment, File, Json
from .place import Place
from .terminal import HEALTHY, UNHEALTHY, USAGE, FailureError, busy, complain, show_json


def show(file: File = None, environment: Environment = None, as_json: Json = False) -> int:
    """The merged configuration, and where each value came from. Secrets are hidden."""
    loaded = _loaded(file, environment)
    values = _values(loaded)
    if as_json:
        show_json({
            "files": [str(read) for read in loaded.files],
            "environment": loaded.configuration.settings.environment,
            "values": {
                path: {"value": value, "source": loaded.sources[path]}
                for path, value in values.items()
            },
        })  # fmt: skip
        return HEALTHY
    for path, value in values.items():
        shown = json.dumps(value, ensure_ascii=False)
        typer.echo(f"{path} = {shown}  ({loaded.sources.get(path, 'default')})")
    return HEALTHY


def validate(
    path: Annotated[Path | None, typer.Argument(help="The file; else as for --config.")] = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Say everything that is wrong with the file. Exits with 1 if anything is."""
    try:
        loaded = config.load(path or file, environment=environment)
    except config.ConfigurationError as error:
        if as_json:
            problems = [one._asdict() for one in error.problems]
            show_json({"valid": False, "files": [], "problems": problems})
        else:
            complain(str(error))
        return UNHEALTHY
    read = [str(one) for one in loaded.files]
    if as_json:
        show_json({"valid": True, "files": read, "problems": []})
    else:
        found = loaded.configuration
        counts = f"{len(found.services)} services, {len(found.circuits())} circuits"
        typer.echo(f"Valid: {', '.join(read)} ({counts}).")
    return HEALTHY


def schema(as_json: Json = False) -> int:
    """The file's JSON Schema."""
    show_json(config.schema())
    return HEALTHY


def diff(
    where: Place,
    other: Annotated[Path | None, typer.Argument(help="Another file.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Another environment of the same file.")
    ] = None,
    as_json: Json = False,
) -> int:
    """What differs from another file, from another environment, or, without either, from the
    policies that the fleet has in force. Exits with 1 if anything does."""
    if where.loaded is None:
        raise FailureError("there is no configuration to compare: give --config", USAGE)
    names = ("here", "there")
    if other is None and against is None:
        names = ("file", "fleet")
        with where.fleet() as fleet, busy(f"Asking {where.title}"):
            differences = dict(_against_fleet(where.circuits, fleet.snapshot()))
    else:
        here = _values(where.loaded)
        there = _values(_loaded(other or where.loaded.files[0], against))
        pairs = {path: (here.get(path), there.get(path)) for path in sorted({*here, *there})}
        differences = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
    one, two = names
    if as_json:
        rows = {path: {one: a, two: b} for path, (a, b) in differences.items()}
        show_json({"equal": not differences, "differences": rows})
        return UNHEALTHY if differences else HEALTHY
    for path, (a, b) in differences.items():
        typer.echo(f"{path}: {one} {json.dumps(a)}, {two} {json.dumps(b)}")
    if not differences:
        typer.echo("No difference.")
    return UNHEALTHY if differences else HEALTHY


def _against_fleet(
    circuits: Mapping[str, report.Configured], snapshots: Mapping[str, Snapshot]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, spec in circuits.items():
        held = snapshots[name].policy if name in snapshots else None
        if held is not None:
            for number, pair in doctor.compare(spec.policy, held).items():
                yield f"{name}.{number}", pair


def _loaded(file: Path | None, environment: str | None) -> config.Loaded:
    try:
        return config.load(file, environment=environment)
    except config.ConfigurationError as error:
        raise FailureError(str(error), UNHEALTHY) from None


def _values(loaded: config.Loaded) -> dict[str, Any]:
    """Each value by its dotted path, as people may see it."""
    return {path: config.shown(path, value) for path, value in loaded.values.items()}
