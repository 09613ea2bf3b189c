"""The command that examines a store and says what to do."""

from __future__ import annotations

import time

import typer

from .. import config
from ..errors import StoreUnavailable
from ..fleet import Fleet
from ..monitoring import doctor as checks
from ..monitoring import report, text
from ..snapshot import Snapshot
from .options import Json
from .place import Place
from .terminal import (
    CANNOT_TELL,
    DEGRADED,
    HEALTHY,
    UNHEALTHY,
    busy,
    complain,
    console,
    on_terminal,
    show_json,
)


def doctor(
    where: Place,
    as_json: Json = False,
) -> int:
    """Examine Redis, the user's rights and the policies, and say what to do.

    Exits with 1 when something does not work, with 2 when something should be mended.
    """
    findings = [_about_file(where)]
    live = not as_json
    if live:
        _tell(findings[0])
    code = HEALTHY
    with where.fleet() as fleet:
        try:
            with busy(f"Asking {where.title}"):
                snapshots = _snapshots_if_allowed(fleet)
            for finding in checks.examine(fleet, snapshots, where.circuits):
                findings.append(finding)
                if live:
                    _tell(finding)
        except StoreUnavailable as error:
            findings.append(checks.unreachable(str(error)))
            complain(f"{error}: {findings[-1].advice}.")
            code = CANNOT_TELL
    verdicts = {finding.verdict for finding in findings}
    if code != CANNOT_TELL and checks.Verdict.WARNING in verdicts:
        code = DEGRADED
    if code != CANNOT_TELL and checks.Verdict.PROBLEM in verdicts:
        code = UNHEALTHY
    if as_json:
        show_json({
            "timestamp": report.iso(time.time()),
            "store": fleet.place,
            "namespace": where.namespace,
            "verdict": ["ok", "problem", "warning", "unreachable"][code],
            "findings": [finding._asdict() for finding in findings],
        })  # fmt: skip
    return code


def _tell(finding: checks.Finding) -> None:
    if on_terminal():
        console().print(text.finding_text(finding))
        return
    for line in text.finding_lines(finding):
        typer.echo(line)


def _snapshots_if_allowed(fleet: Fleet) -> dict[str, Snapshot] | None:
    """None where the user lacks a right, which is one of the findings."""
    try:
        return fleet.snapshot()
    except StoreUnavailable as error:
        if "NOPERM" in str(error):
            return None
        raise


def _about_file(where: Place) -> checks.Finding:
    if where.problem:
        advice = "processes go on with what they have; mend it before one of them is restarted"
        return checks.Finding("configuration", checks.Verdict.PROBLEM, where.problem, advice)
    if where.loaded is None:
        found = f"no {config.DEFAULT_FILE} here, so policies can't be compared"
        return checks.Finding("configuration", checks.Verdict.UNKNOWN, found, "give --config")
    files = ", ".join(str(read) for read in where.loaded.files)
    version = where.loaded.configuration.settings.config_version
    return checks.Finding("configuration", checks.Verdict.OK, f"{files}, version {version}")
