"""A cache whose Redis is well: its operations, what counts as a failure, and loading."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from distributed_breaker.clients import cache_writes
from distributed_breaker.clients.cache import CacheClient
from scripts.servers import Server
from tests.cache.conftest import PREFIX, Start
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")


def test_all_operations(cache: CacheClient, raw: redis.Redis) -> None:
    assert cache.get("a") is None
    assert cache.get("a", 3) == 3
    assert cache.set("a", 1)
    assert cache.set_many({"b": 2, "c": [3]}, ttl=50)
    assert cache.get_many(["a", "b", "x"]) == {"a": 1, "b": 2}
    assert cache.get_many(["a", "x"], default=0) == {"a": 1, "x": 0}
    assert cache.get_many([]) == {}
    assert cache.exists("a")
    assert not cache.exists("x")
    assert cache.increment("a") == 2
    assert cache.increment("new", 5, ttl=10) == 5
    assert 9 < (cache.ttl("new") or 0) <= 10
    assert 49 < (cache.ttl("b") or 0) <= 50
    assert cache.ttl("x") is None
    raw.persist(PREFIX + "a")
    assert cache.ttl("a") == math.inf
    assert cache.expire("a", 5)
    assert not cache.expire("x", 5)
    assert 4 < (cache.ttl("a") or 0) <= 5
    assert cache.delete("a", "b")
    assert cache.delete("x")
    assert cache.get_many(["a", "b", "c"]) == {"c": [3]}


async def test_all_operations_without_blocking(cache: CacheClient) -> None:
    async def load() -> str:
        await asyncio.sleep(0)
        return "loaded"

    assert await cache.get_async("a") is None
    assert await cache.set_async("a", 1)
    assert await cache.get_async("a") == 1
    assert (await cache.get_with_info_async("a")).source == "redis"
    assert await cache.set_many_async({"b": 2})
    assert await cache.get_many_async(["a", "b", "x"]) == {"a": 1, "b": 2}
    assert await cache.increment_async("a", 4) == 5
    assert await cache.exists_async("a")
    assert await cache.expire_async("a", 5)
    assert 4 < (await cache.ttl_async("a") or 0) <= 5
    assert await cache.delete_async("a")
    assert await cache.get_async("a", loader=load) == "loaded"
    assert await cache.get_async("b", loader=load) == 2
    assert await cache.get_async("c", loader=lambda: "by a function") == "by a function"
    await cache.aclose()


def test_a_miss_and_a_wrong_type_open_nothing(cache: CacheClient, raw: redis.Redis) -> None:
    raw.lpush(PREFIX + "list", 1)
    for _ in range(5):
        assert cache.get("missing") is None
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            cache.get("list", default="no")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            cache.increment("list")
    cache.set("text", "abc")
    with pytest.raises(redis.ResponseError, match="not an integer"):
        cache.increment("text")
    assert cache.breaker.state == "closed"
    assert cache.stats()["queued"] == 0


@pytest.mark.parametrize("trouble", ["OOM", "READONLY"])
def test_a_server_that_refuses_writes_is_unwell(
    cache: CacheClient, raw: redis.Redis, trouble: str
) -> None:
    cache.set("k", "old")
    if trouble == "OOM":
        raw.config_set("maxmemory", 1)
    else:
        raw.execute_command("REPLICAOF", "127.0.0.1", "1")
    assert cache.set("k", "new") is False
    assert cache.breaker.state == "open"
    assert cache.get("k") == "new"
    if trouble == "OOM":
        raw.config_set("maxmemory", 0)
    else:
        raw.execute_command("REPLICAOF", "NO", "ONE")
    wait_until(lambda: raw.get(PREFIX + "k") == '"new"')


def test_the_whole_client_is_there_under_the_circuit(cache: CacheClient) -> None:
    assert cache.redis.set("whole", b"bytes")
    assert cache.redis.get("whole") == b"bytes"
    assert cache.redis.pipeline().incr("n").incr("n").execute() == [1, 2]
    cache.breaker.force_open(reason="for a test")
    with pytest.raises(redis.ConnectionError, match="forced_open"):
        cache.redis.get("whole")
    with pytest.raises(redis.ConnectionError, match="forced_open"):
        cache.redis.pipeline().incr("n").execute()


async def test_the_whole_client_of_asyncio(cache: CacheClient) -> None:
    client = cache.redis_async()
    assert await client.set("whole", 1)
    assert await client.pipeline().incr("n").execute() == [1]
    await client.aclose()


@pytest.mark.servers("valkey")
async def test_event_loops_have_clients_of_their_own(cache: CacheClient) -> None:
    """One for each, and none is kept of loops that have ended without a word."""
    client = cache.redis_async()
    assert client is cache.redis_async()
    connected = len(cache.redis.client_list())

    async def use(*, close: bool) -> None:
        assert cache.redis_async() is not client
        await cache.redis_async().set("whole", 1)
        await cache.set_async("k", 1)
        if close:
            await cache.aclose()

    def run() -> None:
        asyncio.run(use(close=True))
        for _ in range(3):
            asyncio.run(use(close=False))
        asyncio.run(use(close=True))

    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        await asyncio.to_thread(run)
        gc.collect()
    wait_until(lambda: len(cache.redis.client_list()) <= connected + 1)
    await cache.aclose()


# ---------------------------------------------------------------------------- races


def in_the_midst(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    do: Callable[[], object],
    *,
    before: bool = False,
) -> None:
    """Have another thread do something, once: after an answer has come, and before it is looked at;
    or ``before`` it is asked for."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        answer = None if before else real(*args, **kwargs)
        with ThreadPoolExecutor(1) as other:
            other.submit(do).result(10)
        return real(*args, **kwargs) if before else answer

    monkeypatch.setattr(owner, name, call)


@pytest.mark.servers("valkey")
def test_an_old_value_that_was_read_is_not_kept_over_a_newer_one(
    cache: CacheClient, cache_server: Server, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache._queue._also = lambda: False
    for key in ("get", "many", "life", "gone", "late"):
        raw.set(PREFIX + key, '"old"', ex=60)
    in_the_midst(monkeypatch, cache._store, "get", lambda: cache.set("get", "new"))
    assert cache.get("get") == "old"
    in_the_midst(monkeypatch, cache_writes, "together", lambda: cache.set("many", "new"))
    assert cache.get_many(["many"]) == {"many": "old"}
    in_the_midst(monkeypatch, cache._store, "get", lambda: cache.set("miss", "new"))
    assert cache.get("miss") is None
    in_the_midst(monkeypatch, cache._store, "get", lambda: cache.delete("gone"))
    assert cache.get("gone") == "old"
    assert cache.get("life") == "old"
    in_the_midst(monkeypatch, cache._tiers, "peek", lambda: cache.set("life", "new"))
    cache._learn_lives()
    # At the last moment: then nothing is known of it here.
    in_the_midst(monkeypatch, cache, "_put", lambda: cache.set("late", "new"), before=True)
    assert cache.get("late") == "old"
    cache_server.kill()
    assert cache.get("late", "none") == "none"
    assert cache.get_many(["get", "many", "life", "miss"]) == dict.fromkeys(
        ["get", "many", "life", "miss"], "new"
    )
    assert cache.get("gone", "none") == "none"


@pytest.mark.servers("valkey")
def test_what_is_known_of_changes_is_bounded(cache: CacheClient) -> None:
    for n in range(3):
        cache.set_many({f"{n}:{m}": m for m in range(900)})
    assert len(cache._changed) <= 2_000
    assert cache._changed_since(PREFIX + "0:0", 10)
    assert not cache._changed_since(PREFIX + "0:0", cache._changes)


# ---------------------------------------------------------------------------- loading


@pytest.mark.servers("valkey")
def test_one_loads_for_many(cache: CacheClient, start: Start) -> None:
    """In two clients, as two processes have them, with many threads each."""
    other, loads = start(), []
    going, may_end = threading.Event(), threading.Event()

    def load() -> str:
        loads.append(1)
        going.set()
        may_end.wait(10)
        return "loaded"

    with ThreadPoolExecutor(12) as pool:
        got = [pool.submit((cache, other)[n % 2].get, "k", loader=load) for n in range(12)]
        assert going.wait(10)
        may_end.set()
        assert [future.result(20) for future in got] == ["loaded"] * 12
    assert len(loads) == 1


@pytest.mark.servers("valkey")
def test_a_loader_that_fails(cache: CacheClient) -> None:
    def load() -> Any:
        raise KeyError("no such row")

    for _ in range(3):
        with pytest.raises(KeyError):
            cache.get("k", loader=load)
    assert cache.breaker.state == "closed"
    assert cache.get("k", loader=lambda: 4) == 4
    assert cache.stats()["load_errors"] == 3


@pytest.mark.servers("valkey")
def test_what_is_loaded_is_stored_with_its_life(cache: CacheClient, raw: redis.Redis) -> None:
    assert cache.get_with_info("k", loader=lambda: 4, ttl=20).source == "loader"
    assert 19_000 < raw.pttl(PREFIX + "k") <= 20_000
    assert raw.keys("cb:l:*") == []
    assert cache.get_with_info("k", loader=lambda: 5).source == "redis"


@pytest.mark.servers("valkey")
def test_what_is_loaded_lives_as_long_as_the_section_says(
    cache: CacheClient, raw: redis.Redis
) -> None:
    cache.get("k", loader=lambda: 4)
    assert 3_590_000 < raw.pttl(PREFIX + "k") <= 3_600_000


@pytest.mark.servers("valkey")
def test_redis_goes_away_while_a_value_is_loaded(cache: CacheClient, cache_server: Server) -> None:
    def load() -> str:
        cache_server.kill()
        return "loaded"

    assert cache.get("k", loader=load) == "loaded"
    assert cache.get_with_info("k")[:2] == ("loaded", "memory")
    assert cache.stats()["queued"] == 0


@pytest.mark.servers("valkey")
def test_a_redis_that_is_down_at_the_start_is_used_once_it_is_up(
    start: Start, cache_server: Server
) -> None:
    cache_server.kill()
    cache = start()
    assert cache.get("k", "none") == "none"
    cache_server.restart()
    wait_until(lambda: cache.set("k", 1))
    assert cache.get_with_info("k").source in ("redis", "outbox")
