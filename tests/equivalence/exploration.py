"""All states of a circuit that a small policy can reach, with every operation in each of them.

``Exploration`` goes breadth first.  Times lie on a grid of ``tick`` ms, on which also the policy's
durations lie, so the states are finite once they are seen as ``shape`` sees them: relative to now,
without what no rule looks at (counters, texts, the exact generation), names in order of appearance,
and counts cut off where more makes no difference.  Every operation is done in every state; those
that leave the grid (one ms before, at and after each deadline, a clock set back) or lead to ever
larger numbers are compared, but not followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from distributed_breaker import model
from distributed_breaker.model import Circuit, Stepped
from distributed_breaker.policy import Numbers
from tests.equivalence.alphabet import Alphabet
from tests.equivalence.small import NOON, Small
from tests.equivalence.twins import Case, Fields, run_model

# Deadlines further away than this many ticks are alike: no path of single ticks gets there.
FAR = 8
Shape = tuple[object, ...]


class Place(NamedTuple):
    """One stored circuit at one moment."""

    fields: Fields | None
    now: int

    def circuit(self) -> Circuit | None:
        """The circuit, unpacked anew."""
        return None if self.fields is None else model.load(self.fields)


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


def shares_of(c: Circuit, small: Small, p: Numbers, now: int, until: Callable[[int], int]) -> Shape:
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
