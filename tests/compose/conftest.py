"""Circuits without a store, and pipelines around them called by blocking and on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy, deadline
from distributed_breaker.compose import Pipeline, pipeline
from tests.unit.clock import STURDY, FakeClock

Ask = Callable[..., Any]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry(clock: FakeClock) -> Iterator[CircuitBreakerRegistry]:
    with CircuitBreakerRegistry.from_url("memory://", clock=clock) as registry:
        yield registry


@pytest.fixture
def breaker(registry: CircuitBreakerRegistry) -> CircuitBreaker:
    """A circuit that stays closed, unless a test opens it."""
    return registry.breaker("sturdy", STURDY)


@pytest.fixture
def brittle(registry: CircuitBreakerRegistry) -> CircuitBreaker:
    """A circuit that the second failure in a row opens."""
    policy = Policy(failure_threshold=2, failure_rate=None, success_threshold=1, jitter=0.0)
    return registry.breaker("brittle", policy)


@pytest.fixture
def time(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Deadlines by the test's clock, which waits move."""
    fake = SimpleNamespace(monotonic=clock, sleep=clock.advance)
    monkeypatch.setattr(deadline, "time", fake)
    monkeypatch.setattr(pipeline, "time", fake)
    return clock


def blocking(pipeline: Pipeline[Any], function: Ask, *args: Any) -> Any:
    return pipeline.call(function, *args)


def on_a_loop(pipeline: Pipeline[Any], function: Ask, *args: Any) -> Any:
    async def awaited(*args: Any) -> Any:
        return function(*args)

    return asyncio.run(pipeline.call_async(awaited, *args))


@pytest.fixture(params=[blocking, on_a_loop], ids=["blocking", "on a loop"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """``ask(pipeline, function, *args)``: one call, in either way."""
    made: Ask = request.param
    return made
