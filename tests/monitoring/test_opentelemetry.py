"""What OpenTelemetry hears of this process's circuits, and that nobody else pays for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, Span, Tracer, use_span

from distributed_breaker import CircuitBreaker, CircuitBreakerOpenException, Policy
from distributed_breaker.monitoring import opentelemetry
from distributed_breaker.monitoring.opentelemetry import Instrumentation, instrument
from distributed_breaker.registry import CircuitBreakerRegistry
from scripts.servers import Server
from tests.fleet.process import BOUND

BRITTLE = Policy(failure_threshold=2, failure_rate=None)
Metrics = Callable[[], dict[str, dict[frozenset[tuple[str, Any]], Any]]]


@pytest.fixture
def registry() -> Iterator[CircuitBreakerRegistry]:
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        yield registry


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def metrics(reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """What is exported now, by name and attributes."""
    monkeypatch.setattr(opentelemetry, "FRESH", -1.0)

    def collect() -> dict[str, dict[frozenset[tuple[str, Any]], Any]]:
        data = reader.get_metrics_data()
        return {} if data is None else {
            metric.name: {frozenset(p.attributes.items()): p.value for p in metric.data.data_points}
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }  # fmt: skip

    return collect


@pytest.fixture
def ended() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(ended: InMemorySpanExporter) -> Iterator[Tracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(ended))
    yield provider.get_tracer("tests")
    provider.shutdown()


@pytest.fixture
def on(registry: CircuitBreakerRegistry, provider: MeterProvider) -> Iterator[Instrumentation]:
    instrumentation = instrument(registry, provider)
    yield instrumentation
    instrumentation.end()


def fail(breaker: CircuitBreaker, times: int = 2) -> None:
    for _ in range(times):
        with pytest.raises(ZeroDivisionError):
            breaker.call(lambda: 1 // 0)


def of(name: str, **more: str) -> frozenset[tuple[str, Any]]:
    said = {"name": name, **more}
    return frozenset((f"circuit_breaker.{key}", value) for key, value in said.items())


def events(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    return [(event.name, dict(event.attributes or {})) for event in span.events]


# ---------------------------------------------------------------------------- metrics


@pytest.mark.usefixtures("on")
def test_metrics_of_this_process(registry: CircuitBreakerRegistry, metrics: Metrics) -> None:
    breaker = registry.breaker("shop.http", BRITTLE)
    breaker.call(int)
    fail(breaker)
    for _ in range(3):
        with pytest.raises(CircuitBreakerOpenException):
            breaker.call(int)
    breaker.count_rejection()
    breaker.count_fallback()
    found = metrics()
    one = of("shop.http")
    assert found["circuit_breaker.calls"] == {one: 3}
    assert found["circuit_breaker.rejections"] == {one: 4}
    assert found["circuit_breaker.fallbacks"] == {one: 1}
    assert found["circuit_breaker.outcomes.pending"] == {one: 0}
    assert found["circuit_breaker.outcomes.dropped"] == {one: 0}
    opened = of("shop.http", state="open", source="shared")
    assert found["circuit_breaker.state"] == {opened: 1}
    assert found["circuit_breaker.transitions"] == {opened: 1}
    assert "circuit_breaker.mirror.age" not in found
    breaker.reset()
    closed = of("shop.http", state="closed", source="shared")
    assert metrics()["circuit_breaker.state"] == {closed: 1}
    assert metrics()["circuit_breaker.transitions"] == {opened: 1, closed: 1}


@pytest.mark.servers("valkey")
def test_counts_are_this_process_s_and_not_the_fleets(
    server: Server, namespace: str, provider: MeterProvider, metrics: Metrics
) -> None:
    with contextlib.ExitStack() as stack:
        mine, other = (
            stack.enter_context(CircuitBreakerRegistry.from_url(server.url, namespace))
            for _ in range(2)
        )
        instrumentation = instrument(mine, provider)
        stack.callback(instrumentation.end)
        for registry, calls in ((mine, 2), (other, 5)):
            for _ in range(calls):
                registry.breaker("shop.http").call(int)
            registry.flush(BOUND)
        assert mine.snapshot(BOUND)["shop.http"].totals["calls"] == 7
        assert metrics()["circuit_breaker.calls"] == {of("shop.http"): 2}
        (age,) = metrics()["circuit_breaker.mirror.age"].values()
        assert age >= 0


@pytest.mark.usefixtures("on")
def test_names_follow_the_conventions(registry: CircuitBreakerRegistry, metrics: Metrics) -> None:
    registry.breaker("shop.http").call(int)
    for name in metrics():
        assert name.startswith("circuit_breaker.")
        assert name == name.lower()
        assert not name.endswith(("_total", ".total", "_seconds", ".count"))


@pytest.mark.usefixtures("on")
def test_one_look_serves_all_instruments(
    registry: CircuitBreakerRegistry, reader: InMemoryMetricReader
) -> None:
    looks = 0
    look = registry.snapshot_here

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return look()

    registry.breaker("shop.http").call(int)
    registry.snapshot_here = counted  # type: ignore[method-assign]
    reader.get_metrics_data()
    assert looks == 1


# ---------------------------------------------------------------------------- spans


@pytest.mark.usefixtures("on")
def test_a_span_hears_what_becomes_of_its_calls(
    registry: CircuitBreakerRegistry, tracer: Tracer, ended: InMemorySpanExporter
) -> None:
    breaker = registry.breaker("shop.http", BRITTLE)
    with tracer.start_as_current_span("trips"):
        fail(breaker)
    with tracer.start_as_current_span("refused"), pytest.raises(CircuitBreakerOpenException):
        breaker.call(int)
    with tracer.start_as_current_span("instead"):
        breaker.count_rejection()
        breaker.count_fallback()
    trips, refused, instead = ended.get_finished_spans()
    said = {
        "circuit_breaker.name": "shop.http",
        "circuit_breaker.state": "open",
        "circuit_breaker.source": "shared",
    }
    ((name, about),) = events(trips)
    assert name == "circuit_breaker.transition"
    assert about == said | {"circuit_breaker.reason": "run"}
    ((name, about),) = events(refused)
    assert name == "circuit_breaker.rejected"
    assert about == said | {"circuit_breaker.reason": about["circuit_breaker.reason"]}
    (rejected, _), (fallback, about) = events(instead)
    assert (rejected, fallback) == ("circuit_breaker.rejected", "circuit_breaker.fallback")
    assert about == {"circuit_breaker.name": "shop.http"}


WAYS: dict[str, Callable[[CircuitBreaker], Any]] = {
    "call": lambda b: b.call(int),
    "guard": lambda b: b.guard().__enter__(),
    "with": lambda b: b.__enter__(),
    "acquire": lambda b: b.acquire(),
    "decorator": lambda b: b(int)(),
    "async": lambda b: asyncio.run(b.call_async(asyncio.sleep, 0)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("on")
def test_each_way_to_be_refused_is_one_event(
    way: str, registry: CircuitBreakerRegistry, tracer: Tracer, ended: InMemorySpanExporter
) -> None:
    breaker = registry.breaker("shop.http", BRITTLE)
    fail(breaker)
    with tracer.start_as_current_span("refused"), pytest.raises(CircuitBreakerOpenException):
        WAYS[way](breaker)
    (span,) = ended.get_finished_spans()
    assert [name for name, _ in events(span)] == ["circuit_breaker.rejected"]


class Broken(NonRecordingSpan):
    """A span of somebody else's making."""

    def is_recording(self) -> bool:
        return True

    def add_event(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("no room")


@pytest.mark.usefixtures("on")
def test_no_call_fails_for_its_span(registry: CircuitBreakerRegistry, tracer: Tracer) -> None:
    breaker = registry.breaker("shop.http", BRITTLE)
    span: Span = Broken(tracer.start_span("x").get_span_context())
    with use_span(span):
        fail(breaker)
        with pytest.raises(CircuitBreakerOpenException):
            breaker.call(int)
    assert breaker.state == "open"


# ---------------------------------------------------------------------------- on and off


def test_breakers_that_are_there_are_instrumented_too_and_the_end_undoes_it(
    registry: CircuitBreakerRegistry, provider: MeterProvider, metrics: Metrics
) -> None:
    before = registry.breaker("before", BRITTLE)
    assert type(before) is CircuitBreaker, "nobody pays who does not ask"
    instrumentation = instrument(registry, provider)
    fail(before)
    fail(registry.breaker("after", BRITTLE))
    assert len(metrics()["circuit_breaker.transitions"]) == 2
    with pytest.raises(ValueError, match="instrumented already"):
        instrument(registry, provider)
    instrumentation.end()
    instrumentation.end()
    assert {type(before), type(registry.breaker("later"))} == {CircuitBreaker}
    assert metrics() == {}
    again = instrument(registry, provider)
    assert type(before) is not CircuitBreaker
    again.end()


def test_a_fork_s_child_has_counted_nothing(
    on: Instrumentation, registry: CircuitBreakerRegistry, metrics: Metrics
) -> None:
    breaker = registry.breaker("shop.http", BRITTLE)
    fail(breaker)
    with pytest.raises(CircuitBreakerOpenException):
        breaker.call(int)
    found = metrics()
    assert len(found["circuit_breaker.transitions"]) == 1
    assert found["circuit_breaker.rejections"] == {of("shop.http"): 1}
    # What the process module does in a child.
    registry.forked()
    on.forked()
    found = metrics()
    assert "circuit_breaker.transitions" not in found
    for name in ("calls", "rejections", "fallbacks"):
        assert set(found[f"circuit_breaker.{name}"].values()) == {0}
