"""Figures as text for Prometheus: its own format, and OpenMetrics.

Written here and not by prometheus-client, which needs some 400 ms for a thousand circuits; a test
holds the two against each other.  So an endpoint needs no package either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ..breaker import host_name
from ..errors import StoreUnavailable
from ..services import Services, current
from ..snapshot import Snapshot
from .client_figures import of_clients
from .figures import Figures, Table, of_fleet, of_process

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def exposition(accept: str = "", figures: Figures | None = None) -> tuple[str, bytes]:
    """The figures in the format that is asked for.

    Args:
        accept: the header of this name; the first of the two formats that it lists counts, and
            without any it is Prometheus' own.
        figures: what to say; None: what ``look()`` finds.

    Returns:
        The content type and the body.
    """
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    wanted = [kind for kind in kinds if kind in ("text/plain", "application/openmetrics-text")]
    figures = look() if figures is None else figures
    if wanted[:1] == ["application/openmetrics-text"]:
        return OPENMETRICS, "".join([*_lines(figures, ""), "# EOF\n"]).encode()
    return TEXT, "".join(_lines(figures, "_total")).encode()


def families(figures: Figures, *, fleet: bool = True, process: bool = True) -> Iterator[Table]:
    """All that there is to export; families without samples are left out."""
    if fleet:
        yield from (table for table in of_fleet(figures) if table[1])
    if process:
        yield from (table for table in of_process(figures) if table[1])
        yield from (table for table in of_clients(figures) if table[1])


def _lines(figures: Figures, total: str) -> Iterator[str]:
    """The two formats differ in what a counter is called before its samples."""
    for family, rows in families(figures):
        name = family.name + total if family.kind == "counter" else family.name
        yield f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n"
        row = family.row
        yield "".join([(row % values).replace("\0", labels.text) for labels, values in rows])


# ---------------------------------------------------------------------------- looking


def look(services: Services | None = None) -> Figures:
    """Ask the store, and this process's clients.  Blocks, for a second at most.

    Args:
        services: whose; None: those that the getters use.
    """
    services = services or current()
    try:
        seen: dict[str, Snapshot] | None = services.registry.snapshot()
    except StoreUnavailable:
        seen = None
    return figures_of(services, seen)


def figures_of(services: Services, seen: Mapping[str, Snapshot] | None) -> Figures:
    """What there is to say once the fleet has been looked at.

    Args:
        services: of this process.
        seen: the circuits, from its registry or from outside; None: the store can't be asked.
    """
    registry = services.registry
    own = {name: s for name, s in (seen or {}).items() if s.local} or registry.snapshot_here()
    return Figures.of(
        seen,
        own,
        registry.namespace,
        process_name(),
        clients={client.name: client.stats() for client in services.clients()},
        configured=services.configuration.circuits(),
        rejected=bool(services.status.problem),
    )


def process_name() -> str:
    """What tells this process from the others: the label ``process``."""
    return f"{host_name()}:{os.getpid()}"
