"""What happens in one simulated run: drawn from a seed, as a list of events that can be shortened.

Each seed draws its own subset of the faults, so that some runs are calm but for one of them.
Everything that an event needs is drawn here or from the event's own number: a run without some of
the events is the same run otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from distributed_breaker import Policy
from distributed_breaker.shadow import MAX_PENDING

LONGEST = 12_000  # ms in which events begin
MOST_PROCESSES = 12  # alive at the same time
CIRCUITS = ("a", "b")

# Every fault, with how much more often than others it is drawn.
FAULTS = {
    "cut": 3,  # a process's connections are reset; what was under way may have been executed
    "slow": 3,  # messages of a process take up to 600 ms: longer than it waits for them
    "partition": 2,  # nothing goes to a process or comes from it, and nobody is told
    "deaf": 2,  # pushes to a process vanish
    "repeat": 2,  # some requests and pushes arrive twice
    "refuse": 2,  # the store answers with an error
    "stop": 2,  # the store stops answering, and carries everything out later
    "restart": 2,  # the store is away, and comes back empty, as it was, or as it once was
    "failover": 3,  # a replica that had not heard everything takes over
    "flush": 2,  # the store forgets everything
    "evict": 2,  # the store forgets one circuit
    "broken_key": 1,  # somebody else's value stands under a circuit's key
    "store_clock": 2,  # the store's clock steps
    "freeze": 3,  # a process stands still
    "suspend": 1,  # so does its clock
    "crash": 3,  # a process dies
    "fork": 3,
    "join": 3,  # a new process
    "leave": 2,  # a process ends as programs do: it flushes and closes
    "upgrade": 2,  # a new process with a newer policy
    "cancel": 2,  # tasks that wait for an admission are cancelled
    "operate": 3,  # an operator's word
}
REFUSALS = ("READONLY", "LOADING", "OOM", "NOPERM", "BUSY", "CLUSTERDOWN", "MISCONF", "WRONGPASS")
OPERATIONS = ("force_open", "force_closed", "reset", "release", "release")
HEALTH = ("well", "well", "broken", "broken", "slow", "flaky")


class Event(NamedTuple):
    """Something that happens at ``at`` (ms), or, with ``more["on"]``, when the circuit next changes
    to that state after it.  ``who`` is a number that chooses among processes; with
    ``more["culprit"]`` it is the process whose step made that transition."""

    number: int
    at: int
    what: str
    who: int
    more: dict[str, Any]

    def __str__(self) -> str:
        more = " ".join(f"{name}={value}" for name, value in self.more.items())
        return f"{self.number:4}  {self.at:6} ms  {self.what:12} process {self.who:3}  {more}"


@dataclass(frozen=True)
class Plan:
    """One run.

    ``recovers`` says whether the dependencies are well in the end, or dead.
    """

    seed: int
    processes: int
    circuits: tuple[str, ...]
    policy: Policy
    explicit: bool  # whether processes are given a policy, or take the store's
    checks: bool  # whether processes have health checks
    recovers: bool
    most_pending: int  # runs that may wait to be sent
    events: tuple[Event, ...]

    def only(self, numbers: Iterable[int]) -> Plan:
        """The same run with nothing but these events."""
        kept = set(numbers)
        return replace(self, events=tuple(e for e in self.events if e.number in kept))


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    chance = random.Random(f"plan {seed}")
    # Every other run has few faults, in which what they do can be seen for longer.
    number = chance.choice([0, 1, 2, 3, len(FAULTS) // 2, len(FAULTS)])
    names = list(FAULTS)
    faults = [names.pop(chance.randrange(len(names))) for _ in range(number)]
    circuits = CIRCUITS[: chance.choice([1, 1, 2])]
    events = [*_traffic(chance, circuits), *_happenings(chance, faults, circuits)]
    events.sort(key=lambda event: event.at)
    return Plan(
        seed=seed,
        processes=chance.randint(1, 5),
        circuits=circuits,
        policy=_policy(chance),
        explicit=chance.random() < 0.8,
        checks=chance.random() < 0.25,
        recovers=chance.random() < 0.8,
        most_pending=chance.choice([MAX_PENDING, MAX_PENDING, 4]),
        events=tuple(event._replace(number=i) for i, event in enumerate(events)),
    )


def _policy(chance: random.Random) -> Policy:
    success_threshold = chance.randint(1, 3)
    slow = chance.random() < 0.2
    return Policy(
        failure_threshold=chance.randint(1, 6),
        failure_rate=chance.choice([None, 0.3, 0.6]),
        minimum_calls=chance.choice([3, 10, 40]),
        window=chance.choice([1.2, 5.0, 60.0]),
        slow_call_duration=0.1 if slow else None,
        open_interval=chance.choice([0.3, 1.0, 3.0]),
        open_interval_max=chance.choice([None, None, 6.0]),
        jitter=chance.choice([0.0, 0.1]),
        success_threshold=success_threshold,
        half_open_permits=chance.randint(1, success_threshold),
        permit_lease=chance.choice([0.4, 1.5, 4.0]),
        quorum=chance.choice([1, 2, 2, 3]),
    )


def _traffic(chance: random.Random, circuits: tuple[str, ...]) -> list[Event]:
    """Bursts of calls, and how well the dependencies and single processes are."""
    busy = chance.choice([10, 25, 45])
    events = []
    for _ in range(busy):
        burst = {
            "circuit": chance.choice(circuits),
            "calls": chance.randint(1, 25),
            "gap": chance.choice([0, 3, 20, 120]),
            "longest": chance.choice([0, 20, 20, 300, 3_000]),
        }
        events.append(_event(chance, "burst", burst))
    for _ in range(chance.randint(1, 8)):
        health = {"circuit": chance.choice(circuits), "health": chance.choice(HEALTH)}
        events.append(_event(chance, "health", health))
    for _ in range(chance.choice([0, 0, 1, 2])):
        events.append(_event(chance, "sick", {"for_ms": chance.randint(200, 5_000)}))
    for _ in range(chance.choice([0, 1, 4])):
        events.append(_event(chance, "ask_for_flush", {}))
    return events


def _happenings(chance: random.Random, faults: list[str], circuits: tuple[str, ...]) -> list[Event]:
    if not faults:
        return []
    weights = [FAULTS[fault] for fault in faults]
    events = []
    for _ in range(chance.choice([3, 8, 20, 40])):
        (what,) = chance.choices(faults, weights)
        more: dict[str, Any] = {"circuit": chance.choice(circuits)}
        more["for_ms"] = chance.choice([30, 300, 900, 2_500, 5_000])
        if what == "refuse":
            more["code"] = chance.choice(REFUSALS)
        elif what == "restart":
            more["data"] = chance.choice(["empty", "kept", "older"])
        elif what == "store_clock":
            more["by"] = chance.choice([-60_000, -2_000, -300, 300, 2_000, 60_000])
        elif what == "operate":
            more |= {"step": chance.choice(OPERATIONS), "ttl": chance.choice([None, 0.2, 2.0])}
        if what in ("failover", "restart"):
            more["lag"] = chance.choice([1, 20, 400, 3_000])
        if chance.random() < 0.4:
            # Faults do most harm right after a transition.
            more["on"] = chance.choice(["half_open", "half_open", "open", "closed"])
            more["delay"] = chance.choice([0, 1, 3, 10, 30])
            more["culprit"] = chance.random() < 0.6
        events.append(_event(chance, what, more))
    return events


def _event(chance: random.Random, what: str, more: dict[str, Any]) -> Event:
    return Event(0, chance.randrange(LONGEST), what, chance.randrange(1_000), more)
