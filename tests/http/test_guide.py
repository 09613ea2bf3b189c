"""The guide's lines on HTTP, with its import path and the shipped file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from circuit_breaker_config import (
    CircuitBreakerOpenException,
    get_http_circuit_breaker,
    initialize_circuit_breakers,
)
from distributed_breaker.services import shut_down
from tests.config.test_load import SHIPPED
from tests.http.service import Service, answer


@pytest.fixture(autouse=True)
def initialized() -> Iterator[None]:
    settings = {"redis_url": "memory://"}
    initialize_circuit_breakers(SHIPPED, environ={}, overrides={"settings": settings})
    yield
    shut_down()


def call_external_api(data: Any) -> Any:
    """The guide's lines."""
    http_circuit = get_http_circuit_breaker("api_v1", service_type="external")
    try:
        response = http_circuit.post("/external/api", json=data)
        return response.json()
    except CircuitBreakerOpenException:
        return {"status": "unavailable", "fallback": True}


def test_the_guides_api_client(service: Service) -> None:
    client = get_http_circuit_breaker("api_v1", "external", base_url=service.url)
    service.scripts["/external/api"] = [answer(200, {"fine": True}), answer(500, {})]
    assert call_external_api({"a": 1}) == {"fine": True}
    for _ in range(3):
        call_external_api({"a": 1})
    assert client.breaker.state == "open"
    assert call_external_api({"a": 1}) == {"message": "External service unavailable"}
    client.configure(client.section.model_copy(update={"default_response": None}))
    assert call_external_api({"a": 1}) == {"status": "unavailable", "fallback": True}
    assert service.asked("/external/api") == 4


def test_the_guides_worker(service: Service) -> None:
    http_circuit = get_http_circuit_breaker("celery_workers", service_type="ml_api")
    assert http_circuit.base_url == "http://localhost:8002"
    get_http_circuit_breaker("celery_workers", "ml_api", base_url=service.url)
    service.scripts["/predict"] = [answer(200, {"label": "cat"})]
    assert http_circuit.post("/predict", json={"x": 1}).json() == {"label": "cat"}
