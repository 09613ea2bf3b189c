"""The script on each kind of server, for the tests of equality."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import redis

from scripts.servers import Server
from tests.equivalence.twins import Script


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    """A client that waits long enough for a pipeline of hundreds of steps on a busy machine."""
    with contextlib.closing(server.client(decode_responses=True, socket_timeout=60.0)) as it:
        yield it


@pytest.fixture
def script(client: redis.Redis, namespace: str) -> Iterator[Script]:
    """The shipped script, under keys that no other test uses."""
    with contextlib.closing(Script(client, namespace)) as it:
        yield it
