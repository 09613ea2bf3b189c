"""The memory tier: least recently used, within two bounds, each entry for its life."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from distributed_breaker.fallback.memory import OVERHEAD, Entry, MemoryTier, size_of
from tests.fallback.settings import MIB, data_of, entry
from tests.unit.clock import FakeClock


def tier(clock: FakeClock, **settings: Any) -> MemoryTier:
    return MemoryTier(**({"most_items": 3, "most_bytes": MIB, "now": clock} | settings))


def test_what_is_put_is_served_for_its_life(clock: FakeClock) -> None:
    memory = tier(clock)
    put = entry(clock, ttl=10.0, stale=20.0)
    memory.put("a", put)
    clock.advance(9.5)
    hit = memory.get("a")
    assert hit == (put, "memory", False, 9.5)
    clock.advance(0.5)
    assert memory.get("a") is None
    hit = memory.get("a", stale=True)
    assert hit == (put, "memory", True, 10.0)
    clock.advance(10.0)
    assert memory.get("a", stale=True) is None
    stats = memory.stats()
    assert (stats["hits"], stats["stale"], stats["misses"]) == (1, 1, 2)


def test_an_age_is_never_negative(clock: FakeClock) -> None:
    memory = tier(clock)
    memory.put("a", entry(clock)._replace(written=clock() + 5.0))
    hit = memory.get("a")
    assert hit is not None
    assert hit.age == 0.0


def test_the_least_recently_used_goes_first(clock: FakeClock) -> None:
    gone: list[str] = []
    memory = tier(clock, on_evicted=lambda key, _: gone.append(key))
    for key in "abc":
        memory.put(key, entry(clock))
    memory.get("a")
    memory.peek("b")  # is no use
    memory.put("d", entry(clock))
    memory.put("e", entry(clock))
    assert gone == ["b", "c"]
    assert sorted(key for key, _ in memory.items()) == ["a", "d", "e"]
    assert memory.stats()["evictions"] == 2


def test_putting_again_is_a_use_and_evicts_nothing(clock: FakeClock) -> None:
    gone: list[str] = []
    memory = tier(clock, on_evicted=lambda key, _: gone.append(key))
    for key in "abca":
        memory.put(key, entry(clock))
    assert gone == []
    memory.put("d", entry(clock))
    assert gone == ["b"]


def test_bytes_are_bounded_too(clock: FakeClock) -> None:
    memory = tier(clock, most_items=1_000, most_bytes=20_000)
    size = OVERHEAD + 1 + 1_400
    for key in "abcdefghijkl":
        assert memory.put(key, entry(clock, b"x" * 1_400))
    kept = 20_000 // size
    assert memory.stats()["items"] == kept
    assert memory.stats()["bytes"] == kept * size


def test_what_is_larger_than_an_eighth_is_refused_with_what_was_there(clock: FakeClock) -> None:
    memory = tier(clock, most_bytes=8 * 1_000)
    fits = 1_000 - OVERHEAD - 1
    assert memory.put("a", entry(clock, b"x" * fits))
    assert not memory.put("a", entry(clock, b"x" * (fits + 1)))
    assert memory.get("a") is None
    assert memory.stats()["bytes"] == 0


def test_expired_ones_make_room_first(clock: FakeClock) -> None:
    memory = tier(clock)
    memory.put("short", entry(clock, ttl=1.0, stale=2.0))
    memory.put("b", entry(clock))
    memory.put("c", entry(clock))
    memory.get("short")  # the most recently used
    clock.advance(2.0)
    memory.put("d", entry(clock))
    assert sorted(key for key, _ in memory.items()) == ["b", "c", "d"]


def test_delete_and_clear(clock: FakeClock) -> None:
    memory = tier(clock)
    memory.put("a", entry(clock))
    memory.put("b", entry(clock))
    assert memory.delete("a")
    assert not memory.delete("a")
    memory.clear()
    assert memory.items() == []
    assert memory.stats()["bytes"] == 0


@pytest.mark.parametrize("bound", ["most_items", "most_bytes"])
def test_a_bound_below_one_is_refused(bound: str) -> None:
    with pytest.raises(ValueError, match=f"{bound} is 0"):
        MemoryTier(**({"most_items": 1, "most_bytes": 1} | {bound: 0}))


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_agrees_with_a_plain_model(seed: int) -> None:
    """The same keys in the same order, and the same bytes, after each step."""
    rnd = random.Random(seed)
    clock = FakeClock()
    gone: list[str] = []
    memory = MemoryTier(
        most_items=8, most_bytes=8_000, on_evicted=lambda key, _: gone.append(key), now=clock
    )
    model: OrderedDict[str, Entry] = OrderedDict()
    expected: list[str] = []
    for _ in range(300):
        key = rnd.choice("abcdefghijkl") * rnd.randint(1, 3)
        step = rnd.random()
        if step < 0.6:
            new = entry(clock, b"x" * rnd.choice([0, 10, 300, 499, 500, 2_000]))
            kept = memory.put(key, new)
            model.pop(key, None)
            assert kept == (size_of(key, new) <= 1_000)
            if kept:
                model[key] = new
                while len(model) > 8 or sum(map(size_of, model, model.values())) > 8_000:
                    expected.append(model.popitem(last=False)[0])
        elif step < 0.9:
            assert data_of(memory, key) == (model[key].data if key in model else None)
            if key in model:
                model.move_to_end(key)
        else:
            assert memory.delete(key) == (model.pop(key, None) is not None)
        assert gone == expected
        assert dict(memory.items()) == model
        stats = memory.stats()
        assert stats["bytes"] == sum(map(size_of, model, model.values()))
        assert stats["items"] == len(model)


def test_threads_leave_the_accounts_right(clock: FakeClock) -> None:
    memory = MemoryTier(most_items=50, most_bytes=50_000, now=clock)
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        rnd = random.Random(number)
        barrier.wait()
        for _ in range(1_000):
            key = str(rnd.randrange(100))
            way = rnd.random()
            if way < 0.5:
                memory.put(key, entry(clock, b"x" * rnd.randrange(2_000)))
            elif way < 0.9:
                memory.get(key)
            else:
                memory.delete(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    stats = memory.stats()
    held = memory.items()
    assert stats["items"] == len(held) <= 50
    assert stats["bytes"] == sum(size_of(*pair) for pair in held) <= 50_000
