"""What the cache client costs: healthy, open, out of memory and disk, and of what waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.clients.redis_guard import connect
from distributed_breaker.fallback.disk import DiskTier
from distributed_breaker.fallback.memory import Entry
from distributed_breaker.fallback.tiers import Tiers
from distributed_breaker.services import Services
from scripts.servers import Server

from .figures import Row, Spread, Topic
from .setting import Setting
from .timing import Case, measure

ASKING, ANSWERING = 300, 2_000  # calls in a round, with and without a server
KEYS = 1_000_000
BATCH = 10_000
VALUE = {"label": "cat", "score": 0.98, "model": "v3"}
DAY = 86_400.0
METHOD = (
    "One client, one server over TCP on the loopback, one small value. What a healthy `get` adds "
    "is its time less that of redis-py's own `get` with the same settings, round by round; "
    "decoding the value is part of it, and stands beside it. It is less than nothing, since the "
    "client does without what redis-py's has for trying again and for its pool. An open circuit "
    "answers from this process's memory. The disk tier holds a million keys; those that are read "
    "are drawn at random, so memory has none of them. Changes are made one by one while the server "
    "is away, each synced to disk; then the server is started again."
)


def run(setting: Setting) -> Topic:
    """Measure all of it, with a server of its own."""
    count = setting.count(3, 40)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        server = Server.start(setting.server, tcp=True)
        stack.callback(server.stop)

        def client(name: str, **section: Any) -> CacheClient:
            made = _client(server, folder / name, **section)
            stack.callback(made.close)
            return made

        off = {"enable_memory_fallback": False, "enable_disk_fallback": False}
        cold = client("cold", **off)
        bare = connect(cold.section)
        stack.callback(bare.close)
        warm = client("warm")
        warm.set("k", VALUE)
        rows = _healthy(bare, cold, warm, count)
        server.kill()
        rows.append(_open(warm, count))
        rows += _waiting(warm, server, setting.count(300, 1_000))
        keys = setting.count(20_000, KEYS)
        rows.append(_disk(folder / "million", keys, setting.count(500, 10_000)))
    return Topic("cache", "The cache client", METHOD, rows)


def _client(server: Server, folder: Path, **section: Any) -> CacheClient:
    folder.mkdir(exist_ok=True)
    cache = {
        "redis_url": server.url, "disk_cache_dir": str(folder), "jitter": 0.0, "timeout": 0.2,
        "outbox_path": str(folder / "outbox.db"), "failure_threshold": 1, "success_threshold": 1,
    }  # fmt: skip
    file = folder / "breakers.json"
    content = {
        "settings": {"redis_url": "memory://"},
        "services": {"api": {"cache": cache | section}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    services = Services(file, environ={})
    client = services.client("cache", "api")
    assert isinstance(client, CacheClient)
    return client


def _healthy(bare: redis.Redis, cold: CacheClient, warm: CacheClient, count: int) -> list[Row]:
    raw = bare.get
    name = "nightscan:k"
    cases = [
        Case("bare", f"raw({name!r})", {"raw": raw}, ASKING),
        Case("loads", "loads(data)", {"loads": json.loads, "data": raw(name)}, ASKING),
        Case("off", "get('k')", {"get": cold.get}, ASKING),
        Case("on", "get('k')", {"get": warm.get}, ASKING),
    ]
    samples = measure(cases, count, asyncio.run)
    base = Spread.of(samples["bare"])
    rows = [
        Row("a bare `get` of redis-py", "µs", base),
        Row("`json.loads` of its value", "µs", Spread.of(samples["loads"])),
    ]
    for key, words, target in (("off", "off", "≤ 3 %"), ("on", "warm", "≤ 15 %")):
        added = Spread.of(t - b for t, b in zip(samples[key], samples["bare"], strict=True))
        share = {"share of a bare one": f"{added.median / base.median:.1%}"}
        rows.append(
            Row(f"a healthy `get` adds, tiers {words}", "µs", added, target=target, extra=share)
        )
    return rows


def _open(cache: CacheClient, count: int) -> Row:
    """A hit in memory while the circuit refuses."""
    with contextlib.suppress(redis.RedisError):
        cache.get("missing")  # opens it
    cache.breaker.force_open(ttl=600)
    assert cache.get("k") == VALUE
    case = Case("open", "get('k')", {"get": cache.get}, ANSWERING)
    samples = measure([case], count, asyncio.run)["open"]
    cache.breaker.release()
    return Row("`get` from memory, circuit open", "µs", Spread.of(samples), target="≤ 5")


def _waiting(cache: CacheClient, server: Server, changes: int) -> list[Row]:
    """Changes that wait, and how long it takes to bring them back."""
    took = [_timed(lambda n=n: cache.set(f"w{n}", n)) for n in range(changes)]  # type: ignore[misc]
    waiting = _count(cache)
    server.restart(empty=False)
    start = time.perf_counter()
    while _count(cache) and time.perf_counter() - start < 60:
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    rate = Spread.exactly(waiting / seconds)
    return [
        Row("`set` while the server is away, synced", "ms", Spread.of(took)),
        Row(f"{waiting:,} waiting changes are back, changes/s", "", rate, more_is_better=True),
    ]


def _count(cache: CacheClient) -> int:
    return cache.outbox.waiting(cache.name)


def _disk(folder: Path, keys: int, reads: int) -> Row:
    tiers = Tiers(most_items=1, most_bytes=1, disk=DiskTier(folder, most_bytes=2**32))
    now, data = time.time(), json.dumps(VALUE).encode()
    entry = Entry(data, now, now + DAY, now + 2 * DAY)
    for first in range(0, keys, BATCH):
        some = [(f"nightscan:{number}", entry) for number in range(first, first + BATCH)]
        tiers.put_many(some, durable=True)
    chance = random.Random(0)
    took = []
    for _ in range(reads):
        key = f"nightscan:{chance.randrange(keys)}"
        took.append(_timed(lambda: tiers.get(key)))  # noqa: B023
    tiers.close()
    spread = Spread.of(took)
    ordered = sorted(took)
    worst = {"99 of 100 within": f"{ordered[len(ordered) * 99 // 100]:.3f} ms"}
    return Row(f"`get` from disk, {keys:,} keys", "ms", spread, target="≤ 1", extra=worst)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3
