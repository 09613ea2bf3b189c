"""An injected error of a client's library is answered as a real one: by retries and fallbacks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import redis
import requests

from circuit_breaker_config import get_cache_circuit_breaker, get_http_circuit_breaker
from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.faults import SWITCH, inject

NOWHERE = "127.0.0.1:9"  # nothing is asked there


@pytest.fixture
def services(circuit_breaker_services: Callable[[Any], Any], monkeypatch: Any) -> Any:
    monkeypatch.setenv(SWITCH, "true")
    http: dict[str, Any] = {
        "base_url": f"http://{NOWHERE}",
        "max_retries": 2,
        "backoff_factor": 0.0,
    }
    http["failure_threshold"] = 3
    parts = {"http": http, "cache": {"redis_url": f"redis://{NOWHERE}/0"}}
    return circuit_breaker_services({"services": {"a": parts}})


@pytest.mark.parametrize("library", [requests, httpx], ids=["requests", "httpx"])
def test_http(services: Any, circuit_breakers: CircuitBreakerRegistry, library: Any) -> None:
    client = get_http_circuit_breaker("a")
    error = {
        requests: lambda: requests.ConnectionError("injected"),
        httpx: lambda: httpx.ConnectError("injected"),
    }[library]

    async def get(**options: Any) -> Any:
        answer = await client.get_async("/x", **options)
        await client.aclose()
        return answer

    def ask(**options: Any) -> Any:
        if library is httpx:
            return asyncio.run(get(**options))
        return client.get("/x", **options)

    with inject(circuit_breakers, "a.http", failures=1.0, error=error):
        with pytest.raises(type(error()), match="injected"):
            ask()
        assert client.breaker.snapshot().totals["failures"] == 3, "with its two retries"
        assert client.breaker.state == "open"
        assert ask(default={"kept": True}).json() == {"kept": True}


def test_cache(services: Any, circuit_breakers: CircuitBreakerRegistry) -> None:
    cache = get_cache_circuit_breaker("a")
    with inject(circuit_breakers, "a.cache", failures=1.0, error=redis.ConnectionError):
        cache.set("key", {"kept": True})
        assert cache.get("key") == {"kept": True}, "by the memory tier"
    assert cache.breaker.snapshot().totals["failures"] >= 1
