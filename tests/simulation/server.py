"""The store's side: circuits, a clock that steps, copies on a replica, and what can befall it.

Every step is judged by the rules of ``tests/equivalence/invariants.py`` as it is carried out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import redis

from distributed_breaker import model
from distributed_breaker.errors import StoreError
from distributed_breaker.model import Circuit, Header, Reply, Step, Stepped
from distributed_breaker.shadow import Generation
from tests.equivalence.invariants import History, Seen
from tests.equivalence.twins import Living
from tests.simulation.timeline import Action, Timeline

NOON = 1_764_000_000_000  # the store's clock (ms) when a run begins
COPIES = 400  # how many writes a replica may be behind at most


class Machine(Protocol):
    """Carries out the steps of one circuit.  A circuit that it has shown never changes again."""

    @property
    def circuit(self) -> Circuit | None: ...
    def step(self, step: Step, now: int) -> Stepped: ...
    def put(self, circuit: Circuit | None) -> None: ...
    def finish(self) -> None: ...


class Modelled:
    """The model as the machine."""

    def __init__(self) -> None:
        self.circuit: Circuit | None = None

    def step(self, step: Step, now: int) -> Stepped:
        stepped = model.step(copied(self.circuit), step, now)
        self.circuit = stepped.circuit
        return stepped

    def put(self, circuit: Circuit | None) -> None:
        self.circuit = circuit

    def finish(self) -> None:
        pass


class Scripted:
    """The script on a real server as the machine, compared with the model at every step."""

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self._living = Living(client, namespace)
        self.step = self._living.step
        self.finish = self._living.finish

    @property
    def circuit(self) -> Circuit | None:
        return self._living.circuit

    def put(self, circuit: Circuit | None) -> None:
        self._living.put(None if circuit is None else model.dump(circuit))


def copied(c: Circuit | None) -> Circuit | None:
    """A circuit that shares nothing that a step may change."""
    if c is None:
        return None
    return replace(
        c,
        ring=[list(bucket) for bucket in c.ring],
        reporters=[replace(r) for r in c.reporters],
        slots=[replace(s) for s in c.slots],
        totals=list(c.totals),
    )


class Server:
    """One server, from which the processes' wires lead away.

    Attributes:
        refusing: the code with which everything is answered; empty while it serves.
        foreign: circuits under whose key somebody else's value stands.
        upsets: when data was lost or the clock stepped (ms), for rules that allow for it.
        left: per circuit, when each generation stopped being the store's (ms).
        executed: how many outcomes were counted, per circuit, repeated requests left out.
    """

    def __init__(self, timeline: Timeline, machines: dict[str, Machine]) -> None:
        self._timeline = timeline
        self._machines = machines
        self._histories = {name: History() for name in machines}
        self._copies: deque[tuple[int, dict[str, Circuit | None]]] = deque(maxlen=COPIES)
        self._waiting: list[Action] = []
        self._offset = NOON
        self.up = True
        self.stopped = False
        self.refusing = ""
        self.foreign: set[str] = set()
        self.subscribers: dict[object, Callable[[str], None]] = {}
        self.upsets: list[int] = []
        self.generations: dict[str, Generation | None] = dict.fromkeys(machines)
        self.left: dict[str, dict[Generation, int]] = {name: {} for name in machines}
        self.granted: dict[str, tuple[int, int]] = {}  # token → (when, lease in ms)
        self._settled: set[str] = set()
        self.executed = dict.fromkeys(machines, 0)
        self.on_grant: Callable[[str, str, str], None] = lambda circuit, reporter, token: None
        self.on_transition: Callable[[str, str, str], None] = lambda circuit, state, by: None

    # ------------------------------------------------------------------ requests

    @property
    def now(self) -> int:
        """The store's clock (ms)."""
        return self._timeline.now + self._offset

    def receive(self, job: Action) -> None:
        """Something has arrived; a server that is stopped sees to it later, one that is down
        never."""
        if self.up and self.stopped:
            self._waiting.append(job)
        elif self.up:
            job()

    def execute(self, circuit: str, step: Step, *, repeated: bool = False) -> Reply | StoreError:
        """Carry out one step and judge it."""
        if circuit in self.foreign:
            return StoreError("WRONGTYPE Operation against a key holding the wrong kind of value")
        machine = self._machines[circuit]
        before = machine.circuit
        now = self.now
        try:
            stepped = machine.step(step, now)
        except StoreError as error:
            return error
        self._histories[circuit].observe(Seen.of(before, step, now, stepped))
        calls = stepped.circuit.totals[0] - (before.totals[0] if before is not None else 0)
        # What a failover has undone may be carried out again.
        again = repeated or (step.op == "settle" and step.token in self._settled)
        self.executed[circuit] += 0 if again else calls
        if step.op == "settle" and calls:
            self._settled.add(step.token)
        if stepped.reply.verdict == "grant":
            self.granted.setdefault(step.token, (self._timeline.now, stepped.reply.value))
            self.on_grant(circuit, step.reporter, step.token)
        if stepped.dirty:
            self._copies.append((self._timeline.now, self._all()))
        self._moved(circuit)
        if stepped.events:
            self.on_transition(circuit, stepped.events[-1].new, step.reporter)
            for push in list(self.subscribers.values()):
                push(f"{circuit} {stepped.reply.header}")
        return stepped.reply

    def header(self, circuit: str) -> Header | None:
        """The circuit's header, as a poll reads it."""
        stored = self._machines[circuit].circuit
        return None if stored is None else stored.header

    def holds(self, circuit: str, token: str) -> bool:
        """Whether a token holds a permit whose lease is not over."""
        stored = self._machines[circuit].circuit
        return stored is not None and any(
            s.token == token and s.since + s.lease > self.now for s in stored.slots
        )

    def poll(self, circuits: list[str]) -> tuple[int, list[str | None]]:
        """What a poll is answered."""
        stored = [None if c in self.foreign else self._machines[c].circuit for c in circuits]
        return self.now, [None if c is None else model.dump_header(c) for c in stored]

    # ------------------------------------------------------------------ what befalls it

    def step_clock(self, by: int) -> None:
        self._offset += by
        self.upsets.append(self._timeline.now)

    def stop(self) -> None:
        """Nothing is answered any more, and nothing is refused."""
        self.stopped = True

    def go_on(self) -> None:
        """What was sent meanwhile is carried out now."""
        self.stopped = False
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            self._timeline.after(0, lambda job=job: self.receive(job))  # type: ignore[misc]

    def die(self) -> None:
        self.up = False
        self.stopped = False
        self._waiting.clear()
        self.subscribers.clear()

    def older(self, lag: int) -> dict[str, Circuit | None]:
        """What a replica holds that is ``lag`` ms behind."""
        known: dict[str, Circuit | None] = dict.fromkeys(self._machines)
        for at, copy in self._copies:
            if at <= self._timeline.now - lag:
                known = copy
        return known

    def replace(self, held: dict[str, Circuit | None]) -> None:
        """Hold this from now on, whatever was held before."""
        self.upsets.append(self._timeline.now)
        for circuit, copy in held.items():
            if copy == self._machines[circuit].circuit:
                continue
            self._machines[circuit].put(copy)
            self._histories[circuit].replaced(copy)
            self._moved(circuit)
        self._copies.append((self._timeline.now, self._all()))

    def finish(self) -> None:
        for machine in self._machines.values():
            machine.finish()

    def _all(self) -> dict[str, Circuit | None]:
        return {name: machine.circuit for name, machine in self._machines.items()}

    def _moved(self, circuit: str) -> None:
        header = self.header(circuit)
        new = None if header is None else (header.v, header.nonce)
        old = self.generations[circuit]
        if new != old:
            if old is not None:
                self.left[circuit][old] = self._timeline.now
            if new is not None:
                self.left[circuit].pop(new, None)
            self.generations[circuit] = new
