"""The numbers that rule one circuit, and the words for its states and outcomes.

Pure values: frozen, validated at construction, no I/O and no clock.  ``Policy`` is what a user
writes (seconds, shares between 0 and 1); ``Numbers`` is what the store keeps and both machines
compute with (milliseconds, basis points, percent: whole numbers only, so that Lua and Python
cannot round differently).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple

from .errors import CircuitBreakerOpenException

ErrorTypes = tuple[type[BaseException], ...]


class State(StrEnum):
    """The states of a circuit."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


class Outcome(StrEnum):
    """How a guarded call ended.  ``IGNORED`` is neither a success nor a failure."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"

    def kind(self, slow: bool) -> str:
        """The outcome's letter in a batch: ``s f i``, in capitals when the call was slow."""
        return self.value[0].upper() if slow else self.value[0]


class Numbers(NamedTuple):
    """A policy as the store keeps it: whole numbers in this order, separated by blanks."""

    version: int
    failure_threshold: int
    failure_rate: int  # basis points; 0 = no rate rule
    window: int  # ms
    minimum_calls: int
    slow_call_rate: int  # basis points
    open_interval: int  # ms
    open_interval_max: int  # ms; 0 = constant interval
    backoff_multiplier: int  # percent
    jitter: int  # basis points
    success_threshold: int
    half_open_permits: int
    permit_lease: int  # ms
    quorum: int

    @functools.lru_cache(256)  # noqa: B019 - a policy is a value, and there are few
    def text(self) -> str:
        """The stored text."""
        return " ".join(map(str, self))

    @classmethod
    @functools.lru_cache(256)
    def parse(cls, text: str) -> Numbers | None:
        """Read a stored text; None when it is not a policy or a number is out of range."""
        # A newer library may append numbers: the ones known here are read.
        words = text.split(" ")[: len(cls._fields)]
        usual = all(re.fullmatch("0|[1-9][0-9]{0,15}", word) for word in words)
        if len(words) < len(cls._fields) or not usual:
            return None
        numbers = cls(*map(int, words))
        in_range = all(
            least <= number <= most
            for number, (least, most) in zip(numbers, LIMITS.values(), strict=True)
        )
        return numbers if in_range else None


# The least and the greatest value of each number; the script refuses others.
LIMITS = {
    "version": (0, 9_000_000_000_000_000),
    "failure_threshold": (1, 1_000_000),
    "failure_rate": (0, 10_000),
    "window": (1, 86_400_000),
    "minimum_calls": (1, 1_000_000),
    "slow_call_rate": (1, 10_000),
    "open_interval": (1, 2_592_000_000),
    "open_interval_max": (0, 2_592_000_000),
    "backoff_multiplier": (100, 10_000),
    "jitter": (0, 10_000),
    "success_threshold": (1, 1_000),
    "half_open_permits": (1, 16),
    "permit_lease": (1, 86_400_000),
    "quorum": (1, 8),
}


_WHOLE = ("version", "failure_threshold", "minimum_calls", "success_threshold", "quorum")
_CIRCUIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/-]{0,127}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def check_circuit(name: str) -> str:
    """Return a circuit's name, or raise ValueError saying which characters are allowed."""
    return _check_name("circuit", name, _CIRCUIT, "letters, digits and _ . : @ / -", 128)


def check_namespace(name: str) -> str:
    """Return a namespace, or raise ValueError saying which characters are allowed."""
    return _check_name("namespace", name, _NAMESPACE, "letters, digits and _ . -", 64)


def _check_name(what: str, name: str, grammar: re.Pattern[str], allowed: str, most: int) -> str:
    if not isinstance(name, str) or not grammar.fullmatch(name):
        raise ValueError(
            f"{what} name {name!r} is not allowed: use 1 to {most} characters out of {allowed}, "
            f"beginning with a letter, a digit or _"
        )
    return name


def check_number(name: str, value: float, least: float, most: float) -> float:
    """Return a number within bounds, or raise TypeError or ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} must be a number")
    if math.isnan(value) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must lie between {least:g} and {most:g}")
    return value


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one circuit.  Durations are seconds, rates are shares between 0 and 1.

    A circuit trips when *either* ``failure_threshold`` bad outcomes come in a row *or*, among at
    least ``minimum_calls`` calls of the last ``window`` seconds, the share of failures reaches
    ``failure_rate`` (or that of slow calls ``slow_call_rate``), *and* ``quorum`` processes agree.

    Args:
        failure_threshold: bad outcomes in a row that trip the circuit.
        failure_rate: share of failures that trips it; None switches the rate rule off.
        window: seconds that the rates look back over (12 buckets).
        minimum_calls: the rates are not looked at below this many calls in the window.
        slow_call_duration: seconds from which a call is slow; None: no slow-call rule.
        slow_call_rate: share of slow calls that trips the circuit.
        open_interval: seconds that a circuit stays open before a probe is allowed.
        open_interval_max: upper bound when the interval grows; None keeps it constant.
        backoff_multiplier: factor by which the interval grows from one attempt to the next.
        jitter: share by which an open interval is lengthened at random, the same for the fleet.
        success_threshold: successful probes that close a half-open circuit.
        half_open_permits: probes at a time in the whole fleet, at most 16 and at most
            ``success_threshold``; None: as many as that allows.
        permit_lease: seconds after which a probe that was never settled gives its permit back.
        quorum: how many processes must have seen failures before the fleet trips (1 to 8).
        version: a policy with a higher version is not replaced in the store by a lower one.
        record: exception types that count as failures; other errors are ignored.
        ignore: exceptions to ``record``: they count neither as failure nor as success.
        record_result: predicate; a return value for which it is true counts as a failure.
        measure: whether durations are measured; False saves two clock reads a call.
        auto_recovery: False: a circuit that has opened stays open until an operator resets it.

    The last five and ``slow_call_duration`` are each process's own and never stored.

    Raises:
        ValueError: a value is out of range; the message names it and what is allowed.
        TypeError: a value has the wrong type.
    """

    failure_threshold: int = 5
    failure_rate: float | None = 0.5
    window: float = 60.0
    minimum_calls: int = 10
    slow_call_duration: float | None = None
    slow_call_rate: float = 0.5
    open_interval: float = 60.0
    open_interval_max: float | None = None
    backoff_multiplier: float = 2.0
    jitter: float = 0.1
    success_threshold: int = 3
    half_open_permits: int | None = None
    permit_lease: float = 30.0
    quorum: int = 2
    version: int = 0
    record: ErrorTypes = (Exception,)
    ignore: ErrorTypes = ()
    record_result: Callable[[Any], bool] | None = field(default=None)
    measure: bool = True
    auto_recovery: bool = True

    def __post_init__(self) -> None:
        whole, real = self._whole, self._real
        for name in _WHOLE:
            whole(name, *LIMITS[name])
        if self.half_open_permits is not None:
            whole("half_open_permits", *LIMITS["half_open_permits"])
            if self.half_open_permits > self.success_threshold:
                raise ValueError(
                    f"Policy.half_open_permits={self.half_open_permits} is more than "
                    f"success_threshold={self.success_threshold}: further permits could never "
                    f"be used; lower it or leave it out"
                )
        if self.failure_rate is not None:
            real("failure_rate", 0.0001, 1.0)
        real("slow_call_rate", 0.0001, 1.0)
        real("window", 0.1, 86_400.0)
        real("open_interval", 0.001, 2_592_000.0)
        if self.open_interval_max is not None:
            real("open_interval_max", self.open_interval, 2_592_000.0)
        real("backoff_multiplier", 1.0, 100.0)
        real("jitter", 0.0, 1.0)
        real("permit_lease", 0.01, 86_400.0)
        if self.slow_call_duration is not None:
            real("slow_call_duration", 0.000001, 86_400.0)
            if not self.measure:
                raise ValueError(
                    "Policy.measure=False leaves slow_call_duration without durations to compare: "
                    "set measure=True or slow_call_duration=None"
                )
        for name in ("record", "ignore"):
            object.__setattr__(self, name, self._types(name))
        if self.record_result is not None and not callable(self.record_result):
            raise TypeError(
                f"Policy.record_result={self.record_result!r} must be a function of one return "
                f"value, or None"
            )
        for name in ("measure", "auto_recovery"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Policy.{name}={getattr(self, name)!r} must be True or False")

    def _whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Policy.{name}={value!r} must be a whole number")
        if not least <= value <= most:
            raise ValueError(f"Policy.{name}={value!r} must lie between {least} and {most}")

    def _real(self, name: str, least: float, most: float) -> None:
        check_number(f"Policy.{name}", getattr(self, name), least, most)

    def _types(self, name: str) -> ErrorTypes:
        value = getattr(self, name)
        types = tuple(value) if isinstance(value, tuple | list | set | frozenset) else (value,)
        for one in types:
            if not (isinstance(one, type) and issubclass(one, BaseException)):
                raise TypeError(f"Policy.{name} holds {one!r}, which is not an exception type")
        return types

    @property
    def numbers(self) -> Numbers:
        """The part that the store keeps, in whole numbers."""
        most = LIMITS["half_open_permits"][1]
        permits = self.half_open_permits or min(self.success_threshold, most)
        return Numbers(
            version=self.version,
            failure_threshold=self.failure_threshold,
            failure_rate=round((self.failure_rate or 0) * 10_000),
            window=_ms(self.window),
            minimum_calls=self.minimum_calls,
            slow_call_rate=round(self.slow_call_rate * 10_000),
            open_interval=_ms(self.open_interval),
            open_interval_max=0 if self.open_interval_max is None else _ms(self.open_interval_max),
            backoff_multiplier=round(self.backoff_multiplier * 100),
            jitter=round(self.jitter * 10_000),
            success_threshold=self.success_threshold,
            half_open_permits=permits,
            permit_lease=_ms(self.permit_lease),
            quorum=self.quorum,
        )

    def with_numbers(self, numbers: Numbers) -> Policy:
        """This policy with the numbers that the store keeps, whoever put them there: the script's
        ranges are wider than ours, so they are not validated again."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= _in_seconds(numbers)
        policy = object.__new__(Policy)
        for name, value in values.items():
            object.__setattr__(policy, name, value)
        return policy

    def outcome_of(self, error: BaseException) -> Outcome:
        """Which outcome an exception is.

        Anything but an ``Exception`` (cancellation, KeyboardInterrupt, GeneratorExit) is ignored,
        and so is another circuit's rejection, unless ``record`` names its type itself.
        """
        if isinstance(error, self.ignore) or not isinstance(error, Exception):
            return Outcome.IGNORED
        if isinstance(error, CircuitBreakerOpenException):
            named = [t for t in self.record if issubclass(t, CircuitBreakerOpenException)]
            return Outcome.FAILURE if isinstance(error, tuple(named)) else Outcome.IGNORED
        # An error that is not recorded may come from before the dependency was reached, so it is
        # no success either: it must not close a half-open circuit.
        return Outcome.FAILURE if isinstance(error, self.record) else Outcome.IGNORED

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Policy:
        """Build a policy from the names above; unknown names are errors with a suggestion."""
        allowed = [f.name for f in fields(cls) if f.name not in _CODE_ONLY]
        for name in values:
            if name not in allowed:
                import difflib  # it takes as long as all else that is imported here

                near = difflib.get_close_matches(str(name), allowed, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {allowed}"
                raise ValueError(f"Policy has no setting {name!r}{hint}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Build a policy from a JSON object with the names above."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a policy is a JSON object, not {values!r}")
        return cls.from_mapping(values)


# Settings that hold code; JSON cannot carry them.
_CODE_ONLY = frozenset({"record", "ignore", "record_result"})


def _in_seconds(numbers: Numbers) -> dict[str, Any]:
    return {
        "version": numbers.version,
        "failure_threshold": numbers.failure_threshold,
        "failure_rate": numbers.failure_rate / 10_000 or None,
        "window": numbers.window / 1000,
        "minimum_calls": numbers.minimum_calls,
        "slow_call_rate": numbers.slow_call_rate / 10_000,
        "open_interval": numbers.open_interval / 1000,
        "open_interval_max": numbers.open_interval_max / 1000 or None,
        "backoff_multiplier": numbers.backoff_multiplier / 100,
        "jitter": numbers.jitter / 10_000,
        "success_threshold": numbers.success_threshold,
        "half_open_permits": numbers.half_open_permits,
        "permit_lease": numbers.permit_lease / 1000,
        "quorum": numbers.quorum,
    }
