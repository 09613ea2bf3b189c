"""As much of PromQL as the alert rules and the dashboard use, evaluated on two expositions.

It is no Prometheus: matching is one to one on all labels, ``rate`` is the difference of the two
divided by the time between them, and there is no staleness.  It is strict where Prometheus is
lenient: a metric that is not exported, and a label that none of its series has, are errors.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from distributed_breaker.monitoring.prometheus import FAMILIES
from tests.monitoring.exported import Exported

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?![\w.]))|(?P<word>[A-Za-z_]\w*)"
    r'|(?P<text>"[^"]*")|(?P<range>\[[^\]]+\])|(?P<sign>=~|!~|==|!=|>=|<=|[-+*/<>=(){},]))'
)
AGGREGATIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum, "max": max, "min": min, "count": len,
}  # fmt: skip
SIGNS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
    ">=": operator.ge, "<=": operator.le,
}  # fmt: skip
COMPARISONS = ("==", "!=", ">", "<", ">=", "<=")
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
EXPORTED = {family.name + suffix for family in FAMILIES for suffix in SUFFIXES[family.kind]}

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]


class Scene(NamedTuple):
    """What is evaluated on: two expositions, the seconds between them, and when it is."""

    before: Exported
    now: Exported
    seconds: float = 300.0
    at: float = 0.0


def evaluate(text: str, scene: Scene) -> Vector | float:
    """The value of an expression."""
    return _Evaluation(text, scene).whole()


class _Evaluation:
    def __init__(self, text: str, scene: Scene) -> None:
        self._scene = scene
        self._tokens: list[str] = []
        at = 0
        while at < len(text.rstrip()):
            found = TOKEN.match(text, at)
            assert found, f"can't be read: {text[at:]!r}"
            self._tokens.append(found[0].strip())
            at = found.end()
        self._tokens.append("")

    def whole(self) -> Vector | float:
        value = self._or()
        assert self._tokens == [""], f"too much: {self._tokens}"
        return value

    # ------------------------------------------------------------------ tokens

    def _next(self, *wanted: str) -> str:
        token = self._tokens.pop(0)
        assert not wanted or token in wanted, f"{token!r} and not one of {wanted}"
        return token

    def _if(self, *wanted: str) -> str:
        return self._tokens.pop(0) if self._tokens[0] in wanted else ""

    # ------------------------------------------------------------------ signs between values

    def _or(self) -> Vector | float:
        value = self._and()
        while self._if("or"):
            other = _vector(self._and())
            value = {**other, **_vector(value)}
        return value

    def _and(self) -> Vector | float:
        value = self._compared()
        while self._if("and"):
            other = _vector(self._compared())
            value = {labels: v for labels, v in _vector(value).items() if labels in other}
        return value

    def _compared(self) -> Vector | float:
        value = self._sum()
        while sign := self._if(*COMPARISONS):
            value = _both(sign, value, self._sum())
        return value

    def _sum(self) -> Vector | float:
        value = self._product()
        while sign := self._if("+", "-"):
            value = _both(sign, value, self._product())
        return value

    def _product(self) -> Vector | float:
        value = self._one()
        while sign := self._if("*", "/"):
            value = _both(sign, value, self._one())
        return value

    # ------------------------------------------------------------------ one value

    def _one(self) -> Vector | float:
        token = self._next()
        if token == "(":
            value = self._or()
            self._next(")")
            return value
        if token[0].isdigit():
            return float(token)
        if token in AGGREGATIONS:
            return self._aggregated(token)
        if token in ("rate", "increase"):
            self._next("(")
            growth = self._grown(self._next())
            self._next(")")
            seconds = self._scene.seconds if token == "rate" else 1.0
            return {labels: value / seconds for labels, value in growth.items()}
        if token == "time":
            self._next("(")
            self._next(")")
            return self._scene.at
        if token == "histogram_quantile":
            self._next("(")
            share = float(self._next())
            self._next(",")
            buckets = _vector(self._or())
            self._next(")")
            return _quantile(share, buckets)
        return self._selected(token, self._scene.now)

    def _aggregated(self, name: str) -> Vector:
        how = self._if("by", "without")
        asked = set(self._listed("(", ")")) if how else set()
        self._next("(")
        vector = _vector(self._or())
        self._next(")")
        there = {label for labels in vector for label, _ in labels}
        assert not vector or asked <= there, f"{name} {how} {asked - there}: no series has it"
        groups: dict[Labels, list[float]] = {}
        for labels, value in vector.items():
            key = frozenset(label for label in labels if (label[0] in asked) is (how != "without"))
            groups.setdefault(key, []).append(value)
        return {labels: AGGREGATIONS[name](values) for labels, values in groups.items()}

    def _listed(self, start: str, end: str) -> list[str]:
        self._next(start)
        tokens = self._tokens[: self._tokens.index(end)]
        del self._tokens[: len(tokens) + 1]
        return [token for token in tokens if token != ","]

    def _selected(self, name: str, exported: Exported) -> Vector:
        """The series of one metric that match; the metric and the labels must be known."""
        assert name in EXPORTED, f"{name} is not exported"
        found = {labels: value for (_, labels), value in exported.all(name)}
        there = {label for labels in found for label, _ in labels}
        matchers = self._listed("{", "}") if self._tokens[0] == "{" else []
        for label, sign, text in zip(*[iter(matchers)] * 3, strict=True):
            assert not found or label in there, f"{name} has no label {label}"
            pattern = text[1:-1] if "~" in sign else re.escape(text[1:-1])
            found = {
                labels: value
                for labels, value in found.items()
                if bool(re.fullmatch(pattern, dict(labels).get(label, ""))) is ("!" not in sign)
            }
        return found

    def _grown(self, name: str) -> Vector:
        """By how much each series has grown; one that was not there before has not."""
        rest = list(self._tokens)
        before = self._selected(name, self._scene.before)
        self._tokens = rest
        now = self._selected(name, self._scene.now)
        assert self._next().startswith("["), f"rate({name}) wants a range"
        assert name.endswith(("_total", "_bucket", "_sum", "_count")), f"{name} is no counter"
        return {labels: value - before[labels] for labels, value in now.items() if labels in before}


def _both(sign: str, left: Vector | float, right: Vector | float) -> Vector | float:
    """One to one on all labels; a comparison of a vector keeps what it is true of."""
    if isinstance(left, float):
        if isinstance(right, float):
            return float(SIGNS[sign](left, right))
        return {labels: SIGNS[sign](left, value) for labels, value in right.items()}
    pairs = {
        labels: (value, right if isinstance(right, float) else right[labels])
        for labels, value in left.items()
        if isinstance(right, float) or labels in right
    }
    if sign in COMPARISONS:
        return {labels: pair[0] for labels, pair in pairs.items() if SIGNS[sign](*pair)}
    if sign == "/":
        pairs = {
            labels: pair for labels, pair in pairs.items() if pair[1]
        }  # NaN compares to nothing
    return {labels: SIGNS[sign](*pair) for labels, pair in pairs.items()}


def _quantile(share: float, buckets: Vector) -> Vector:
    """The upper bound of the bucket in which it lies, for each set of the other labels."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in buckets.items():
        others = frozenset(label for label in labels if label[0] != "le")
        assert len(others) < len(labels), "a quantile needs the label le"
        groups.setdefault(others, []).append((float(dict(labels)["le"]), value))
    return {
        labels: min(le for le, count in found if count >= share * max(found)[1])
        for labels, found in groups.items()
        if max(found)[1]
    }


def _vector(value: Vector | float) -> Vector:
    assert isinstance(value, dict), "a vector is wanted here"
    return value
