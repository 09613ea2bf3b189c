"""Health and metrics as a process serves them: the fleet's view, else its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..errors import StoreUnavailable
from ..services import Services, current
from ..snapshot import Snapshot
from .report import Status, health, metrics, worst
from .source import configuration_of, problems_of, setting_of


def circuit_breaker_health(services: Services | None = None) -> dict[str, Any]:
    """How well each circuit is, and all together; the same from every process of the fleet.

    Args:
        services: whose; None: those that the getters use.

    While the store cannot be asked (which takes at most a second to find out), it is this
    process's own view, and at best degraded; ``store.problem`` says why.  ``clients`` says what is
    wrong with the disk tiers and outboxes of this process and its host, and which faults are
    injected into it, which makes it degraded.
    """
    services = services or current()
    snapshots, lost = _seen(services)
    found = health(snapshots, services.configuration.circuits(), time.time(), lost)
    clients = problems_of(services)
    statuses = [found["overall_status"], *(client["status"] for client in clients.values())]
    return {
        **found,
        "overall_status": worst(*map(Status, statuses)).value,
        "clients": clients,
        "configuration": configuration_of(services),
    }


def circuit_breaker_metrics(services: Services | None = None) -> dict[str, Any]:
    """Counts, rates and response times of each circuit, and under ``clients`` what this process's
    clients count and hold; for arguments see ``circuit_breaker_health``."""
    services = services or current()
    snapshots, lost = _seen(services)
    values = services.configuration
    found = metrics(snapshots, values.circuits(), time.time(), setting_of(values))
    store = {"reachable": not lost, "problem": lost or None}
    clients = {client.name: client.stats() for client in services.clients()}
    return {
        **found,
        "clients": clients,
        "store": store,
        "configuration": configuration_of(services),
    }


def _seen(services: Services) -> tuple[Mapping[str, Snapshot], str]:
    """The fleet's view, or this process's own and why it is only that."""
    try:
        return services.registry.snapshot(), ""
    except StoreUnavailable as error:
        return services.registry.snapshot_here(), str(error)
