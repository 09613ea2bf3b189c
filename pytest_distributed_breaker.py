"""Fixtures for tests around circuits; pytest finds them by itself.

Nothing of the library is imported before a test asks for one of them: pytest's start stays as fast
as it was, and a coverage tool sees the whole library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distributed_breaker import CircuitBreakerRegistry
    from distributed_breaker.services import Services
    from distributed_breaker.testing import FakeClock

Config = Mapping[str, Any] | str | PathLike[str] | None


@pytest.fixture
def circuit_breaker_clock() -> FakeClock:
    """The clock of ``circuit_breakers``: ``advance(seconds)`` moves it, and nothing else does."""
    from distributed_breaker.testing import FakeClock

    return FakeClock()


@pytest.fixture
def circuit_breakers(circuit_breaker_clock: FakeClock) -> Iterator[CircuitBreakerRegistry]:
    """A registry whose circuits live in this test only, on ``circuit_breaker_clock``."""
    from distributed_breaker import CircuitBreakerRegistry

    with CircuitBreakerRegistry.from_url("memory://", clock=circuit_breaker_clock) as registry:
        yield registry


@pytest.fixture
def circuit_breaker_services(
    circuit_breakers: CircuitBreakerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Config], Services]]:
    """Give the getters of ``circuit_breaker_config`` services of this test's own.

    ``circuit_breaker_services(config)`` takes a configuration as a dictionary or a file (None: the
    file that the environment names) and puts its circuits into ``circuit_breakers``.  What the
    application itself initializes meanwhile is kept in memory, too, and closed after the test.
    """
    from distributed_breaker.services import initialize
    from distributed_breaker.testing import own_services

    def start(config: Config = None) -> Services:
        file = config
        if isinstance(config, Mapping):
            file = tmp_path / "circuit_breakers.json"
            file.write_text(json.dumps(config), "utf-8")
        if file is not None:
            monkeypatch.setenv("CIRCUIT_BREAKER_CONFIG", str(file))
        return initialize(registry=circuit_breakers)

    monkeypatch.setenv("CIRCUIT_BREAKER_REDIS_URL", "memory://")
    with own_services():
        yield start
