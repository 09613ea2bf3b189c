"""Predictions that are kept: in this process's memory, and, if wanted, in the service's cache."""

from __future__ import annotations

import base64
import functools
import json
import sys
import time
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from ..errors import CircuitBreakerOpenException
from ..fallback.memory import Entry, MemoryTier
from ..sections import Ml
from .ml_tensors import decode, encode


class Shared(Protocol):
    """The service's cache."""

    def get(self, key: str, default: Any = ...) -> Any: ...
    def set(self, key: str, value: Any, ttl: float | None = ...) -> bool: ...


class Kept(NamedTuple):
    """A prediction that was kept.

    Attributes:
        value: the model's output, the caller's own.
        age: seconds since the model has given it.
        stale: whether it is past its fresh life.
    """

    value: Any
    age: float
    stale: bool


class Predictions:
    """What a model has answered, by its version and the input's type, shape and bytes.

    Args:
        section: says how many are kept, and how long.
        shared: the cache that other processes see, too; None: there is none.
    """

    def __init__(self, section: Ml, shared: Shared | None = None) -> None:
        self.section = section
        self.shared = shared
        self.uncachable = 0
        self._tier = MemoryTier(
            most_items=section.prediction_cache_size, most_bytes=section.prediction_cache_bytes
        )

    def key(self, version: str, inputs: Any) -> str | None:
        """What an input's prediction is kept under; None: it cannot be told from others."""
        try:
            header, parts = encode(inputs)
        except TypeError:
            self.uncachable += 1
            return None
        # Lengths come first, so that no two inputs run into one another.
        text = f"{version} {header!r}"
        digest = blake2b(f"{len(text)} {text}".encode(), digest_size=16)
        for part in parts:
            digest.update(part)
        return digest.hexdigest()

    def get(self, key: str, stale: bool = False) -> Kept | None:
        """The prediction kept under a key: a fresh one, or with ``stale`` also one past that."""
        hit = self._tier.get(key, stale)
        if hit is not None:
            return Kept(_unpack_own(hit.entry.data), hit.age, hit.stale)
        return None if stale else self._of_others(key)

    def put(self, key: str, output: Any) -> None:
        """Keep a prediction."""
        try:
            data = _pack(output)
        except TypeError:
            self.uncachable += 1
            return
        now, section = time.time(), self.section
        self._put(key, data, now)
        if self.shared is not None:
            text = f"{now} {base64.b85encode(data).decode()}"
            _quietly(self.shared, "set", f"prediction:{key}", text, section.prediction_cache_ttl)

    def _put(self, key: str, data: bytes, written: float) -> None:
        fresh = written + self.section.prediction_cache_ttl
        self._tier.put(key, Entry(data, written, fresh, fresh + self.section.prediction_stale_ttl))

    def _of_others(self, key: str) -> Kept | None:
        if self.shared is None:
            return None
        text = _quietly(self.shared, "get", f"prediction:{key}", None)
        try:
            written, coded = text.split(" ", 1)
            data = base64.b85decode(coded)
            value, at = _unpack(data), float(written)
        except (AttributeError, ValueError):
            return None  # there is none, or it is not one of ours
        self._put(key, data, at)
        return Kept(value, max(0.0, time.time() - at), False)

    def stats(self) -> dict[str, int]:
        """Counts, and what is held."""
        return {**self._tier.stats(), "uncachable": self.uncachable}

    def clear(self) -> None:
        """Forget all that this process holds."""
        self._tier.clear()


def _quietly(shared: Shared, method: str, *args: Any) -> Any:
    """A cache that fails costs its answer and nothing else."""
    breaker = getattr(shared, "breaker", None)
    if breaker is not None and breaker.refusing:
        return None
    try:
        return getattr(shared, method)(*args)
    except (CircuitBreakerOpenException, OSError, _redis_error()):
        return None


def _redis_error() -> type[Exception]:
    import redis

    return redis.RedisError


def _pack(tree: Any) -> bytes:
    header, parts = encode(tree)
    return b"".join((json.dumps(header).encode(), b"\n", *parts))


def _unpack(data: bytes) -> Any:
    header, _, body = data.partition(b"\n")
    return decode(json.loads(header), body)


def _unpack_own(data: bytes) -> Any:
    """The same for what this process has packed, or has looked at before: most predictions are one
    tensor, which is made in a third of the time if nothing in it need be doubted."""
    header, _, body = data.partition(b"\n")
    node = _parsed(header)
    if body and isinstance(node, list) and node[0] == "torch":
        torch = sys.modules["torch"]
        flat = torch.frombuffer(bytearray(body), dtype=getattr(torch, node[1]))
        return flat.view(node[2])
    return decode(node, body)


@functools.lru_cache(1_000)
def _parsed(header: bytes) -> Any:
    return json.loads(header)
