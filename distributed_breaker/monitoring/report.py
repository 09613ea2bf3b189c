"""Health and metrics of circuits as dictionaries, in the shapes that existing consumers read.

Pure: no I/O and no clock.  Both functions take snapshots, be it of the fleet
(``registry.snapshot()``, ``Fleet.snapshot()``) or of one process that cannot reach its store
(``breaker.snapshot()``).  Times become ISO 8601 in UTC, durations are seconds, rates are shares
between 0 and 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from ..policy import Policy, State
from ..snapshot import Change, ReporterShare, Snapshot, Trip, Window

BUCKETS = 16
FIRST_BUCKET = 2**20 / 1e9  # s, the upper bound of the first one; each is twice the one before


class Status(StrEnum):
    """How well a circuit is, the best first."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


ORDER = list(Status)

# An operator who has forced a circuit closed lets all calls pass, so the service works; only its
# protection is off.
OF_STATE = {
    State.CLOSED: Status.HEALTHY,
    State.HALF_OPEN: Status.DEGRADED,
    State.FORCED_CLOSED: Status.DEGRADED,
    State.OPEN: Status.UNHEALTHY,
    State.FORCED_OPEN: Status.UNHEALTHY,
}


class Configured(Protocol):
    """What the configuration says of one circuit."""

    @property
    def service(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def enabled(self) -> bool: ...


class Setting(NamedTuple):
    """Where the circuits are: for ``manager_info`` and the dashboard."""

    environment: str = "development"
    monitoring_enabled: bool = True
    services: int = 0
    namespace: str = "default"


# ---------------------------------------------------------------------------- the two reports


def health(
    snapshots: Mapping[str, Snapshot],
    configured: Mapping[str, Configured],
    at: float,
    lost: str = "",
) -> dict[str, Any]:
    """How well each circuit is, and all together.

    Args:
        snapshots: by circuit.
        configured: circuits that the configuration names; those without a snapshot are listed as
            closed and never called.
        at: seconds since the epoch, for ``timestamp``.
        lost: why the store cannot be asked; empty while it can be.  Nothing is better than
            degraded then, since each process decides alone.
    """
    circuits = {
        name: _health_of(name, snapshots.get(name), configured.get(name), at, bool(lost))
        for name in sorted({*snapshots, *configured})
    }
    counts = Counter(circuit["status"] for circuit in circuits.values())
    found = [Status(status) for status in counts]
    overall = worst(*found, Status.DEGRADED if lost else Status.HEALTHY)
    return {
        "overall_status": overall.value,
        "timestamp": iso(at),
        "circuit_breakers": circuits,
        "summary": {"total": len(circuits), **{status.value: counts[status] for status in ORDER}},
        "store": {"reachable": not lost, "problem": lost or None},
    }


def metrics(
    snapshots: Mapping[str, Snapshot],
    configured: Mapping[str, Configured],
    at: float,
    setting: Setting | None = None,
) -> dict[str, Any]:
    """Counts, rates and response times of each circuit since the store holds it."""
    setting = setting or Setting()
    circuits = {
        name: _metrics_of(name, snapshots.get(name), configured.get(name), at)
        for name in sorted({*snapshots, *configured})
    }
    return {
        "timestamp": iso(at),
        "circuit_breakers": circuits,
        "manager_info": {
            "total_circuits": len(circuits),
            "services_configured": setting.services,
            "environment": setting.environment,
            "monitoring_enabled": setting.monitoring_enabled,
        },
    }


# ---------------------------------------------------------------------------- one circuit


def status_of(snapshot: Snapshot, lost: bool = False) -> Status:
    """How well a circuit is.

    A process in quarantine is sick alone: the fleet's state counts, and that something is wrong.
    """
    if snapshot.source == "disabled":
        return Status.HEALTHY
    if snapshot.source == "quarantine":
        return worst(OF_STATE[snapshot.shared_state or State.CLOSED], Status.DEGRADED)
    alone = lost or snapshot.source == "shadow"
    return worst(OF_STATE[snapshot.state], Status.DEGRADED if alone else Status.HEALTHY)


def _health_of(
    name: str, snapshot: Snapshot | None, configured: Configured | None, at: float, lost: bool
) -> dict[str, Any]:
    s, enabled = _known(name, snapshot, configured)
    return {
        "status": status_of(s, lost).value,
        "state": s.state.value,
        "shared_state": None if s.shared_state is None else s.shared_state.value,
        "source": s.source,
        "service": configured.service if configured else service_of(name),
        "kind": configured.kind if configured else kind_of(name),
        "enabled": enabled,
        "configured": configured is not None,
        "called": _called(s),
        "since": iso(s.since),
        "next_attempt_time": iso(_next_attempt(s, at)),
        "ends_at": iso(s.ends_at),
        "attempt": s.attempt,
        "cause": s.cause or None,
        "detail": dict(s.detail),
        "probes": {"out": s.permits, "successes": s.successes, "needed": _needed(s)},
        "window": _window(s.window),
        "run": s.run,
        "reporters": [_reporter(r) for r in s.reporters],
        "suspects": suspects(s),
        "last_trip": _trip(s.last_trip),
        "mirror_age": s.mirror_age,
        "policy_mismatch": s.policy_mismatch,
    }


def _metrics_of(
    name: str, snapshot: Snapshot | None, configured: Configured | None, at: float
) -> dict[str, Any]:
    s, enabled = _known(name, snapshot, configured)
    t = Counter(s.totals)
    counts = [t[f"b{i}"] for i in range(BUCKETS)]
    measured = sum(counts)
    return {
        "state": s.state.value,
        "enabled": enabled,
        "total_requests": t["calls"] + t["rejected"],
        "successful_requests": t["calls"] - t["failures"] - t["ignored"],
        "failed_requests": t["failures"],
        "ignored_requests": t["ignored"],
        "rejected_requests": t["rejected"],
        "slow_requests": t["slow"],
        "late_requests": t["late"],
        "dropped_requests": t["dropped"],
        "fallback_requests": t["fallbacks"],
        "probes": t["probes"],
        "trips": t["trips"],
        "failure_rate": _share(t["failures"], t["calls"] - t["ignored"]),
        "average_response_time": t["duration_us"] / 1e6 / measured if measured else None,
        "p50_response_time": quantile(counts, 0.50),
        "p95_response_time": quantile(counts, 0.95),
        "p99_response_time": quantile(counts, 0.99),
        "last_failure_time": iso(t["last_failure"] / 1000 or None),
        "last_success_time": iso(t["last_success"] / 1000 or None),
        "last_state_change": iso(s.since if s.cause != "created" else None),
        "state_transitions": {
            "to_open": t["opens"],
            "to_half_open": t["half_opens"],
            "to_closed": t["closes"],
        },
        "next_attempt_time": iso(_next_attempt(s, at)),
        "window": _window(s.window),
    }


def _known(
    name: str, snapshot: Snapshot | None, configured: Configured | None
) -> tuple[Snapshot, bool]:
    """What to show of a circuit; one that is switched off lets all calls pass, whatever the store
    still holds of it."""
    enabled = configured is None or configured.enabled
    if snapshot is None:
        policy = configured.policy if configured else None
        source = "shared" if enabled else "disabled"
        return Snapshot(name, State.CLOSED, None, source, policy=policy), enabled
    if not enabled:
        # The rest stays: other processes may not have switched it off.
        return replace(snapshot, state=State.CLOSED, source="disabled"), False
    policy = configured.policy if configured else snapshot.policy
    if policy is not None and not policy.auto_recovery and snapshot.state is State.OPEN:
        snapshot = replace(snapshot, ends_at=None, retry_after=0.0)
    return snapshot, snapshot.source != "disabled"


def suspects(snapshot: Snapshot) -> list[str]:
    """Reporters that alone see the failures of a closed circuit: most likely in quarantine."""
    bad = [r for r in snapshot.reporters if r.bad]
    threshold = snapshot.policy.failure_threshold if snapshot.policy else 0
    lonely = len(bad) == 1 and len(snapshot.reporters) > 1 and 0 < threshold <= bad[0].bad
    return [bad[0].id] if lonely and snapshot.shared_state is State.CLOSED else []


def policy(snapshot: Snapshot | None, configured: Configured | None) -> dict[str, Any] | None:
    """The numbers of a circuit, in seconds and shares; None when none are known."""
    held = snapshot.policy if snapshot else configured.policy if configured else None
    if held is None:
        return None
    return {name: getattr(held, name) for name in held.numbers._fields}


# ---------------------------------------------------------------------------- transitions


def change(entry: Change) -> dict[str, Any]:
    """One transition out of the log."""
    return {
        "time": iso(entry.at),
        "from": entry.old or None,
        "to": entry.new,
        "cause": entry.cause,
        "generation": entry.generation,
        "window": _window(entry.window),
        "run": entry.run,
        "reporters": entry.reporters,
        "detail": dict(entry.detail),
    }


def _trip(trip: Trip | None) -> dict[str, Any] | None:
    if trip is None:
        return None
    return {
        "cause": trip.cause,
        "time": iso(trip.at),
        "window": None if trip.window is None else _window(trip.window),
        "run": trip.run,
        "reporters": trip.reporters,
        "detail": dict(trip.detail),
    }


# ---------------------------------------------------------------------------- small parts


def iso(seconds: float | None) -> str | None:
    """A time of the epoch as ISO 8601 in UTC, to the millisecond; None stays None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def worst(*statuses: Status) -> Status:
    """The worst of some; healthy if there are none."""
    return max(statuses, key=ORDER.index, default=Status.HEALTHY)


def service_of(circuit: str) -> str:
    """The service to which a circuit belongs by its name."""
    return circuit.partition(".")[0]


def kind_of(circuit: str) -> str:
    """What the circuit guards, by its name; empty where that says nothing."""
    return circuit.partition(".")[2].partition(".")[0]


def quantile(counts: list[int], share: float) -> float | None:
    """The duration (s) that this share of the calls did not exceed; None without calls.

    Within a bucket the calls are taken as evenly spread, so it is right to a factor of two.  The
    last bucket has no upper bound and is taken to end at twice its lower one: 34 s is the most.
    """
    total = sum(counts)
    if not total:
        return None
    wanted, below = share * total, 0
    for i, count in enumerate(counts):
        if count and below + count >= wanted:
            upper = FIRST_BUCKET * (1 << i)
            lower = upper / 2 if i else 0.0
            return lower + (upper - lower) * (wanted - below) / count
        below += count
    raise AssertionError("unreachable")


def _share(part: int, whole: int) -> float:
    return part / whole if whole > 0 else 0.0


def _window(window: Window) -> dict[str, Any]:
    rate = _share(window.failures, window.calls)
    return {**window._asdict(), "failure_rate": rate}


def _reporter(share: ReporterShare) -> dict[str, Any]:
    return {"id": share.id, "bad": share.bad, "run": share.run, "last": iso(share.last)}


def _called(s: Snapshot) -> bool:
    return any(s.totals.get(name) for name in ("calls", "rejected", "dropped"))


def _needed(s: Snapshot) -> int | None:
    return s.policy.success_threshold if s.policy else None


def _next_attempt(s: Snapshot, at: float) -> float | None:
    """When a call may be tried again; None when calls are let through, or no end is known."""
    if s.state not in (State.OPEN, State.FORCED_OPEN):
        return None
    if s.state is s.shared_state:
        return s.ends_at
    return at + s.retry_after if s.retry_after else None
