"""All commands, put together."""

from __future__ import annotations

from collections.abc import Callable

import typer

from . import alerting, examine, look, serving, settings, step_in, waiting
from .options import Commands, command

app = typer.Typer(
    cls=Commands,
    help="Look at the circuit breakers of a running fleet, and step in.",
    epilog="Exit codes: 0 healthy or done, 1 unhealthy or failed, 2 degraded, "
    "3 Redis cannot be reached, 64 wrong usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_of_settings = typer.Typer(help="Look at the configuration file.", no_args_is_help=True)
_of_waiting = typer.Typer(help="Look after what waits on this host.", no_args_is_help=True)

_of_alerts = typer.Typer(help="Look after alerts.", no_args_is_help=True)

_function: Callable[..., int]
for _function in (
    *(look.status, look.metrics, look.monitor, look.explain),
    *(step_in.reset, step_in.force_open, step_in.force_closed, step_in.release),
    *(serving.serve, examine.doctor),
):
    app.command(_function.__name__.replace("_", "-"))(command(_function))
app.add_typer(_of_settings, name="config")
for _function in (settings.show, settings.validate, settings.schema, settings.diff):
    _of_settings.command(_function.__name__)(command(_function))
app.add_typer(_of_waiting, name="outbox")
for _function in (waiting.list_, waiting.replay, waiting.purge):
    _of_waiting.command(_function.__name__.strip("_"))(command(_function))
app.add_typer(_of_alerts, name="alerts")
_of_alerts.command("test")(command(alerting.trial_run))
