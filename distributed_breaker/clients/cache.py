"""The protected cache: Redis first, and behind it memory, disk and the caller's loader.

Values are anything that JSON gives back; they are stored as JSON, so that other programs can read
them and numbers can be counted up.  While Redis answers, what is read and written is kept in the
tiers as well; when it does not, the tiers answer, and changes wait in an outbox on disk until they
can be carried out.

Each rule is written once, as a generator; see ``driving.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import redis

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..fallback.disk import DiskTier
from ..fallback.memory import Entry, Hit
from ..fallback.outbox import Entry as Waiting
from ..fallback.outbox import Outbox, OutboxError, Parked
from ..fallback.tiers import Tiers
from ..permit import Permit
from ..policy import Policy, check_number
from ..process import OwnLock, follow_process
from ..sections import Cache, Circuit
from ..workers import start_thread
from .cache_changes import Change, all_of, beside, decode, encode, ms, script, sha
from .client import Client
from .driving import Aside, Ask, Driver, Load, Pause, Rules
from .redis_guard import (
    FAILURES,
    CacheOpenException,
    connect,
    connect_async,
    counts,
    guarded,
    guarded_async,
    refused,
    was_never_sent,
)

__all__ = ["CacheClient", "Info"]

MISSING: Any = object()
LOAD_LEASE = 30.0  # s that one process may load a key before others stop waiting for it
LOAD_PAUSE = 0.05  # s between looks whether another process has loaded it
MOST_LIVES = 10_000  # keys whose time to live is still to be asked for
BATCH = 500
SOON, LATER = 0.1, 1.0  # s between the caretaker's rounds: while something waits, and else

T = TypeVar("T")
Source = Literal["redis", "memory", "disk", "outbox", "loader", "default"]

log = logging.getLogger("distributed_breaker")


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


class CacheClient(Driver, Client):
    """A service's cache.  Keys are texts, without the section's ``cache_key_prefix``.

    Every method has a twin whose name ends in ``_async``.  For all of them:

    Raises:
        CacheOpenException: the circuit is open, and nothing behind Redis could answer instead.  It
            is a ``CircuitBreakerOpenException`` and also redis-py's ``ConnectionError``.
        redis.RedisError: Redis failed, and nothing behind it could answer instead; or the error is
            the caller's own, such as a wrong type.
    """

    section: Cache
    _lock = OwnLock()

    def __init__(
        self,
        name: str,
        circuits: Mapping[str, CircuitBreaker],
        section: Circuit,
        explicit: Mapping[str, Any],
    ) -> None:
        super().__init__(name, circuits, section, explicit)
        self._breaker = self.breaker
        self._prefix = self.section.cache_key_prefix
        self._store = connect(self.section)
        self._stores: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._tiers = _tiers(self.section, self._folder())
        self._outbox = Outbox(self._outbox_path(), attempts=1_000)
        self._waits = True  # something may be in the outbox; the first look tells
        self._lives: deque[tuple[str, bytes]] = deque(maxlen=MOST_LIVES)
        self._flights: dict[str, Future[Any]] = {}
        self._counts: dict[str, int] = dict.fromkeys(
            ("loads", "load_errors", "stale", "queued", "replayed", "superseded", "parked"), 0
        )
        self._said = ""  # of the outbox's trouble
        self._caretaker: _Caretaker | None = None
        follow_process(self)

    @staticmethod
    def policy(policy: Policy) -> Policy:
        """Only what says that Redis is unwell counts; a miss is a success."""
        return replace(policy, record=FAILURES)

    def configure(self, section: Circuit) -> None:
        """Connect anew when where or how has changed; sizes and folders are read at the start."""
        old, new = self.section, cast(Cache, section)
        super().configure(section)
        fields = ("address", "socket_timeout", "connection_timeout")
        if any(getattr(old, name) != getattr(new, name) for name in fields):
            self._store, self._stores = connect(new), weakref.WeakKeyDictionary()
            self.__dict__.pop("_guarded", None)
        self._prefix = new.cache_key_prefix

    def _folder(self) -> Path:
        """Of what is kept on disk: another Redis or another prefix has another one."""
        where = urlsplit(self.section.address)
        address = f"{where.hostname}:{where.port}{where.path}?{where.query} {self._prefix}"
        mark = hashlib.sha256(address.encode()).hexdigest()[:8]
        chosen = self.section.disk_cache_dir
        base = Path(chosen) if chosen else _home("XDG_CACHE_HOME", ".cache")
        return base / f"{self.name}-{mark}"

    def _outbox_path(self) -> Path:
        if self.section.outbox_path:
            return Path(self.section.outbox_path)
        state = _home("XDG_STATE_HOME", ".local/state")
        return state / self._folder().name / "outbox.db"

    # ------------------------------------------------------------------ reads

    def get(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Any:
        """The value of a key.

        Args:
            key: which.
            default: what is returned when there is none, instead of None; and when Redis and the
                tiers cannot say, instead of an error.
            loader: makes the value when there is none, as a rule from the database; its value is
                stored.  Of many callers at once one loads, in the whole fleet while Redis answers.
            ttl: seconds for which a loaded value lives; None: the section's ``default_ttl``.
        """
        if loader is None and not self._waits:
            # What _get does, for the most frequent of all calls.
            name = self._prefix + key
            try:
                with self._breaker.guard():
                    data = self._store.get(name)
            except Exception as error:
                return self._drive(
                    self._without(name, self._native(error), default, None, None)
                ).value
            if data is not None:
                self._keep(name, data)
                return decode(data)
            return self._missed(name, default)
        return self._drive(self._get(key, default, loader, ttl)).value

    def get_with_info(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Info:
        """As ``get``, and where the value comes from, how old it is, and whether it is stale."""
        return self._drive(self._get(key, default, loader, ttl))

    async def get_async(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Any:
        """As ``get``; the loader may be a coroutine function."""
        return (await self._drive_async(self._get(key, default, loader, ttl))).value

    async def get_with_info_async(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Info:
        """As ``get_with_info``."""
        return await self._drive_async(self._get(key, default, loader, ttl))

    def _get(
        self, key: str, default: Any, loader: Callable[[], Any] | None, ttl: float | None
    ) -> Rules[Info]:
        name = self._name(key)
        if self._waits:
            found = yield from self._waiting(name)
            if found is not None:
                if found.source == "outbox":
                    return found
                return (yield from self._behind(name, default, loader, ttl, None))
        try:
            data = yield Ask(lambda store: store.get(name))
        except redis.RedisError as error:
            return (yield from self._without(name, error, default, loader, ttl))
        if data is not None:
            self._keep(name, data)
            return Info(decode(data), "redis")
        missing = self._missed(name, default)
        if loader is None:
            return Info(missing, "default")
        return (yield from self._load(name, loader, ttl, shared=True))

    def get_many(self, keys: Sequence[str], default: Any = MISSING) -> dict[str, Any]:
        """The values of those keys that have one; with a default, of all keys.

        When Redis cannot answer, what the tiers know is the answer; only if they know nothing, and
        there is no default, that is an error.
        """
        return self._drive(self._get_many(keys, default))

    async def get_many_async(self, keys: Sequence[str], default: Any = MISSING) -> dict[str, Any]:
        """As ``get_many``."""
        return await self._drive_async(self._get_many(keys, default))

    def _get_many(self, keys: Sequence[str], default: Any) -> Rules[dict[str, Any]]:
        names = {key: self._name(key) for key in dict.fromkeys(keys)}
        found: dict[str, Any] = {}
        if self._waits:
            for key, name in names.items():
                known = yield from self._waiting(name)
                if known is not None and known.source == "outbox":
                    found[key] = known.value
        asked = [key for key in names if key not in found]

        def ask(store: Any) -> Any:
            pipe = store.pipeline(transaction=False)
            for key in asked:
                pipe.get(names[key])
            return pipe.execute()

        try:
            values = (yield Ask(ask)) if asked else []
        except redis.RedisError as error:
            if not counts(error):
                raise
            tiers = self._tiers
            hits: dict[str, Hit] = {}
            if tiers is not None:
                wanted = [names[key] for key in asked]
                hits = yield Aside(lambda: tiers.get_many(wanted, stale=True))
            found |= {k: decode(hits[names[k]].entry.data) for k in asked if names[k] in hits}
            if not found and default is MISSING and names:
                raise
        else:
            for key, data in zip(asked, values, strict=True):
                if data is not None:
                    self._keep(names[key], data)
                    found[key] = decode(data)
                else:
                    self._missed(names[key], None)
        missing = () if default is MISSING else (key for key in names if key not in found)
        return {key: found[key] for key in names if key in found} | dict.fromkeys(missing, default)

    def exists(self, key: str) -> bool:
        """Whether a key has a value."""
        return self._drive(self._exists(key))

    async def exists_async(self, key: str) -> bool:
        """As ``exists``."""
        return await self._drive_async(self._exists(key))

    def _exists(self, key: str) -> Rules[bool]:
        info = yield from self._ask_or_tiers(key, lambda store, name: store.exists(name))
        return info.entry.stale_until > 0 if isinstance(info, Hit) else bool(info)

    def ttl(self, key: str) -> float | None:
        """Seconds that a key still lives; ``inf``: for ever; None: it has no value."""
        return self._drive(self._ttl(key))

    async def ttl_async(self, key: str) -> float | None:
        """As ``ttl``."""
        return await self._drive_async(self._ttl(key))

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
        if self._waits:
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

    def _without(
        self,
        name: str,
        error: BaseException,
        default: Any,
        loader: Callable[[], Any] | None,
        ttl: float | None,
    ) -> Rules[Info]:
        """Redis has failed, or was not asked."""
        if not counts(error):
            raise error
        return (yield from self._behind(name, default, loader, ttl, error))

    def _behind(
        self,
        name: str,
        default: Any,
        loader: Callable[[], Any] | None,
        ttl: float | None,
        error: BaseException | None,
    ) -> Rules[Info]:
        """What stands behind Redis: what is fresh, the loader, what is stale, the default."""
        hit = yield from self._hit(name, stale=loader is None)
        if hit is not None:
            return self._from(hit)
        if loader is not None:
            try:
                return (yield from self._load(name, loader, ttl, shared=False))
            except Exception:
                hit = yield from self._hit(name, stale=True)
                if hit is None:
                    raise
                return self._from(hit)
        if default is not MISSING:
            return Info(default, "default")
        if error is None:
            return Info(None, "default")  # its deletion waits: that is a miss
        raise error

    def _from(self, hit: Hit) -> Info:
        self._counts["stale"] += hit.stale
        source: Source = "disk" if hit.tier == "disk" else "memory"
        return Info(decode(hit.entry.data), source, hit.stale, hit.age)

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
        changed in another way; None: nothing."""
        if self._caretaker is None:
            self._care()
        if not os.path.exists(self._outbox.path):
            return None
        try:
            entry = yield Aside(lambda: self._outbox.latest(self.name, name))
        except OutboxError:
            return None
        if entry is None:
            return None
        payload = cast(dict[str, Any], entry.payload)
        lives = payload["ttl"] is None or entry.created + payload["ttl"] / 1000 > time.time()
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
                    data = yield Ask(lambda store: store.get(name))
                    if data is not None:
                        self._keep(name, data)
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
            data = encode(name, value)
            if shared:
                yield from self._change("set", name, data=data, ttl=ttl, waits=False)
            self._put(name, data, self._life(ttl))
            return Info(value, "loader")
        finally:
            if ours:
                # Another's lock stays: only what this load has set is taken away.
                with _ignoring_redis():
                    if (yield Ask(lambda store: store.get(lock))) == token.encode():
                        yield Ask(lambda store: store.delete(lock))

    # ------------------------------------------------------------------ changes

    def set(self, key: str, value: Any, ttl: float | None = None, *, durable: bool = False) -> bool:
        """Set a key.

        Args:
            key: which.
            value: anything that JSON gives back; tuples become lists, and keys texts.
            ttl: seconds for which it lives; None: the section's ``default_ttl``.
            durable: have it on disk, too, before this returns.

        Returns:
            True when Redis has it; False when it waits on disk for Redis to return.
        """
        return self._drive(self._set(key, value, ttl, durable))

    async def set_async(
        self, key: str, value: Any, ttl: float | None = None, *, durable: bool = False
    ) -> bool:
        """As ``set``."""
        return await self._drive_async(self._set(key, value, ttl, durable))

    def _set(self, key: str, value: Any, ttl: float | None, durable: bool) -> Rules[bool]:
        name = self._name(key)
        data, life = encode(key, value), self._life(ttl)
        done = yield from self._change("set", name, data=data, ttl=life)
        if durable:
            yield Aside(lambda: self._put(name, data, life, durable=True))
        else:
            self._put(name, data, life)
        return done is not None

    def set_many(self, values: Mapping[str, Any], ttl: float | None = None) -> bool:
        """Set several keys; True when Redis has all of them."""
        return self._drive(self._set_many(values, ttl))

    async def set_many_async(self, values: Mapping[str, Any], ttl: float | None = None) -> bool:
        """As ``set_many``."""
        return await self._drive_async(self._set_many(values, ttl))

    def _set_many(self, values: Mapping[str, Any], ttl: float | None) -> Rules[bool]:
        life = self._life(ttl)
        data = {self._name(key): encode(key, value) for key, value in values.items()}
        done = yield from self._change_many(
            [Change("set", name, self._stamp(), one, life) for name, one in data.items()]
        )
        for name, one in data.items():
            self._put(name, one, life)
        return done

    def delete(self, *keys: str) -> bool:
        """Delete keys; False when that waits for Redis to return.  No tier serves them then."""
        return self._drive(self._delete(keys))

    async def delete_async(self, *keys: str) -> bool:
        """As ``delete``."""
        return await self._drive_async(self._delete(keys))

    def _delete(self, keys: Sequence[str]) -> Rules[bool]:
        names = [self._name(key) for key in dict.fromkeys(keys)]
        tiers = self._tiers
        done = yield from self._change_many(
            [Change("delete", name, self._stamp()) for name in names]
        )
        if tiers is not None:
            yield Aside(lambda: tiers.delete_many(names))
        return done

    def increment(self, key: str, amount: int = 1, ttl: float | None = None) -> int | None:
        """Add to a whole number; one that is not there begins at 0.

        While Redis is away the amount waits and is added when it is back, whatever others have
        added meanwhile.

        Args:
            key: which.
            amount: what is added.
            ttl: seconds for which a new number lives; None: for ever.

        Returns:
            The sum; while Redis is away what it is as far as is known here, or None.

        Raises:
            redis.RedisError: also when Redis got the amount and did not answer: whether it was
                added is unknown then, so it is not added again.
        """
        return self._drive(self._increment(key, amount, ttl))

    async def increment_async(
        self, key: str, amount: int = 1, ttl: float | None = None
    ) -> int | None:
        """As ``increment``."""
        return await self._drive_async(self._increment(key, amount, ttl))

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
        self._keep(name, b"%d" % sum_)
        return cast(int, sum_)

    def expire(self, key: str, ttl: float) -> bool:
        """Let a key live for so many seconds from now on; False: it has no value, or that waits."""
        return self._drive(self._expire(key, ttl))

    async def expire_async(self, key: str, ttl: float) -> bool:
        """As ``expire``."""
        return await self._drive_async(self._expire(key, ttl))

    def _expire(self, key: str, ttl: float) -> Rules[bool]:
        name, life = self._name(key), self._life(ttl)
        there = yield from self._change("expire", name, ttl=life)
        hit = yield from self._hit(name, stale=True)
        if hit is not None:
            self._put(name, hit.entry.data, life)
        return bool(there)

    def _change(
        self,
        op: str,
        name: str,
        *,
        data: bytes = b"",
        ttl: float | None = None,
        waits: bool = True,
    ) -> Rules[Any]:
        """Carry out one change; what Redis answers, or None: it waits."""
        change = Change(op, name, self._stamp(), data, ttl)
        try:
            if self._waits and (yield from self._must_queue([change])):
                return None
            return (yield from self._carry_out(change))
        except redis.RedisError as error:
            if not counts(error) or not waits:
                raise
            if op == "increment" and not was_never_sent(error):
                raise
            yield from self._queue([change], error)
            return None

    def _change_many(self, changes: list[Change]) -> Rules[bool]:
        if not changes:
            return True
        try:
            if self._waits and (yield from self._must_queue(changes)):
                return False
            yield Ask(lambda store: all_of(store, changes))
        except redis.exceptions.NoScriptError:
            for change in changes:  # seldom: once after a start of Redis
                yield from self._carry_out(change)
        except redis.RedisError as error:
            if not counts(error):
                raise
            yield from self._queue(changes, error)
            return False
        return True

    def _carry_out(self, change: Change, replayed: str = "") -> Rules[Any]:
        """Raises what Redis says; see ``lua/cache.lua``."""
        keys, words = change.words(replayed)
        try:
            reply = yield Ask(lambda store: store.evalsha(sha(), len(keys), *keys, *words))
        except redis.exceptions.NoScriptError:
            reply = yield Ask(lambda store: store.eval(script(), len(keys), *keys, *words))
        verdict, value = reply
        if verdict == b"newer":
            self._counts["superseded"] += 1
        return value

    def _must_queue(self, changes: list[Change]) -> Rules[bool]:
        """Whether an older change of one of the keys still waits, so that these wait behind it."""
        outbox = self._outbox
        keys = [change.name for change in changes]
        if self._caretaker is None:
            self._care()
        if not os.path.exists(outbox.path):
            return False
        try:
            held = yield Aside(lambda: any(outbox.holds(self.name, key) for key in keys))
        except OutboxError:
            return False
        if held:
            yield from self._queue(changes, None)
        return bool(held)

    def _queue(self, changes: list[Change], error: BaseException | None) -> Rules[None]:
        outbox = self._outbox
        items = [(c.op, c.payload(), c.name) for c in changes]
        try:
            yield Aside(lambda: outbox.add_many(self.name, items))
        except OutboxError as full:
            if error is None:
                raise
            log.error("%s: a change is lost: %s", self.name, full)
            raise error from full
        self._counts["queued"] += len(changes)
        self._waits = True
        self._care()

    # ------------------------------------------------------------------ keeping the tiers warm

    def _keep(self, name: str, data: bytes) -> None:
        """Redis has this value.  How long it lives is asked for later, once for each value."""
        tiers = self._tiers
        if tiers is None:
            return
        held = tiers.peek(name)
        now = time.time()
        if held is not None and held.data == data and now < held.fresh_until:
            return
        # Until that is known it counts as stale: it may be over at any moment.
        tiers.put(name, Entry(data, now, now, now + self.section.stale_ttl))
        self._lives.append((name, data))
        if self._caretaker is None:
            self._care()

    def _missed(self, name: str, default: Any) -> Any:
        tiers = self._tiers
        if tiers is not None and tiers.peek(name) is not None:
            tiers.delete(name)
        return None if default is MISSING else default

    def _put(self, name: str, data: bytes, life: float | None, *, durable: bool = False) -> None:
        if self._tiers is not None:
            now = time.time()
            fresh = now + (self.section.default_ttl if life is None else life)
            entry = Entry(data, now, fresh, fresh + self.section.stale_ttl)
            self._tiers.put(name, entry, durable=durable)
            self._care()

    def _learn_lives(self) -> None:
        """Ask for the times to live of what was read."""
        tiers = self._tiers
        asked: dict[str, bytes] = {}
        while self._lives and len(asked) < BATCH:
            name, data = self._lives.popleft()
            asked[name] = data
        if tiers is None or not asked:
            return
        names = list(asked)

        def ask(store: Any) -> Any:
            pipe = store.pipeline(transaction=False)
            for name in names:
                pipe.pttl(name)
            return pipe.execute()

        with _ignoring_redis():
            with self._breaker.guard():
                lives = ask(self._store)
            now = time.time()
            for name, left in zip(names, lives, strict=True):
                held = tiers.peek(name)
                if held is None or held.data != asked[name] or left == -2:
                    continue
                # What lives for ever in Redis is fresh here for a while only: nobody would tell.
                fresh = now + (self.section.default_ttl if left < 0 else left / 1000)
                tiers.put(name, Entry(held.data, now, fresh, fresh + self.section.stale_ttl))

    # ------------------------------------------------------------------ bringing back what waits

    def replay(self, limit: int = 1_000) -> int:
        """Carry out what waits, as far as Redis takes it; done by itself while the client lives.

        Returns:
            How many changes were carried out by this process.
        """
        done = self._outbox.replay(self.name, self._deliver, limit=limit, seconds=5.0)
        self._waits = done.left > 0
        self._counts["replayed"] += done.delivered
        self._counts["parked"] += done.parked
        return done.delivered

    def _deliver(self, entry: Waiting) -> None:
        try:
            change = Change.read(entry)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Parked(f"it is no change of a cache: {error!r}") from error
        try:
            self._drive(self._carry_out(change, replayed=entry.uid))
        except redis.RedisError as error:
            if counts(error):
                raise
            raise Parked(f"{type(error).__name__}: {error}") from error

    def _care(self) -> None:
        """See to it that the caretaker lives, and looks soon."""
        caretaker = self._caretaker
        if caretaker is None:
            with self._lock:
                if self._caretaker is None:
                    self._caretaker = _Caretaker(self)
                caretaker = self._caretaker
        caretaker.wake()

    def _round(self) -> bool:
        """One round of the caretaker's; whether another one is to follow soon."""
        if self._lives:
            self._learn_lives()
        if self._waits and not self._replay_if_possible():
            return False
        return self._waits or bool(self._lives)

    def _replay_if_possible(self) -> bool:
        """Whether the outbox can be used."""
        if not os.path.exists(self._outbox.path):
            self._waits = False
            return True
        # Once the circuit is due, what waits is tried as a probe, so no traffic is needed.
        if self._breaker.refusing:
            return True
        try:
            self.replay()
        except OutboxError as error:
            if str(error) != self._said:
                log.warning("%s: what waits cannot be replayed: %s", self.name, error)
            self._said = str(error)
            return False
        self._said = ""
        return True

    # ------------------------------------------------------------------ the rest

    @property
    def redis(self) -> Any:
        """redis-py's client of the cache's Redis for all else; its commands and pipelines are calls
        under the circuit.  Keys are whole there: the prefix is not added."""
        found = self.__dict__.get("_guarded")
        if found is None:
            found = self.__dict__["_guarded"] = guarded(connect(self.section), self._breaker)
        return found

    def redis_async(self) -> Any:
        """The same for the running event loop."""
        return guarded_async(connect_async(self.section), self._breaker)

    def health(self) -> dict[str, Any]:
        """What there is to know of the tiers and of what waits, as dictionaries and numbers."""
        return {
            "tiers": None if self._tiers is None else self._tiers.stats(),
            "outbox": self._outbox.stats(),
            **self._counts,
        }

    def close(self) -> None:
        """Write what the disk tier has not got yet, and let go of files and connections."""
        if self._caretaker is not None:
            self._caretaker.close()
        if self._tiers is not None:
            self._tiers.close()
        self._outbox.close()
        self._store.close()

    async def aclose(self) -> None:
        """Let go of the running event loop's connections, before the loop ends."""
        store = self._stores.pop(asyncio.get_running_loop(), None)
        if store is not None:
            await store.aclose()

    def forked(self) -> None:
        """A child makes connections, locks and a caretaker of its own."""
        self.__dict__.pop("_lock", None)
        self._caretaker = None
        self._flights = {}
        self._stores = weakref.WeakKeyDictionary()

    def _name(self, key: str) -> str:
        if not isinstance(key, str):
            raise TypeError(f"a key is a text, not {key!r}: decode it")
        return self._prefix + key

    def _life(self, ttl: float | None) -> float:
        return self.section.default_ttl if ttl is None else check_number("ttl", ttl, 0.001, 1e10)

    @staticmethod
    def _stamp() -> int:
        return time.time_ns() // 1_000

    # ------------------------------------------------------------------ how Redis is asked

    def _client(self) -> Any:
        return self._store

    def _client_async(self) -> Any:
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        store = self._stores.get(loop)
        if store is None:
            store = self._stores[loop] = connect_async(self.section)
        return store

    def _native(self, error: BaseException) -> BaseException:
        """A refusal as redis-py's own error; any other as it is."""
        if isinstance(error, CacheOpenException | redis.RedisError):
            return error
        return refused(error) if isinstance(error, CircuitBreakerOpenException) else error

    def _failed(self, permit: Permit, error: Exception) -> None:
        if isinstance(error, redis.ResponseError) and counts(error):
            permit.failure(error)


class _Caretaker:
    """A client's thread: learns how long values live, and carries out what waits."""

    def __init__(self, client: CacheClient) -> None:
        self._client = weakref.ref(client)
        self._wake = threading.Event()
        self._ended = False
        try:
            self._thread: threading.Thread | None = start_thread("circuit-breaker-cache", self._run)
        except RuntimeError:
            self._thread = None

    def wake(self) -> None:
        self._wake.set()

    def _run(self) -> None:
        soon = True
        while not self._ended:
            client = self._client()
            if client is None:
                return
            try:
                soon = client._round()
            except Exception:
                log.exception("the cache's caretaker goes on after a defect")
            del client
            self._wake.clear()
            # What is put wakes it; rounds are not made more often than that, whatever comes.
            time.sleep(SOON)
            self._wake.wait(0 if soon else LATER)

    def close(self) -> None:
        self._ended = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)


# ---------------------------------------------------------------------------- small things


class _ignoring_redis:  # noqa: N801 - a context manager
    """The next round tries again."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> bool:
        return isinstance(error, redis.RedisError | CircuitBreakerOpenException)


def _home(variable: str, otherwise: str) -> Path:
    base = os.environ.get(variable) or Path.home() / otherwise
    return Path(base) / "distributed_breaker"


def _tiers(section: Cache, folder: Path) -> Tiers | None:
    if not (section.enable_memory_fallback or section.enable_disk_fallback):
        return None
    memory = section.enable_memory_fallback
    disk = None
    if section.enable_disk_fallback:
        disk = DiskTier(folder, most_bytes=section.disk_cache_bytes)
    most = round(section.memory_cache_bytes * section.max_memory_usage)
    return Tiers(
        most_items=section.memory_cache_size if memory else 1,
        most_bytes=max(1, most) if memory else 1,
        disk=disk,
    )
