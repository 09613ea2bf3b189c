"""Metrics and span events for OpenTelemetry: what this process does with its circuits.

    instrument()           # after initialize(), once for each process

Metrics are of this process alone, since a backend adds up what processes say of themselves; the
fleet's own figures are for ``prometheus.py``.  A span that is recording gets an event when a call
in it is refused, is answered by a fallback, or changes what this process does with a circuit.  Only
instrumented breakers look for a span: the others are of a class that does not.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from opentelemetry import trace
from opentelemetry.metrics import (
    CallbackOptions,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..linked import Refusal
from ..process import follow_process
from ..registry import CircuitBreakerRegistry
from ..services import current
from ..snapshot import Snapshot
from ..transitions import Transition

NAME = "circuit_breaker.name"
STATE = "circuit_breaker.state"
SOURCE = "circuit_breaker.source"
REASON = "circuit_breaker.reason"
FRESH = 1.0  # s for which all instruments make do with one look

Callback = Callable[[CallbackOptions], Iterable[Observation]]


def instrument(
    registry: CircuitBreakerRegistry | None = None, meter_provider: MeterProvider | None = None
) -> Instrumentation:
    """Export metrics of a registry's circuits, and tell spans what becomes of the calls in them.

    Args:
        registry: whose; None: that of the services that the getters use.
        meter_provider: None: the global one.

    Returns:
        What ``end()`` switches off again.

    Raises:
        ValueError: the registry is instrumented already.
    """
    return Instrumentation(registry or current().registry, meter_provider or get_meter_provider())


class Instrumented(CircuitBreaker):
    """A breaker that tells the current span.  It adds no field, so that breakers that there are can
    become one."""

    transitions: ClassVar[Counter[tuple[str, str, str]]]

    def _rejection(self, now: float, refusal: Refusal | None = None) -> CircuitBreakerOpenException:
        error = super()._rejection(now, refusal)
        _tell("rejected", self.name, error.state, error.source, error.reason)
        return error

    def count_rejection(self) -> None:
        super().count_rejection()
        _, state, source, reason = self._refused
        _tell("rejected", self.name, state, source, reason)

    def count_fallback(self) -> None:
        super().count_fallback()
        _tell("fallback", self.name)

    def _changed(self, change: Transition) -> None:
        # The circuit's lock is held, so nobody else counts the same; to tell a span is to append to
        # a list.  Changes that the link's threads learn of are in nobody's span.
        self.transitions[change.circuit, change.new.value, change.source] += 1
        _tell("transition", self.name, change.new.value, change.source, change.cause)
        super()._changed(change)


def _tell(event: str, circuit: str, state: str = "", source: str = "", reason: str = "") -> None:
    """Add an event to the current span, if it is recording; no call fails for that."""
    span = trace.get_current_span()
    if span.is_recording():
        said = {NAME: circuit, STATE: state, SOURCE: source, "circuit_breaker.reason": reason}
        with contextlib.suppress(Exception):
            span.add_event(
                f"circuit_breaker.{event}", {n: text for n, text in said.items() if text}
            )


class Instrumentation:
    """What ``instrument`` has switched on."""

    def __init__(self, registry: CircuitBreakerRegistry, meter_provider: MeterProvider) -> None:
        if issubclass(registry.kind, Instrumented):
            raise ValueError(
                f"{registry!r} is instrumented already: end() what instrument returned"
            )
        self._registry = registry
        self._transitions = Counter[tuple[str, str, str]]()
        self._looked = float("-inf")
        self._seen: Mapping[str, Snapshot] = {}
        self._on = True
        kind = type("InstrumentedBreaker", (Instrumented,), {"transitions": self._transitions})
        registry.make_with(kind)
        self._make(meter_provider.get_meter("distributed_breaker"))
        follow_process(self)

    def end(self) -> None:
        """Say nothing any more.  Safe to call twice."""
        if self._on:
            self._on = False
            self._registry.make_with(CircuitBreaker)

    def close(self) -> None:
        """At the process's end the exporter may still want to know."""

    def forked(self) -> None:
        """A child has counted nothing yet."""
        self._transitions.clear()
        self._looked = float("-inf")

    # ------------------------------------------------------------------ instruments

    def _make(self, meter: Meter) -> None:
        counter, gauge = meter.create_observable_counter, meter.create_observable_gauge
        level = meter.create_observable_up_down_counter
        level(
            STATE, [self._states], "{process}",
            "Processes that are in this state with a circuit, and who decides so.",
        )  # fmt: skip
        counter(
            "circuit_breaker.transitions", [self._changes], "{transition}",
            "Changes of what a process does with a circuit, by the new state and who decides so.",
        )  # fmt: skip
        counter("circuit_breaker.calls", [self._own("recorded")], "{call}",
                "Calls that have ended.")  # fmt: skip
        counter("circuit_breaker.rejections", [self._own("rejected")], "{call}",
                "Calls that were refused.")  # fmt: skip
        counter("circuit_breaker.fallbacks", [self._own("fallbacks")], "{call}",
                "Calls that a fallback has answered.")  # fmt: skip
        counter("circuit_breaker.outcomes.dropped", [self._own("dropped")], "{outcome}",
                "Outcomes that never reached the store.")  # fmt: skip
        level("circuit_breaker.outcomes.pending", [self._own("pending")], "{outcome}",
              "Outcomes that the store has not acknowledged yet.")  # fmt: skip
        gauge("circuit_breaker.mirror.age", [self._ages], "s",
              "Since when the store has not confirmed what a process goes by.")  # fmt: skip

    def _look(self) -> Mapping[str, Snapshot]:
        """This process's own view; the store is not asked."""
        if not self._on:
            return {}
        if time.monotonic() - self._looked > FRESH:
            self._seen = self._registry.snapshot_here()
            self._looked = time.monotonic()
        return self._seen

    def _own(self, count: str) -> Callback:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(s.local[count], {NAME: name}) for name, s in self._look().items()]

        return observe

    def _states(self, _: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(1, {NAME: name, STATE: s.state.value, SOURCE: s.source})
            for name, s in self._look().items()
        ]

    def _changes(self, _: CallbackOptions) -> Iterable[Observation]:
        counted = list(self._transitions.items()) if self._on else []
        return [
            Observation(count, {NAME: name, STATE: state, SOURCE: source})
            for (name, state, source), count in counted
        ]

    def _ages(self, _: CallbackOptions) -> Iterable[Observation]:
        return [
            Observation(s.mirror_age, {NAME: name})
            for name, s in self._look().items()
            if s.mirror_age is not None
        ]
