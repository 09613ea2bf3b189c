"""Fleets whose servers, networks and processes fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.faults.proxy import Proxy, proxy_before
from tests.fleet.harness import Fleet, Nursery, client_of


@pytest.fixture
def fleet_of(
    request: pytest.FixtureRequest, nursery: Nursery, namespace: str, tmp_path: Path
) -> Iterator[Callable[[str], Fleet]]:
    """Make a fleet whose store has the given URL.  A module's ``ADJUST`` gives other values to the
    library's constants."""
    with contextlib.ExitStack() as stack:

        def make(url: str) -> Fleet:
            fleet = Fleet(nursery, url, namespace, tmp_path)
            # Many tests wait for a return, and none for how long that takes when an outage is long.
            fleet.adjust = {"LONGEST_RETRY": 300, **getattr(request.module, "ADJUST", {})}
            stack.callback(fleet.end)
            return fleet

        yield make


@pytest.fixture
def broken_server(own_server: Callable[..., Server]) -> Server:
    """A server of this test's own, to break."""
    return own_server()


@pytest.fixture
def fleet(
    server_kind: str, request: pytest.FixtureRequest, fleet_of: Callable[[str], Fleet]
) -> Fleet:
    """A fleet on ``broken_server`` where the test asks for that, else on the shared one."""
    name = "broken_server" if "broken_server" in request.fixturenames else "server"
    return fleet_of(request.getfixturevalue(name).url)


@pytest.fixture
def client(server_kind: str, request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """A client for looking at that server."""
    name = "broken_server" if "broken_server" in request.fixturenames else "server"
    with client_of(request.getfixturevalue(name)) as client:
        yield client


@pytest.fixture
def proxy(server_kind: str, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy before that server."""
    name = "broken_server" if "broken_server" in request.fixturenames else "server"
    with proxy_before(request.getfixturevalue(name).url) as proxy:
        yield proxy
