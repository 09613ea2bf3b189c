"""The session by hand: what it asks for, round by round, and what it makes of the answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from distributed_breaker import Policy, model
from distributed_breaker.errors import StoreDown, StoreError, StoreUnavailable
from distributed_breaker.linked import Clock, LinkedCircuit
from distributed_breaker.model import Circuit, Known, Reply, Step
from distributed_breaker.session import POLL, Ask, Request, Session
from distributed_breaker.shadow import Bad, Shadow
from tests.unit.clock import FakeClock

POLICY = Policy(failure_threshold=1, success_threshold=2, quorum=1, jitter=0.0, permit_lease=10.0)
TIMEOUT = StoreDown("TIMEOUT", "no answer")


class ByHand(Session):
    """A session whose rounds the test makes, over one circuit and the model."""

    def __init__(self) -> None:
        self.time = FakeClock()
        self.clock = Clock(lambda: self.time.ms, self.time, lambda: self.time.ms * 1_000_000)
        nonces = random.Random(0)
        nonce: Callable[[], str] = lambda: f"{nonces.getrandbits(32):08x}"  # noqa: E731
        shadow = Shadow(POLICY.numbers, "me", nonce, nonces.random, self.time.ms)
        self.circuit = LinkedCircuit("c", POLICY, shadow, self.clock)
        self.stored: Circuit | None = None
        self.asked: list[Ask] = []
        super().__init__(self.clock, {"c": self.circuit}, lambda: random.Random(0))
        self.add(self.circuit)

    def wake(self) -> None:
        pass

    def ensure_started(self) -> bool:
        return True

    def want_pushes(self, wanted: bool) -> None:
        pass

    def carry_out(self, step: Step) -> Reply:
        done = model.step(self.stored, step, self.time.ms)
        self.stored = done.circuit
        return done.reply

    def answer(self, ask: Ask) -> Any:
        if ask.what == "run":
            return [self.carry_out(step) for _, step in ask.about]
        if ask.what == "poll":
            header = None if self.stored is None else model.dump_header(self.stored)
            return self.time.ms, [header for _ in ask.about]
        return None

    def go_round(self, answer: Callable[[Ask], Any] | None = None) -> list[Ask]:
        """Make one round, answered by the model or by ``answer``; returns what was asked."""
        asks, asked = self.round(), []
        try:
            ask = next(asks)
            while True:
                asked.append(ask)
                value = (answer or self.answer)(ask)
                ask = asks.throw(value) if isinstance(value, Exception) else asks.send(value)
        except StopIteration:
            return asked

    def record(self, kind: str) -> None:
        era = self.circuit._era
        assert era is not None
        era.tally.append(0 if kind == "s" else Bad(kind, 0, self.time.ms))

    def probe(self) -> tuple[str, tuple[int, str]]:
        """A permit of the store's: its token and its generation."""
        token = self.circuit.new_token()
        future = self.submit(Request("acquire", self.circuit, {"op": "acquire", "token": token}))
        self.go_round()
        reply, _ = future.result(0)
        assert reply.verdict == "grant"
        header = model.load_header(reply.header)
        return token, (header.v, header.nonce)

    def settle(self, token: str, era: tuple[int, str], kind: str = "s") -> Request:
        self.circuit.settle_begun()
        arguments = {"op": "settle", "token": token, "era": era, "kind": kind}
        request = Request("settle", self.circuit, arguments, expires=self.time.ms + 10_000)
        self.submit(request)
        return request

    @property
    def account(self) -> dict[str, int]:
        account = self.circuit.conservation()
        assert account["recorded"] == account["flushed"] + account["dropped"] + account["pending"]
        return account

    @property
    def total(self) -> dict[str, int]:
        assert self.stored is not None
        return dict(zip(model.TOTALS, self.stored.totals, strict=True))


@pytest.fixture
def session() -> ByHand:
    session = ByHand()
    session.go_round()
    return session


@pytest.fixture
def half_open(session: ByHand) -> ByHand:
    """A circuit that has tripped, and whose open interval is over."""
    session.record("f")
    session.nudge(session.circuit)
    session.go_round()
    assert session.circuit.decide().state == "open"
    session.time.advance(60.0)
    return session


def test_a_settle_that_its_repetition_has_overtaken_counts_once(half_open: ByHand) -> None:
    """S10: found by simulation.  The store had stopped; on going on it saw to the repetition, over
    a new connection, before it saw to the first one, and counted both."""
    token, era = half_open.probe()
    half_open.settle(token, era)
    late: list[Step] = []

    def stopped(ask: Ask) -> Any:
        late.extend(step for _, step in ask.about)
        return TIMEOUT

    before = half_open.total["calls"]
    half_open.go_round(stopped)
    half_open.go_round()
    for step in late:
        half_open.carry_out(step)
    assert half_open.total["calls"] == before + 1
    assert half_open.total["late"] == 0
    assert half_open.account["flushed"] == 2


def test_a_settle_that_came_too_late_is_reported_as_late(half_open: ByHand) -> None:
    token, era = half_open.probe()
    half_open.time.advance(1.0)
    half_open.carry_out(Step("reset", "deadbeef", POLICY.numbers))
    before = half_open.total["calls"]
    half_open.settle(token, era, "f")
    half_open.go_round()
    assert half_open.account["pending"] == 1
    half_open.time.advance(2.0)
    half_open.go_round()
    assert half_open.account["pending"] == 0
    assert half_open.total["calls"] == before + 1
    assert half_open.total["late"] == 1
    assert half_open.circuit.decide().state == "closed"


def test_a_flush_waits_for_what_a_late_settle_brings(half_open: ByHand) -> None:
    """Found by simulation: outcomes are collected before the settle is answered."""
    token, era = half_open.probe()
    half_open.carry_out(Step("reset", "deadbeef", POLICY.numbers))
    half_open.settle(token, era, "f")
    flushed = half_open.flush()
    half_open.go_round()
    assert not flushed.done()
    half_open.go_round()
    assert flushed.result(0) is None
    assert half_open.account["pending"] == 0


def test_a_repeated_settle_that_came_too_late_is_dropped(half_open: ByHand) -> None:
    """Nobody knows whether the first one was counted, so it is not counted again."""
    token, era = half_open.probe()
    half_open.settle(token, era)
    half_open.go_round(lambda _: TIMEOUT)
    half_open.carry_out(Step("reset", "deadbeef", POLICY.numbers))
    before = half_open.total["calls"]
    half_open.go_round()
    assert half_open.account["dropped"] == 1
    assert half_open.total["calls"] == before


def test_a_child_asks_for_a_circuit_that_was_refused_to_its_parent(session: ByHand) -> None:
    """Found by simulation: the child heard from the store, and yet sent nothing ever again."""

    def refuse(ask: Ask) -> Any:
        if ask.what == "run":
            return [StoreError("WRONGTYPE not a hash") for _ in ask.about]
        return session.answer(ask)

    session.record("s")
    session.time.advance(2.0)
    session.go_round(refuse)
    assert session.circuit.broken == "WRONGTYPE"
    session.fork("child")
    session.go_round()
    session.record("s")
    flushed = session.flush()
    session.go_round()
    assert flushed.result(0) is None
    assert session.account == {"recorded": 1, "flushed": 1, "dropped": 0, "pending": 0}


def test_a_flush_tells_of_a_circuit_whose_key_has_been_mended(session: ByHand) -> None:
    """Found by simulation: the sync in the same round made it well again, and its outcomes were
    left behind by a flush that had succeeded."""
    session.record("s")
    session.time.advance(2.0)
    session.go_round(lambda ask: [StoreError("WRONGTYPE x")] if ask.what == "run" else (0, [None]))
    session.record("s")
    refused = session.flush()
    session.go_round(lambda ask: [StoreError("WRONGTYPE x")] if ask.what == "run" else (0, [None]))
    with pytest.raises(StoreUnavailable, match="'c': WRONGTYPE"):
        refused.result(0)
    mended = session.flush()
    session.go_round()
    session.go_round()
    assert mended.result(0) is None
    assert session.account["pending"] == 0


@pytest.mark.parametrize("heard_before", [0, 150, 900, 1_000, 1_100, 1_900])
def test_no_mirror_gets_older_than_a_poll_interval(session: ByHand, heard_before: int) -> None:
    """C6: found by simulation.  A mirror that was confirmed shortly before a poll was left out of
    it, and so got nearly twice as old."""
    start = session.time.ms
    session.subscribed()
    session.go_round()
    session.time.ms = start + heard_before
    assert session.stored is not None
    session.pushed(f"c {model.dump_header(session.stored)}")
    oldest = 0
    while session.time.ms < start + 10_000:
        session.time.ms = max(session.time.ms + 1, session.due())
        oldest = max(oldest, session.time.ms - session.circuit.heard)
        session.go_round()
    assert oldest <= POLL + 1


def test_a_push_that_is_not_believed_is_asked_about_even_while_a_sync_is_under_way(
    session: ByHand,
) -> None:
    """R12: found by simulation.  The answer under way was taken for the one to the new question,
    and the mirror stayed behind until the next poll."""

    def restored(ask: Ask | None = None) -> Any:
        """Another process brings back what it knows, and the push is heard before the answer."""
        answer = session.answer(ask) if ask is not None else None
        assert session.stored is not None
        known = Known(session.stored.v + 5, "bbbbbbbb", "forced_open", -1, 0)
        session.carry_out(Step("report", "bbbbbbbb", POLICY.numbers, known))
        session.pushed(f"c {model.dump_header(session.stored)}")
        return answer

    session.go_round()
    session.carry_out(session.circuit.step("override", kind="forced_open"))
    session.subscribed()
    session.go_round()
    restored()
    assert session.go_round(restored)[0].what == "run"
    assert session.due() <= session.time.ms
    assert session.go_round()[0].what == "run"
    assert session.stored is not None
    assert session.circuit._shadow.generation == (session.stored.v, session.stored.nonce)
