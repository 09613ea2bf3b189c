"""A service that misbehaves, and clients of it; circuits are each client's own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.clients.http import HttpClient
from distributed_breaker.services import Services
from tests.http.service import Service

Start = Callable[..., HttpClient]

QUICK = {
    "connect_timeout": 1.0, "read_timeout": 2.0, "total_timeout": 5.0, "backoff_factor": 0.0,
    "failure_threshold": 1_000, "failure_rate": None, "jitter": 0.0,
}  # fmt: skip
# The first failure opens it, and nothing but a test closes it.
BRITTLE = {"failure_threshold": 1, "max_retries": 0, "timeout": 60.0, "success_threshold": 1}


@pytest.fixture
def service() -> Iterator[Service]:
    with contextlib.closing(Service()) as service:
        yield service


@pytest.fixture
def other() -> Iterator[Service]:
    """Another host."""
    with contextlib.closing(Service()) as service:
        yield service


@pytest.fixture
def start(service: Service, tmp_path: Path, namespace: str) -> Iterator[Start]:
    """``start(**section)``: a client as another process would have it."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(store: str = "memory://", **section: Any) -> HttpClient:
            nonlocal count
            count += 1
            http = {"base_url": service.url, **QUICK, "outbox_path": str(tmp_path / "outbox.db")}
            if section.get("base_url", "") is None:
                http.pop("base_url")
                section.pop("base_url")
            file = tmp_path / f"{count}.json"
            file.write_text(
                json.dumps(
                    {
                        "settings": {"redis_url": store, "namespace": namespace},
                        "services": {"api": {"http": http | section}},
                    }
                )
            )
            services = Services(file, environ={})
            stack.callback(services.close)
            client = services.client("http", "api")
            assert isinstance(client, HttpClient)
            return client

        yield start


@pytest.fixture
def client(start: Start) -> HttpClient:
    return start()
