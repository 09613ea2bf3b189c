"""Fleets whose store is a group of servers: a cluster, or a primary that Sentinels watch.

A group belongs to one test: it takes about three seconds to start, and after a failover most of ten
until it is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.groups import Cluster, Watched
from scripts.servers import why_missing
from tests.fleet.harness import Fleet, Nursery
from tests.required import need


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster | Watched]]:
    """Start groups of the kind of server that the test wants, Valkey unless it says otherwise."""
    kind = getattr(request, "param", "valkey")
    need(why_missing(kind))
    with contextlib.ExitStack() as stack:
        yield lambda group: stack.enter_context(group.start(kind))


@pytest.fixture(params=[Watched, Cluster], ids=["sentinel", "cluster"])
def group(
    request: pytest.FixtureRequest, started: Callable[..., Cluster | Watched]
) -> Cluster | Watched:
    """A group of each kind."""
    return started(request.param)


@pytest.fixture
def cluster(started: Callable[..., Cluster]) -> Cluster:
    return started(Cluster)


@pytest.fixture
def watched(started: Callable[..., Watched]) -> Watched:
    return started(Watched)


@pytest.fixture
def fleet_on(
    nursery: Nursery, namespace: str, tmp_path: Path
) -> Iterator[Callable[[Cluster | Watched], Fleet]]:
    """Make a fleet on a group."""
    with contextlib.ExitStack() as stack:

        def make(group: Cluster | Watched) -> Fleet:
            fleet = Fleet(nursery, group.url, namespace, tmp_path)
            # Many tests wait for a return, and none for how long that takes when an outage is long.
            # A busy machine must not look like a fault; what is killed here refuses at once.
            fleet.adjust = {"LONGEST_RETRY": 300, "READ_TIMEOUT": 2.0, "CONNECT_TIMEOUT": 2.0}
            stack.callback(fleet.end)
            return fleet

        yield make
