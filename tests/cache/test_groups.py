"""A cache whose Redis is a cluster, or a primary that Sentinels watch.

The cluster of three is shared, and left as well as it was found.  See also ``tests/groups``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.asyncio.connection import SSLConnection as AsyncSSL
from redis.connection import SSLConnection
from redis.crc import key_slot

from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.clients.cache_changes import SCRIPT, beside
from distributed_breaker.clients.redis_guard import connect, connect_async
from distributed_breaker.sections import Cache
from distributed_breaker.services import Services
from distributed_breaker.store import sha
from scripts.groups import Cluster, Watched, port_of, wait_for
from scripts.servers import why_missing
from tests.cache.conftest import PREFIX, settings
from tests.required import need
from tests.unit.clock import wait_until

KEYS = [f"k{n}" for n in range(30)]  # on all nodes
Start = Callable[..., CacheClient]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need(why_missing("valkey"))
    with Cluster.start() as group:
        yield group


@pytest.fixture
def watched() -> Iterator[Watched]:
    need(why_missing("valkey"))
    with Watched.start(replicas=1) as group:
        yield group


@pytest.fixture
def alone() -> Iterator[Cluster]:
    """A cluster of one node, which the test may kill."""
    need(why_missing("valkey"))
    with Cluster.start(primaries=1, replicas=0) as group:
        yield group


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """``start(group, **section)``: a client of that group's."""
    clients: list[CacheClient] = []
    with contextlib.ExitStack() as stack:

        def start(group: Any, **section: Any) -> CacheClient:
            file = tmp_path / "file.json"
            file.write_text(json.dumps(settings(group, tmp_path, **section)))
            services = Services(file, environ={})
            stack.callback(services.close)
            client = services.client("cache", "api")
            assert isinstance(client, CacheClient)
            clients.append(client)
            return client

        yield start
        for client in clients:
            await client.aclose()


def held(group: Cluster | Watched, key: str) -> Any:
    """What the node that serves a key holds."""
    return group.client(group.primary_of(PREFIX + key)).get(PREFIX + key)


def nothing_waits(cache: CacheClient) -> bool:
    return not cache.stats()["outbox"]["topics"]


# ---------------------------------------------------------------------------- a cluster


def test_all_operations_on_a_cluster(cluster: Cluster, start: Start) -> None:
    cache = start(cluster)
    odd = ["a}b", "{}x", "a{b", "{user}:1", "a{}{b}"]
    values = {key: n for n, key in enumerate(KEYS + odd)}
    for node in cluster.nodes[:3]:
        cluster.client(node).script_flush()
    assert cache.set_many(values)
    # Known to all nodes but one.
    cluster.client(cluster.nodes[1]).script_flush()
    assert cache.set_many({key: n + 1 for key, n in values.items()}, ttl=60)
    assert cluster.ask(cluster.nodes[1], "SCRIPT", "EXISTS", sha(SCRIPT)) == [1]
    assert [held(cluster, key) for key in KEYS] == [str(n + 1) for n in range(len(KEYS))]
    assert cache.get_many([*values, "none"]) == {key: n + 1 for key, n in values.items()}
    for key in odd:
        # By the servers' own word, too.
        slots = {
            cluster.ask(cluster.nodes[0], "CLUSTER", "KEYSLOT", name)
            for name in (key, beside(key, "w"))
        }
        assert len(slots) == 1
        assert cache.set(key, 5)
        assert cache.get(key) == 5
        assert cache.increment(key, 2) == 7
        assert cache.expire(key, 20)
        assert 19 < (cache.ttl(key) or 0) <= 20
        assert cluster.client(cluster.primary_of(PREFIX + key)).exists(beside(PREFIX + key, "w"))
    assert cache.get("loaded", loader=lambda: 3) == 3
    assert cache.delete(*values)
    assert cache.get_many(KEYS) == {}
    assert not cache.exists("k0")
    assert cache.stats()["queued"] == 0
    assert cache.breaker.state == "closed"


async def test_all_operations_on_a_cluster_without_blocking(cluster: Cluster, start: Start) -> None:
    cache = start(cluster)
    values = {key: n for n, key in enumerate([*KEYS, "a}b", "a{b"])}
    cluster.client(cluster.nodes[1]).script_flush()
    assert await cache.set_many_async(values)
    assert await cache.get_many_async([*values, "none"]) == values
    assert await cache.increment_async("k3", 2) == 5
    assert await cache.set_async("k4", "x")
    assert await cache.get_async("k4") == "x"
    assert await cache.get_async("loaded-async", loader=lambda: 3) == 3
    assert await cache.delete_async(*values)
    assert not await cache.exists_async("k4")
    assert cache.stats()["queued"] == 0
    # The whole client: one for a loop, and its own faults are none of the cluster's.
    client = cache.redis_async()
    assert client is cache.redis_async()
    assert await client.set("whole", 1)
    assert await client.pipeline().get("whole").incr("n").execute() == [b"1", 1]
    for _ in range(3):
        with pytest.raises(redis.exceptions.RedisClusterException):
            await client.mget("a", "b")
    assert cache.breaker.state == "closed"
    await client.delete("whole", "n")
    cache.breaker.force_open(reason="for a test")
    for call in (client.get("whole"), client.pipeline().incr("n").execute()):
        with pytest.raises(redis.ConnectionError, match="forced_open"):
            await call
    await cache.aclose()
    assert client is not cache.redis_async()


def test_the_whole_client_of_a_cluster(cluster: Cluster, start: Start) -> None:
    cache = start(cluster)
    assert cache.redis.set("whole", b"bytes")
    assert cache.redis.pipeline().get("whole").incr("n").execute() == [b"bytes", 1]
    for _ in range(3):
        with pytest.raises(redis.exceptions.RedisClusterException):
            cache.redis.mget("a", "b")
    assert cache.breaker.state == "closed"
    cache.redis.delete("whole", "n")
    cache.breaker.force_open(reason="for a test")
    with pytest.raises(redis.ConnectionError, match="forced_open"):
        cache.redis.get("whole")
    with pytest.raises(redis.ConnectionError, match="forced_open"):
        cache.redis.pipeline().incr("n").execute()


async def test_a_node_is_replaced(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    """After a kill; what it did not take waits, and only that."""
    cache = start(cluster)
    values = {key: n for n, key in enumerate(KEYS)}
    assert cache.set_many(values)
    assert await cache.get_many_async(KEYS) == values
    # Those who only read bunches, and have nothing else to read from, find the new node as well.
    reader = start(
        cluster,
        enable_memory_fallback=False,
        enable_disk_fallback=False,
        outbox_path=str(tmp_path / "none.db"),
    )
    assert reader.get_many(KEYS) == await reader.get_many_async(KEYS) == values
    dead = cluster.primary_of(PREFIX + "k0")
    heir = cluster.replica_of(dead)
    there = [key for key in KEYS if cluster.primary_of(PREFIX + key) is dead]
    assert 0 < len(there) < len(KEYS)
    dead.kill()
    assert cache.set_many({key: -n for key, n in values.items()}) is False
    assert cache.stats()["queued"] == len(there)
    assert cache.increment("k0", 5) is None or cache.get("k0") == 5
    assert await cache.get_many_async(KEYS, default=None) == cache.get_many(KEYS, default=None)
    wait_for(lambda: cluster.is_primary(heir), "another one is promoted")
    wait_until(lambda: nothing_waits(cache), 30)
    assert (await cache.get_many_async(KEYS))["k1"] == -1
    assert [held(cluster, key) for key in KEYS[1:]] == [str(-n) for n in range(1, len(KEYS))]
    assert held(cluster, "k0") == "5"
    assert cache.problems() == []
    wait_until(lambda: cache.get_with_info("k0", None).source == "redis")
    wait_until(lambda: reader.get_many(["k0"], None) == {"k0": 5})
    async with asyncio.timeout(20):
        while await reader.get_many_async(["k0"], None) != {"k0": 5}:
            await asyncio.sleep(0.01)
    dead.restart(empty=False)
    cluster.wait_ready()


# ---------------------------------------------------------------------------- a cluster of one


async def test_slots_move_to_a_node_that_is_new(alone: Cluster, start: Start) -> None:
    """ASK for a node that nobody has heard of, and MOVED: reads go on.  TRYAGAIN: what changes two
    keys waits while one is here and one there, and Redis is none the worse for it."""
    cache = start(alone)
    raw = cache.redis_async()
    names = ["{x}:a", "{x}:b"]
    assert cache.set_many(dict.fromkeys(names, 1))
    assert await cache.get_many_async(names) == dict.fromkeys(names, 1)
    await asyncio.gather(*(raw.get("warm") for _ in range(3)))  # several connections
    new = alone.add_server()
    alone.nodes.append(new)
    alone.ask(new, "CLUSTER", "SET-CONFIG-EPOCH", 2)
    alone.ask(new, "CLUSTER", "MEET", "127.0.0.1", port_of(alone.nodes[0]))
    wait_for(lambda: alone._ok(new), "they meet")
    loop, looks = asyncio.get_running_loop(), 0

    async def without_blocking() -> None:
        await cache.increment_async("{x}:n")
        assert await cache.get_many_async(names) == dict.fromkeys(names, 1)
        assert await asyncio.gather(*(raw.get(PREFIX + "{x}:b") for _ in range(4))) == [b"1"] * 4

    def look() -> None:
        nonlocal looks
        looks += 1
        cache.increment("{x}:n")
        cache.set("{x}:c", looks)
        assert cache.get_many(names) == dict.fromkeys(names, 1)
        asyncio.run_coroutine_threadsafe(without_blocking(), loop).result(20)

    slot = key_slot(b"x")
    await asyncio.to_thread(alone.move_slot, slot, new, look)
    await asyncio.to_thread(look)
    assert alone.primary_of("{x}") is new
    assert looks > 4
    assert cache.stats()["queued"] > 0
    assert cache.breaker.state == "closed"
    await asyncio.to_thread(wait_until, lambda: nothing_waits(cache))
    assert (held(alone, "{x}:n"), held(alone, "{x}:c")) == (str(2 * looks), str(looks))


async def test_a_cluster_that_was_to_be_asked_anew_is_closed(alone: Cluster, start: Start) -> None:
    """After an answer that did not come the client asks who is there, and redis-py's own close
    leaves such a client's connections open."""
    cache = start(alone)
    await cache.set_async("k", 1)
    store = cache._stores.get()
    store._initialize = True
    (node,) = store.nodes_manager.nodes_cache.values()
    assert any(connection.is_connected for connection in node._connections)
    await cache.aclose()
    assert not any(connection.is_connected for connection in node._connections)


def test_a_cluster_says_that_it_is_down(alone: Cluster, start: Start) -> None:
    """CLUSTERDOWN counts; what was to be written waits, an increment, too."""
    cache = start(alone)
    cache.set("k", 1)
    (node,) = alone.nodes
    alone.ask(node, "CLUSTER", "DELSLOTS", 7)
    wait_for(lambda: not alone._ok(node), "it is down")
    assert cache.get_with_info("k")[:2] == (1, "memory")
    assert cache.breaker.state in ("open", "half_open")
    assert cache.increment("k", 2) == 3
    assert cache.set_many({"a": 1, "b": 2}) is False
    alone.ask(node, "CLUSTER", "ADDSLOTS", 7)
    alone.wait_ready()
    wait_until(lambda: nothing_waits(cache))
    assert [held(alone, key) for key in ("k", "a", "b")] == ["3", "1", "2"]


def test_a_cluster_that_is_down_at_the_start(alone: Cluster, start: Start) -> None:
    (node,) = alone.nodes
    node.kill()
    cache = start(alone)
    assert cache.get("k", "none") == "none"
    assert cache.set("k", 1) is False
    assert cache.increment("n", 2) is None  # nothing was sent, so it waits
    with pytest.raises(redis.ConnectionError):
        cache.redis.get("k")
    node.restart()
    if not alone.ask(node, "CLUSTER", "SLOTS"):
        alone.ask(node, "CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
    alone.wait_ready()
    wait_until(lambda: nothing_waits(cache))
    assert (held(alone, "k"), held(alone, "n")) == ("1", "2")
    assert cache.get_with_info("k")[:2] == (1, "redis")
    wait_until(lambda: cache.breaker.state == "closed")
    assert cache.redis.get(PREFIX + "k") == b"1"


# ---------------------------------------------------------------------------- Sentinels


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_how_sentinels_are_asked(scheme: str) -> None:
    """As users of their own, over TLS if the servers are; and nothing is tried twice."""
    url = f"{scheme}+sentinel://u:p@127.0.0.1:1,127.0.0.1:2/main/3?sentinel_password=s"
    section = Cache(redis_url=url)
    for client, ssl in ((connect(section), SSLConnection), (connect_async(section), AsyncSSL)):
        pool = client.connection_pool
        assert issubclass(pool.connection_class, ssl) is (scheme == "rediss")
        assert (pool.connection_kwargs["username"], pool.connection_kwargs["db"]) == ("u", 3)
        assert pool.connection_kwargs["retry"].get_retries() == 0
        assert len(pool.sentinel_manager.sentinels) == 2
        for sentinel in pool.sentinel_manager.sentinels:
            its = sentinel.connection_pool
            assert issubclass(its.connection_class, ssl) is (scheme == "rediss")
            assert (its.connection_kwargs["username"], its.connection_kwargs["password"]) == (
                None,
                "s",
            )
            assert its.connection_kwargs["retry"].get_retries() == 0
            assert its.connection_kwargs["socket_timeout"] == section.socket_timeout


async def test_a_primary_is_lost(watched: Watched, start: Start) -> None:
    """Killed while changes come; they wait and reach the new one, in order and once."""
    cache = start(watched)
    assert cache.set_many({"k": 1, "other": 1})
    assert await cache.get_async("k") == 1
    assert cache.redis.get(PREFIX + "k") == b"1"
    assert await cache.redis_async().get(PREFIX + "k") == b"1"
    watched.wait_ready()
    watched.primary_of("").kill()
    for n in range(3):
        assert cache.set("k", n) is False
        assert await cache.set_async("other", n) is False
        cache.increment("n")
    watched.primary_of("")
    wait_until(lambda: nothing_waits(cache), 30)
    assert [held(watched, key) for key in ("k", "other", "n")] == ["2", "2", "3"]
    assert cache.get_with_info("k").source == "redis"
    assert (await cache.get_with_info_async("k")).source == "redis"
    assert cache.redis.get(PREFIX + "k") == b"2"
    assert await cache.redis_async().get(PREFIX + "k") == b"2"


async def test_a_primary_becomes_a_replica(watched: Watched, start: Start) -> None:
    """READONLY counts, and the next connection goes where the Sentinels say; an increment that was
    answered so waits."""
    cache = start(watched)
    assert cache.set("k", 1)
    assert await cache.set_async("other", 1)
    old = watched.primary_of("")
    watched.wait_ready()
    new = watched.switch("")
    # The Sentinels do the same, ten seconds later; unlike them we close no connections.
    watched.ask(old, "REPLICAOF", "127.0.0.1", port_of(new))
    assert await cache.increment_async("other") == 2
    assert cache.breaker.state in ("open", "half_open")
    cache.breaker.reset(reason="for a test")
    cache.increment("k")
    wait_until(lambda: nothing_waits(cache))
    assert [held(watched, key) for key in ("k", "other")] == ["2", "2"]
    wait_until(lambda: cache.set("k", 5))
    assert held(watched, "k") == "5"
