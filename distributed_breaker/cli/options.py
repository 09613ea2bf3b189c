"""The options that commands share, and what makes a function a command."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import config
from ..errors import StoreUnavailable
from ..fallback.outbox import OutboxError
from .place import find
from .terminal import CANNOT_TELL, INTERRUPTED, UNHEALTHY, USAGE, FailureError, fail


def _complete_circuit(incomplete: str) -> list[str]:
    """What the configuration names; a completion must not wait for a store."""
    with contextlib.suppress(Exception):
        return [n for n in config.load().configuration.circuits() if n.startswith(incomplete)]
    return []


def _complete_service(incomplete: str) -> list[str]:
    with contextlib.suppress(Exception):
        return [n for n in config.load().configuration.services if n.startswith(incomplete)]
    return []


Circuit = Annotated[str, typer.Argument(help="Its name.", autocompletion=_complete_circuit)]
OneCircuit = Annotated[
    str | None,
    typer.Option("--circuit", "-c", help="Only this one.", autocompletion=_complete_circuit),
]
OneService = Annotated[
    str | None,
    typer.Option(
        "--service", "-s", help="Only its circuits (NAME.*).", autocompletion=_complete_service
    ),
]
File = Annotated[
    Path | None,
    typer.Option("--config", help="Else CIRCUIT_BREAKER_CONFIG, else config/circuit_breakers.json"),
]
Environment = Annotated[
    str | None, typer.Option("--environment", "-e", help="Which overlay; else ENVIRONMENT.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable; see docs/command.md.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Who; user@host if not given.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why; the fleet's log keeps it.")]
Ttl = Annotated[
    float | None,
    typer.Option("--ttl", min=0.001, max=31_536_000, help="Seconds after which it ends by itself."),
]
# What stands for a parameter ``where: Place``.
PLACE: dict[str, Any] = {
    "url": Annotated[
        str | None, typer.Option("--url", help="Redis; else the environment says, else the file.")
    ],
    "namespace": Annotated[
        str | None, typer.Option("--namespace", help="Of the fleet; else the file says.")
    ],
    "file": File,
    "environment": Environment,
}


def command(function: Callable[..., int]) -> Callable[..., None]:
    """Make a command of a function that returns an exit code.

    Its parameter ``where``, if it has one, is found by the options that say where to look.  Its
    failures become an exit code and one sentence, and ``as_json`` says whether in JSON, too.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "where"]
    located = len(own) < len(signature.parameters)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in (PLACE.items() if located else ())
    ]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        try:
            if located:
                given["where"] = find(**{name: given.pop(name) for name in PLACE})
            code = function(**given)
        except StoreUnavailable as error:
            code = fail(FailureError(str(error), CANNOT_TELL), as_json=given["as_json"])
        except config.ConfigurationError as error:
            code = fail(FailureError(str(error), USAGE), as_json=given["as_json"])
        except OutboxError as error:
            code = fail(FailureError(str(error), UNHEALTHY), as_json=given["as_json"])
        except FailureError as error:
            code = fail(error, as_json=given["as_json"])
        except KeyboardInterrupt:
            code = INTERRUPTED
        raise typer.Exit(code)

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    shown = signature.replace(parameters=[*own, *more], return_annotation=None)
    run.__dict__.pop("__wrapped__")
    run.__dict__["__signature__"] = shown
    run.__annotations__ = {p.name: p.annotation for p in shown.parameters.values()}
    return run


# The base of all errors of usage, which typer does not export.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """A usage error ends with 64, since 2 means degraded here."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _usage():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        with _usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = USAGE
        raise
