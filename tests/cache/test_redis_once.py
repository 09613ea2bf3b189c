"""redis-py's client without what it has for trying again: its connections, on a real server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from redis.connection import parse_url

from distributed_breaker.clients import redis_once
from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.clients.redis_once import Once, client_of
from scripts.servers import Server

pytestmark = pytest.mark.servers("valkey")

Connect = Callable[..., redis.Redis]


@pytest.fixture
def connect(server: Server) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def connect(**options: Any) -> redis.Redis:
            client = client_of(**parse_url(server.url), **options)
            stack.callback(client.connection_pool.disconnect)
            return client

        yield connect


def connections(client: redis.Redis) -> int:
    made: int = client.connection_pool._created_connections
    return made


def disconnect(server: Server, name: str) -> None:
    with contextlib.closing(server.client(decode_responses=True)) as other:
        (found,) = [each["id"] for each in other.client_list() if each["name"] == name]
        other.client_kill_filter(_id=found)


def test_the_cache_uses_it(cache: CacheClient) -> None:
    assert type(cache._store) is Once


def test_one_connection_is_enough_for_one_thread(connect: Connect) -> None:
    client = connect(max_connections=1)
    client.set("k", "v")
    for _ in range(3):
        assert client.get("k") == b"v"
        with client.pipeline() as pipe:
            assert pipe.get("k").get("k").execute() == [b"v", b"v"]
    with pytest.raises(redis.ResponseError):
        client.lpush("k", "x")
    assert client.get("k") == b"v"
    assert connections(client) == 1


def test_threads_have_connections_of_their_own_and_no_more_than_allowed(connect: Connect) -> None:
    client = connect(max_connections=2)
    ready = threading.Barrier(3)
    failed = []

    def wait() -> None:
        ready.wait(10)
        try:
            assert client.blpop(["none"], timeout=0.5) is None
        except redis.MaxConnectionsError as error:
            failed.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 1
    assert connections(client) == 2


def test_a_connection_that_the_server_has_closed_is_replaced(
    connect: Connect, server: Server
) -> None:
    client = connect(client_name="once")
    client.set("k", "v")
    disconnect(server, "once")
    assert client.get("k") == b"v"
    assert connections(client) == 1


def test_the_answer_to_an_interrupted_command_is_not_the_next_ones(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    client.set("k", "v")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(client, "parse_response", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.blpop(["none"], timeout=0.1)  # its answer is still to come
    assert client.get("k") == b"v"


def test_a_server_that_is_away_is_tried_once(
    connect: Connect, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(client_name="away")
    client.get("k")
    tried = []

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        tried.append(self)
        raise redis.ConnectionError

    disconnect(server, "away")
    monkeypatch.setattr(client.connection_pool.connection_class, "connect", refuse)
    for attempts in (1, 2, 3):
        with pytest.raises(redis.ConnectionError):
            client.get("k")
        assert len(tried) == attempts
    assert connections(client) == 1


def test_with_metrics_it_is_redis_pys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class On:
        def is_enabled(self) -> bool:
            return True

    monkeypatch.setattr(redis_once, "get_observability_instance", On)
    client = client_of()
    assert type(client) is redis.Redis
    assert type(client.connection_pool) is redis.ConnectionPool
