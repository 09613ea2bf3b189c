"""What runs beside the services of a process: its document for the fleet, and alerts.

Whoever loads the monitoring gets it: it enters itself with the services, which stand below.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..services import Services, companions, current
from .alerts import Alerts
from .presence import Presence, processes
from .ticking import Ticker

LOOK = 5.0  # s between looks at the configuration where no document is written


class Beside:
    """Goes by the configuration in force; a change is noticed within some seconds.

    Args:
        services: of this process.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self.presence = Presence(services)
        self._alerts: Alerts | None = None
        self._alerting: object = None  # the settings that the alerts go by
        services.registry.on_transition(self._hear)
        self._ticker = Ticker("circuit-breaker-monitoring", self._tick)
        self._ticker.start()

    def _tick(self) -> float:
        services, wait = self._services, LOOK
        if services.registry.shared and services.configuration.settings.monitoring_enabled:
            wait = self.presence.write()
        else:
            self.presence.close()
        self._see_to_alerts()
        return wait

    def _see_to_alerts(self) -> None:
        settings = self._services.configuration.settings
        wanted = settings.alerts if settings.alerts.channels and settings.enabled else None
        if wanted == self._alerting:
            return
        before, self._alerts, self._alerting = self._alerts, None, wanted
        if before is not None:
            before.close()
        if wanted is not None:
            self._alerts = Alerts(
                self._services.registry,
                wanted,
                environment=settings.environment,
                processes=self.processes,
                shared=self._services.registry.shared,
            )
            self._alerts.start()

    def processes(self) -> Sequence[dict[str, Any]]:
        """Those of the fleet."""
        return processes(self._services.registry, self.presence)

    def _hear(self, change: object) -> None:
        if self._alerts is not None:
            self._alerts.hear(change)

    def close(self) -> None:
        """Safe to call twice."""
        self._ticker.close()
        if self._alerts is not None:
            self._alerts.close()
        with suppress(Exception):
            self.presence.close()

    def forked(self) -> None:
        """A child is another process."""
        self.presence.forked()
        if self._alerts is not None:
            self._alerts.forked()
        self._ticker.forked()


def presence_of(services: Services) -> Presence | None:
    """The document of a process, if it keeps one."""
    return next((one.presence for one in services.beside if isinstance(one, Beside)), None)


def fleet_processes(services: Services | None = None) -> list[dict[str, Any]]:
    """What the processes of the fleet say of themselves, for people; see ``presence.processes``.

    Args:
        services: of this process; None: those that the getters use.
    """
    services = services or current()
    return processes(services.registry, presence_of(services))


companions.append(Beside)
