"""Where a fleet is looked at from: a process that belongs to it, or from outside.

A source says what there is to know; when it is asked is the reader's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from .. import config
from ..breaker import host_name
from ..faults import faults
from ..fleet import Done, Fleet
from ..policy import Policy
from ..process import OwnLock
from ..registry import CircuitBreakerRegistry
from ..services import Services, current
from ..snapshot import Change, Snapshot
from .beside import presence_of
from .presence import Presence
from .report import Configured, Setting, Status

ACTIONS = ("reset", "force-open", "force-closed", "release")


class Alone:
    """Circuits at ``memory://``: this process is the whole fleet."""

    def __init__(self, registry: CircuitBreakerRegistry) -> None:
        self._registry = registry

    def snapshot(self) -> dict[str, Snapshot]:
        return self._registry.snapshot()

    def histories(self, circuits: Sequence[str], count: int = 50) -> dict[str, list[Change]]:
        return {name: [] for name in circuits}  # Nothing keeps a log there.

    def operated(self, method: str, names: Sequence[str], **said: Any) -> Iterator[Done]:
        """Step in on circuits, one after the other, by a method of theirs."""
        for name in names:
            breaker = self._registry.breaker(name)
            before = breaker.state
            getattr(breaker, method)(**said)
            yield Done(name, before.value, breaker.state.value, breaker.state is not before)

    def close(self) -> None:
        """The registry is the process's own."""

    def forked(self) -> None:
        """The registry is told by itself."""


def operate(
    fleet: Fleet | Alone, action: str, policies: Mapping[str, Policy | None], **said: Any
) -> list[Done]:
    """Step in on circuits of a fleet.

    Args:
        action: one of ``ACTIONS``.
        policies: of the circuits, in case that the store does not hold them.
        said: ``actor``, ``reason`` and, to force, ``ttl``.

    Raises:
        StoreUnavailable: nothing was carried out, or the message says that this is unknown.
    """
    method = action.replace("-", "_")
    if isinstance(fleet, Alone):
        return list(fleet.operated(method, list(policies), **said))
    return list(getattr(fleet, method)(policies, **said))


# ---------------------------------------------------------------------------- what there is


class Source(Protocol):
    """One fleet, as it is seen from one place.  Nothing but ``fleet()`` asks the store."""

    def fleet(self) -> Fleet | Alone:
        """Whom to ask; its methods raise StoreUnavailable."""

    def configured(self) -> Mapping[str, Configured]:
        """The circuits that the configuration names."""

    def setting(self) -> Setting: ...
    def configuration(self) -> dict[str, Any]: ...

    def own(self) -> Mapping[str, Snapshot]:
        """What this process knows by itself."""

    def process(self, own: Mapping[str, Snapshot]) -> dict[str, Any]:
        """What is only of this process, and so differs between those that answer."""

    def presence(self) -> Presence | None:
        """The document that this process keeps for the fleet, if it is of the fleet."""

    def problems(self) -> dict[str, dict[str, Any]]:
        """What is wrong with the clients of this process, and which faults are injected."""

    def stats(self) -> dict[str, dict[str, Any]]:
        """What they count and hold."""

    def wants_view(self) -> bool:
        """Whether nothing can be said before the store has answered once."""

    def close(self) -> None: ...
    def forked(self) -> None: ...


# ---------------------------------------------------------------------------- inside


class Inside:
    """A process of the fleet looks at it.

    It asks over a connection of its own, so that whoever looks never keeps the process's own link
    from its work.

    Args:
        services: the process's; None: those that the getters use, when they are first wanted.
    """

    _lock = OwnLock()

    def __init__(self, services: Services | None = None) -> None:
        self._services = services
        self._fleet: Fleet | Alone | None = None
        self._of: CircuitBreakerRegistry | None = None
        self._circuits: tuple[config.Loaded | None, Mapping[str, Configured]] = None, {}

    @property
    def services(self) -> Services:
        """Whose."""
        return self._services or current()

    def fleet(self) -> Fleet | Alone:
        registry = self.services.registry
        with self._lock:
            if self._fleet is None or self._of is not registry:
                self._close()
                alone = registry.url.startswith("memory://")
                self._fleet = Alone(registry) if alone else Fleet(registry.url, registry.namespace)
                self._of = registry
            return self._fleet

    def configured(self) -> Mapping[str, Configured]:
        loaded = self.services.loaded
        if self._circuits[0] is not loaded:
            self._circuits = loaded, loaded.configuration.circuits()
        return self._circuits[1]

    def setting(self) -> Setting:
        found = setting_of(self.services.configuration)
        return found._replace(namespace=self.services.registry.namespace)

    def configuration(self) -> dict[str, Any]:
        return configuration_of(self.services)

    def own(self) -> Mapping[str, Snapshot]:
        return self.services.registry.snapshot_here()

    def process(self, own: Mapping[str, Snapshot]) -> dict[str, Any]:
        ages = [s.mirror_age for s in own.values() if s.mirror_age is not None]
        return {
            **_identity(),
            "circuits": len(own),
            "mirror_age": max(ages, default=None),
            "degraded": any(s.source == "shadow" for s in own.values()),
            "quarantined": [name for name, s in own.items() if s.source == "quarantine"],
            "policy_mismatch": [name for name, s in own.items() if s.policy_mismatch],
        }

    def presence(self) -> Presence | None:
        return presence_of(self.services)

    def problems(self) -> dict[str, dict[str, Any]]:
        return problems_of(self.services)

    def stats(self) -> dict[str, dict[str, Any]]:
        return {client.name: client.stats() for client in self.services.clients()}

    def wants_view(self) -> bool:
        return False  # Its shadow decides, whatever the store does.

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._fleet = None

    def forked(self) -> None:
        vars(self).pop("_lock", None)
        if self._fleet is not None:
            self._fleet.forked()


# ---------------------------------------------------------------------------- outside


class Outside:
    """Somebody who is no process of the fleet looks at it, as the command does.

    Args:
        url: where the circuits are.
        namespace: the fleet's.
        loaded: what the configuration says of them; None: there is none.
        problem: what is wrong with it.

    Raises:
        ValueError: the URL or the namespace can't be used.
    """

    def __init__(
        self, url: str, namespace: str, loaded: config.Loaded | None = None, problem: str = ""
    ) -> None:
        self._fleet = Fleet(url, namespace)
        self._loaded = loaded
        self._problem = problem
        self._circuits = loaded.configuration.circuits() if loaded else {}

    def fleet(self) -> Fleet | Alone:
        return self._fleet

    def configured(self) -> Mapping[str, Configured]:
        return self._circuits

    def setting(self) -> Setting:
        said = setting_of(self._loaded.configuration) if self._loaded else Setting()
        return said._replace(namespace=self._fleet.namespace)

    def configuration(self) -> dict[str, Any]:
        settings = self._loaded.configuration.settings if self._loaded else None
        return {
            "files": [str(file) for file in self._loaded.files] if self._loaded else [],
            "environment": settings.environment if settings else None,
            "version": settings.config_version if settings else None,
            "problem": self._problem or None,
        }

    def own(self) -> Mapping[str, Snapshot]:
        return {}

    def process(self, own: Mapping[str, Snapshot]) -> dict[str, Any]:
        return _identity()

    def presence(self) -> Presence | None:
        return None

    def problems(self) -> dict[str, dict[str, Any]]:
        return {}

    def stats(self) -> dict[str, dict[str, Any]]:
        return {}

    def wants_view(self) -> bool:
        return True

    def close(self) -> None:
        self._fleet.close()

    def forked(self) -> None:
        self._fleet.forked()


def configuration_of(services: Services) -> dict[str, Any]:
    """Where the values in force come from."""
    status = services.status
    return {
        "files": list(status.files),
        "environment": status.environment,
        "version": status.version,
        "problem": status.problem or None,
    }


def problems_of(services: Services) -> dict[str, dict[str, Any]]:
    """What is wrong with each client beside its circuits, and what is made wrong on purpose."""
    found = {client.name: client.problems() for client in services.clients()}
    injected = [fault.what for fault in faults(services.registry)]
    if injected:
        found["fault injection"] = injected
    return {name: {"status": _status(told), "problems": told} for name, told in found.items()}


def _status(problems: list[str]) -> str:
    return (Status.DEGRADED if problems else Status.HEALTHY).value


def setting_of(configuration: config.Configuration) -> Setting:
    """What the metrics say of a configuration."""
    settings = configuration.settings
    return Setting(
        settings.environment,
        settings.monitoring_enabled,
        len(configuration.services),
        settings.namespace,
    )


def _identity() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": host_name()}
