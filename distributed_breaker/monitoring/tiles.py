"""What the dashboard shows of each circuit: one small dictionary, and how its traffic has gone.

Pure: no I/O and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

SAMPLES = 60  # that are kept
EVERY = 2.0  # s between two of them: processes tell good outcomes only so often
OVER = 3  # totals a sample looks at, and so evens out when they were told
FORGET = 30.0  # s without one after which what was before says nothing any more

Counts = tuple[float, int, int, int]  # when, and by then: requests, bad ones, rejected ones


class Traffic:
    """The last samples of one circuit."""

    def __init__(self) -> None:
        self._totals: deque[Counts] = deque(maxlen=OVER)
        self.rate: float | None = None
        self.rejected: float | None = None
        self.calls: list[float] = []
        self.bad: list[float] = []

    def add(self, counts: Counts) -> None:
        """Take in what is counted now.  What comes before the first call is not kept."""
        self._totals.append(counts)
        (start, *before), (end, *now) = self._totals[0], counts
        if end <= start:
            return
        requests, bad, rejected = (max(0, n - b) for n, b in zip(now, before, strict=True))
        self.rate = rate = _rounded(requests / (end - start))
        self.rejected = _rounded(rejected / (end - start))
        if requests or any(self.calls):
            share = round(min(1.0, bad / requests), 3) if requests else 0.0
            self.calls = [*self.calls[1 - SAMPLES :], rate]
            self.bad = [*self.bad[1 - SAMPLES :], share]
        else:
            self.calls, self.bad = [], []


class Traffics:
    """The traffic of all circuits, sampled whenever somebody looks."""

    def __init__(self) -> None:
        self._of: dict[str, Traffic] = {}
        self._at = float("-inf")

    def add(self, at: float, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Sample, if it is time.

        Args:
            at: seconds.
            metrics: of each circuit.
        """
        if at - self._at < EVERY * 0.9:
            return
        if at - self._at > FORGET:
            self._of = {}
        self._at = at
        self._of = {name: self._of.get(name) or Traffic() for name in metrics}
        for name, found in metrics.items():
            rejected = found["rejected_requests"]
            bad = found["failed_requests"] + rejected
            self._of[name].add((at, found["total_requests"], bad, rejected))

    def of(self, name: str) -> Traffic:
        """Of one circuit."""
        return self._of.get(name) or Traffic()


def tile(
    name: str, health: Mapping[str, Any], metrics: Mapping[str, Any], traffic: Traffic
) -> dict[str, Any]:
    """What is shown of one circuit, out of what the two reports say of it."""
    window = health["window"]
    times = {key: metrics[f"{key}_response_time"] for key in ("p50", "p95", "p99")}
    return {
        "name": name,
        **{key: health[key] for key in OF_HEALTH},
        "failure_rate": _rounded(window["failure_rate"]),
        "calls": window["calls"],
        "slow": window["slow"],
        "rate": traffic.rate,
        "rejected_rate": traffic.rejected,
        **{key: None if took is None else _rounded(took) for key, took in times.items()},
        **{key: metrics[key] for key in OF_METRICS},
        "reporters": len(health["reporters"]),
        "spark": traffic.calls,
        "spark_bad": traffic.bad,
    }


OF_HEALTH = (
    "service kind status state shared_state source since next_attempt_time ends_at cause probes "
    "suspects policy_mismatch enabled"
).split()
OF_METRICS = "fallback_requests total_requests rejected_requests trips".split()


def _rounded(number: float) -> float:
    """Four digits are more than a screen shows, and half of what would be sent."""
    return float(f"{number:.4g}")
