"""How the command speaks: results on stdout, remarks on stderr, live lines only on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console

from ..monitoring import text

HEALTHY, UNHEALTHY, DEGRADED, CANNOT_TELL, USAGE = 0, 1, 2, 3, 64
CODES = {"healthy": HEALTHY, "degraded": DEGRADED, "unhealthy": UNHEALTHY}
INTERRUPTED = 130
SHOWN_NAMES = 40  # in an error that lists what there is


class FailureError(Exception):
    """Ends the command with a sentence, an exit code, and (where it matters) what there is."""

    def __init__(self, message: str, code: int, known: Iterable[str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.known = None if known is None else list(known)


def fail(error: FailureError, *, as_json: bool) -> int:
    """Say why the command ends; returns its exit code."""
    known = error.known
    if as_json:
        show_json({"error": str(error), "known": known or []})
    listed = ""
    if known is not None:
        listed = f"; there are: {', '.join(known[:SHOWN_NAMES])}" if known else "; there is none"
        if len(known) > SHOWN_NAMES:
            listed += f" and {len(known) - SHOWN_NAMES} more"
    complain(f"{str(error).rstrip('.')}{listed}.")
    return error.code


def complain(message: str) -> None:
    """Say something to people, beside what is printed for programs."""
    for line in message.splitlines():
        typer.echo(text.clean(line), err=True)


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value that programs read."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def on_terminal() -> bool:
    """Whether somebody looks at what is printed."""
    return sys.stdout.isatty()


def console() -> Console:
    """Where tables go; colour only on a terminal and without NO_COLOR."""
    return Console(highlight=False)


def busy(what: str) -> contextlib.AbstractContextManager[Any]:
    """A live line while somebody waits."""
    waiting = Console(stderr=True, highlight=False)
    return waiting.status(what) if sys.stderr.isatty() else contextlib.nullcontext()
