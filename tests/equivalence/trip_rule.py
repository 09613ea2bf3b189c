"""The trip rule done the plain way: one outcome at a time, with exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from distributed_breaker import model
from distributed_breaker.model import Circuit, Run, Step
from distributed_breaker.policy import Numbers


@dataclass
class Share:
    last: int
    cur: int
    prev: int
    run: int


@dataclass
class Window:
    """A circuit's window, run and shares as they are at ``now``."""

    p: Numbers
    now: int
    calls: int
    failures: int
    slow: int
    run: int
    shares: dict[str, Share]

    @classmethod
    def of(cls, c: Circuit, p: Numbers, now: int) -> Window:
        age = max(0, now // max(1, p.window // model.BUCKETS) - c.head)
        alive = [b for i, b in enumerate(c.ring) if i + age < model.BUCKETS]
        turned = now // max(1, p.window // 2) - c.half
        shares = {}
        for r in c.reporters:
            cur, prev = (r.cur, r.prev) if turned <= 0 else (0, r.cur if turned == 1 else 0)
            shares[r.id] = Share(min(r.last, now), cur, prev, r.run)
        sums = [sum(b[i] for b in alive) for i in range(3)]
        return cls(p, now, *sums, c.run, shares)

    def add(self, reporter: str, kind: str) -> None:
        share = self.shares.setdefault(reporter, Share(0, 0, 0, 0))
        share.last = self.now
        self.calls += 1
        if kind == "s":
            self.run = 0
            for other in self.shares.values():
                other.run = 0
            return
        self.failures += kind in "fF"
        self.slow += kind in "SFI"
        self.run += 1
        share.run += 1
        share.cur += 1

    def cause(self) -> str:
        p = self.p
        if self.run >= p.failure_threshold and self.agreed(
            p.failure_threshold, {name: s.run for name, s in self.shares.items()}
        ):
            return "run"
        for cause, bad, points in (
            ("rate", self.failures, p.failure_rate),
            ("slow", self.slow, p.slow_call_rate),
        ):
            if not points or not bad or self.calls < p.minimum_calls:
                continue
            rate = Fraction(points, 10_000)
            if Fraction(bad, self.calls) >= rate:
                need = min(
                    p.failure_threshold, -(-rate.numerator * p.minimum_calls // rate.denominator)
                )
                both = {name: s.cur + s.prev for name, s in self.shares.items()}
                if self.agreed(need, both):
                    return cause
        return ""

    def agreed(self, need: int, bad: dict[str, int]) -> bool:
        since = self.now - max(model.ACTIVE, self.p.window)
        here = [name for name, s in self.shares.items() if name != "*" and s.last >= since]
        q = min(self.p.quorum, len(here))
        if q < 2:
            return True
        need = max(need, q)
        most = -(-need // q)
        return sum(n if name == "*" else min(n, most) for name, n in bad.items()) >= need


def expected_trip(c: Circuit, p: Numbers, step: Step, now: int) -> tuple[int, str]:
    """How many outcomes of the batch count, and the cause of the trip that the last one makes."""
    window = Window.of(c, p, now)
    counted = 0
    for run in step.batch:
        if run.age >= 0 and now - run.age < min(c.since, now):
            continue
        for _ in range(run.count):
            counted += 1
            if run.kind != "i":
                window.add(step.reporter, run.kind)
            elif not run.open_for:
                continue
            cause = "retry_after" if run.open_for else window.cause()
            if cause and c.state == "closed":
                # An ignored outcome that carries open_for counts with its whole run of one.
                return counted, cause
    return counted, ""


def one_by_one(batch: Sequence[Run]) -> tuple[Run, ...]:
    """The same outcomes in the same order, every one a run of its own."""
    return tuple(run._replace(count=1) for run in batch for _ in range(run.count))
