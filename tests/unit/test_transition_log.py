"""One line of the log for each transition, with its fields; none for a refused call."""

from __future__ import annotations

import logging

import pytest

from distributed_breaker import CircuitBreakerRegistry
from scripts.servers import Server
from tests.unit.clock import BRITTLE, fail, refused, wait_until

FIELDS = "circuit service old new source cause generation".split()


@pytest.mark.servers("valkey")
def test_a_line_for_each_transition(
    server: Server, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distributed_breaker.transitions")

    def lines() -> list[logging.LogRecord]:
        found = [r for r in caplog.records if r.name == "distributed_breaker.transitions"]
        # The process may have opened it alone, a moment before the fleet did.
        return [r for r in found if r.__dict__["old"] != r.__dict__["new"]]

    with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
        breaker = registry.breaker("api.http.ml", BRITTLE)
        fail(breaker)
        wait_until(lambda: breaker.snapshot().shared_state == "open")
        for _ in range(50):
            refused(breaker)
        breaker.reset()
        registry.flush()
    opened, closed = lines()
    assert opened.levelno == logging.WARNING
    assert closed.levelno == logging.INFO
    assert closed.getMessage() == "circuit api.http.ml: open → closed (shared, reset)"
    fields = {name: closed.__dict__[name] for name in FIELDS}
    generation = fields.pop("generation")
    assert generation > 0
    assert fields == {
        "circuit": "api.http.ml",
        "service": "api",
        "old": "open",
        "new": "closed",
        "source": "shared",
        "cause": "reset",
    }


def test_without_a_store_somebody_must_listen(caplog: pytest.LogCaptureFixture) -> None:
    """A thread of its own would be the only one that memory:// has."""
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        fail(registry.breaker("a", BRITTLE))
        heard: list[object] = []
        registry.on_transition(heard.append)
        fail(registry.breaker("b", BRITTLE))
        registry.flush()
    assert len(heard) == 1
    assert [r.getMessage() for r in caplog.records] == ["circuit b: closed → open (shared, run)"]
