"""Everything that can be done to a circuit at one moment under a small policy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product
from typing import NamedTuple

from distributed_breaker import model
from distributed_breaker.model import NOTHING, Circuit, Known, Run, Step
from tests.equivalence.small import FORCED, SECOND, UNKNOWN, Small


class Edge(NamedTuple):
    """One operation at one moment; ``follow`` is False where its result is only compared."""

    step: Step
    now: int
    follow: bool


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
        for at in (era, (max(0, era[0] - 1), era[1]), (era[0], "00000000")):
            yield self._step("settle", era=at, token=token, kind="s")
        yield self._step("settle", era=era, token=UNKNOWN, kind="F")
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
    lefts |= dict.fromkeys(FORCED, (0, small.tick, -1))
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
