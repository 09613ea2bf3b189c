"""What an HTTP client has counted in this process, exact under threads."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..process import OwnLock

COUNTED = (
    "requests", "attempts", "retries", "retries_over_budget", "bytes", "served_stale", "defaults",
    "fallbacks", "queued", "delivered", "invalid", "rate_limited",
)  # fmt: skip
PHASES = ("dns", "connect", "tls", "wait", "read")


class Counts:
    """Numbers that only grow, the statuses of answers, and the time that each phase took."""

    _lock = OwnLock()

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._times: Counter[str] = Counter()

    def __getitem__(self, name: str) -> int:
        return self._numbers[name]

    def add(self, name: str, by: int = 1) -> None:
        """Count one of ``COUNTED``."""
        with self._lock:
            self._numbers[name] += by

    def status(self, status: int, seconds: float) -> None:
        """An answer has come, after so many seconds."""
        with self._lock:
            self._statuses[status] += 1
            self._seconds["wait"] += seconds
            self._times["wait"] += 1

    def body(self, size: int, seconds: float) -> None:
        """A body of so many bytes has been read, in so many seconds."""
        with self._lock:
            self._numbers["bytes"] += size
            self._seconds["read"] += seconds
            self._times["read"] += 1

    def took(self, phase: str, seconds: float) -> None:
        """One of ``PHASES`` has taken so long."""
        with self._lock:
            self._seconds[phase] += seconds
            self._times[phase] += 1

    def stats(self) -> dict[str, Any]:
        """All of it; of phases how often they came, and how many seconds they took together."""
        with self._lock:
            return {
                **{name: self._numbers[name] for name in COUNTED},
                "statuses": {str(status): n for status, n in sorted(self._statuses.items())},
                "times": {
                    phase: {"count": self._times[phase], "seconds": round(self._seconds[phase], 6)}
                    for phase in PHASES
                },
            }
