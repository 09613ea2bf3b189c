"""What is stored comes back, wherever it comes from, and is what other programs can read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import redis
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.clients.cache_changes import OURS, beside, decode, encode
from tests.cache.conftest import PREFIX, Start

pytestmark = pytest.mark.servers("valkey")

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@settings(deadline=None)
@given(JSON)
def test_any_value_of_json_comes_back(value: Any) -> None:
    assert decode(encode("k", value)) == value


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, "5", 5, 1.5, {"expires": 3}])
def test_it_comes_back_as_itself(cache: CacheClient, value: Any) -> None:
    assert cache.set("k", value)
    assert cache.get("k", "none") == value
    assert type(cache.get("k", "none")) is type(value)


def test_it_is_json_in_redis(cache: CacheClient, raw: redis.Redis) -> None:
    cache.set("k", {"a": [1, "ü"]}, ttl=100)
    assert raw.get(PREFIX + "k") == '{"a":[1,"\\u00fc"]}'
    assert 99_000 < raw.pttl(PREFIX + "k") <= 100_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("12", 12),
        ('{"a":1}', {"a": 1}),
        (" [1]\n", [1]),
        ("1 2", "1 2"),
        ("", ""),
    ],
)
def test_what_others_have_stored(
    cache: CacheClient, raw: redis.Redis, text: str, value: Any
) -> None:
    raw.set(PREFIX + "k", text)
    assert cache.get("k") == value


def test_bytes_of_others(cache: CacheClient, raw: redis.Redis) -> None:
    raw.set(PREFIX + "k", b"\xff\xfe")
    assert cache.get("k") == b"\xff\xfe"


@pytest.mark.parametrize("value", [b"x", object(), math.nan, {1, 2}, 1j])
def test_what_is_no_json_is_refused_with_words(cache: CacheClient, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"'k'.*is not JSON"):
        cache.set("k", value)
    assert cache.breaker.state == "closed"
    assert not cache.exists("k")


def test_a_key_is_a_text(cache: CacheClient) -> None:
    with pytest.raises(TypeError, match="a key is a text"):
        cache.get(b"k")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a key is a text"):
        cache.set(1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("ttl", [0, -1, math.nan, "5"])
def test_a_life_is_a_number_of_seconds(cache: CacheClient, ttl: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="ttl"):
        cache.set("k", 1, ttl=ttl)


NAMES = st.text(st.sampled_from("{}:ab1é"), max_size=12)


@settings(deadline=None)
@given(NAMES)
@example("")
@example("{}")
@example("a{}{b}")
@example("a{{b}c")
@example("a}b{c")
def test_what_lies_beside_a_key_is_in_its_slot(name: str) -> None:
    for what in ("w", "l", "i:0123"):
        assert key_slot(beside(name, what).encode()) == key_slot(name.encode())
        assert beside(name, what).startswith(OURS)


@settings(deadline=None)
@given(NAMES, NAMES)
@example("{a}", "a")
@example("a{}", "{a{}}")
def test_each_thing_beside_a_key_has_a_key_of_its_own(one: str, other: str) -> None:
    keys = {beside(name, what) for name in {one, other} for what in ("w", "l", "i:0123")}
    assert len(keys) == 3 * len({one, other})


@pytest.mark.parametrize("prefix", ["", "c", "cb:", "cb:w:{"])
def test_no_key_may_be_one_of_ours(start: Start, prefix: str) -> None:
    cache = start(cache_key_prefix=prefix)
    key = beside("k", "w").removeprefix(prefix)
    for call in (cache.get, cache.delete, lambda key: cache.set(key, 1)):
        with pytest.raises(ValueError, match=r"cb:w:\{k\}.*cache_key_prefix"):
            call(key)
    if not prefix.startswith(OURS):
        assert cache.set("k", 1)
