"""What is worth an alert, what it says, and how many of them may go out.

Pure: no I/O and no clock.  Times are seconds since 1970.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from string import Template
from typing import Any, NamedTuple

from ..alert_keys import FIELDS, Alerts, Rule
from ..policy import State
from ..snapshot import Change, Snapshot
from .report import iso, service_of

CATCH_UP = 60.0  # s of a circuit's history that a process looks back on when it begins to evaluate
MINUTE = 60.0  # s over which the share of fallbacks is counted
SAMPLES = 6  # of a circuit's counters in that time
RECOVERED = 0.8  # share of the threshold below which fallbacks are no longer too many
MOST_NAMED = 20  # alerts that a digest names
MOST_TEXT = 2_000  # characters of a title or text

SEVERITY = {
    "open": "critical",
    "store_lost": "critical",
    "forced_open": "warning",
    "forced_closed": "warning",
    "stuck_half_open": "warning",
    "fallback_share": "warning",
    "policy_mismatch": "warning",
    "half_open": "info",
}

# Which alerts a state begins, and which states do not end them.
BEGUN_BY = {State.OPEN: "open", State.FORCED_OPEN: "forced_open",
            State.FORCED_CLOSED: "forced_closed"}  # fmt: skip
GOES_ON_IN = {
    "open": {State.OPEN, State.HALF_OPEN, State.FORCED_OPEN, State.FORCED_CLOSED},
    "forced_open": {State.FORCED_OPEN},
    "forced_closed": {State.FORCED_CLOSED},
    "stuck_half_open": {State.HALF_OPEN},
}

TITLES = {
    "open": "circuit $circuit is open",
    "half_open": "circuit $circuit is half open",
    "forced_open": "circuit $circuit is forced open",
    "forced_closed": "circuit $circuit is forced closed, without protection",
    "stuck_half_open": "circuit $circuit does not get out of half_open",
    "fallback_share": "circuit $circuit: $value of the requests are answered by fallbacks",
    "policy_mismatch": "circuit $circuit: processes go by different policies",
    "store_lost": "host $host: the circuit breakers' Redis is lost",
}
OVER_TITLES = {
    "open": "circuit $circuit is closed again",
    "forced_open": "circuit $circuit is no longer forced open",
    "forced_closed": "circuit $circuit is no longer forced closed",
    "stuck_half_open": "circuit $circuit has left half_open",
    "fallback_share": "circuit $circuit: few requests are answered by fallbacks again",
    "policy_mismatch": "circuit $circuit: all processes go by the fleet's policy again",
    "store_lost": "host $host: the circuit breakers' Redis is back",
}
TEXT = "$summary [$environment, $namespace, $at]"


class Incident(NamedTuple):
    """Something that was told and is not over: which, and since when."""

    number: int
    at: float


class Event(NamedTuple):
    """Something that is to be told once.

    Attributes:
        kind: see ``sections.Kind``.
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


# ---------------------------------------------------------------------------- what an alert says


class Setting(NamedTuple):
    """Where the circuits are, and who tells it."""

    namespace: str
    environment: str
    host: str


def document(event: Event, rule_name: str, rule: Rule, setting: Setting) -> dict[str, Any]:
    """An alert, as it is posted; its ``id`` and ``sent_at`` come with the delivery."""
    about = {key: value for key, value in event.about.items() if value not in ("", None)}
    began = event.incident or Incident(event.number, event.at)
    found: dict[str, Any] = {
        "kind": event.kind,
        "event": "resolved" if event.over else "firing",
        "severity": SEVERITY[event.kind],
        "circuit": event.circuit,
        "service": service_of(event.circuit),
        **setting._asdict(),
        "state": "",
        "incident": f"{setting.namespace}/{event.kind}/{event.circuit or setting.host}/"
        f"{began.number}",
        "number": event.number,
        "at": iso(event.at),
        "began_at": iso(began.at),
        "duration": round(max(0.0, event.at - began.at), 3) if event.over else None,
        "rule": rule_name,
        **about,
    }
    found["summary"] = _summary(event, found)
    fields = {name: _text(found.get(name)) for name in FIELDS}
    titles = OVER_TITLES if event.over else TITLES
    for part, own, usual in (("title", rule.title, titles[event.kind]), ("text", rule.text, TEXT)):
        found[part] = Template(own or usual).safe_substitute(fields)[:MOST_TEXT]
    return found


def trial(setting: Setting, now: float) -> dict[str, Any]:
    """An alert that only shows that alerts arrive."""
    return {
        **_about_nothing("test", "info", setting, now),
        "title": "this is a test of the circuit breakers' alerts",
        "text": f"Nothing is wrong [{setting.environment}, {setting.namespace}, {iso(now)}]",
    }


def _about_nothing(kind: str, severity: str, setting: Setting, now: float) -> dict[str, Any]:
    """The fields of an alert that is not about one event."""
    return {
        **dict.fromkeys(("circuit", "service", "state", "incident", "summary", "rule"), ""),
        "kind": kind,
        "event": "firing",
        "severity": severity,
        **setting._asdict(),
        "number": 0,
        "at": iso(now),
        "began_at": iso(now),
        "duration": None,
    }


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary(event: Event, found: Mapping[str, Any]) -> str:
    """One or two sentences with what is known beside the title."""
    if event.over:
        return f"It lasted {found['duration']:.0f} s."
    said = []
    if event.kind == "store_lost":
        said.append("Each process decides alone until it is back; calls go on.")
    if found.get("cause"):
        evidence = found.get("evidence")
        counted = (
            f": {evidence['failures']} of {evidence['calls']} calls failed, {evidence['run']} "
            f"bad ones in a row, {evidence['reporters']} processes"
            if evidence and event.kind == "open" else ""
        )  # fmt: skip
        said.append(f"Cause {found['cause']}{counted}.")
    for name, words in (
        ("error", "Last error: {}."),
        ("actor", "By {}."),
        ("reason", "Reason: {}."),
        ("processes", "Not of the fleet's policy: {}."),
    ):
        if found.get(name):
            value = found[name]
            said.append(words.format(", ".join(value) if isinstance(value, list) else value))
    if event.kind == "stuck_half_open":
        said.append(f"Half open for {found['value']}, {found['probes']} probes are out.")
    return " ".join(said)


# ---------------------------------------------------------------------------- how many go out


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
                yield channel, _digest(name, flow, setting, now)
                flow.held, flow.titles = Counter(), []
                flow.sent.append(now)


def _digest(rule: str, flow: _Flow, setting: Setting, now: float) -> dict[str, Any]:
    count = flow.held.total()
    kinds = ", ".join(f"{n} {what}" for what, n in flow.held.most_common())
    more = count - len(flow.titles)
    named = "; ".join(flow.titles) + (f"; and {more} more" if more else "")
    return {
        **_about_nothing("digest", "warning", setting, now),
        "began_at": flow.since,
        "rule": rule,
        "count": count,
        "counts": dict(flow.held),
        "title": f"{count} more alerts by the rule {rule}",
        "text": f"Held back so as not to flood you ({kinds}): {named}"[:MOST_TEXT],
    }
