"""The figures for an application that exports metrics of its own with prometheus-client.

An endpoint that exports nothing else uses ``exposition.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..services import Services
from .exposition import families, look
from .figures import FAMILIES, Family, Row


class FiguresCollector(Collector):
    """Looks at fleet and process whenever the registry is asked.

    Args:
        services: whose; None: those that the getters use, when they are first wanted.
        fleet: say what the store knows of the fleet.
        process: say what this process and its clients count and hold.
    """

    def __init__(
        self, services: Services | None = None, *, fleet: bool = True, process: bool = True
    ) -> None:
        self._services = services
        self._fleet = fleet
        self._process = process

    def describe(self) -> list[Metric]:
        """All families, without their samples: nobody is asked for that."""
        return [_metric(family, []) for family in FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """What there is now.  Blocks for a second at most, if the store is not there."""
        found = families(look(self._services), fleet=self._fleet, process=self._process)
        return (_metric(family, rows) for family, rows in found)


def register(
    registry: CollectorRegistry | None = None,
    services: Services | None = None,
    *,
    fleet: bool = True,
    process: bool = True,
) -> FiguresCollector:
    """Have an application's own ``/metrics`` say these figures too.

    Args:
        registry: where its metrics are; None: prometheus-client's own.  With several processes
            behind one port it is the one that the application makes for
            ``MultiProcessCollector``.
        services: see ``FiguresCollector``, as for the others.

    Returns:
        What ``registry.unregister`` takes.

    Raises:
        ValueError: the registry has them already.
    """
    collector = FiguresCollector(services, fleet=fleet, process=process)
    (REGISTRY if registry is None else registry).register(collector)
    return collector


def _metric(family: Family, rows: list[Row]) -> Metric:
    metric = Metric(family.name, family.help, family.kind)
    for labels, values in rows:
        for (suffix, more), value in zip(family.columns, values, strict=True):
            metric.add_sample(family.name + suffix, {**labels.pairs, **more.pairs}, value)
    return metric
