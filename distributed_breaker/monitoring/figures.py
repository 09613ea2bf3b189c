"""A fleet and a process as numbers: families of samples, for whatever exports them.

Pure: no I/O and no clock.  What is said of the fleet comes from the store alone, so that every
process says the same; what is only of one process carries the label ``process``.  While the store
can't be asked, nothing is said of the fleet: a process's own counts in place of the fleet's would
look as if counters had gone back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import itemgetter
from typing import Any, Final

from ..policy import State
from ..snapshot import Snapshot
from .report import BUCKETS, FIRST_BUCKET, Configured, service_of, suspects

MOST = 5_000  # circuits that are exported; of more, those that are left out are counted


class Labels:
    """Names and values that tell samples of a family apart, also as the text that stands for them.

    The text is made once for all the samples that share it.
    """

    __slots__ = ("pairs", "text")

    def __init__(self, **pairs: str) -> None:
        self.pairs = pairs
        self.text = ",".join([f'{name}="{_escaped(value)}"' for name, value in pairs.items()])

    def __add__(self, more: Labels) -> Labels:
        return Labels(**self.pairs, **more.pairs)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


NONE: Final = Labels()

Columns = tuple[tuple[str, Labels], ...]
Row = tuple[Labels, tuple[float, ...]]


@dataclass(frozen=True)
class Family:
    """Samples of one kind: ``counter``, ``gauge`` or ``histogram``, as a table.

    A row has labels and a value for each column; a column says what follows the family's name, and
    which labels are its own.  The name is that of OpenMetrics: without a counter's ``_total``.
    """

    name: str
    kind: str
    help: str
    columns: Columns

    @cached_property
    def row(self) -> str:
        """The text of a row, in which a zero byte stands for the row's labels."""
        samples = ((self.name + suffix, ",".join(filter(None, ("\0", more.text))))
                   for suffix, more in self.columns)  # fmt: skip
        return "".join([f"{name}{{{labels}}} %s\n" for name, labels in samples])


Table = tuple[Family, list[Row]]
FAMILIES: list[Family] = []  # all that there are, each made just once


def family(kind: str, name: str, text: str, columns: Columns = ()) -> Family:
    """A new family, which begins like all of them; without columns it has a single one."""
    single = (("_total" if kind == "counter" else "", NONE),)
    FAMILIES.append(Family(f"circuit_breaker_{name}", kind, text, columns or single))
    return FAMILIES[-1]


def _by(label: str, values: Iterable[str], suffix: str = "") -> Columns:
    return tuple((suffix, Labels(**{label: value})) for value in values)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known at one moment.

    Attributes:
        fleet: the circuits as the store holds them; None: it can't be asked.
        own: the circuits that this process uses, as it sees them.
        clients: what the clients of this process say of themselves, by their names.
        configured: the circuits that the configuration names.
        namespace: the fleet's.
        process: this process's name.
        rejected: a change of the configuration is not in force, since it can't be used.
    """

    fleet: Mapping[str, Snapshot] | None
    own: Mapping[str, Snapshot] = field(default_factory=dict)
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    configured: Mapping[str, Configured] = field(default_factory=dict)
    namespace: str = "default"
    process: str = ""
    rejected: bool = False

    @classmethod
    def of(
        cls,
        seen: Mapping[str, Snapshot] | None,
        own: Mapping[str, Snapshot],
        namespace: str,
        process: str,
        **known: Any,
    ) -> Figures:
        """What there is to say once the fleet has been looked at.

        Args:
            seen: the circuits, be it from a registry or from outside; None: the store can't be
                asked.
            own, namespace, process, known: see the attributes.
        """
        # At memory:// each process is a fleet of its own, and must not be taken for another one.
        alone = any(s.mirror_age is None for s in own.values())
        fleet = None if seen is None else {name: s for name, s in seen.items() if s.fleet or alone}
        named = f"{namespace}@{process}" if alone else namespace
        return cls(fleet, own, namespace=named, process=process, **known)

    def labels(self, circuit: str) -> Labels:
        """Of a circuit's samples.  It is not called namespace, since Kubernetes' label is."""
        known = self.configured.get(circuit)
        service = known.service if known else service_of(circuit)
        return Labels(circuit=circuit, service=service, fleet=self.namespace)


# ---------------------------------------------------------------------------- the fleet

STATE = family(
    "gauge",
    "state",
    "1 for the state that the fleet's circuit is in, 0 for others.",
    _by("state", [state.value for state in State]),
)
SINCE = family("gauge", "state_since_timestamp_seconds", "When the present state began.")
ATTEMPT = family(
    "gauge",
    "next_attempt_timestamp_seconds",
    "When an open circuit may be tried again; absent while calls are let through, and when no "
    "time is known.",
)
PROBES_OUT = family("gauge", "probes_out", "Probes of a half-open circuit that are under way.")
SUSPECTS = family(
    "gauge",
    "suspects",
    "Processes that alone see failures of a closed circuit, and so are most likely sick.",
)
CALLS = family(
    "counter",
    "calls",
    "Calls that have ended, by outcome; probes and late ones too.",
    _by("outcome", ("success", "failure", "ignored"), "_total"),
)
TRANSITIONS = family(
    "counter",
    "transitions",
    "Transitions, by the state they led to.",
    _by("to", ("open", "half_open", "closed"), "_total"),
)
# The store's last bucket takes everything longer as well.
BOUNDS = [*(repr(FIRST_BUCKET * (1 << i)) for i in range(BUCKETS - 1)), "+Inf"]
DURATION = family(
    "histogram",
    "call_duration_seconds",
    "How long calls took.",
    (*_by("le", BOUNDS, "_bucket"), ("_count", NONE), ("_sum", NONE)),
)
OMITTED = family("gauge", "circuits_omitted", f"Circuits beyond the {MOST} that are exported.")

# What the store counts under one name.
COUNTED = {
    "slow": family("counter", "slow_calls", "Calls that took too long, whatever their outcome."),
    "rejected": family("counter", "rejections", "Calls that were refused."),
    "fallbacks": family("counter", "fallbacks", "Answers that came from a fallback."),
    "trips": family("counter", "trips", "Times that a closed circuit opened by a rule."),
    "probes": family("counter", "probes", "Probes that have ended."),
    "late": family("counter", "late_calls", "Outcomes that came too late to change anything."),
    "dropped": family("counter", "dropped_outcomes", "Outcomes that never reached the store."),
}
IN_STATE = {state: tuple(int(other is state) for other in State) for state in State}
NOTHING = dict.fromkeys((f"b{i}" for i in range(BUCKETS)), 0)
COUNTS = itemgetter(*NOTHING)

Circuits = list[tuple[Labels, Snapshot]]


def of_fleet(figures: Figures) -> Iterator[Table]:
    """What the store knows: the same from every process that asks at the same time."""
    if figures.fleet is None:
        return
    circuits, omitted = _circuits(figures, figures.fleet)
    yield OMITTED, [(Labels(fleet=figures.namespace), (omitted,))]
    yield STATE, [(of, IN_STATE[s.shared_state]) for of, s in circuits if s.shared_state]
    yield SINCE, [(of, (s.since,)) for of, s in circuits if s.since]
    attempts = [(of, _attempt(s, figures.configured.get(s.circuit))) for of, s in circuits]
    yield ATTEMPT, [(of, (at,)) for of, at in attempts if at is not None]
    yield PROBES_OUT, [(of, (s.permits,)) for of, s in circuits]
    yield SUSPECTS, [(of, (len(suspects(s)),)) for of, s in circuits]
    yield CALLS, [(of, _outcomes(s.totals)) for of, s in circuits]
    yield TRANSITIONS, [(of, _transitions(s.totals)) for of, s in circuits]
    for name, counted in COUNTED.items():
        yield counted, [(of, (s.totals.get(name, 0),)) for of, s in circuits]
    yield DURATION, [(of, _durations(s.totals)) for of, s in circuits]


def _circuits(figures: Figures, held: Mapping[str, Snapshot]) -> tuple[Circuits, int]:
    """Those that are exported, and how many are not; what is switched off is not there.

    One that the configuration names is there before its first call, so that its first failure is
    seen to come.  Names that are made while running, such as those of hosts, are left out first.
    """
    known = figures.configured
    names = [name for name in {**known, **held} if name not in known or known[name].enabled]
    names.sort(key=lambda name: (name not in known, "@" in name, name))
    found = [
        (figures.labels(n), held.get(n) or Snapshot(n, State.CLOSED, State.CLOSED, "shared"))
        for n in names[:MOST]
    ]
    return found, max(0, len(names) - MOST)


def _attempt(s: Snapshot, configured: Configured | None) -> float | None:
    """When an open circuit will be tried again by itself."""
    by_hand = configured is not None and not configured.policy.auto_recovery
    ends = s.shared_state is State.FORCED_OPEN or (s.shared_state is State.OPEN and not by_hand)
    return s.ends_at if ends else None


def _outcomes(totals: Mapping[str, int]) -> tuple[int, ...]:
    failures, ignored = totals.get("failures", 0), totals.get("ignored", 0)
    return totals.get("calls", 0) - failures - ignored, failures, ignored


def _transitions(totals: Mapping[str, int]) -> tuple[int, ...]:
    return totals.get("opens", 0), totals.get("half_opens", 0), totals.get("closes", 0)


def _durations(totals: Mapping[str, int]) -> tuple[float, ...]:
    """Prometheus' buckets hold all shorter calls too."""
    counts = (*accumulate(COUNTS(totals) if totals else (0,) * BUCKETS),)
    return (*counts, counts[-1], totals.get("duration_us", 0) / 1e6)


# ---------------------------------------------------------------------------- one process

REACHABLE = family("gauge", "store_reachable", "Whether the store answers this process.")
MIRROR_AGE = family(
    "gauge", "mirror_age_seconds", "For how long the store has not confirmed the oldest mirror."
)
PENDING = family("gauge", "pending_outcomes", "Outcomes that the store has not acknowledged yet.")
REJECTED = family(
    "gauge", "configuration_rejected", "1 while a change of the configuration can't be used."
)
LOCAL = family(
    "gauge",
    "local_state",
    "1 for the state of a circuit about which this process decides by itself: in quarantine, or as "
    "a shadow without the store; absent while it goes by the fleet.",
)
MISMATCH = family(
    "gauge",
    "policy_mismatch",
    "1 for a circuit for which this process was given another policy than the fleet goes by; "
    "absent while it is the same.",
)


LOCAL_DURATION = family(
    "histogram",
    "local_call_duration_seconds",
    "How long this process's calls took; probes apart.",
    DURATION.columns,
)


def of_process(figures: Figures) -> Iterator[Table]:
    """What this process alone knows and does, beside its clients."""
    own = figures.own.values()
    here = Labels(fleet=figures.namespace, process=figures.process)
    yield REACHABLE, [(here, (int(figures.fleet is not None),))]
    yield REJECTED, [(here, (int(figures.rejected),))]
    yield PENDING, [(here, (sum([s.local.get("pending", 0) for s in own]),))] if own else []
    ages = [s.mirror_age for s in own if s.mirror_age is not None]
    yield MIRROR_AGE, [(here, (max(ages),))] if ages else []
    process = Labels(process=figures.process)
    alone = [s for s in own if s.source in ("quarantine", "shadow")][:MOST]
    yield (
        LOCAL,
        [
            (
                figures.labels(s.circuit) + process + Labels(source=s.source, state=s.state.value),
                (1,),
            )
            for s in alone
        ],
    )
    unlike = [s for s in own if s.policy_mismatch][:MOST]
    yield MISMATCH, [(figures.labels(s.circuit) + process, (1,)) for s in unlike]
    measured = [s for s in own if "duration_us" in s.local][:MOST]
    yield (
        LOCAL_DURATION,
        [
            (figures.labels(s.circuit) + process, _durations({**NOTHING, **s.local}))
            for s in measured
        ],
    )
