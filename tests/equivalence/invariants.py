"""What must always hold: the store's rules S1 to S12, S14 and S15, written a second time.

``check_step`` judges one step from what can be seen of it; ``History`` judges the steps of one
circuit in a row.  Both know nothing of who carried the steps out: the tests of equality give them
the model's steps, a simulation may give them the script's.  Where a rule is a computation, it is
done here in the plainest way (one outcome at a time, exact fractions), not as the twins do it.
A broken rule raises AssertionError, whose message begins with the rule's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from distributed_breaker import model
from distributed_breaker.model import INDEX, Circuit, Event, Reply, Step, Stepped
from distributed_breaker.policy import Numbers
from tests.equivalence.trip_rule import Window, expected_trip

ANY = frozenset({"closed", "open", "half_open", "forced_open", "forced_closed"})
RESTORED = frozenset({"closed", "open", "forced_open", "forced_closed"})
# S1: the legal moves, by cause.  The state of a circuit that did not exist is the empty text.
LEGAL: dict[str, frozenset[tuple[str, str]]] = {
    "created": frozenset({("", "closed")}),
    "restored": frozenset((old, new) for old in ANY | {""} for new in RESTORED),
    "run": frozenset({("closed", "open")}),
    "rate": frozenset({("closed", "open")}),
    "slow": frozenset({("closed", "open")}),
    "retry_after": frozenset({("closed", "open"), ("half_open", "open")}),
    "due": frozenset({("open", "half_open")}),
    "recovered": frozenset({("half_open", "closed")}),
    "probe": frozenset({("half_open", "open")}),
    "forced_open": frozenset((old, "forced_open") for old in ANY),
    "forced_closed": frozenset((old, "forced_closed") for old in ANY),
    "released": frozenset({("forced_open", "half_open"), ("forced_closed", "closed")}),
    "expired": frozenset({("forced_open", "half_open"), ("forced_closed", "closed")}),
    "reset": frozenset((old, "closed") for old in ANY),
}
# By operation and verdict: the states before the step from which it can come to that.  A circuit
# that moves in the same step, because its client knows better, makes for surprising ones.
VERDICTS: dict[tuple[str, str], frozenset[str]] = {
    ("report", "ok"): ANY | {""},
    ("acquire", "go"): ANY | {""},
    ("acquire", "deny"): ANY | {""},
    ("acquire", "grant"): ANY | {""},
    ("settle", "ok"): frozenset({"half_open"}),
    ("settle", "stale"): ANY | {""},
    ("cancel", "ok"): frozenset({"half_open"}),
    ("cancel", "noop"): ANY | {""},
    ("override", "ok"): ANY | {""},
    ("release", "ok"): ANY | {""},
    ("release", "noop"): ANY | {""},
    ("reset", "ok"): ANY | {""},
}
JUDGED = ("run", "rate", "slow")


class Seen(NamedTuple):
    """One step as seen from outside.  ``before`` and ``after`` must not share their lists."""

    before: Circuit | None
    step: Step
    now: int
    reply: Reply
    after: Circuit
    events: Sequence[Event]

    @classmethod
    def of(cls, before: Circuit | None, step: Step, now: int, stepped: Stepped) -> Seen:
        """A step of the model; ``before`` is a copy made before it."""
        return cls(before, step, now, stepped.reply, stepped.circuit, stepped.events)

    @property
    def policy(self) -> Numbers:
        """The policy that the step was judged by, unless it was the step that changed it."""
        assert self.after.policy is not None
        return self.after.policy

    @property
    def undisturbed(self) -> bool:
        """Whether the operation found the circuit as it was, and not moved by what came before."""
        first = self.events[0].cause if self.events else ""
        return (
            self.before is not None
            and self.before.policy == self.after.policy
            and first not in ("restored", "expired")
        )

    @property
    def current(self) -> bool:
        """Whether the outcomes belong to the generation that the operation found."""
        return self.before is not None and (self.before.v, self.before.nonce) == self.step.era


def check_step(seen: Seen) -> None:
    """Judge one step by every rule that needs no more than this step."""
    for check in CHECKS:
        check(seen)


def _broken(rule: str, seen: Seen) -> str:
    return f"{rule}\n  before {seen.before}\n  step   {seen.step}\n  now    {seen.now}" + (
        f"\n  reply  {seen.reply}\n  after  {seen.after}\n  events {seen.events}"
    )


def legal_graph(seen: Seen) -> None:
    """S1: every move is one of the legal ones, and the state changes by moves alone."""
    state = seen.before.state if seen.before is not None else ""
    for event in seen.events:
        assert event.old == state, _broken("S1: a move does not begin where the last ended", seen)
        assert (event.old, event.new) in LEGAL[event.cause], _broken("S1: illegal move", seen)
        state = event.new
    assert state == seen.after.state, _broken("S1: the state changed without a move", seen)
    cause = seen.events[-1].cause if seen.events else ""
    assert seen.reply.cause == cause, _broken("S1: the reply claims another move", seen)
    if not seen.events and seen.before is not None:
        same = (seen.before.v, seen.before.nonce, seen.before.duration, seen.before.attempt)
        now = (seen.after.v, seen.after.nonce, seen.after.duration, seen.after.attempt)
        assert same == now, _broken("S1: a step without a move changed the generation", seen)


def generations(seen: Seen) -> None:
    """S2: every move mints a larger v, no smaller than the clock's and the client's; and C8."""
    v = seen.before.v if seen.before is not None else 0
    for event in seen.events:
        least = max(seen.now, v + 1, seen.step.known.v + 1)
        assert event.v == least, _broken("S2: v is not the least that is allowed", seen)
        v = event.v
    assert seen.after.v == v >= seen.step.known.v, _broken("S2: v fell behind", seen)
    if seen.events:
        assert seen.after.nonce == seen.step.nonce, _broken("S2: the nonce is another", seen)


def live(c: Circuit, now: int) -> int:
    """Slots whose lease is not over."""
    return sum(1 for s in c.slots if min(s.since, now) + s.lease > now)


def permits(seen: Seen) -> None:
    """S3 and S4: permits are out only in half_open, each token once, and never too many."""
    c, p, now = seen.after, seen.policy, seen.now
    assert not c.slots or c.state == "half_open", _broken("S3: slots outside half_open", seen)
    tokens = [s.token for s in c.slots]
    assert len(tokens) == len(set(tokens)), _broken("S3: a token has two slots", seen)
    # A policy that lowers the number of permits takes none back.
    had = len(seen.before.slots) if seen.before is not None else 0
    assert len(tokens) <= max(p.half_open_permits, had), _broken("S3: too many slots", seen)
    if seen.reply.verdict == "grant":
        assert seen.step.token in tokens, _broken("S3: a grant without a slot", seen)
        kept = seen.before is not None and any(
            s.token == seen.step.token for s in seen.before.slots
        )
        if seen.events or not kept:
            out = live(c, now)
            assert out <= p.half_open_permits, _broken("S3: too many live permits", seen)
            most = p.success_threshold
            assert c.successes + out <= most, _broken("S4: more probes than needed", seen)
            assert seen.reply.value == p.permit_lease, _broken("S4: the lease is another", seen)
        assert 0 <= seen.reply.value <= max(s.lease for s in c.slots), _broken("S12", seen)
    if seen.reply.verdict == "deny" and c.state == "half_open":
        assert 0 <= seen.reply.value <= model.MAX_DENY, _broken("S12: the wait is too long", seen)
        assert live(c, now) > 0, _broken("L2: refused though no permit is out", seen)


def settles(seen: Seen) -> None:
    """S5 and S6: a settle counts only for a token that holds a slot of this generation."""
    recovered = any(e.cause == "recovered" for e in seen.events)
    if seen.step.op != "settle":
        assert not recovered, _broken("S6: closed without a settle", seen)
        return
    before = seen.before
    if seen.reply.verdict == "ok":
        holds = before is not None and any(s.token == seen.step.token for s in before.slots)
        assert holds, _broken("S5: counted without a permit", seen)
        assert seen.current, _broken("S5: counted for another generation", seen)
        assert all(s.token != seen.step.token for s in seen.after.slots), _broken("S5", seen)
        assert before is not None
        enough = before.successes + 1 >= seen.policy.success_threshold
        good = seen.step.kind == "s"
        if seen.undisturbed:
            assert recovered == (good and enough), _broken("S6: closed at the wrong moment", seen)
        if not seen.events:
            gained = seen.after.successes - before.successes
            assert gained == int(good), _broken("S5: a token counted more than once", seen)
    elif seen.undisturbed and before is not None:
        same = (before.successes, len(before.slots)) == (
            seen.after.successes,
            len(seen.after.slots),
        )
        assert same, _broken("S5: a settle that was refused changed something", seen)


def not_early(seen: Seen) -> None:
    """S7: nothing goes from open to half_open before the open interval is over."""
    since, duration = 0, 0
    if seen.before is not None:
        since, duration = min(seen.before.since, seen.now), seen.before.duration
    for event in seen.events:
        if event.cause == "due":
            assert since + duration <= seen.now, _broken("S7: a grant before its time", seen)
        if event.cause == "restored" and event.new == "open":
            state, known_left = seen.step.known.state, seen.step.known.remaining
            since, duration = seen.now, known_left if state == "open" else 0
    if seen.after.state in ("open", "forced_open") and seen.step.op == "acquire":
        assert seen.reply.verdict == "deny", _broken("S7: granted while open", seen)


def windows(seen: Seen) -> None:
    """S8: the counts are possible, the run is the sum of its shares, a move empties everything."""
    c = seen.after
    for calls, failures, slow in c.ring:
        assert calls >= max(failures, slow) >= 0, _broken("S8: more bad calls than calls", seen)
    runs = sum(r.run for r in c.reporters)
    assert runs == c.run, _broken("S8: the run is not the sum of the shares", seen)
    assert len({r.id for r in c.reporters}) == len(c.reporters), _broken("S8: a name twice", seen)
    named = [r for r in c.reporters if r.id != "*"]
    assert len(named) <= model.REPORTERS, _broken("S8: too many reporters", seen)
    if seen.events and (seen.step.op != "report" or seen.events[-1].new == "open"):
        rest = [sum(map(sum, c.ring)), c.run, *(r.cur + r.prev + r.run for r in c.reporters)]
        assert not any(rest), _broken("S8: a move left something in the window", seen)


def totals(seen: Seen) -> None:
    """S10: every outcome that the store has seen is in the totals once."""
    had = seen.before.totals if seen.before is not None else [0] * len(model.TOTALS)
    gained = {name: seen.after.totals[i] - had[i] for name, i in INDEX.items()}
    calls = 0
    if seen.step.op == "report":
        calls = sum(run.count for run in seen.step.batch)
    elif seen.step.op == "settle" and seen.reply.verdict == "ok":
        calls = 1
    assert gained["calls"] == calls, _broken("S10: outcomes counted more or less than once", seen)
    assert 0 <= gained["late"] <= calls, _broken("S10: more late outcomes than outcomes", seen)
    assert gained["probes"] == int(seen.reply.verdict == "ok" and seen.step.op == "settle"), (
        _broken("S10: a probe was not counted once", seen)
    )
    moves = Counter(e.new for e in seen.events if e.cause != "created")
    opens = moves["open"] + moves["forced_open"]
    assert gained["opens"] == opens, _broken("S10: a move was not counted once", seen)
    assert gained["half_opens"] == moves["half_open"], _broken("S10: half_opens", seen)
    trips = sum(1 for e in seen.events if e.old == "closed" and e.cause in (*JUDGED, "retry_after"))
    assert gained["trips"] == trips, _broken("S10: a trip was not counted once", seen)


def other_generations(seen: Seen) -> None:
    """S11: outcomes of other generations change nothing but totals."""
    if seen.step.op not in ("report", "settle") or seen.current or seen.before is None:
        return
    without = replace(seen.step, batch=(), deltas=())
    if seen.step.op == "settle":
        without = replace(seen.step, op="report", deltas=())
    copy = model.load(model.dump(seen.before))
    plain = model.step(copy, without, seen.now).circuit
    both = [
        replace(c, totals=[], n=0, touched=0, ring=[list(b) for b in c.ring])
        for c in (plain, seen.after)
    ]
    assert both[0] == both[1], _broken("S11: a late outcome changed more than totals", seen)


def left(seen: Seen) -> None:
    """S12: what remains lies between nothing and the whole duration, whatever the clock does."""
    state, duration = seen.after.state, seen.after.duration
    if state in ("closed", "half_open"):
        assert seen.reply.remaining == 0, _broken("S12: nothing can remain here", seen)
    elif duration < 0:
        assert state != "open", _broken("S12: open without end", seen)
        assert seen.reply.remaining == -1, _broken("S12: a forced state ends by itself", seen)
    else:
        assert 0 <= seen.reply.remaining <= duration, _broken("S12: out of bounds", seen)


def trips(seen: Seen) -> None:
    """S9: the circuit trips iff the predicate holds after one of the outcomes, and there."""
    before, step = seen.before, seen.step
    if step.op != "report" or before is None or not seen.undisturbed:
        return
    counted, cause = 0, ""
    if seen.current and before.state in ("closed", "forced_closed"):
        if len(before.reporters) >= model.REPORTERS:
            return  # Who is pushed out of a full table is no part of the predicate.
        counted, cause = expected_trip(before, seen.policy, step, seen.now)
    made = seen.events[0].cause if seen.events else ""
    assert made == cause, _broken(f"S9: tripped for {made!r}, expected {cause!r}", seen)
    late = seen.after.totals[INDEX["late"]] - before.totals[INDEX["late"]]
    total = sum(run.count for run in step.batch)
    assert late == total - counted, _broken(f"S9: {counted} outcomes should count", seen)


def quorum(seen: Seen) -> None:
    """S15: one reporter alone never trips a circuit on which another was active."""
    tripped = seen.events and seen.events[-1].cause in JUDGED
    if not tripped or seen.before is None or seen.policy.quorum < 2:
        return
    window = Window.of(seen.before, seen.policy, seen.now)
    others = {n: s for n, s in window.shares.items() if n != seen.step.reporter}
    since = seen.now - max(model.ACTIVE, seen.policy.window)
    if any(s.last >= since for n, s in others.items() if n != "*"):
        shared = any(s.cur + s.prev + s.run > 0 for s in others.values())
        assert shared, _broken("S15: one reporter alone tripped the circuit", seen)


CHECKS = (
    legal_graph,
    generations,
    permits,
    settles,
    not_early,
    windows,
    trips,
    quorum,
    totals,
    other_generations,
    left,
)


# ---------------------------------------------------------------------------- many steps


@dataclass
class History:
    """The rules that look at more than one step of a circuit; tell it of every step in order.

    Tokens are taken to be used for one acquire each, as clients do.
    """

    identities: set[tuple[int, str]] = field(default_factory=set)
    leases: Counter[str] = field(default_factory=Counter)
    succeeded: set[str] = field(default_factory=set)

    def replaced(self, c: Circuit | None) -> None:
        """The store has lost the circuit, or holds an older one now."""
        self.leases = Counter(s.token for s in c.slots) if c is not None else Counter()
        self.succeeded = {f"lost {i}" for i in range(c.successes if c is not None else 0)}

    def observe(self, seen: Seen) -> None:
        """Judge one step by itself and by what came before it."""
        check_step(seen)
        if seen.step.op == "settle" and seen.reply.verdict == "ok":
            self._settled(seen)
        if seen.events:
            for event in seen.events:
                identity = (event.v, seen.step.nonce)
                assert identity not in self.identities, _broken("S2: an identity twice", seen)
                self.identities.add(identity)
            self.leases, self.succeeded = Counter(), set()
        if seen.reply.verdict == "grant" and seen.reply.value > 0:
            self.leases[seen.step.token] = 1

    def _settled(self, seen: Seen) -> None:
        token = seen.step.token
        assert self.leases.pop(token, 0) > 0, _broken("S5: settled, but not granted", seen)
        if seen.step.kind == "s":
            assert token not in self.succeeded, _broken("S6: one token counted twice", seen)
            self.succeeded.add(token)
        if any(e.cause == "recovered" for e in seen.events):
            enough = len(self.succeeded) >= seen.policy.success_threshold
            assert enough, _broken("S6: closed by too few tokens", seen)
