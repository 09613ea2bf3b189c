"""A service's cache on a real server of its own; its circuit is each process's own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.services import Services
from scripts.servers import Server

# One refused connection opens the circuit, and it tries again soon.
BRITTLE = {"failure_threshold": 1, "success_threshold": 1, "timeout": 0.05, "jitter": 0.0}
PREFIX = "nightscan:"

Start = Callable[..., CacheClient]


def settings(server: Server, folder: Path, **section: Any) -> dict[str, Any]:
    """A configuration with one cache."""
    cache = {
        "redis_url": server.url,
        "disk_cache_dir": str(folder / "disk"),
        "outbox_path": str(folder / "outbox.db"),
        **BRITTLE,
    }
    return {
        "settings": {"redis_url": "memory://"},
        "services": {"api": {"cache": cache | section}},
    }


@pytest.fixture
def cache_server(own_server: Callable[..., Server]) -> Server:
    """The cache's own Redis, which the test may kill."""
    return own_server(args=["--appendonly", "yes", "--appendfsync", "always"])


@pytest.fixture
def start(cache_server: Server, tmp_path: Path) -> Iterator[Start]:
    """``start(host="", **section)``: a client as another process would have it; clients of one
    host share its disk."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(host: str = "here", **section: Any) -> CacheClient:
            nonlocal count
            count += 1
            folder = tmp_path / host
            file = tmp_path / f"{count}.json"
            file.write_text(json.dumps(settings(cache_server, folder, **section)))
            services = Services(file, environ={})
            stack.callback(services.close)
            client = services.client("cache", "api")
            assert isinstance(client, CacheClient)
            return client

        yield start


@pytest.fixture
def cache(start: Start) -> CacheClient:
    return start()


@pytest.fixture
def raw(cache_server: Server) -> Iterator[redis.Redis]:
    """What is really in Redis."""
    with contextlib.closing(cache_server.client(decode_responses=True)) as client:
        yield client
