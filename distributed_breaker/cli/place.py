"""Which fleet is meant, and which of its circuits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .. import config
from ..address import redacted
from ..fleet import Fleet
from ..monitoring import report
from ..monitoring.source import setting_of
from ..snapshot import Snapshot
from .terminal import USAGE, FailureError, complain


class Place(NamedTuple):
    """Which fleet, and what the configuration says of it.

    Attributes:
        url: where its circuits are kept.
        namespace: its name there.
        loaded: the configuration, None when there is none that can be used.
        problem: what is wrong with it; empty also when there is none and none was asked for.
    """

    url: str
    namespace: str
    loaded: config.Loaded | None
    problem: str

    @property
    def title(self) -> str:
        """For people, without a password."""
        return f"{self.namespace} at {redacted(self.url)}"

    @property
    def circuits(self) -> Mapping[str, report.Configured]:
        """The circuits that the configuration names."""
        return self.loaded.configuration.circuits() if self.loaded else {}

    @property
    def setting(self) -> report.Setting:
        """What the metrics say of the configuration."""
        if self.loaded is None:
            return report.Setting()
        return setting_of(self.loaded.configuration)

    def fleet(self) -> Fleet:
        """Raises FailureError when the URL or the namespace can't be used."""
        try:
            return Fleet(self.url, self.namespace)
        except ValueError as error:
            raise FailureError(str(error), USAGE) from None

    def chosen(
        self, held: Mapping[str, Snapshot], service: str | None, circuit: str | None
    ) -> list[str]:
        """The names that are asked for, out of what the store holds and the configuration names.

        Raises FailureError, with what there is, when that is nothing.
        """
        if service is not None and circuit is not None:
            raise FailureError("give --service or --circuit, not both", USAGE)
        known = sorted({*held, *self.circuits})
        if circuit is not None:
            if circuit not in known:
                raise FailureError(f"there is no circuit {circuit!r}", USAGE, known)
            return [circuit]
        if service is not None:
            # The dot keeps web_app_v2 apart from web_app.
            found = [n for n in known if n == service or n.startswith(f"{service}.")]
            if not found:
                services = sorted({report.service_of(name) for name in known})
                raise FailureError(f"no circuit belongs to a service {service!r}", USAGE, services)
            return found
        return known

    def narrowed(
        self, held: Mapping[str, Snapshot], service: str | None, circuit: str | None
    ) -> tuple[dict[str, Snapshot], dict[str, report.Configured]]:
        """What the store holds of what is asked for, and what the configuration says of it."""
        names = self.chosen(held, service, circuit)
        specs = self.circuits
        return {n: held[n] for n in names if n in held}, {n: specs[n] for n in names if n in specs}


def find(
    url: str | None, namespace: str | None, file: Path | None, environment: str | None
) -> Place:
    """Find the fleet: options beat the environment, and that beats the file.

    In an incident a broken file must not keep anybody from looking, so it is only complained about
    where the options say where to look.  No namespace is guessed: an empty one would look healthy.
    """
    loaded, problem = None, ""
    try:
        loaded = config.load(file, environment=environment)
    except config.ConfigurationError as error:
        named = file or os.environ.get("CIRCUIT_BREAKER_CONFIG")
        if named or Path(config.DEFAULT_FILE).exists():
            problem = str(error)
    if problem:
        complain(f"Going on without the configuration: {problem}")
    if problem and namespace is None:
        raise FailureError("give --namespace (and --url), which the file would have said", USAGE)
    found = loaded.configuration if loaded else config.without_file()
    if url is None and loaded is None and found.settings.redis_url is None:
        raise FailureError(
            f"nothing says where Redis is: give --url, set CIRCUIT_BREAKER_REDIS_URL, or run this "
            f"where {config.DEFAULT_FILE} is",
            USAGE,
        )
    return Place(
        url or found.redis_url,
        namespace or found.settings.namespace,
        loaded,
        problem,
    )
