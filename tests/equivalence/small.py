"""Small policies, everything that can be done to a circuit under them, and all its states.

``Exploration`` goes breadth first over the states that a small policy can reach and yields every
operation in every state.  Times lie on a grid of ``tick`` ms, on which also the policy's durations
lie, so the states are finite once they are seen as ``shape`` sees them: relative to now, without
what no rule looks at (counters, texts, the exact generation), names in order of appearance, and
counts cut off where more makes no difference.  Every operation is done in every state; those that
leave the grid (one ms before, at and after each deadline, a clock set back) or lead to ever larger
numbers are compared, but not followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, product
from typing import NamedTuple

from distributed_breaker import model
from distributed_breaker.model import NOTHING, Circuit, Known, Run, Step, Stepped
from distributed_breaker.policy import Numbers

from tests.equivalence.twins import Case, Fields, run_model

# A multiple of every tick, so that the grid lies on the buckets' bounds.
NOON = 1_764_000_000_000
SECOND = 1000
# Deadlines further away than this many ticks are alike: no path of single ticks gets there.
FAR = 8
Shape = tuple[object, ...]
FORCED = ("forced_open", "forced_closed")
UNKNOWN = "nobody"


@dataclass(frozen=True)
class Small:
    """A small policy with the bounds within which its states are explored.

    ``states`` is how many there are at least; ``jumps`` are the times that may pass between two steps; ``kinds`` the outcomes that lead on;
    ``most_calls`` bounds the calls in the window; ``jitters`` are the first halves of the nonces;
    ``drifts`` also follows the offered policies, ``rewinds`` a clock that is set back.
    """

    name: str
    states: int
    numbers: Numbers
    tick: int
    jumps: tuple[int, ...]
    kinds: str = "sf"
    reporters: tuple[str, ...] = ("a",)
    tokens: tuple[str, ...] = ("t",)
    most_calls: int = 3
    jitters: tuple[str, ...] = ("0000",)
    drifts: bool = False
    rewinds: bool = False

    @property
    def offers(self) -> tuple[Numbers, ...]:
        """Policies that clients offer: the same, newer with other numbers, older."""
        p = self.numbers
        fewer = {"half_open_permits": 1, "success_threshold": 1}
        newer = p._replace(version=p.version + 1, window=2 * p.window, **fewer)
        return p, newer, p._replace(version=p.version - 1, failure_threshold=9)


def numbers(**changes: int) -> Numbers:
    """A small policy in the store's units; as it is, one probe closes and the slow rule sleeps."""
    plain = Numbers(
        version=1,
        failure_threshold=2,
        failure_rate=0,
        window=24,
        minimum_calls=50,
        slow_call_rate=10_000,
        open_interval=12,
        open_interval_max=0,
        backoff_multiplier=200,
        jitter=0,
        success_threshold=1,
        half_open_permits=1,
        permit_lease=12,
        quorum=1,
    )
    return plain._replace(**changes)


HALF_MINUTE = 30 * SECOND
# A minute of window makes a reporter's 60 seconds of activity two ticks long.
MINUTE = {
    "window": 2 * HALF_MINUTE,
    "open_interval": HALF_MINUTE,
    "permit_lease": HALF_MINUTE,
}

SMALL = (
    Small(
        "run rule, backoff, clock set back",
        150,
        numbers(success_threshold=2, open_interval_max=24),
        tick=12,
        jumps=(12, 61 * SECOND),
        rewinds=True,
    ),
    Small(
        "run rule, quorum 2, two permits",
        650,
        numbers(failure_threshold=3, success_threshold=2, half_open_permits=2, quorum=2, **MINUTE),
        tick=HALF_MINUTE,
        jumps=(HALF_MINUTE,),
        reporters=("a", "b"),
        tokens=("t", "u"),
    ),
    Small(
        "rate rule, jitter",
        100,
        numbers(failure_threshold=9, failure_rate=5_000, minimum_calls=2, jitter=5_000, **MINUTE),
        tick=HALF_MINUTE,
        jumps=(HALF_MINUTE,),
        jitters=("0000", "8000"),
    ),
    Small(
        "slow and rate rules, quorum 2",
        500,
        numbers(failure_threshold=3, failure_rate=6_000, slow_call_rate=5_000, minimum_calls=2, quorum=2),
        tick=12,
        jumps=(12, 61 * SECOND),
        kinds="sfSI",
        reporters=("a", "b"),
        most_calls=2,
    ),
    Small(
        "all rules, policies that drift",
        250,
        numbers(failure_rate=5_000, minimum_calls=2, half_open_permits=2, success_threshold=2),
        tick=12,
        jumps=(12,),
        kinds="sf",
        tokens=("t", "u"),
        most_calls=2,
        drifts=True,
    ),
)


class Place(NamedTuple):
    """One stored circuit at one moment."""

    fields: Fields | None
    now: int

    def circuit(self) -> Circuit | None:
        """The circuit, unpacked anew."""
        return None if self.fields is None else model.load(self.fields)


class Edge(NamedTuple):
    """One operation at one moment; ``follow`` is False where its result is only compared."""

    step: Step
    now: int
    follow: bool


# ---------------------------------------------------------------------------- operations


class Alphabet:
    """Everything that can be done to one circuit at one moment under a small policy."""

    def __init__(self, small: Small) -> None:
        self.small = small
        self._number = count()

    def _step(self, op: str, jitter: str = "", **arguments: object) -> Step:
        nonce = (jitter or self.small.jitters[0]) + f"{next(self._number) * 40_503 % 65_536:04x}"
        return Step(op, nonce, arguments.pop("policy", self.small.numbers), **arguments)

    def edges(self, c: Circuit | None, now: int) -> Iterator[Edge]:
        """Every operation now, and a few of them around every deadline."""
        era = (c.v, c.nonce) if c is not None else (0, "-")
        known = knows(c, now)
        follow, compare = self._here(c, era, known, now)
        yield from (Edge(step, now, True) for step in follow)
        yield from (Edge(step, now, False) for step in compare)
        for moment in sorted(moments(c, self.small, now)):
            yield from (Edge(step, moment, False) for step in self._probes(c, era, known))

    def _here(
        self, c: Circuit | None, era: tuple[int, str], known: Known, now: int
    ) -> tuple[list[Step], list[Step]]:
        small, step = self.small, self._step
        follow: list[Step] = []
        compare: list[Step] = []
        mine = {"known": known, "era": era}
        for reporter, kind in product(small.reporters, small.kinds):
            for jitter in small.jitters if kind == "f" else small.jitters[:1]:
                batch = (Run(kind),)
                follow.append(step("report", jitter, reporter=reporter, batch=batch, **mine))
        for token in small.tokens:
            follow.append(step("acquire", known=known, token=token))
            follow.append(step("cancel", known=known, token=token))
            follow += [step("settle", token=token, kind=kind, **mine) for kind in "sfi"]
        for kind in "sfiSFI":
            reporter, token = small.reporters[-1], small.tokens[0]
            if kind not in small.kinds:
                compare.append(step("report", reporter=reporter, batch=(Run(kind),), **mine))
            if kind not in "sfi":
                compare.append(step("settle", token=token, kind=kind, **mine))
        for kind, ttl in product(FORCED, (-1, small.tick)):
            follow.append(step("override", known=known, kind=kind, ttl=ttl, detail="by hand"))
        follow += [step("release", known=known), step("reset", known=known)]
        for other in knowledge(c, small, now):
            follow.append(step("report", known=other))
            if c is None:
                rest = ("acquire", "settle", "cancel", "release", "reset")
                compare += [step(op, known=other, token=UNKNOWN) for op in rest]
                compare.append(step("override", known=other, kind=FORCED[0]))
        for other in odd_knowledge(c, small, now):
            compare += [step(op, known=other, token=UNKNOWN) for op in ("acquire", "release")]
        for policy in small.offers:
            for offer in (True, False):
                one = step("report", known=known, policy=policy, offer=offer)
                (follow if small.drifts else compare).append(one)
        compare += self._batches(c, era, known, now)
        compare += self._settles(era, known)
        return follow, compare

    def _batches(
        self, c: Circuit | None, era: tuple[int, str], known: Known, now: int
    ) -> Iterator[Step]:
        """Batches of more than one outcome, with ages, with open_for, of other generations."""
        first, last = self.small.reporters[0], self.small.reporters[-1]
        since = max(0, now - c.since) if c is not None else 0
        tick = self.small.tick
        for batch in (
            (Run("f", 2),),
            (Run("s", 3), Run("f", 3)),
            (Run("f"), Run("s"), Run("F"), Run("S", 2)),
            (Run("i", 2), Run("I", 2), Run("f")),
            (Run("f", 1, tick // 2),),
            (Run("i", 1, 100 * tick), Run("s")),
            (Run("s", 1, 1),),
            (Run("f", 1, -1 + 1, since), Run("f", 1, 0, since + 1), Run("f", 1, 0, 0)),
        ):
            yield self._step("report", known=known, era=era, reporter=last, batch=batch)
        for stale in ((max(0, era[0] - 1), era[1]), (era[0], "00000000"), (era[0] + 1, era[1])):
            one = (Run("f", 2),)
            yield self._step("report", known=known, era=stale, reporter=first, batch=one)
        deltas = (("rejected", 2), ("dropped", 1), ("duration_us", 7), ("b0", 1), ("b15", 1))
        yield self._step("report", reporter=first, deltas=deltas, detail="x y")

    def _settles(self, era: tuple[int, str], known: Known) -> Iterator[Step]:
        """Settles that come late, twice, or with open_for; tokens that nobody has."""
        token, tick = self.small.tokens[0], self.small.tick
        for kind in "fis":
            yield self._step(
                "settle", known=known, era=era, token=token, kind=kind, open_for=tick // 2
            )
        for retry in (False, True):
            for at in (era, (max(0, era[0] - 1), era[1]), (era[0], "00000000")):
                yield self._step("settle", era=at, token=token, kind="s", retry=retry)
            yield self._step("settle", era=era, token=UNKNOWN, kind="F", retry=retry)
        deltas = (("fallbacks", 1), ("b3", 2))
        yield self._step("settle", era=era, token=token, kind="s", deltas=deltas, detail="x")
        yield self._step("acquire", known=known, token=UNKNOWN)
        yield self._step("cancel", token=UNKNOWN)

    def _probes(self, c: Circuit | None, era: tuple[int, str], known: Known) -> Iterator[Step]:
        """What may turn out differently a millisecond later."""
        reporter, token = self.small.reporters[-1], self.small.tokens[-1]
        yield self._step("report")
        yield self._step("report", era=era, reporter=reporter, batch=(Run("f"),))
        if c is not None and c.fresh:
            longer = Known(c.v - 1, "0000000f", "open", 10 * self.small.tick)
            yield self._step("report", known=longer)
        if c is not None and c.state not in ("closed", "forced_closed"):
            yield self._step("acquire", known=known, token=token)
            yield self._step("settle", known=known, era=era, token=token, kind="s")


def knows(c: Circuit | None, now: int) -> Known:
    """What a client knows that is up to date."""
    if c is None:
        return NOTHING
    left = model.remaining(c.state, c.since, c.duration, now)
    return Known(c.v, c.nonce, c.state, left, c.attempt)


def knowledge(c: Circuit | None, small: Small, now: int) -> Iterator[Known]:
    """Nothing, and every state with and without time left, newer and (while it counts) older."""
    yield NOTHING
    v = c.v if c is not None else now - SECOND
    fresh = c is not None and c.fresh and (small.rewinds or now - c.since < model.FRESH)
    lefts = {"closed": (0,), "half_open": (0,), "open": (0, small.tick)}
    lefts |= {state: (0, small.tick, -1) for state in FORCED}
    for state, remaining in lefts.items():
        for left in remaining:
            attempt = 1 if state == "open" else 0
            yield Known(v + 1, "0000000e", state, left, attempt)
            if fresh:
                yield Known(v - 1, "0000000e", state, left, attempt)


def odd_knowledge(c: Circuit | None, small: Small, now: int) -> Iterator[Known]:
    """The same generation from elsewhere, the longest backoff, and times left at the margin."""
    if c is None:
        return
    yield Known(c.v, "0000000e", "forced_open", -1, 0)
    yield Known(c.v - 1, "0000000e", "forced_open", -1, 0)
    for state, left in (("closed", 0), ("half_open", 0), ("forced_open", -1)):
        yield Known(c.v + 1, "0000000e", state, left, 0)
    yield Known(c.v + 1, "0000000e", "open", small.tick, model.MAX_ATTEMPT)
    left = max(0, model.remaining(c.state, c.since, c.duration, now))
    for more in (model.FRESH_MARGIN, model.FRESH_MARGIN + 1):
        yield Known(c.v - 1, "0000000e", "open", left + more, 0)


def moments(c: Circuit | None, small: Small, now: int) -> set[int]:
    """A ms before, at and after every deadline, and a clock that is a little or far behind."""
    if c is None:
        return set()
    deadlines = {c.since + c.duration, c.touched + model.HOUR}
    if c.fresh:
        deadlines.add(c.since + model.FRESH)
    deadlines |= {slot.since + slot.lease for slot in c.slots}
    deadlines |= {r.last + max(model.ACTIVE, small.numbers.window) for r in c.reporters}
    around = {deadline + step for deadline in deadlines for step in (-1, 0, 1)}
    return {moment for moment in around if moment > now} | {c.since - 1, now - 5 * small.tick}


# ---------------------------------------------------------------------------- states


def shape(c: Circuit | None, small: Small, now: int) -> Shape:
    """What the rules see of a circuit: two circuits of one shape behave alike from now on."""
    if c is None:
        return ()
    p = c.policy or small.numbers

    def until(moment: int) -> int:
        return min(max(0, moment - now), FAR * small.tick)

    timed = small.rewinds or c.state != "half_open"
    return (
        c.state,
        p,
        until(c.since + model.FRESH) if c.fresh else 0,
        c.fresh and small.rewinds,
        until(c.since + c.duration) if timed else 0,
        c.duration if small.rewinds or c.state != "closed" else 0,
        c.since > now,
        attempt_of(c, p),
        c.successes,
        tuple(until(min(s.since, now) + s.lease) for s in c.slots),
        named(small.tokens, [s.token for s in c.slots]),
        min(c.run, p.failure_threshold) if c.state == "closed" else 0,
        window_of(c, small, p, now),
        shares_of(c, small, p, now, until),
        c.touched == 0,
    )


def attempt_of(c: Circuit, p: Numbers) -> int:
    """Attempts are alike from the one on that reaches the longest interval."""
    if p.open_interval_max == 0:
        return 0
    for attempt in range(c.attempt):
        if model.open_duration(p, attempt, "00000000") >= p.open_interval_max:
            return attempt
    return c.attempt


def named(names: tuple[str, ...], used: list[str]) -> tuple[int, ...]:
    """Names are interchangeable: only which of them are the same counts."""
    order = list(dict.fromkeys(name for name in used if name in names))
    return tuple(order.index(name) if name in order else -1 for name in used)


def window_of(c: Circuit, small: Small, p: Numbers, now: int) -> Shape:
    """What the rate rules look at, by age."""
    if c.state != "closed" or p.minimum_calls > small.most_calls:
        return ()
    shift = max(0, now // max(1, p.window // model.BUCKETS) - c.head)
    return tuple(
        (offset + shift, calls, failures if p.failure_rate else 0, slow)
        for offset, (calls, failures, slow) in enumerate(c.ring)
        if calls > 0 and offset + shift < model.BUCKETS
    )


def shares_of(
    c: Circuit, small: Small, p: Numbers, now: int, until: Callable[[int], int]
) -> Shape:
    """What the quorum looks at: who was active, and each one's share up to what it may count."""
    if p.quorum < 2:
        return ()
    cap = max(p.failure_threshold, p.quorum)
    halves = now // max(1, p.window // 2) - c.half
    rates = p.minimum_calls <= small.most_calls
    shares = []
    for r in c.reporters:
        seen = until(r.last + max(model.ACTIVE, p.window) + 1)
        cur, prev = (r.cur, r.prev) if halves <= 0 else (0, r.cur if halves == 1 else 0)
        window = (min(cur, cap), min(prev, cap)) if rates else ()
        judged = (min(r.run, cap), window) if c.state == "closed" else ()
        shares.append((seen, r.last > now, judged))
    return tuple(shares)


# ---------------------------------------------------------------------------- exploration


class Exploration:
    """Iterating over it goes through every operation in every state, breadth first.

    It ends by itself.  Then ``states`` holds one circuit of each shape, and ``others`` another one
    of the same shape, where there was one.
    """

    def __init__(self, small: Small) -> None:
        self.small = small
        self.alphabet = Alphabet(small)
        self.states: dict[Shape, Place] = {shape(None, small, NOON): Place(None, NOON)}
        self.others: dict[Shape, Place] = {}

    def __iter__(self) -> Iterator[tuple[Case, Stepped]]:
        frontier = list(self.states.values())
        while frontier:
            later: list[Place] = []
            for place in frontier:
                for edge in self.alphabet.edges(place.circuit(), place.now):
                    case = Case(place.fields, edge.step, edge.now)
                    stepped = run_model(case)
                    yield case, stepped
                    if edge.follow:
                        after = model.dump(stepped.circuit) if stepped.dirty else place.fields
                        later += self._visit(stepped.circuit, after, edge.now)
                for moment in self._later(place):
                    later += self._visit(place.circuit(), place.fields, moment)
            frontier = later

    def outcomes(self, place: Place) -> Counter[tuple[object, ...]]:
        """What may come next in one state, as far as the rules see it."""
        next_ones: Counter[tuple[object, ...]] = Counter()
        for step, now, follow in self.alphabet.edges(place.circuit(), place.now):
            if follow:
                circuit, reply, *_ = run_model(Case(place.fields, step, now))
                after = shape(circuit, self.small, now)
                next_ones[(step.op, step.kind, reply.verdict, reply.cause, after)] += 1
        for moment in self._later(place):
            next_ones[(shape(place.circuit(), self.small, moment),)] += 1
        return next_ones

    def _later(self, place: Place) -> Iterator[int]:
        c = place.circuit()
        # Without a circuit no time matters, and a clock that was set back stays so until a step.
        if c is None or c.since > place.now:
            return
        yield from (place.now + jump for jump in self.small.jumps)
        if self.small.rewinds:
            yield c.since - self.small.tick

    def _visit(self, c: Circuit | None, fields: Fields | None, now: int) -> list[Place]:
        if c is not None and sum(bucket[0] for bucket in c.ring) > self.small.most_calls:
            return []
        key, place = shape(c, self.small, now), Place(fields, now)
        if key in self.states:
            if self.states[key].fields != fields:
                self.others[key] = place
            return []
        self.states[key] = place
        return [place]
