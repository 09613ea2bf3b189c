"""The command that tries the channels of alerts: alerts test."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .. import config
from ..breaker import host_name
from ..monitoring.alert_delivery import attempt
from ..monitoring.alert_texts import Setting, trial
from .options import Environment, File, Json
from .terminal import HEALTHY, UNHEALTHY, USAGE, FailureError, show_json


def trial_run(
    file: File = None,
    environment: Environment = None,
    channel: Annotated[
        list[str] | None, typer.Option("--channel", help="Only this one; may be given again.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Send a test alert through each channel and say what happened. Exits with 1 if one failed."""
    settings = config.load(file, environment=environment).configuration.settings
    known = settings.alerts.channels
    unknown = [name for name in channel or () if name not in known]
    if unknown:
        raise FailureError(f"there is no channel {unknown[0]!r}", USAGE, known)
    if not known:
        raise FailureError("settings.alerts.channels names no channel: add one", USAGE)
    alert = trial(Setting(settings.namespace, settings.environment, host_name()), time.time())
    failed = 0
    found = {}
    for name in channel or known:
        begin = time.monotonic()
        problem = attempt(name, settings.alerts, alert)
        took = round(time.monotonic() - begin, 3)
        kind = known[name].type
        found[name] = {"type": kind, "delivered": not problem, "problem": problem or None,
                       "seconds": took}  # fmt: skip
        failed += bool(problem)
        if not as_json:
            said = f"failed: {problem}" if problem else f"delivered in {took:.2f} s"
            typer.echo(f"{name} ({kind}): {said}")
    if as_json:
        show_json({"channels": found})
    return UNHEALTHY if failed else HEALTHY
