"""Simulated runs whose steps a real server carries out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from scripts.servers import Server
from tests.fleet.harness import client_of


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    """A client for looking at the store, and for carrying out steps."""
    with client_of(server) as client:
        yield client
