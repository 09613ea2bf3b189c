"""A cache whose Redis is away: who answers, what waits, and what Redis holds afterwards."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import redis

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.clients import waiting
from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.clients.cache_changes import Change
from distributed_breaker.clients.waiting import Waiting
from scripts.servers import Server
from tests.cache.conftest import PREFIX, Start
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")


def nothing_waits(*caches: CacheClient) -> bool:
    return all(not cache.stats()["outbox"]["topics"] for cache in caches)


def known_as_fresh(cache: CacheClient, key: str) -> Callable[[], bool]:
    """Whether the client has learnt how long a value lives."""
    tiers = cache._tiers
    assert tiers is not None

    def known() -> bool:
        held = tiers.peek(PREFIX + key)
        return held is not None and held.fresh_until > held.written

    return known


# ---------------------------------------------------------------------------- reads


def test_the_tiers_answer(cache: CacheClient, cache_server: Server, raw: redis.Redis) -> None:
    cache.set("set", {"a": 1})
    raw.set(PREFIX + "read", '"seen"', px=60_000)
    assert cache.get("read") == "seen"
    wait_until(known_as_fresh(cache, "read"))
    cache_server.kill()
    for _ in range(3):
        info = cache.get_with_info("set")
        assert (info.value, info.source, info.stale) == ({"a": 1}, "memory", False)
        assert info.age is not None
        assert cache.get_with_info("read")[:3] == ("seen", "memory", False)
        assert cache.get_many(["set", "read", "x"]) == {"set": {"a": 1}, "read": "seen"}
        assert cache.exists("set")
        assert 0 < (cache.ttl("read") or 0) <= 60
    assert cache.breaker.state == "open"


def test_what_answers_in_an_outage_is_a_fallback(start: Start, cache_server: Server) -> None:
    cache = start(timeout=600)
    cache.set("k", 1)
    cache_server.kill()
    cache.get("k")
    assert cache.breaker.refusing
    before = cache.breaker.snapshot().totals
    assert cache.get("k") == 1
    assert cache.get("none", default=2) == 2
    assert cache.get("loaded", loader=lambda: 3) == 3
    assert cache.get_many(["k"]) == {"k": 1}
    cache.set("k", 4)
    after = cache.breaker.snapshot().totals
    assert after["rejected"] == before["rejected"] + 5
    assert after["fallbacks"] == before["fallbacks"] + 5


def test_a_share_of_the_keys_is_kept_warm(
    start: Start, cache_server: Server, raw: redis.Redis
) -> None:
    """The same ones in every process."""
    keys = [f"k{number}" for number in range(100)]
    for key in keys:
        raw.set(f"nightscan:{key}", "1")
    caches = [start(str(share), warm_share=share) for share in (0.0, 0.3, 0.3, 1.0)]
    caches[0].set("mine", 1)
    for cache in caches:
        assert len([cache.get(key) for key in keys]) == len(cache.get_many(keys)) == 100
    cache_server.kill()
    none, some, same, every = ({k for k in keys if c.get(k, 0)} for c in caches)
    assert none == set()
    assert every == set(keys)
    assert some == same
    assert 15 < len(some) < 45
    assert caches[0].get("mine") == 1


def test_when_nothing_can_answer(start: Start, cache_server: Server) -> None:
    cache = start(timeout=60)
    cache_server.kill()
    with pytest.raises(redis.ConnectionError) as first:
        cache.get("k")
    assert not isinstance(first.value, CircuitBreakerOpenException)
    with pytest.raises(CircuitBreakerOpenException) as caught:
        cache.get("k")
    assert isinstance(caught.value, redis.ConnectionError)
    assert caught.value.circuit == "api.cache"
    assert "CacheOpenException" in repr(caught.value)
    assert cache.get("k", None) is None
    assert cache.get("k", default=4) == 4
    with pytest.raises(CircuitBreakerOpenException):
        cache.get_many(["k"])
    assert cache.get_many(["k"], default=0) == {"k": 0}
    for call in (cache.exists, cache.ttl):
        with pytest.raises(CircuitBreakerOpenException):
            call("k")


def test_with_every_tier_off(start: Start, cache_server: Server) -> None:
    cache = start(enable_memory_fallback=False, enable_disk_fallback=False)
    cache.set("k", 1)
    cache_server.kill()
    for _ in range(2):
        with pytest.raises(redis.ConnectionError):
            cache.get("k")
    assert cache.set("k", 2) is False
    assert cache.get_with_info("k")[:2] == (2, "outbox")


def test_what_is_over_is_stale_and_then_gone(start: Start, cache_server: Server) -> None:
    cache = start(stale_ttl=0.5)
    cache.set("k", 1, ttl=0.001)
    cache_server.kill()
    info = cache.get_with_info("k", default="gone")
    assert (info.value, info.stale) == (1, True)
    assert cache.stats()["stale"] == 1
    wait_until(lambda: cache.get("k", default="gone") == "gone")


def test_the_loader_comes_before_what_is_stale(start: Start, cache_server: Server) -> None:
    cache = start()
    cache.set("k", "old", ttl=0.001)
    cache_server.kill()

    def broken() -> Any:
        raise OSError("the database is away, too")

    assert cache.get_with_info("k", loader=broken)[:3] == ("old", "memory", True)
    assert cache.get_with_info("k", loader=lambda: "new").source == "loader"
    assert cache.get_with_info("k", loader=broken)[:3] == ("new", "memory", False)
    with pytest.raises(OSError, match="the database is away"):
        cache.get("other", loader=broken)


def test_it_survives_a_restart_of_the_process(
    cache: CacheClient, start: Start, cache_server: Server
) -> None:
    cache.set("kept", "on disk", durable=True)
    cache.set("flushed", 1)
    cache_server.kill()
    assert cache.set("late", 2) is False
    cache.close()
    fresh = start()
    assert fresh.get_with_info("kept")[:2] == ("on disk", "disk")
    assert fresh.get("flushed") == 1
    assert fresh.get("late") == 2
    cache_server.restart(empty=False)
    wait_until(lambda: nothing_waits(fresh))
    assert fresh.get_with_info("late")[:2] == (2, "redis")


async def test_the_tiers_answer_without_blocking(cache: CacheClient, cache_server: Server) -> None:
    await cache.set_async("k", 1)
    cache_server.kill()
    for _ in range(2):
        assert (await cache.get_with_info_async("k"))[:2] == (1, "memory")
    with pytest.raises(CircuitBreakerOpenException):
        await cache.get_async("x")
    assert await cache.get_async("x", 3) == 3
    assert await cache.set_async("k", 2) is False
    assert await cache.get_async("k") == 2
    assert await cache.delete_async("k") is False
    assert await cache.get_async("k") is None
    await cache.aclose()


# ---------------------------------------------------------------------------- changes


def test_changes_reach_redis_afterwards_in_order(
    cache: CacheClient, cache_server: Server, raw: redis.Redis
) -> None:
    cache.set_many({"a": 1, "b": 1, "c": 1, "n": 10})
    cache_server.kill()
    assert cache.set("a", 2) is False
    assert cache.set("a", 3, ttl=500) is False
    assert cache.delete("b") is False
    assert cache.expire("c", 300) is False
    assert cache.increment("n", 5) == 15
    assert cache.increment("n", 2) == 17
    assert cache.set_many({"new": [1], "b2": 2}) is False
    # All of it holds at once.
    assert (cache.get("a"), cache.get("b"), cache.get("n")) == (3, None, 17)
    assert cache.get("b", loader=lambda: "loaded") == "loaded"
    cache_server.restart(empty=False)
    wait_until(lambda: nothing_waits(cache))
    assert cache.get_many(["a", "b", "n", "new", "b2"]) == {"a": 3, "n": 17, "new": [1], "b2": 2}
    assert 490_000 < raw.pttl(PREFIX + "a") <= 500_000
    assert 290_000 < raw.pttl(PREFIX + "c") <= 300_000


def test_where_no_thread_can_run_callers_bring_changes_back(
    cache: CacheClient, cache_server: Server, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(name: str, run: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(waiting, "start_thread", no_thread)
    monkeypatch.setattr(waiting, "LATER", 0.01)
    cache_server.kill()
    assert cache.set("a", 1) is False
    cache_server.restart(empty=False)
    wait_until(lambda: cache.get("a") == 1 and raw.exists("nightscan:a") == 1)
    wait_until(lambda: cache.get("b", "none") == "none" and not cache._queue.possible)


def test_what_another_process_lets_wait_counts_at_once(
    start: Start, cache_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen of the file is remembered only until it is written again."""
    one, other = start(timeout=60), start(timeout=60)
    for cache in (one, other):
        cache.set("a", 1)
        cache.set("b", 1)
    cache_server.kill()
    assert other.set("b", 2) is False
    look = one.outbox.latest
    looks: list[str] = []
    monkeypatch.setattr(one.outbox, "latest", lambda *key: looks.append(key[1]) or look(*key))

    def reads() -> tuple[object, object, list[str]]:
        looks.clear()
        return one.get("a"), one.get("b"), looks

    def remembered() -> bool:
        os.utime(f"{one.outbox.path}-wal", (1, 1))  # as if that had been long ago
        return reads()[:2] == (1, 2) and reads() == (1, 2, [])

    wait_until(remembered)  # a first attempt to bring it back is a write, too
    assert other.delete("a") is False
    for _ in range(2):  # it was written only just now, so nothing is remembered
        assert reads() == (None, 2, ["nightscan:a", "nightscan:b"])
    assert one.get("a", loader=lambda: 3) == 3
    assert one.get("a") == 3, "it was loaded after the deletion"


def test_nothing_newer_is_overwritten(
    cache: CacheClient, start: Start, cache_server: Server, raw: redis.Redis
) -> None:
    """Another host, which Redis answers sooner, has changed the keys in the meantime."""
    other = start(host="elsewhere")
    cache.set_many({"a": 0, "b": 0, "c": 0, "n": 0, "d": 0})
    cache_server.kill()
    cache.set("a", "older")
    cache.set("b", "older")
    cache.delete("c")
    cache.set("n", 100)
    cache.increment("d", 7)
    cache.breaker.force_open(reason="keeps this host away a little longer")
    cache_server.restart(empty=False)
    wait_until(lambda: other.set("a", "newer"))
    assert other.delete("b")
    assert other.set("c", "newer")
    assert other.increment("n") == 1
    assert other.increment("d") == 1
    cache.breaker.release(reason="go on")
    wait_until(lambda: nothing_waits(cache))
    assert cache.get_many(["a", "b", "c", "n", "d"]) == {"a": "newer", "c": "newer", "n": 1, "d": 8}
    assert cache.stats()["superseded"] == 4


def test_a_slow_clock_is_not_overwritten_by_what_was_carried_out_before(
    cache: CacheClient, start: Start, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer got lost, so it waited as well, and comes again."""
    first = Change("set", PREFIX + "k", cache._stamp(), b"1", 60.0)
    cache._drive(cache._carry_out(first))
    other = start(host="there")
    monkeypatch.setattr(other, "_stamp", lambda: first.stamp - 10_000_000)
    assert other.set("k", 2)
    cache._drive(cache._carry_out(first, replayed="again"))
    assert raw.get(PREFIX + "k") == "2"


def test_what_builds_on_something_that_waits_waits_too(
    cache: CacheClient,
    start: Start,
    cache_server: Server,
    raw: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what replaces it does not."""
    other = start()
    monkeypatch.setattr(Waiting, "round", lambda _: False)
    cache_server.kill()
    cache.set("k", 1)
    cache.set("n", 10)
    cache.increment("m", 3)
    cache_server.restart()
    wait_until(lambda: other.set("k", 2))
    assert raw.get(PREFIX + "k") == "2"
    assert other.get_with_info("k")[:2] == (2, "redis")
    assert other.increment("m") == 1
    other.increment("n")
    assert raw.get(PREFIX + "n") is None
    monkeypatch.undo()
    cache._queue.care()
    wait_until(lambda: nothing_waits(cache, other))
    assert raw.mget(PREFIX + "k", PREFIX + "n", PREFIX + "m") == ["2", "11", "4"]


def test_a_replayed_increment_counts_once(cache: CacheClient, raw: redis.Redis) -> None:
    """A process may die between the delivery and its note."""
    cache._queue.outbox.add(
        "api.cache", "increment", {"stamp": 1, "data": "5", "ttl": None}, key="n"
    )
    (entry,) = cache._queue.outbox.entries()
    cache._deliver(entry)
    cache._deliver(entry)
    cache.replay()
    assert raw.get("n") == "5"


def test_an_increment_without_an_answer_is_not_repeated(
    cache: CacheClient, cache_server: Server, raw: redis.Redis
) -> None:
    """It may have been carried out."""
    cache.set("n", 1)
    cache_server.pause()
    with pytest.raises(redis.TimeoutError):
        cache.increment("n")
    cache_server.resume()
    assert cache.stats()["queued"] == 0
    wait_until(lambda: raw.get(PREFIX + "n") == "2")


def test_what_waited_too_long_is_deleted_rather_than_written(
    cache: CacheClient, raw: redis.Redis
) -> None:
    """What was written since cannot be told any more, and nobody shall read something older."""
    for key, stamp, ttl in (("old", 1_000_000, None), ("over", 1_700_000_000_000_000, 1)):
        raw.set(key, "0")
        payload = {"stamp": stamp, "data": "1", "ttl": ttl}
        cache._queue.outbox.add("api.cache", "set", payload, key=key)
    cache.replay()
    assert raw.mget("old", "over") == [None, None]


def test_what_cannot_be_carried_out_is_parked(cache: CacheClient, raw: redis.Redis) -> None:
    raw.lpush("list", 1)
    payload = {"stamp": 2, "data": "1", "ttl": None}
    cache._queue.outbox.add("api.cache", "increment", payload, key="list")
    cache._queue.outbox.add("api.cache", "dance", payload, key="k")
    cache._queue.outbox.add("api.cache", "set", {"nothing": 1}, key="k")
    cache.replay()
    parked = cache._queue.outbox.entries(parked=True)
    assert ["WRONGTYPE" in entry.error for entry in parked] == [True, False, False]
    assert cache.stats()["outbox"]["topics"]["api.cache"]["parked"] == 3


def test_a_full_outbox_is_no_silent_loss(
    cache: CacheClient, cache_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache._queue.outbox, "_most_entries", 2)
    cache_server.kill()
    cache.set("a", 1)
    cache.set("b", 1)
    with pytest.raises(redis.ConnectionError) as caught:  # the circuit's, or a probe's own
        cache.set("c", 1)
    assert "most_entries=2" in str(caught.value.__cause__)


def test_threads_in_an_outage_lose_nothing(
    cache: CacheClient, cache_server: Server, raw: redis.Redis
) -> None:
    stop = threading.Event()
    written = [0] * 4

    def write(number: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(redis.RedisError):
                cache.increment(f"n{number}")
                written[number] += 1

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(written) > 20)
    cache_server.kill()
    wait_until(lambda: cache.stats()["queued"] > 20)
    cache_server.restart(empty=False)
    wait_until(lambda: cache.breaker.state == "closed", timeout=20)
    stop.set()
    for thread in threads:
        thread.join(10)
    wait_until(lambda: nothing_waits(cache), timeout=30)
    # What raised may have been counted or not, and is at most one for each thread and cut.
    for number in range(4):
        assert int(raw.get(f"{PREFIX}n{number}") or 0) - written[number] in (0, 1, 2)
