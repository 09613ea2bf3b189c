"""One shadow with its time, and a store that tests play."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distributed_breaker import Policy, model
from distributed_breaker.model import Circuit, Header, Known, Reply
from distributed_breaker.policy import Numbers
from distributed_breaker.shadow import Bad, Decision, Era, Generation, Shadow

NOW = 5_000_000  # the process's own clock, ms
STORE = 1_764_000_000_000  # the store's clock at that moment: nobody ever compares the two
SECOND = 1_000
POLICY = Policy(
    failure_threshold=3, failure_rate=None, success_threshold=2, jitter=0.0, permit_lease=10.0
)
STATES = ("closed", "open", "half_open", "forced_open", "forced_closed")


def header(state: str = "closed", v: int = 100, nonce: str = "aaaaaaaa", **more: Any) -> Header:
    values: dict[str, Any] = {
        "since": STORE, "duration": 0, "attempt": 0, "successes": 0, "fresh": False, "n": 1,
        "cause": "run",
    } | more  # fmt: skip
    return Header(v, nonce, state, **values)


def known(head: Header, left: int = 0) -> Known:
    return Known(head.v, head.nonce, head.state, left, head.attempt)


@dataclass
class Process:
    """One shadow with its time, and how it is used."""

    policy: Numbers = POLICY.numbers
    chance: float = 0.0
    explicit: bool = True
    alone: bool = False
    now: int = NOW
    shadow: Shadow = field(init=False)

    def __post_init__(self) -> None:
        nonces = itertools.count(1)
        self.shadow = Shadow(
            self.policy,
            "me",
            lambda: f"{next(nonces):08x}",
            lambda: self.chance,
            self.now,
            alone=self.alone,
            explicit=self.explicit,
        )

    def adopt(self, head: Header, left: int = 0) -> Process:
        """Adopt a state as the reply to the first sync does."""
        self.shadow.synced = True
        assert self.shadow.hear(head, left, self.now, self.shadow.known(self.now)) is False
        assert self.shadow.header == head
        return self

    def hear(self, head: Header, left: int = 0) -> bool:
        return self.shadow.hear(head, left, self.now)

    def wait(self, ms: int) -> Process:
        self.now += ms
        return self

    def decide(self, **more: Any) -> Decision:
        return self.shadow.decide(self.now, **more)

    def era(self) -> Era:
        return Era(self.shadow.generation, self.shadow.local_generation, self.now)

    def record(self, kinds: str, era: Era | None = None, **more: Any) -> None:
        """Absorb outcomes that began now: letters as on the wire."""
        era = era or self.era()
        for kind in kinds:
            era.append(0 if kind == "s" else Bad(kind, 0, self.now, **more))
        assert self.shadow.absorb(era, self.now) == len(kinds)

    def pending(self) -> Counter[str]:
        return Counter({p.kind: 0 for p in self.shadow.pending}) + Counter(
            kind for p in self.shadow.pending for kind in p.kind * p.count
        )

    def sync(self, circuit: Circuit | None, store_now: int) -> tuple[Circuit, bool]:
        """One step with a store that is the model."""
        step = self.shadow.step("report", self.now)
        done = model.step(circuit, step, store_now)
        return done.circuit, self.shadow.answered(step, done.reply, self.now)


def reply(head: Header, remaining: int = 0, policy: str = "") -> Reply:
    circuit = Circuit(*head[:9])
    circuit.reason = f"{head.cause} 0 "
    return Reply(model.dump_header(circuit), STORE, remaining, head.state, "", "ok", 0, policy)


OPEN = header("open", duration=60 * SECOND)
FORCED = header("forced_open", duration=-1, cause="forced_open")
CURRENT = (100, "aaaaaaaa")


def settle(process: Process, token: str, kind: str) -> None:
    assert process.shadow.local_acquire(token, process.now).verdict == "grant"
    item = Bad(kind, 0, process.now)
    process.shadow.local_settle(
        token, process.shadow.local_generation, item, process.now, process.shadow.generation
    )


def quarantined(**more: Any) -> Process:
    """The fleet's circuit is closed, and this process alone has seen failures."""
    process = Process(**more).adopt(header())
    process.record("fff")
    return process


def degraded(head: Header | None, left: int = 0, **more: Any) -> Process:
    process = Process(**more)
    if head is not None:
        process.adopt(head, left)
    process.shadow.degrade(process.now)
    assert process.shadow.degraded
    return process


def healed(
    process: Process, head: Header | None = None, left: int = 0, lasted: int = 60 * SECOND
) -> Process:
    """The store is back: a sync, then evidence.  ``head`` None: the state has not changed.
    ``lasted``: for how long the store's state had lasted when it answered."""
    shadow = process.shadow
    again = head or shadow.header
    assert again is not None
    asked_with = shadow.known(process.now)
    shadow.hear(again, left, process.now, asked_with, again.since + lasted)
    shadow.synced = True
    shadow.heal(process.now)
    assert not shadow.degraded
    return process


def sent(process: Process) -> list[tuple[Generation, str, int, int]]:
    """What goes out: era, kind, count and age of each run."""
    return [
        (step.era, run.kind, run.count, run.age)
        for step in process.shadow.outgoing(process.now)
        for run in step.batch
    ]
