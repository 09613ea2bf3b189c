"""The guide's import path, with the shipped file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import sessionmaker

import circuit_breaker_config
from circuit_breaker_config import (
    CircuitBreakerOpenException,
    UnknownService,
    circuit_breaker_health,
    circuit_breaker_metrics,
    get_cache_circuit_breaker,
    get_database_circuit_breaker,
    get_http_circuit_breaker,
    get_ml_circuit_breaker,
    initialize_circuit_breakers,
)
from distributed_breaker.services import shut_down
from scripts.servers import Server
from tests.config.test_load import SHIPPED
from tests.unit.clock import Boom, boom, wait_until


@pytest.fixture(autouse=True)
def initialized() -> Iterator[None]:
    settings = {"redis_url": "memory://"}
    initialize_circuit_breakers(SHIPPED, environ={}, overrides={"settings": settings})
    yield
    shut_down()


def test_every_getter_gives_the_guides_parts() -> None:
    names = [
        get_database_circuit_breaker("web_app").name,
        get_cache_circuit_breaker("api_v1").name,
        get_http_circuit_breaker("celery_workers", service_type="ml_api").name,
        get_ml_circuit_breaker("api_v1", model_path="/path/to/model.pth").name,
        get_ml_circuit_breaker("ml_prediction").name,
        get_http_circuit_breaker("notification_service").name,
    ]
    assert names == [
        "web_app.database",
        "api_v1.cache",
        "celery_workers.http.ml_api",
        "api_v1.ml",
        "ml_prediction.ml",
        "notification_service.http",
    ]


def test_explicit_arguments_are_honoured_also_later() -> None:
    session = sessionmaker()
    client = get_database_circuit_breaker("web_app", db_session=session)
    assert get_database_circuit_breaker("web_app") is client
    assert client.explicit == {"db_session": session}
    http = get_http_circuit_breaker("api_v1", base_url="http://example.com")
    assert http is not get_http_circuit_breaker("api_v1", service_type="external")
    assert http.explicit == {"base_url": "http://example.com"}


def test_an_open_circuit_refuses_with_the_guides_exception() -> None:
    client = get_ml_circuit_breaker("celery_workers")
    for _ in range(2):
        with pytest.raises(Boom):
            client.call(boom)
    with pytest.raises(CircuitBreakerOpenException):
        client.call(boom)


def test_an_unknown_service_is_an_error_that_lists_them() -> None:
    with pytest.raises(UnknownService, match="web_app, api_v1, celery_workers"):
        get_cache_circuit_breaker("problematic_service")


def test_health_and_metrics_have_their_shapes() -> None:
    for _ in range(2):
        with pytest.raises(Boom):
            get_ml_circuit_breaker("celery_workers").call(boom)
    get_cache_circuit_breaker("api_v1").call(int)
    health, metrics = circuit_breaker_health(), circuit_breaker_metrics()
    assert health["overall_status"] == "unhealthy"
    assert health["circuit_breakers"]["celery_workers.ml"]["status"] == "unhealthy"
    assert health["circuit_breakers"]["api_v1.cache"]["status"] == "healthy"
    assert health["circuit_breakers"]["web_app.http"]["called"] is False
    assert health["summary"]["unhealthy"] == 1
    assert health["configuration"]["version"] == 1
    assert metrics["circuit_breakers"]["celery_workers.ml"]["failed_requests"] == 2
    assert metrics["manager_info"]["services_configured"] == 5


@pytest.mark.servers("valkey")
def test_without_the_store_a_process_tells_what_it_knows(
    own_server: Callable[..., Server],
) -> None:
    server = own_server()
    overrides = {"settings": {"redis_url": server.url}}
    services = initialize_circuit_breakers(SHIPPED, environ={}, overrides=overrides)
    get_cache_circuit_breaker("api_v1").call(int)
    services.registry.flush(5)
    assert circuit_breaker_health()["overall_status"] == "healthy"
    server.kill()
    wait_until(lambda: get_cache_circuit_breaker("api_v1").breaker.degraded)
    health, metrics = circuit_breaker_health(), circuit_breaker_metrics()
    assert health["overall_status"] == "degraded"
    assert health["store"]["reachable"] is metrics["store"]["reachable"] is False
    assert health["circuit_breakers"]["api_v1.cache"]["source"] == "shadow"


def test_the_module_defines_nothing() -> None:
    source = Path(str(circuit_breaker_config.__file__)).read_text("utf-8")
    assert "def " not in source
    assert "class " not in source
