"""The rules of a cache client: in which order what is asked, and who loads.

Each is written once, as a generator; see ``driving.py``.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any, Literal, NamedTuple, cast

import redis

from ..fallback.memory import Hit
from .cache_base import AWAY, MISSING
from .cache_changes import Change, beside, decode, encode, ms
from .cache_writes import CacheWrites
from .driving import Aside, Ask, Load, Pause, Rules
from .redis_guard import counts

LOAD_LEASE = 30.0  # s that one process may load a key before others stop waiting for it
LOAD_PAUSE = 0.05  # s between looks whether another process has loaded it

Source = Literal["redis", "memory", "disk", "outbox", "loader", "default"]


class Info(NamedTuple):
    """A value, and where it comes from.

    Attributes:
        value: the value, or the default.
        source: ``redis``, ``memory``, ``disk``, ``outbox`` (a change that waits for Redis),
            ``loader`` or ``default``.
        stale: whether it may be out of date: its time to live is over, or is not known.
        age: seconds since it was last known to be Redis's; None when it comes from there, or is
            new.
    """

    value: Any
    source: Source
    stale: bool = False
    age: float | None = None


class CacheRules(CacheWrites):
    """What ``CacheClient``'s methods carry out."""

    # ------------------------------------------------------------------ reads

    def _get(
        self, key: str, default: Any, loader: Callable[[], Any] | None, ttl: float | None
    ) -> Rules[Info]:
        name = self._name(key)
        if self._queue.possible:
            found = yield from self._waiting(name)
            if found is not None and found.source == "outbox":
                return found
            if found is not None:
                return (yield from self._behind(name, None, default, loader, ttl))
        seen = self._changes
        try:
            data = yield Ask(lambda store: store.get(name))
        except redis.RedisError as error:
            return (yield from self._behind(name, error, default, loader, ttl))
        if data is not None:
            self._keep(name, data, seen)
            return Info(decode(data), "redis")
        missing = self._missed(name, default, seen)
        if loader is None:
            return Info(missing, "default")
        return (yield from self._load(name, loader, ttl, shared=True))

    def _get_many(self, keys: Sequence[str], default: Any) -> Rules[dict[str, Any]]:
        names = {key: self._name(key) for key in dict.fromkeys(keys)}
        found: dict[str, Any] = {}
        if self._queue.possible:
            for key, name in names.items():
                known = yield from self._waiting(name)
                if known is not None and known.source == "outbox":
                    found[key] = known.value
        asked = [key for key in names if key not in found]

        seen = self._changes
        values, error = yield from self._together([("GET", names[key]) for key in asked])
        unknown: list[str] = []
        for key, data in zip(asked, values, strict=True):
            if isinstance(data, Exception):
                if not counts(data):
                    raise data
                unknown.append(key)
            elif data is not None:
                self._keep(names[key], data, seen)
                found[key] = decode(data)
            else:
                self._missed(names[key], None, seen)
        tiers = self._tiers
        if error is not None and tiers is not None:
            wanted = [names[key] for key in unknown]
            hits = yield Aside(lambda: tiers.get_many(wanted, stale=True))
            found |= {k: decode(hits[names[k]].entry.data) for k in unknown if names[k] in hits}
            if hits:
                self._breaker.count_fallback()
        if error is not None and not found and default is MISSING:
            raise error
        missing = () if default is MISSING else (key for key in names if key not in found)
        return {key: found[key] for key in names if key in found} | dict.fromkeys(missing, default)

    def _exists(self, key: str) -> Rules[bool]:
        info = yield from self._ask_or_tiers(key, lambda store, name: store.exists(name))
        return isinstance(info, Hit) or bool(info)

    def _ttl(self, key: str) -> Rules[float | None]:
        left = yield from self._ask_or_tiers(key, lambda store, name: store.pttl(name))
        if isinstance(left, Hit):
            return max(0.0, left.entry.fresh_until - time.time())
        if left is None or left == -2:
            return None
        return math.inf if left == -1 else left / 1000

    def _ask_or_tiers(self, key: str, ask: Callable[[Any, str], Any]) -> Rules[Any]:
        """Redis's answer, or what the tiers know of the key; None where they know nothing of what
        waits to be deleted."""
        name = self._name(key)
        if self._queue.possible:
            found = yield from self._waiting(name)
            if found is not None:
                return (yield from self._hit(name, stale=True))
        try:
            return (yield Ask(lambda store: ask(store, name)))
        except redis.RedisError as error:
            if not counts(error):
                raise
            hit = yield from self._hit(name, stale=True)
            if hit is None:
                raise
            return hit

    # ------------------------------------------------------------------ without Redis

    def _behind(
        self,
        name: str,
        error: BaseException | None,
        default: Any,
        loader: Callable[[], Any] | None,
        ttl: float | None,
    ) -> Rules[Info]:
        """What stands behind Redis: what is fresh, the loader, what is stale, the default.

        ``error``: how Redis failed; None: it was not asked, as the key's deletion waits.
        """
        if error is not None and not counts(error):
            raise error
        hit = yield from self._hit(name, stale=loader is None)
        if hit is not None:
            return self._from(hit)
        if loader is not None:
            try:
                loaded = yield from self._load(name, loader, ttl, shared=False)
            except Exception:
                hit = yield from self._hit(name, stale=True)
                if hit is None:
                    raise
                return self._from(hit)
            self._breaker.count_fallback()
            return loaded
        if default is not MISSING:
            self._breaker.count_fallback()
            return Info(default, "default")
        if error is None:
            return Info(None, "default")
        raise error

    def _from(self, hit: Hit) -> Info:
        source: Source = "disk" if hit.tier == "disk" else "memory"
        return Info(self._served(hit), source, hit.stale, hit.age)

    def _served(self, hit: Hit) -> Any:
        """The value, which is counted as one that a tier has answered."""
        entry, _, stale, age = hit
        if stale:
            self._counts["stale"] += 1
        if age > self._oldest:
            self._oldest = age
        self._breaker.count_fallback()
        return decode(entry.data)

    def _in_memory(self, name: str) -> Hit | None:
        """What ``_behind`` finds first, for the most frequent of all refusals."""
        tiers = self._tiers
        return None if tiers is None else tiers.get_from_memory(name, stale=True)

    def _hit(self, name: str, *, stale: bool) -> Rules[Hit | None]:
        tiers = self._tiers
        if tiers is None:
            return None
        hit = tiers.get_from_memory(name, stale=stale)
        if hit is None and tiers.has_disk:
            hit = yield Aside(lambda: tiers.get(name, stale=stale))
        return hit

    def _waiting(self, name: str) -> Rules[Info | None]:
        """What the outbox says of a key: its value; or a default, if it is to be deleted or
        changed in another way; None: nothing, or Redis has something newer."""
        queue = self._queue
        entry = (yield Aside(lambda: queue.latest(name))) if queue.has_file() else None
        if entry is None:
            return None
        payload = cast(dict[str, Any], entry.payload)
        if entry.kind == "set" or entry.kind == "delete":
            with suppress(*AWAY):
                stamp = yield Ask(lambda store: store.get(beside(name, "w")))
                if stamp is not None and int(stamp.split()[-1]) > int(payload["stamp"]):
                    return None
        lives = payload["ttl"] is None or entry.created + payload["ttl"] / 1000 > time.time()
        if entry.kind == "delete" or not lives:
            # Another process's change: the memory of this one may still hold what was before.
            tiers = self._tiers
            held = None if tiers is None else tiers.peek(name)
            if tiers is not None and held is not None and held.written < entry.created:
                yield Aside(lambda: tiers.delete(name))
        if entry.kind != "set" or not lives:
            return Info(None, "default")
        age = max(0.0, time.time() - entry.created)
        return Info(json.loads(cast(str, payload["data"])), "outbox", False, age)

    # ------------------------------------------------------------------ loading

    def _load(
        self, name: str, loader: Callable[[], Any], ttl: float | None, *, shared: bool
    ) -> Rules[Info]:
        """One load per key at a time: in this process, and (``shared``) in the fleet."""
        while True:
            with self._lock:
                flight = self._flights.get(name)
                mine = flight is None
                if flight is None:
                    flight = self._flights[name] = Future()
            if not mine:
                try:
                    return Info((yield Pause(LOAD_LEASE, flight)), "loader")
                except FutureTimeout:
                    with self._lock:  # it hangs: the next one takes its place
                        if self._flights.get(name) is flight:
                            del self._flights[name]
                    continue
            try:
                info = yield from self._load_alone(name, loader, ttl, shared)
            except BaseException as error:
                failed = error if isinstance(error, Exception) else RuntimeError("the load ended")
                flight.set_exception(failed)
                raise
            else:
                flight.set_result(info.value)
                return info
            finally:
                with self._lock:
                    if self._flights.get(name) is flight:
                        del self._flights[name]

    def _load_alone(
        self, name: str, loader: Callable[[], Any], ttl: float | None, shared: bool
    ) -> Rules[Info]:
        lock, token, ours = beside(name, "l"), secrets.token_hex(8), False
        end = time.monotonic() + LOAD_LEASE
        while shared and not ours and time.monotonic() < end:
            try:
                ours = bool((yield Ask(lambda s: s.set(lock, token, nx=True, px=ms(LOAD_LEASE)))))
                if not ours:
                    yield Pause(LOAD_PAUSE)
                    seen = self._changes
                    data = yield Ask(lambda store: store.get(name))
                    if data is not None:
                        self._keep(name, data, seen)
                        return Info(decode(data), "redis")
            except redis.RedisError as error:
                if not counts(error):
                    raise
                shared = False
        try:
            self._counts["loads"] += 1
            try:
                value = yield Load(loader)
            except Exception:
                self._counts["load_errors"] += 1
                raise
            data, life = encode(name, value), self._life(ttl)
            if shared:
                # What was loaded can be loaded again, so it needs not wait for Redis.
                try:
                    yield from self._carry_out(Change("set", name, self._stamp(), data, life))
                except redis.RedisError as error:
                    if not counts(error):
                        raise
            self._put(name, data, life)
            return Info(value, "loader")
        finally:
            if ours:
                # Another's lock stays: only what this load has set is taken away.
                with suppress(*AWAY):
                    if (yield Ask(lambda store: store.get(lock))) == token.encode():
                        yield Ask(lambda store: store.delete(lock))

    # ------------------------------------------------------------------ changes

    def _set(self, key: str, value: Any, ttl: float | None, durable: bool) -> Rules[bool]:
        name = self._name(key)
        data, life = encode(key, value), self._life(ttl)
        done = yield from self._change("set", name, data=data, ttl=life)
        if durable:
            yield Aside(lambda: self._put(name, data, life, durable=True))
        else:
            self._put(name, data, life)
        return done is not None

    def _set_many(self, values: Mapping[str, Any], ttl: float | None) -> Rules[bool]:
        life = self._life(ttl)
        data = {self._name(key): encode(key, value) for key, value in values.items()}
        done = yield from self._change_many(
            [Change("set", name, self._stamp(), one, life) for name, one in data.items()]
        )
        for name, one in data.items():
            self._put(name, one, life)
        return done

    def _delete(self, keys: Sequence[str]) -> Rules[bool]:
        names = [self._name(key) for key in dict.fromkeys(keys)]
        tiers = self._tiers
        done = yield from self._change_many(
            [Change("delete", name, self._stamp()) for name in names]
        )
        if tiers is not None:
            yield Aside(lambda: tiers.delete_many(names))
        return done

    def _increment(self, key: str, amount: int, ttl: float | None) -> Rules[int | None]:
        if isinstance(amount, bool) or not isinstance(amount, int):
            raise TypeError(f"increment({key!r}): the amount {amount!r} must be a whole number")
        name = self._name(key)
        life = None if ttl is None else self._life(ttl)
        sum_ = yield from self._change("increment", name, data=b"%d" % amount, ttl=life)
        if sum_ is None:
            hit = yield from self._hit(name, stale=True)
            known = None if hit is None else decode(hit.entry.data)
            if hit is None or not isinstance(known, int):
                return None
            sum_ = known + amount
            left = max(0.001, hit.entry.fresh_until - time.time())
            self._put(name, b"%d" % sum_, left)
            return sum_
        self._keep(name, b"%d" % sum_, self._changes)
        return cast(int, sum_)

    def _expire(self, key: str, ttl: float) -> Rules[bool]:
        name, life = self._name(key), self._life(ttl)
        there = yield from self._change("expire", name, ttl=life)
        hit = yield from self._hit(name, stale=True)
        if hit is not None:
            self._put(name, hit.entry.data, life)
        return bool(there)
