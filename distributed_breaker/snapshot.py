"""What is known of one circuit at one moment, for people and for monitoring.  Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from . import model
from .policy import Numbers, Policy, State
from .shadow import Decision, Shadow


class Window(NamedTuple):
    """The counts of the last ``Policy.window`` seconds."""

    calls: int
    failures: int
    slow: int


NO_CALLS = Window(0, 0, 0)


class Trip(NamedTuple):
    """Why and on what evidence a circuit opened last.

    ``at`` is in seconds since the epoch by the store's clock; ``window`` and ``run`` are what was
    counted at that moment, ``reporters`` how many processes had an outcome in the last minute or
    window (at most 8 are kept).
    """

    cause: str
    at: float
    window: Window | None
    run: int
    reporters: int
    detail: Mapping[str, Any]


class Change(NamedTuple):
    """One transition out of the store's log.

    ``at`` is in seconds since the epoch by the store's clock; ``old`` is empty when the circuit was
    made.  ``window``, ``run`` and ``reporters`` are what was counted just before, as in ``Trip``.
    """

    at: float
    old: str
    new: str
    generation: int
    cause: str
    window: Window
    run: int
    reporters: int
    detail: Mapping[str, Any]


class ReporterShare(NamedTuple):
    """One process's part: its bad outcomes in the window and in the run, and its last outcome."""

    id: str
    bad: int
    run: int
    last: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One circuit, frozen.

    Attributes:
        circuit: its name.
        state: what this process does now (for a circuit that it does not use: the shared state).
        shared_state: the fleet's state, None when it is not known.
        source: who decides here: ``shared``, ``shadow``, ``quarantine``, ``override``,
            ``disabled``.
        generation: the shared generation, 0 when none is known.
        retry_after: seconds until another attempt is worth making, 0.0 when unknown or closed.
        opened_at: seconds since the epoch (store's clock) at which the open state began.
        attempt: how often the circuit has reopened without resting in between.
        since: seconds since the epoch (store's clock) at which the shared state began.
        ends_at: when the shared state ends by itself, or an open one is due for a probe; None when
            it does not.
        cause: why the last transition was made (lua/README.md, section 8).
        detail: what the transition's maker has said: error and host, or actor and reason.
        successes: successful probes of a half-open circuit so far.
        permits: probes that are out.
        window: counts of the window: the fleet's, or this process's own when ``fleet`` is False.
        run: bad outcomes since the last good one.
        totals: counters over all states, with duration buckets b0 … b15 (upper bounds
            2^(20+i) ns); see lua/README.md.
        reporters: the processes' shares.
        last_trip: evidence of the last trip.
        mirror_age: seconds since the mirror was last confirmed; None for memory:// and for
            circuits that this process does not use.
        policy: the policy in force, in seconds and shares.
        policy_mismatch: this process was given another policy than the one in force.
        fleet: whether the counts come from the store (for memory:// they never do, and are all).
        local: this process's own account: recorded, flushed, dropped and pending outcomes, how
            often it rejected and fell back, and the durations of its calls, as in ``totals``.
    """

    circuit: str
    state: State
    shared_state: State | None
    source: str
    generation: int = 0
    retry_after: float = 0.0
    opened_at: float | None = None
    attempt: int = 0
    since: float | None = None
    ends_at: float | None = None
    cause: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    successes: int = 0
    permits: int = 0
    window: Window = NO_CALLS
    run: int = 0
    totals: Mapping[str, int] = field(default_factory=dict)
    reporters: tuple[ReporterShare, ...] = ()
    last_trip: Trip | None = None
    mirror_age: float | None = None
    policy: Policy | None = None
    policy_mismatch: bool = False
    fleet: bool = False
    local: Mapping[str, int] = field(default_factory=dict)


class OwnView(NamedTuple):
    """What this process knows and does: times in ms of its own clock, ``epoch`` added to which
    they are since 1970."""

    shadow: Shadow
    decision: Decision
    now: int
    epoch: int
    policy: Policy
    account: Mapping[str, int]


def snapshot_of(
    name: str,
    circuit: model.Circuit | None,
    now: int,
    own: OwnView | None = None,
    log: Sequence[Mapping[str, str]] = (),
) -> Snapshot:
    """Put together what the store holds and what this process does.

    Args:
        name: the circuit's name.
        circuit: its stored form, None when the store has none or could not be asked.
        now: the store's time in ms.
        own: this process's view, when it uses the circuit.
        log: the stored transitions, newest first.
    """
    known: dict[str, Any] = {}
    if circuit is not None:
        known = _counted(circuit, now, 0)
    elif own is not None:
        known = _counted(own.shadow.local, own.now, own.epoch) | _mirrored(own)
    else:
        return Snapshot(name, State.CLOSED, None, "shared")
    if own is not None:
        shadow, decision = own.shadow, own.decision
        known |= {
            "state": decision.state,
            "source": decision.source,
            "retry_after": max(0, decision.until - own.now) / 1000 if decision.until else 0.0,
            "mirror_age": None if shadow.alone else max(0, own.now - shadow.heard) / 1000,
            "policy": own.policy.with_numbers(shadow.policy),
            "policy_mismatch": shadow.policy_mismatch,
            "local": MappingProxyType(dict(own.account)),
        }
    if log:
        known["last_trip"] = _trip_of_log(log) or known["last_trip"]
    return Snapshot(circuit=name, fleet=circuit is not None, **known)


def _mirrored(own: OwnView) -> dict[str, Any]:
    """What the mirror says where the store could not be asked."""
    header = own.shadow.header
    if own.shadow.last_trip is not None:
        event, at = own.shadow.last_trip
        trip = _trip(event.cause, at + own.epoch, event.evidence, event.detail)
    else:
        trip = None
    if own.shadow.alone:
        return {"last_trip": trip}
    if header is None:
        return {
            "shared_state": None, "generation": 0, "opened_at": None, "attempt": 0,
            "since": None, "ends_at": None, "cause": "", "detail": {}, "successes": 0, "permits": 0,
        }  # fmt: skip
    opened = header.since / 1000 if header.state == "open" else None
    return {
        "shared_state": State(header.state),
        "generation": header.v,
        "last_trip": trip,
        "opened_at": opened,
        "attempt": header.attempt,
        "since": header.since / 1000,
        "ends_at": _end(header.state, header.since, header.duration),
        "cause": header.cause,
        "detail": {},
        "successes": header.successes,
        "permits": 0,
    }


def _end(state: str, since: int, duration: int) -> float | None:
    ends = state in ("open", "forced_open", "forced_closed") and duration >= 0
    return (since + duration) / 1000 if ends else None


def _counted(c: model.Circuit, now: int, epoch: int) -> dict[str, Any]:
    """What one machine's circuit says at ``now``, with the window's counts moved on to it."""
    state = c.state
    left = model.remaining(c.state, c.since, c.duration, now)
    if c.state.startswith("forced") and left == 0:
        state = "half_open" if c.state == "forced_open" else "closed"
    policy = c.policy
    cause, _, rest = c.reason.partition(" ")
    width = max(1, (policy.window if policy else 1) // model.BUCKETS)
    gone = max(0, now // width - c.head)
    recent = c.ring[: max(0, model.BUCKETS - gone)]
    totals = dict(zip(model.TOTALS, c.totals, strict=True))
    for name in ("last_success", "last_failure"):
        totals[name] += epoch if totals[name] else 0
    return {
        "state": State(state),
        "shared_state": State(state),
        "source": "override" if state.startswith("forced") else "shared",
        "generation": c.v,
        "retry_after": left / 1000 if state in ("open", "forced_open") and left > 0 else 0.0,
        "opened_at": (c.since + epoch) / 1000 if state == "open" else None,
        "attempt": c.attempt,
        "since": (c.since + epoch) / 1000,
        "ends_at": _end(state, c.since + epoch, c.duration),
        "cause": cause,
        "detail": _details(rest.partition(" ")[2]),
        "successes": c.successes,
        "permits": sum(now < slot.since + slot.lease for slot in c.slots),
        "window": Window(*(sum(column) for column in zip(*recent, strict=True))) if recent
        else NO_CALLS,
        "run": c.run,
        "totals": MappingProxyType(totals),
        "reporters": tuple(
            ReporterShare(r.id, r.cur + r.prev, r.run, (r.last + epoch) / 1000)
            for r in c.reporters
        ),
        "last_trip": _trip_of_reason(c.reason, epoch),
        "policy": _policy_of(policy) if policy else None,
    }  # fmt: skip


@lru_cache(maxsize=1_024)
def _policy_of(numbers: Numbers) -> Policy:
    """Most circuits of a fleet have one of a few policies, and to check one takes a while."""
    return Policy().with_numbers(numbers)


def _trip_of_reason(reason: str, epoch: int) -> Trip | None:
    cause, _, rest = reason.partition(" ")
    at, _, detail = rest.partition(" ")
    if cause not in model.TRIPS:
        return None
    return Trip(cause, (int(at) + epoch) / 1000, None, 0, 0, _details(detail))


def _trip_of_log(log: Sequence[Mapping[str, str]]) -> Trip | None:
    for entry in log:
        if entry.get("cause") in model.TRIPS:
            return _trip(entry["cause"], int(entry["at"]), entry["evidence"], entry["detail"])
    return None


def change_of(entry: Mapping[str, str]) -> Change:
    """Read one entry of the log."""
    calls, failures, slow, run, active = map(int, entry["evidence"].split(" "))
    return Change(
        at=int(entry["at"]) / 1000,
        old=entry["old"],
        new=entry["new"],
        generation=int(entry["v"]),
        cause=entry["cause"],
        window=Window(calls, failures, slow),
        run=run,
        reporters=active,
        detail=_details(entry["detail"]),
    )


def _trip(cause: str, at: int, evidence: str, detail: str) -> Trip:
    calls, failures, slow, run, active = map(int, evidence.split(" "))
    window = Window(calls, failures, slow)
    return Trip(cause, at / 1000, window, run, active, _details(detail))


def _details(text: str) -> Mapping[str, Any]:
    try:
        detail = json.loads(text)
    except ValueError:
        return {}
    return MappingProxyType(detail) if isinstance(detail, dict) else {}
