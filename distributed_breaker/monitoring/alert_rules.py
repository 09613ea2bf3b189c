"""What is worth an alert: what is seen of a fleet, compared with what has been told.

Pure: no I/O and no clock.  Times are seconds since 1970.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..alert_keys import Alerts
from ..policy import State
from ..snapshot import Change, Snapshot

CATCH_UP = 60.0  # s of a circuit's history that a process looks back on when it begins to evaluate
MINUTE = 60.0  # s over which the share of fallbacks is counted
SAMPLES = 6  # of a circuit's counters in that time
RECOVERED = 0.8  # share of the threshold below which fallbacks are no longer too many

# Which alerts a state begins, and which states do not end them.
BEGUN_BY = {State.OPEN: "open", State.FORCED_OPEN: "forced_open",
            State.FORCED_CLOSED: "forced_closed"}  # fmt: skip
GOES_ON_IN = {
    "open": {State.OPEN, State.HALF_OPEN, State.FORCED_OPEN, State.FORCED_CLOSED},
    "forced_open": {State.FORCED_OPEN},
    "forced_closed": {State.FORCED_CLOSED},
    "stuck_half_open": {State.HALF_OPEN},
}


class Incident(NamedTuple):
    """Something that was told and is not over: which, and since when."""

    number: int
    at: float


class Event(NamedTuple):
    """Something that is to be told once.

    Attributes:
        kind: see ``alert_keys.Kind``.
        circuit: its name; empty for ``store_lost``.
        number: the circuit's generation, or the minute for what has none.
        over: whether it has ended.
        at: when.
        about: what the alert's fields are made of beside that.
        incident: what began, of an event that ends it.
    """

    kind: str
    circuit: str
    number: int
    over: bool
    at: float
    about: Mapping[str, Any] = {}
    incident: Incident | None = None

    @property
    def lasts(self) -> bool:
        """Whether it goes on until another event ends it."""
        return self.kind != "half_open"

    @property
    def key(self) -> str:
        """What an incident is known by; kinds have no blanks."""
        return f"{self.kind} {self.circuit}"


Incidents = dict[str, Incident]  # by Event.key


# ---------------------------------------------------------------------------- what has happened


class _Seen(NamedTuple):
    """A circuit's state as of one transition."""

    state: State
    generation: int
    at: float
    about: Mapping[str, Any]


def _of_change(change: Change) -> _Seen | None:
    if change.new not in {state.value for state in State}:
        return None
    detail = change.detail
    about = {
        "state": change.new,
        "previous": change.old,
        "cause": change.cause,
        "error": _error(detail),
        "host": str(detail.get("host", "")),
        "actor": str(detail.get("actor", "")),
        "reason": str(detail.get("reason", "")),
        "evidence": {
            **change.window._asdict(),
            "run": change.run,
            "reporters": change.reporters,
        },
    }
    return _Seen(State(change.new), change.generation, change.at, about)


def _of_snapshot(snapshot: Snapshot, state: State, now: float) -> _Seen:
    about = {"state": state.value, "cause": snapshot.cause, "error": _error(snapshot.detail)}
    return _Seen(state, snapshot.generation, snapshot.since or now, about)


def _error(detail: Mapping[str, Any]) -> str:
    return ": ".join(str(detail[key]) for key in ("error", "message") if detail.get(key))


@dataclass
class _Counts:
    """A circuit's requests and those that fallbacks answered, of the last minute."""

    samples: deque[tuple[float, int, int]] = field(
        default_factory=lambda: deque(maxlen=SAMPLES + 1)
    )

    def add(self, now: float, requests: int, fallbacks: int) -> None:
        if self.samples and requests < self.samples[-1][1]:
            self.samples.clear()  # the store has lost its counts
        if not self.samples or now - self.samples[-1][0] >= MINUTE / SAMPLES:
            self.samples.append((now, requests, fallbacks))

    def share(self, now: float, requests: int, fallbacks: int, minimum: int) -> float | None:
        """What fallbacks answered of them: 0.0 if there were few, None if that is not known yet."""
        since, requests_before, fallbacks_before = self.samples[0]
        made = requests - requests_before
        if made >= minimum:
            return (fallbacks - fallbacks_before) / made
        return 0.0 if now - since >= MINUTE * (SAMPLES - 1) / SAMPLES else None


class Watcher:
    """Compares what is seen of a fleet with what has been told, and yields what is to be told.

    One process of a fleet does this at a time; another one may go on at any moment, with what
    ``incidents`` holds.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._counts: dict[str, _Counts] = {}
        self._mismatched: dict[str, float] = {}

    def changed(self, snapshots: Mapping[str, Snapshot], now: float) -> list[str]:
        """Circuits that have made transitions of late, so that their history is worth reading."""
        return [
            name
            for name, s in snapshots.items()
            if s.generation != self._seen.get(name, s.generation)
            or (name not in self._seen and s.since is not None and now - s.since < CATCH_UP)
        ]

    def forget(self, circuit: str) -> None:
        """An event of a circuit was not told, and nobody knows yet whether another process has: it
        is looked at again."""
        self._seen.pop(circuit, None)

    def events(
        self,
        snapshots: Mapping[str, Snapshot],
        histories: Mapping[str, Sequence[Change]],
        incidents: Incidents,
        mismatched: Mapping[str, Sequence[str]] | None,
        settings: Alerts,
        now: float,
    ) -> Iterator[Event]:
        """What is to be told; ``incidents`` is kept up with it.

        Args:
            snapshots: of all circuits.
            histories: of those that have changed, newest first.
            incidents: what was told and is not over.
            mismatched: by circuit, processes that were given another policy than the fleet's; None:
                that is not known.
            settings: thresholds.
            now: seconds since 1970.
        """
        for name, snapshot in snapshots.items():
            state = _shared_state(snapshot)
            if state is None:
                continue
            for seen in self._transitions(name, snapshot, state, histories.get(name, ()), now):
                yield from _after(name, seen, incidents)
                if seen.state is State.HALF_OPEN and seen.generation != self._seen.get(name):
                    yield Event("half_open", name, seen.generation, False, seen.at, seen.about)
            self._seen[name] = snapshot.generation
            yield from _stuck(name, snapshot, state, incidents, settings, now)
            yield from self._fallbacks(name, snapshot, incidents, settings, now)
        if mismatched is not None:
            yield from self._mismatches(mismatched, incidents, settings, now)
        yield from _gone(snapshots, incidents, now)
        for gone in self._seen.keys() - snapshots.keys():
            del self._seen[gone]
            self._counts.pop(gone, None)

    def _transitions(
        self, name: str, snapshot: Snapshot, state: State, history: Sequence[Change], now: float
    ) -> Iterator[_Seen]:
        """What has not been looked at, oldest first; the last is the present."""
        before = self._seen.get(name)
        last = None
        for change in reversed(history):
            new = change.at > now - CATCH_UP if before is None else change.generation > before
            seen = _of_change(change) if new else None
            if seen is not None:
                last = seen
                yield seen
        if last is None or last.generation < snapshot.generation or last.state is not state:
            yield _of_snapshot(snapshot, state, now)

    def _fallbacks(
        self, name: str, s: Snapshot, incidents: Incidents, settings: Alerts, now: float
    ) -> Iterator[Event]:
        fallbacks = s.totals.get("fallbacks", 0)
        requests = s.totals.get("calls", 0) + s.totals.get("rejected", 0)
        if not fallbacks and name not in self._counts:
            return
        counts = self._counts.setdefault(name, _Counts())
        counts.add(now, requests, fallbacks)
        share = counts.share(now, requests, fallbacks, settings.fallback_minimum)
        if share is None:
            return
        number = int(now // MINUTE)
        about = {"value": f"{min(share, 1.0):.0%}", "state": s.state.value}
        event = Event("fallback_share", name, number, False, now, about)
        known = incidents.get(event.key)
        if known is None and share >= settings.fallback_share:
            yield _begun(event, incidents)
        elif known is not None and share < settings.fallback_share * RECOVERED:
            yield _ended(event, incidents)

    def _mismatches(
        self,
        mismatched: Mapping[str, Sequence[str]],
        incidents: Incidents,
        settings: Alerts,
        now: float,
    ) -> Iterator[Event]:
        self._mismatched = {name: self._mismatched.get(name, now) for name in mismatched}
        for name, since in self._mismatched.items():
            about = {"value": str(len(mismatched[name])), "processes": list(mismatched[name])}
            event = Event("policy_mismatch", name, int(since // MINUTE), False, now, about)
            if now - since >= settings.mismatch_after and event.key not in incidents:
                yield _begun(event, incidents)
        for key in [k for k in incidents if k.startswith("policy_mismatch ")]:
            kind, _, name = key.partition(" ")
            if name not in mismatched:
                yield _ended(Event(kind, name, int(now // MINUTE), False, now), incidents)


def _shared_state(snapshot: Snapshot) -> State | None:
    """The fleet's; a circuit that is switched off lets all calls pass.  None: it can't be read."""
    return State.CLOSED if snapshot.source == "disabled" else snapshot.shared_state


def _begun(event: Event, incidents: Incidents) -> Event:
    incidents[event.key] = Incident(event.number, event.at)
    return event


def _ended(event: Event, incidents: Incidents) -> Event:
    return event._replace(over=True, incident=incidents.pop(event.key))


def _after(name: str, seen: _Seen, incidents: Incidents) -> Iterator[Event]:
    """What one transition begins and ends."""
    begun = BEGUN_BY.get(seen.state)
    for kind, states in GOES_ON_IN.items():
        event = Event(kind, name, seen.generation, False, seen.at, seen.about)
        known = incidents.get(event.key)
        if kind == begun and known is None:
            yield _begun(event, incidents)
        elif known is not None and seen.state not in states and seen.generation >= known.number:
            yield _ended(event, incidents)


def _stuck(
    name: str, s: Snapshot, state: State, incidents: Incidents, settings: Alerts, now: float
) -> Iterator[Event]:
    if state is not State.HALF_OPEN or s.since is None:
        return
    held = now - s.since
    about = {"state": state.value, "value": f"{held:.0f} s", "probes": s.permits}
    event = Event("stuck_half_open", name, s.generation, False, now, about)
    if held >= settings.stuck_half_open_after and event.key not in incidents:
        yield _begun(event, incidents)


def _gone(snapshots: Mapping[str, Snapshot], incidents: Incidents, now: float) -> Iterator[Event]:
    """A circuit that the store no longer holds has nothing that goes on."""
    for key, known in list(incidents.items()):
        kind, _, name = key.partition(" ")
        if name not in snapshots and kind in (*GOES_ON_IN, "fallback_share"):
            yield _ended(Event(kind, name, known.number, False, now), incidents)
