"""A fleet and a process as numbers: families of samples, for whatever exports them.

Pure: no I/O and no clock.  What is said of the fleet comes from the store alone, so that every
process says the same; what is only of one process carries the label ``process``.  While the store
can't be asked, nothing is said of the fleet: a process's own counts in place of the fleet's would
look as if counters had gone back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import itemgetter
from typing import Any, Final, NamedTuple

from ..policy import State
from ..snapshot import Snapshot
from .report import BUCKETS, FIRST_BUCKET, Configured, service_of, suspects

MOST = 5_000  # circuits that are exported; of more, those that are left out are counted


class Family(NamedTuple):
    """Samples of one kind: ``counter``, ``gauge`` or ``histogram``.

    The name is that of OpenMetrics: a counter's samples have ``_total`` behind it.
    """

    name: str
    kind: str
    help: str


class Labels:
    """Names and values that tell samples of a family apart, also as the text that stands for them.

    The text is made once for all the samples that share it.
    """

    __slots__ = ("pairs", "text")

    def __init__(self, **pairs: str) -> None:
        self.pairs = pairs
        self.text = ",".join([f'{name}="{_escaped(value)}"' for name, value in pairs.items()])


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


NONE: Final = Labels()


# One number: what follows the family's name, labels, one or more further ones, and the value.  A
# plain tuple is made several times faster than a named one, and there are 40 for each circuit.
Sample = tuple[str, Labels, Labels, float]
Samples = list[Sample]
FAMILIES: list[Family] = []  # all that there are, each made just once


def family(kind: str, name: str, text: str) -> Family:
    """A new family, which begins like all of them."""
    FAMILIES.append(Family(f"circuit_breaker_{name}", kind, text))
    return FAMILIES[-1]


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

STATE = family("gauge", "state", "1 for the state that the fleet's circuit is in, 0 for others.")
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
CALLS = family("counter", "calls", "Calls that have ended, by outcome; probes and late ones too.")
TRANSITIONS = family("counter", "transitions", "Transitions, by the state they led to.")
DURATION = family("histogram", "call_duration_seconds", "How long calls took.")
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
STATES = [(state, Labels(state=state.value)) for state in State]
OUTCOMES = [Labels(outcome=outcome) for outcome in ("success", "failure", "ignored")]
TO = [
    (Labels(to="open"), "opens"),
    (Labels(to="half_open"), "half_opens"),
    (Labels(to="closed"), "closes"),
]
# The last bucket that the store has takes everything longer as well.
LE = [
    Labels(le=repr(FIRST_BUCKET * (1 << i)) if i < BUCKETS - 1 else "+Inf") for i in range(BUCKETS)
]
COUNTS = itemgetter(*(f"b{i}" for i in range(BUCKETS)))

Circuits = list[tuple[Labels, Snapshot]]


def of_fleet(figures: Figures) -> Iterator[tuple[Family, Samples]]:
    """What the store knows: the same from every process that asks at the same time."""
    if figures.fleet is None:
        return
    circuits, omitted = _circuits(figures, figures.fleet)
    yield OMITTED, [("", Labels(fleet=figures.namespace), NONE, omitted)]
    yield (
        STATE,
        [
            ("", labels, more, int(s.shared_state is state))
            for labels, s in circuits
            for state, more in STATES
        ],
    )
    yield SINCE, [("", labels, NONE, s.since) for labels, s in circuits if s.since]
    yield (
        ATTEMPT,
        [
            ("", labels, NONE, s.ends_at)
            for labels, s in circuits
            if s.ends_at is not None and _goes_on(s, figures.configured.get(s.circuit))
        ],
    )
    yield PROBES_OUT, [("", labels, NONE, s.permits) for labels, s in circuits]
    yield SUSPECTS, [("", labels, NONE, len(suspects(s))) for labels, s in circuits]
    yield from _counters([(labels, s.totals) for labels, s in circuits])


def _circuits(figures: Figures, held: Mapping[str, Snapshot]) -> tuple[Circuits, int]:
    """Those that are exported, and how many are not; what is switched off is not there.

    One that the configuration names is there before its first call, so that its first failure is
    seen to come.  Names that are made while running, such as those of hosts, are left out first.
    """
    known = figures.configured
    names = [name for name in {**known, **held} if name not in known or known[name].enabled]
    names.sort(key=lambda name: (name not in known, "@" in name, name))
    found = [
        (
            figures.labels(name),
            held.get(name) or Snapshot(name, State.CLOSED, State.CLOSED, "shared"),
        )
        for name in names[:MOST]
    ]
    return found, max(0, len(names) - MOST)


def _goes_on(s: Snapshot, configured: Configured | None) -> bool:
    """Whether an open circuit will be tried again by itself."""
    by_hand = configured is not None and not configured.policy.auto_recovery
    return s.shared_state is State.FORCED_OPEN or (s.shared_state is State.OPEN and not by_hand)


def _counters(
    counted: list[tuple[Labels, Mapping[str, int]]],
) -> Iterator[tuple[Family, Samples]]:
    yield (
        CALLS,
        [
            ("_total", labels, more, count)
            for labels, t in counted
            for more, count in zip(OUTCOMES, _outcomes(t), strict=True)
        ],
    )
    yield (
        TRANSITIONS,
        [("_total", labels, more, t.get(name, 0)) for labels, t in counted for more, name in TO],
    )
    for name, of in COUNTED.items():
        yield of, [("_total", labels, NONE, t.get(name, 0)) for labels, t in counted]
    yield DURATION, [sample for labels, t in counted for sample in _histogram(labels, t)]


def _outcomes(totals: Mapping[str, int]) -> tuple[int, int, int]:
    failures, ignored = totals.get("failures", 0), totals.get("ignored", 0)
    return totals.get("calls", 0) - failures - ignored, failures, ignored


def _histogram(labels: Labels, totals: Mapping[str, int]) -> Samples:
    """Buckets that hold all shorter calls too, as Prometheus has them."""
    counts = COUNTS(totals) if totals else (0,) * BUCKETS
    found: Samples = [
        ("_bucket", labels, more, below) for more, below in zip(LE, accumulate(counts), strict=True)
    ]
    found.append(("_count", labels, NONE, found[-1][-1]))
    found.append(("_sum", labels, NONE, totals.get("duration_us", 0) / 1e6))
    return found


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


def of_process(figures: Figures) -> Iterator[tuple[Family, Samples]]:
    """What this process alone knows and does, beside its clients."""
    here = Labels(fleet=figures.namespace, process=figures.process)
    own = figures.own
    yield REACHABLE, [("", here, NONE, int(figures.fleet is not None))]
    yield REJECTED, [("", here, NONE, int(figures.rejected))]
    if own:
        pending = sum([s.local.get("pending", 0) for s in own.values()])
        yield PENDING, [("", here, NONE, pending)]
    ages = [s.mirror_age for s in own.values() if s.mirror_age is not None]
    if ages:
        yield MIRROR_AGE, [("", here, NONE, max(ages))]
    process = Labels(process=figures.process)
    deciding = [s for s in own.values() if s.source in ("quarantine", "shadow")][:MOST]
    yield (
        LOCAL,
        [
            (
                "",
                figures.labels(s.circuit),
                Labels(process=figures.process, source=s.source, state=s.state.value),
                1,
            )
            for s in deciding
        ],
    )
    yield (
        MISMATCH,
        [
            ("", figures.labels(s.circuit), process, 1)
            for s in [s for s in own.values() if s.policy_mismatch][:MOST]
        ],
    )
