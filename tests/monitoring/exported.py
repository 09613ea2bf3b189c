"""What has been exported, read by prometheus-client's own parsers."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

Series = tuple[str, frozenset[tuple[str, str]]]


class Exported:
    """One exposition: ``exported["circuit_breaker_state", {"state": "open"}]``."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        samples = [sample for family in self.families.values() for sample in family.samples]
        self.series: dict[Series, float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value for sample in samples
        }
        assert len(self.series) == len(samples), "a series is there twice"

    @classmethod
    def of(cls, kind: str, body: bytes | str) -> Exported:
        """Read what an endpoint answers, by its content type."""
        text = body.decode() if isinstance(body, bytes) else body
        return cls((read_openmetrics if "openmetrics" in kind else read_text)(text))

    def __getitem__(self, wanted: str | tuple[str, dict[str, str]]) -> float:
        """The value of the one series with this name and at least these labels."""
        ((_, value),) = self.all(wanted)
        return value

    def all(self, wanted: str | tuple[str, dict[str, str]]) -> list[tuple[Series, float]]:
        """All series with this name and at least these labels."""
        name, labels = (wanted, {}) if isinstance(wanted, str) else wanted
        return [
            (series, value)
            for series, value in self.series.items()
            if series[0] == name and labels.items() <= dict(series[1]).items()
        ]

    def of_the_fleet(self) -> dict[Series, float]:
        """What every process should say."""
        return {s: v for s, v in self.series.items() if "process" not in dict(s[1])}
