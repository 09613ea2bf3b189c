"""What is known of a fleet at one moment, and the documents that are made of it, once each.

Everybody who asks for the same moment gets the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..snapshot import Snapshot
from . import report
from .source import Source


@dataclass(frozen=True)
class View:
    """The circuits of a fleet at one moment.

    Attributes:
        at: seconds since 1970.
        snapshots: the fleet's; while the store can't be asked, the last ones, and over them what
            this process knows by itself.
        configured: what the configuration says.
        setting: for ``manager_info``.
        own: what this process knows by itself; nothing, if it does not belong to the fleet.
        source: tells what is only of this process, once a document has that, too.
        lost: why the store can't be asked; empty while it can be.
    """

    at: float
    snapshots: Mapping[str, Snapshot]
    configured: Mapping[str, report.Configured]
    setting: report.Setting
    own: Mapping[str, Snapshot]
    source: Source
    lost: str = ""

    @cached_property
    def fleet_health(self) -> dict[str, Any]:
        """How well the circuits are."""
        return report.health(self.snapshots, self.configured, self.at, self.lost)

    @cached_property
    def fleet_metrics(self) -> dict[str, Any]:
        """What the circuits have counted."""
        return report.metrics(self.snapshots, self.configured, self.at, self.setting)

    @cached_property
    def health_json(self) -> bytes:
        """The health, and what is wrong in this process, as it is sent."""
        return as_json({
            **self.fleet_health,
            "clients": self.source.problems(),
            "configuration": self.source.configuration(),
            "process": self.source.process(self.own),
        })  # fmt: skip

    @cached_property
    def metrics_json(self) -> bytes:
        """The metrics, and what this process's clients count and hold, as it is sent."""
        return as_json({
            **self.fleet_metrics,
            "clients": self.source.stats(),
            "store": self.store,
            "configuration": self.source.configuration(),
            "process": self.source.process(self.own),
        })  # fmt: skip

    @property
    def store(self) -> dict[str, Any]:
        """Whether it can be asked."""
        return {"reachable": not self.lost, "problem": self.lost or None}


def as_json(document: Any) -> bytes:
    """A document as it is sent, which ends with its line."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"
