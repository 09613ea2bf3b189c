"""Connections that are not used any more are closed at once, not when the collector comes by."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator

import pytest

from distributed_breaker.store import RedisStore
from tests.unit.stub import ANSWER, OK, Stub, array, down, error, packed, run_one

PRIMARY = "mymaster"


@pytest.fixture
def server() -> Iterator[Stub]:
    """Plays a server, a Sentinel and a node, which all name it."""
    gc.disable()
    with contextlib.closing(Stub()) as stub:
        stub.answers["EVALSHA"] = array(*ANSWER)
        stub.answers["SENTINEL"] = array("127.0.0.1", str(stub.port))
        stub.answers["CLUSTER"] = packed([[0, 16_383, ["127.0.0.1", stub.port, "id"]]])
        stub.answers["SELECT"] = OK
        yield stub
    gc.enable()


def still_open(stub: Stub) -> int:
    return sum(connection.fileno() >= 0 for connection in stub.connections)


def all_closed(stub: Stub) -> bool:
    deadline = time.monotonic() + 10
    while still_open(stub) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not still_open(stub)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:{}/0",
        "redis+sentinel://127.0.0.1:{}/mymaster",
        "redis+cluster://127.0.0.1:{}",
    ],
)
def test_a_store_that_is_closed(server: Stub, url: str) -> None:
    store = RedisStore(url.format(server.port), "ns")
    run_one(store)
    assert still_open(server)
    nodes = store._nodes  # is kept, as something that holds it may be
    store.close()
    assert nodes is not None
    assert all_closed(server)


def test_a_primary_that_is_none_any_more(server: Stub) -> None:
    server.answers["EVALSHA"] = error("READONLY You can't write against a read only replica.")
    store = RedisStore(f"redis+sentinel://127.0.0.1:{server.port}/{PRIMARY}", "ns")
    for _ in range(3):
        down(lambda: run_one(store))
    assert all_closed(server)
