"""Alerts over a real store, to a real receiver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker import alert_keys as keys
from distributed_breaker.monitoring.alerts import Alerts
from scripts.servers import Server
from tests.monitoring.alerts.receiver import Receiver

Evaluate = Callable[..., Alerts]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


@pytest.fixture
def registry(server: Server, namespace: str) -> Iterator[CircuitBreakerRegistry]:
    with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
        yield registry


@pytest.fixture
def raw(server: Server) -> Iterator[redis.Redis]:
    with contextlib.closing(server.client(decode_responses=True)) as client:
        yield client


def settings(folder: Path, url: str = "", **given: Any) -> keys.Alerts:
    """Alerts by one webhook, or by the channels that are given; they look often."""
    given.setdefault("evaluate_every", 0.1)
    given.setdefault("channels", {"hook": {"type": "webhook", "url": url}})
    return keys.Alerts(outbox_path=str(folder / "outbox.db"), **given)


@pytest.fixture
def evaluate(
    registry: CircuitBreakerRegistry, receiver: Receiver, tmp_path: Path
) -> Iterator[Evaluate]:
    """``evaluate(**settings)``: alerts of the test's registry, as one process has them."""
    with contextlib.ExitStack() as stack:

        def start(
            processes: Any = None, registry: CircuitBreakerRegistry = registry, **given: Any
        ) -> Alerts:
            alerts = Alerts(
                registry,
                settings(tmp_path, receiver.url, **given),
                environment="test",
                processes=processes,
                shared=registry.shared,
                environ={"TOKEN": "secret-token"},
            )
            registry.on_transition(alerts.hear)
            stack.callback(alerts.close)
            alerts.start()
            return alerts

        yield start
