"""Long random lives of one circuit: what may happen, for hypothesis or for a seed to choose."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from distributed_breaker import model
from distributed_breaker.model import NOTHING, Known, Run, Step, Stepped
from distributed_breaker.policy import Policy
from tests.equivalence.invariants import LEGAL, VERDICTS, History, Seen
from tests.equivalence.small import FORCED, NOON
from tests.equivalence.twins import Case, Fields, Living, run_model

POLICIES = (
    Policy(failure_threshold=3, minimum_calls=4, window=1.2, open_interval=1.0, permit_lease=0.5),
    Policy(
        failure_threshold=4,
        failure_rate=None,
        window=60.0,
        open_interval=1.0,
        open_interval_max=5.0,
        success_threshold=2,
        permit_lease=2.0,
        quorum=3,
    ),
    Policy(
        failure_threshold=20,
        failure_rate=0.3,
        slow_call_duration=1.0,
        slow_call_rate=0.4,
        minimum_calls=5,
        window=7.7,
        success_threshold=1,
        jitter=1.0,
        quorum=1,
    ),
    # For many processes with few failures each.
    Policy(
        failure_threshold=24,
        failure_rate=None,
        minimum_calls=500,
        open_interval=1.0,
        success_threshold=1,
        quorum=4,
    ),
)
STATES = ("closed", "open", "half_open", *FORCED)
REPORTERS = 12  # More than a circuit remembers.
BATCH = st.lists(
    st.builds(
        Run,
        st.sampled_from("ssfffSFiI"),
        st.sampled_from([1, 1, 2, 3, 9]),
        st.just(0),
        st.sampled_from([-1, -1, -1, 0, 10, 2_000]),
    )
    | st.builds(
        Run,
        st.sampled_from("fFi"),
        st.just(1),
        st.sampled_from([1, 700, 90_000]),
        st.sampled_from([-1, -1, 30]),
    ),
    max_size=4,
).map(tuple)


class Alone:
    """The model without the script, in place of ``Living``; it keeps every step as a case."""

    def __init__(self) -> None:
        self.circuit: model.Circuit | None = None
        self.cases: list[Case] = []

    def fields(self) -> Fields | None:
        """What would be stored now."""
        return None if self.circuit is None else model.dump(self.circuit)

    def step(self, step: Step, now: int) -> Stepped:
        """Carry out one step."""
        self.cases.append(Case(self.fields(), step, now))
        stepped = run_model(self.cases[-1])
        self.circuit = stepped.circuit
        return stepped

    def put(self, fields: Fields | None) -> None:
        """Replace the circuit."""
        self.circuit = None if fields is None else model.load(fields)

    def finish(self) -> None:
        """There is nothing to compare."""


@dataclass
class Client:
    """What one process remembers: the newest header that it has heard of, and its permit."""

    name: str
    known: Known = NOTHING
    token: str = "none"
    era: tuple[int, str] = (0, "-")


class Walk(RuleBasedStateMachine):
    """One circuit, twelve processes, and everything that can happen to them."""

    make: Callable[[], Living | Alone]
    visited: Counter[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.living = self.make()
        self.history = History()
        self.clients = [Client(f"r{i}") for i in range(REPORTERS)]
        self.now = NOON + 12_345
        self.steps = 0
        self.older: list[Fields | None] = [None]
        self.policy = POLICIES[0].numbers

    @initialize(policy=st.sampled_from(POLICIES))
    def choose(self, policy: Policy) -> None:
        self.policy = policy.numbers

    def do(self, op: str, client: Client, **arguments: Any) -> None:
        """One step in both twins, judged by all rules; the client learns from the reply."""
        self.steps += 1
        nonce = f"{self.steps * 2_654_435_761 % 2**32:08x}"
        arguments = {"known": client.known, "policy": self.policy} | arguments
        step = Step(op, nonce, **arguments)
        fields = self.living.fields()
        before = None if fields is None else model.load(fields)
        stepped = self.living.step(step, self.now)
        assert model.load(model.dump(stepped.circuit)) == stepped.circuit
        self.history.observe(Seen.of(before, step, self.now, stepped))
        self.visited.update(("move", e.cause, e.old, e.new) for e in stepped.events)
        self.visited[("verdict", op, stepped.reply.verdict, stepped.reply.old)] += 1
        c = stepped.circuit
        client.known = Known(c.v, c.nonce, c.state, stepped.reply.remaining, c.attempt)
        self.older = [*self.older[-5:], fields]

    def era(self, client: Client, which: str) -> tuple[int, str]:
        c = self.living.circuit
        if which == "current" and c is not None:
            return c.v, c.nonce
        return (client.known.v, client.known.nonce) if which == "known" else (client.known.v, "00")

    @rule(
        who=st.integers(0, REPORTERS - 1),
        batch=BATCH,
        era=st.sampled_from(["current", "current", "known", "other"]),
        rejected=st.sampled_from([0, 0, 3]),
    )
    def report(self, who: int, batch: tuple[Run, ...], era: str, rejected: int) -> None:
        client = self.clients[who]
        deltas = (("rejected", rejected), ("b7", 1)) if rejected else ()
        at = self.era(client, era)
        self.do("report", client, reporter=client.name, batch=batch, era=at, deltas=deltas)

    @rule(who=st.integers(0, 3), again=st.booleans())
    def acquire(self, who: int, again: bool) -> None:
        client = self.clients[who]
        if not again:
            client.token = f"t{self.steps}"
        self.do("acquire", client, token=client.token)
        client.era = client.known.v, client.known.nonce

    @rule(
        who=st.integers(0, 3),
        kind=st.sampled_from("sssfiSFI"),
        open_for=st.sampled_from([0, 0, 0, 800]),
        again=st.booleans(),
    )
    def settle(self, who: int, kind: str, open_for: int, again: bool) -> None:
        client = self.clients[who]
        mine = {"era": client.era, "token": client.token, "kind": kind}
        self.do("settle", client, open_for=open_for, detail="settled", **mine)
        # A token serves for one permit; asked for again it would be another one.
        client.token = f"u{self.steps}" if not again else client.token

    @rule(who=st.integers(0, 3))
    def cancel(self, who: int) -> None:
        self.do("cancel", self.clients[who], token=self.clients[who].token)

    @rule(kind=st.sampled_from(FORCED), ttl=st.sampled_from([-1, 1, 700, 100_000]))
    def override(self, kind: str, ttl: int) -> None:
        self.do("override", self.clients[4], kind=kind, ttl=ttl, detail='{"actor":"Zoë"}')

    @rule(op=st.sampled_from(["release", "reset"]))
    def operate(self, op: str) -> None:
        self.do(op, self.clients[5], detail="by hand")

    @rule(
        ms=st.sampled_from([1, 40, 100, 600, 1_000, 3_000, 10_000, 61_000, 3_700_000]),
        exactly=st.sampled_from(["", "since", "lease", "fresh"]),
        off=st.sampled_from([-1, 0, 1]),
    )
    def later(self, ms: int, exactly: str, off: int) -> None:
        """Time passes: some of it, or until about the moment when something runs out."""
        c = self.living.circuit
        moment = self.now + ms
        if exactly == "since" and c is not None:
            moment = c.since + c.duration + off
        elif exactly == "lease" and c is not None and c.slots:
            moment = c.slots[-1].since + c.slots[-1].lease + off
        elif exactly == "fresh" and c is not None:
            moment = c.since + model.FRESH + off
        self.now = max(self.now, moment)

    @rule(ms=st.sampled_from([1, 300, 5_000, 200_000]))
    def set_back(self, ms: int) -> None:
        self.now -= ms

    @precondition(lambda self: self.living.circuit is not None)
    @rule(steps=st.integers(0, 5))
    def lose(self, steps: int) -> None:
        """The store loses its last steps, or (0) everything."""
        self.living.put(self.older[-steps] if steps and steps <= len(self.older) else None)
        self.history.replaced(self.living.circuit)

    @rule(change=st.sampled_from(["version", "window", "permits", "older", "none"]))
    def offer(self, change: str) -> None:
        p = self.policy
        offered = {
            "version": p._replace(version=p.version + 1, success_threshold=1, half_open_permits=1),
            "window": p._replace(window=p.window * 2),
            "permits": p._replace(success_threshold=4, half_open_permits=3, quorum=2),
            "older": p._replace(version=max(0, p.version - 1), failure_threshold=1),
            "none": p,
        }[change]
        self.do("report", self.clients[6], policy=offered, offer=True)

    @rule(
        op=st.sampled_from(["report", "acquire", "settle", "cancel", "release"]),
        state=st.sampled_from(STATES),
        left=st.sampled_from([0, 100, 900, 5_000, -1]),
        attempt=st.sampled_from([0, 1, 64]),
        ahead=st.sampled_from([-3, -1, 0, 0, 1, 1, 5_000]),
    )
    def know(self, op: str, state: str, left: int, attempt: int, ahead: int) -> None:
        """A process comes along that knows something else."""
        v = self.living.circuit.v if self.living.circuit is not None else self.now - 2
        endless = left == -1 and state not in FORCED
        stranger = Client("x", Known(v + ahead, "abcdef01", state, 0 if endless else left, attempt))
        self.do(op, stranger, token=f"x{self.steps}")

    def teardown(self) -> None:
        self.living.finish()


WANTED = {("move", cause, *move) for cause, legal in LEGAL.items() for move in legal} | {
    ("verdict", *key, old) for key, states in VERDICTS.items() for old in states
}


def walk(make: Callable[[], Living | Alone]) -> type[Walk]:
    """A machine of its own, with counts of its own, on one server."""
    return type("Walk", (Walk,), {"make": staticmethod(make), "visited": Counter()})


def wander(machine: Walk, choose: random.Random, steps: int, crowded: bool = False) -> None:
    """Walk without hypothesis: the same rules, drawn from a seed.

    In a crowded life hardly anything happens but bad outcomes at ever more processes.
    """
    one_of, turns = choose.choice, count()
    few, times = range(4), [1, 40, 100, 600, 1_000, 3_000, 10_000, 61_000]

    def flip() -> bool:
        return choose.random() < 0.3

    def batch() -> tuple[Run, ...]:
        if choose.random() < 0.1:
            return (Run(one_of("fFi"), 1, one_of([1, 700, 90_000])),)
        ages, counts = [-1, -1, -1, 0, 10, 2_000], [1, 1, 2, 3, 9]
        some = choose.randrange(4)
        return tuple(Run(one_of("ssfffSFiI"), one_of(counts), 0, one_of(ages)) for _ in range(some))

    def report() -> None:
        era = one_of(["current"] * 3 + ["known", "other"])
        machine.report(choose.randrange(REPORTERS), batch(), era, 3 * flip())

    def one_bad() -> None:
        # In turn, so that nearly everybody has been forgotten when his turn comes again.
        batch = (Run(one_of("fFSI"), one_of([1, 1, 1, 2])),)
        machine.report(next(turns) % REPORTERS, batch, "current", 0)

    def settle() -> None:
        machine.settle(one_of(few), one_of("sssfiSFI"), 800 * flip(), flip())

    def later() -> None:
        machine.later(
            one_of(times), one_of(["", "", "since", "lease", "fresh"]), one_of([-1, 0, 1])
        )

    def probe() -> None:
        who = one_of(few)
        machine.later(0, "since", 0)
        machine.acquire(who, False)
        if choose.random() < 0.1:
            machine.cancel(who)
        machine.settle(who, one_of("sssf"), 0, False)

    def know() -> None:
        op = one_of(["report", "acquire", "settle", "cancel", "release"])
        left, ahead = one_of([0, 100, 900, 5_000, -1]), one_of([-3, -1, 0, 1, 1, 5_000])
        machine.know(op, one_of(STATES), left, one_of([0, 1, 64]), ahead)

    def lose() -> None:
        if machine.living.circuit is not None:
            machine.lose(one_of([0, 0, 0, 1, 3, 5]))
        one_of([know, report, later, override, operate])()

    def override() -> None:
        machine.override(one_of(FORCED), one_of([-1, 1, 700, 100_000]))

    def operate() -> None:
        machine.operate(one_of(["release", "reset"]))

    def offer() -> None:
        machine.offer(one_of(["version", "window", "permits", "older", "none"]))

    rules: list[tuple[int, Callable[[], None]]] = [
        (10, report),
        (6, lambda: machine.acquire(one_of(few), flip())),
        (6, settle),
        (6, probe),
        (6, later),
        (3, know),
        (2, lose),
        (2, override),
        (2, operate),
        (1, lambda: machine.cancel(one_of(few))),
        (1, lambda: machine.set_back(one_of([1, 300, 5_000, 200_000]))),
        (1, offer),
    ]
    if crowded:
        rules = [(50, one_bad), (5, probe), (1, later), (1, report)]
    weights = [weight for weight, _ in rules]
    for _, do in choose.choices(rules, weights, k=steps):
        do()


def lives(number: int, steps: int) -> list[Case]:
    """Cases out of the lives of ``number`` circuits, the same ones every time."""
    cases: list[Case] = []
    machine = walk(Alone)
    for seed in range(number):
        one = machine()
        one.choose(POLICIES[seed % len(POLICIES)])
        wander(one, random.Random(seed), steps, crowded=seed % 4 == 3)
        cases += one.living.cases
    return cases
