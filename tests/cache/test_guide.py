"""The guide's lines on the cache, with its import path, while Redis is well and while it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from circuit_breaker_config import (
    CircuitBreakerOpenException,
    get_cache_circuit_breaker,
    initialize_circuit_breakers,
)
from distributed_breaker.services import shut_down
from scripts.servers import Server
from tests.cache.conftest import settings

pytestmark = pytest.mark.servers("valkey")


def read(fallback_cache: dict[str, Any]) -> Any:
    """The guide's lines."""
    cache_circuit = get_cache_circuit_breaker("api")
    try:
        return cache_circuit.get("prediction:abc123")
    except CircuitBreakerOpenException:
        return fallback_cache.get("prediction:abc123")


def test_the_guides_lines(cache_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "breakers.json"
    file.write_text(json.dumps(settings(cache_server, tmp_path, timeout=60)))
    initialize_circuit_breakers(file, environ={})
    try:
        cache_circuit = get_cache_circuit_breaker("api")
        assert get_cache_circuit_breaker("api") is cache_circuit
        assert read({}) is None
        cache_circuit.set("prediction:abc123", "cat")
        assert read({}) == "cat"
        cache_server.kill()
        assert read({}) == "cat"
        cache_circuit.breaker.force_open()
        cache_circuit.delete("prediction:abc123")
        assert read({"prediction:abc123": "their own"}) is None, "it is deleted"
        with pytest.raises(CircuitBreakerOpenException):
            cache_circuit.get("never seen")
    finally:
        shut_down()
