"""Figures and what they say: spreads, rows that compare, and the verdict on each.

Pure: nothing here measures, prints or reads a file, so that the tests can judge the judge.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

OURS = "distributed_breaker"

# Two medians that differ by less are the same figure: a machine with other work shows such
# differences between two measurements of one thing.
LEVEL_WITHIN = 0.03


@dataclass(frozen=True)
class Spread:
    """What repeated measurements gave: the least, the quartiles, the greatest."""

    least: float
    low: float
    median: float
    high: float
    most: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up measurements, of which there is at least one."""
        ordered = sorted(values)
        if len(ordered) == 1:
            only = ordered[0]
            return cls(only, only, only, only, only, 1)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(ordered[0], low, median, high, ordered[-1], len(ordered))

    @classmethod
    def exactly(cls, value: float) -> Spread:
        """One figure that was counted, not sampled."""
        return cls.of([value])


class Verdict(StrEnum):
    """How ours compares with the best of the others."""

    AHEAD = "ahead"
    LEVEL = "level"
    BEHIND = "behind"
    ALONE = "no peer"


@dataclass(frozen=True)
class Row:
    """One thing that was measured of ours, and of each peer that has it.

    Attributes:
        name: what was measured; with its topic's name the key under which reasons are filed.
        unit: of all its figures.
        ours: None when ours was not measured; that counts as behind.
        peers: title → figures.
        more_is_better: of throughput; everything else is a cost.
        target: what ours is meant to reach, in words.
        extra: further columns, in words: ratios within this run.
        note: what a reader must know of this row.
        noise: up to here a figure is the machine's doing, whoever was measured.
    """

    name: str
    unit: str
    ours: Spread | None
    peers: Mapping[str, Spread] = field(default_factory=dict)
    more_is_better: bool = False
    target: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    noise: float = 0.0

    def best(self) -> tuple[str, Spread] | None:
        """The best peer by its median, None without a peer."""
        if not self.peers:
            return None
        choose = max if self.more_is_better else min
        return choose(self.peers.items(), key=lambda item: item[1].median)

    def ratio(self) -> float | None:
        """How many times better ours is than the best peer; below 1 it is worse."""
        best = self.best()
        if best is None or self.ours is None:
            return None
        ours, theirs = self.ours.median, best[1].median
        good, bad = (ours, theirs) if self.more_is_better else (theirs, ours)
        if bad <= 0:
            return 1.0 if good <= 0 else math.inf
        return max(0.0, good / bad)

    @property
    def verdict(self) -> Verdict:
        """Level when the medians are within 3 %, or the middle halves of the samples overlap, or
        both are noise."""
        best = self.best()
        if best is None:
            return Verdict.ALONE
        if self.ours is None:
            return Verdict.BEHIND
        ratio, theirs = self.ratio(), best[1]
        assert ratio is not None
        sampled = self.ours.samples > 1 and theirs.samples > 1
        overlap = sampled and self.ours.low <= theirs.high and theirs.low <= self.ours.high
        noise = not self.more_is_better and max(self.ours.median, theirs.median) <= self.noise
        if overlap or noise or abs(ratio - 1) <= LEVEL_WITHIN:
            return Verdict.LEVEL
        return Verdict.AHEAD if ratio > 1 else Verdict.BEHIND


@dataclass(frozen=True)
class Topic:
    """The rows of one topic.

    Attributes:
        key: its name on the command line.
        title: what is measured.
        method: how, in full sentences, with the configurations that were compared.
        rows: the figures.
        limits: what a peer could not do here, and why.
        drawn: the names of the rows that are drawn.
    """

    key: str
    title: str
    method: str
    rows: Sequence[Row]
    limits: Sequence[str] = ()
    drawn: Sequence[str] = ()


@dataclass(frozen=True)
class Judgement:
    """A row with its verdict and, where ours is not ahead, the reason that is on file."""

    topic: str
    row: Row
    verdict: Verdict
    reason: str

    @property
    def unexplained(self) -> bool:
        return self.verdict is Verdict.BEHIND and not self.reason


def judge(topics: Sequence[Topic], reasons: Mapping[str, str]) -> list[Judgement]:
    """Give each row its verdict.

    ``reasons`` maps patterns of ``topic: row`` (as in fnmatch) to a reason; the first that fits is
    taken, for rows where ours is behind or level.
    """
    judged = []
    for topic in topics:
        for row in topic.rows:
            verdict = row.verdict
            reason = ""
            if verdict in (Verdict.BEHIND, Verdict.LEVEL):
                key = f"{topic.key}: {row.name}"
                fitting = (text for pattern, text in reasons.items() if fnmatchcase(key, pattern))
                reason = next(fitting, "")
            judged.append(Judgement(topic.key, row, verdict, reason))
    return judged


def number(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value == 0:
        return "0"
    if math.isinf(value):
        return "∞"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text and digits > 2 else text


def times(ratio: float | None) -> str:
    """A ratio in words: ``2.5×``."""
    return "–" if ratio is None else f"{number(ratio)}×"
