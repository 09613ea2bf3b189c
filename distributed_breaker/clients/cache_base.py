"""What a cache client is made of: connections, tiers, outbox; and how the tiers are kept warm."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from zlib import crc32

import redis

from ..errors import CircuitBreakerOpenException
from ..fallback.disk import DiskTier
from ..fallback.memory import Entry
from ..fallback.outbox import Entry as Waits
from ..fallback.outbox import Outbox
from ..fallback.tiers import Tiers
from ..permit import Permit
from ..policy import Policy, check_number
from ..process import OwnLock, follow_process
from ..sections import Cache, Circuit
from .cache_changes import OURS
from .client import Client, users_folder
from .driving import Driver
from .redis_cluster import together
from .redis_guard import (
    FAILURES,
    PerLoop,
    connect,
    connect_async,
    guarded,
    guarded_async,
    raise_outage,
    refused,
    unwell,
)
from .redis_once import client_of
from .waiting import Waiting, outbox_of

MISSING: Any = object()
# What a round ignores, since the next one tries again.
AWAY = (redis.RedisError, CircuitBreakerOpenException)
MOST_LIVES = 10_000  # keys whose time to live is still to be asked for
MOST_CHANGED = 1_000  # names of which is known when this process has changed them
BATCH = 500


class CacheBase(Driver, Client):
    """The parts, and what they need of each other."""

    section: Cache
    _lock = OwnLock()

    def _begin(self) -> None:
        self._breaker = self.breaker
        self._use_prefix()
        self._connect()
        self._tiers = _tiers(self.section, folder_of(self.name, self.section))
        outbox = cache_outbox(self.name, self.section)
        self._queue = Waiting(outbox, self.name, self._breaker, self._deliver, self._learn_lives)
        self._lives: deque[tuple[str, bytes]] = deque(maxlen=MOST_LIVES)
        self._flights: dict[str, Future[Any]] = {}
        # When this process has changed which name: a number that grows with each change, also the
        # one up to which all names count as changed.
        self._changes = self._forgotten = 0
        self._changed: dict[str, int] = {}
        self._counts: dict[str, int] = dict.fromkeys(
            ("loads", "load_errors", "stale", "queued", "replayed", "superseded", "lost"), 0
        )
        self._oldest = 0.0  # s, of what the tiers have served
        self._check_health()
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
            self._connect()
        self._use_prefix()
        self._check_health()

    def _connect(self) -> None:
        """Have all clients of its Redis made anew; what is under way may end."""
        section = self.section
        self._store = connect(section, client_of)
        self._stores = PerLoop(lambda: connect_async(section))
        self._raw = guarded(connect(section), self._breaker)
        self._raws = PerLoop(lambda: guarded_async(connect_async(section), self._breaker))

    def _check_health(self) -> None:
        key = self.section.health_check_key
        if key is None:
            self._breaker.check = None
        else:
            self._breaker.health_check(lambda: self._store.get(self._name(key)))

    # ------------------------------------------------------------------ keeping the tiers warm

    def _keep(self, name: str, data: bytes, seen: int) -> None:
        """Redis had this value after the change ``seen``.  How long it lives is asked for later,
        once for each value."""
        tiers = self._tiers
        if tiers is None:
            return
        held = tiers.peek(name)
        if held is not None and held.data == data and time.time() < held.fresh_until:
            return
        share = self.section.warm_share
        if share < 1.0 and held is None and crc32(name.encode()) >= share * 2**32:
            return
        # Until that is known it counts as stale: it may be over at any moment.
        if not self._put_read(name, data, 0.0, seen):
            return
        self._lives.append((name, data))
        if len(self._lives) == 1:
            self._queue.care()

    def _put_read(self, name: str, data: bytes, life: float, seen: int) -> bool:
        """Keep what was read, unless this process has changed it since; whether it is kept.

        A change is noted before it gets into the tiers.  So it comes there after this, or is seen
        here: now, or, if it came in between, right after.
        """
        if self._changed_since(name, seen):
            return False
        entry = self._put(name, data, life)
        tiers = self._tiers
        if tiers is None or not self._changed_since(name, seen):
            return True
        if tiers.peek(name) in (None, entry):
            tiers.delete(name)
        return False

    def _changed_since(self, name: str, seen: int) -> bool:
        return self._changes != seen and self._changed.get(name, self._forgotten) > seen

    def _note(self, *names: str) -> None:
        """Redis, or the outbox, has a change of these, and the tiers have not."""
        with self._lock:
            if len(self._changed) > MOST_CHANGED:
                self._forgotten = self._changes
                self._changed = {}
            for name in names:
                self._changed[name] = self._changes + 1
                self._changes += 1

    def _missed(self, name: str, default: Any, seen: int) -> Any:
        tiers = self._tiers
        held = tiers is not None and tiers.peek(name) is not None
        if tiers is not None and held and not self._changed_since(name, seen):
            tiers.delete(name)
        return None if default is MISSING else default

    def _put(self, name: str, data: bytes, life: float, *, durable: bool = False) -> Entry:
        now = time.time()
        entry = Entry(data, now, now + life, now + life + self.section.stale_ttl)
        if self._tiers is not None:
            self._tiers.put(name, entry, durable=durable)
        return entry

    def _learn_lives(self) -> bool:
        """Ask for the times to live of what was read; whether there is more."""
        tiers = self._tiers
        asked: dict[str, bytes] = {}
        while self._lives and len(asked) < BATCH:
            name, data = self._lives.popleft()
            asked[name] = data
        if tiers is None or not asked:
            return False
        seen = self._changes
        with suppress(*AWAY):
            with self._breaker.guard():
                lives = together(self._store, [("PTTL", name) for name in asked])
                raise_outage(lives)
            for name, left in zip(asked, lives, strict=True):
                held = tiers.peek(name)
                if held is None or held.data != asked[name] or left == -2:
                    continue
                # What lives for ever in Redis is fresh here for a while only: nobody would tell.
                life = self.section.default_ttl if left < 0 else left / 1000
                self._put_read(name, held.data, life, seen)
        return bool(self._lives)

    def _deliver(self, entry: Waits) -> None:
        """Carry out a change that has waited."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the rest

    def forked(self) -> None:
        """A child makes connections, locks and a thread of its own."""
        self.__dict__.pop("_lock", None)
        self._queue.forked()
        self._flights = {}
        self._connect()

    def _name(self, key: str) -> str:
        if not isinstance(key, str):
            raise TypeError(f"a key is a text, not {key!r}: decode it")
        name = self._prefix + key
        if self._may_be_ours and name.startswith(OURS):
            raise ValueError(
                f"the key {name!r}: names that begin with {OURS!r} are the library's own; choose "
                f"another key, or another cache_key_prefix"
            )
        return name

    def _use_prefix(self) -> None:
        self._prefix = self.section.cache_key_prefix
        self._may_be_ours = OURS.startswith(self._prefix[: len(OURS)])

    def _life(self, ttl: float | None) -> float:
        return self.section.default_ttl if ttl is None else check_number("ttl", ttl, 0.001, 1e10)

    @staticmethod
    def _stamp() -> int:
        return time.time_ns() // 1_000

    # ------------------------------------------------------------------ how Redis is asked

    def _client(self) -> Any:
        return self._store

    def _client_async(self) -> Any:
        return self._stores.get()

    def _native(self, error: BaseException) -> BaseException:
        """A refusal as redis-py's own error; any other as it is."""
        return refused(error) if isinstance(error, CircuitBreakerOpenException) else error

    def _failed(self, permit: Permit, error: Exception) -> None:
        if isinstance(error, redis.ResponseError) and unwell(error):
            permit.failure(error)


def folder_of(name: str, section: Cache) -> Path:
    """Where a cache's disk tier lies: another Redis or another prefix has another folder."""
    where = urlsplit(section.address)
    hosts = where.netloc.rpartition("@")[2]  # of a group it names several
    address = f"{hosts}{where.path}?{where.query} {section.cache_key_prefix}"
    mark = hashlib.sha256(address.encode()).hexdigest()[:8]
    chosen = section.disk_cache_dir
    base = Path(chosen) if chosen else users_folder("XDG_CACHE_HOME", ".cache")
    return base / f"{name}-{mark}"


def cache_outbox(name: str, section: Cache) -> Outbox:
    """Where a cache's changes wait; those of another Redis or prefix wait elsewhere."""
    return outbox_of(folder_of(name, section).name, section.outbox_path)


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
