"""A fleet on a server that other tests use too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.fleet.harness import PATIENT, Fleet, Nursery, client_of


@pytest.fixture
def fleet_of(nursery: Nursery, namespace: str, tmp_path: Path) -> Iterator[Callable[[str], Fleet]]:
    """Make a fleet whose store has the given URL."""
    with contextlib.ExitStack() as stack:

        def make(url: str) -> Fleet:
            fleet = Fleet(nursery, url, namespace, tmp_path)
            fleet.adjust = dict(PATIENT)
            stack.callback(fleet.end)
            return fleet

        yield make


@pytest.fixture
def fleet(server: Server, fleet_of: Callable[[str], Fleet]) -> Fleet:
    return fleet_of(server.url)


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with client_of(server) as client:
        yield client
