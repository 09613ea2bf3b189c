"""Which alerts go out by which rules, and how many of them: the rest comes as digests.

Pure: no I/O and no clock.  Times are seconds since 1970.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ..alert_keys import Rule
from .alert_rules import Event
from .alert_texts import Setting, digest

MOST_NAMED = 20  # alerts that a digest names


def wanted(rule: Rule, event: Event) -> bool:
    """Whether a rule tells an event."""
    if event.kind not in rule.on or (event.over and not rule.recovery):
        return False
    return not event.circuit or any(fnmatchcase(event.circuit, p) for p in rule.circuits)


@dataclass
class _Flow:
    """What went to one channel by one rule of late, and what was held back."""

    sent: deque[float] = field(default_factory=deque)
    held: Counter[str] = field(default_factory=Counter)
    titles: list[str] = field(default_factory=list)
    since: str = ""

    def free(self, rule: Rule, now: float) -> bool:
        while self.sent and now - self.sent[0] >= rule.per:
            self.sent.popleft()
        return len(self.sent) < rule.limit

    def hold(self, alert: Mapping[str, Any]) -> None:
        if not self.held:
            self.since = alert["at"]
        self.held[f"{alert['kind']} {alert['event']}"] += 1
        if len(self.titles) < MOST_NAMED:
            self.titles.append(alert["title"])


class Limiter:
    """Lets ``limit`` alerts of a rule through to a channel in ``per`` seconds; the rest is held
    back, and comes as one digest once there is room again."""

    def __init__(self) -> None:
        self._flows: dict[tuple[str, str], _Flow] = {}

    def passes(self, channel: str, rule: Rule, alert: Mapping[str, Any], now: float) -> bool:
        """Whether an alert may go out now; if not, the digest will tell of it."""
        flow = self._flows.setdefault((alert["rule"], channel), _Flow())
        if flow.held or not flow.free(rule, now):
            flow.hold(alert)
            return False
        flow.sent.append(now)
        return True

    def digests(
        self, rules: Mapping[str, Rule], setting: Setting, now: float, *, all_of_them: bool = False
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Channels and their digests that may go out now, or ``all_of_them``."""
        for (name, channel), flow in self._flows.items():
            rule = rules.get(name, Rule())
            if flow.held and (all_of_them or flow.free(rule, now)):
                yield channel, digest(name, flow.held, flow.titles, flow.since, setting, now)
                flow.held, flow.titles = Counter(), []
                flow.sent.append(now)
