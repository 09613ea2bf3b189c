"""Values kept in this process: what an entry is, and the memory tier.  No I/O and no thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import ClassVar, NamedTuple

from cachetools import Cache, LRUCache

from ..process import OwnLock
from .forks import follow_forks

# What an entry costs in memory beside its key's characters and its data: the headers of its objects
# and its places in three dictionaries.  Measured on 64-bit CPython 3.11 with 1,000 to 65,000
# entries it is 420 to 460 bytes, and a little more while the entry waits to be written to disk.
OVERHEAD = 500

LARGEST_SHARE = 8  # an entry may take up to this part of a tier's bytes
SWEEP = 100  # entries that are looked at for expired ones when room is wanted …
SWEEP_PAUSE = 1.0  # … at most once in so many seconds


class Entry(NamedTuple):
    """A value and its life.  Times are seconds since the epoch.

    Attributes:
        data: the value, encoded.
        written: when it was put; of two values of a key the one written later counts.
        fresh_until: from then on it is stale.
        stale_until: from then on it is never served.
    """

    data: bytes
    written: float
    fresh_until: float
    stale_until: float


class Hit(NamedTuple):
    """What was found.

    Attributes:
        entry: the value and its life.
        tier: where it was: ``"memory"`` or ``"disk"``.
        stale: whether it is past its fresh life.
        age: seconds since it was put.
    """

    entry: Entry
    tier: str
    stale: bool
    age: float


class MemoryTier:
    """Holds the entries used last, within a number of entries and a number of bytes.

    An entry counts its key's characters, its data and ``OVERHEAD`` bytes.

    Args:
        most_items: how many entries it holds.
        most_bytes: how many bytes they may count.
        on_evicted: told each entry that had to leave for want of room, whether or not it has
            expired; called with the lock held, so it must be quick, and must not call back.
        now: the wall clock, in seconds.

    Raises:
        ValueError: a bound is below 1.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((30, "_lock"),)
    _lock = OwnLock()

    def __init__(
        self,
        *,
        most_items: int,
        most_bytes: int,
        on_evicted: Callable[[str, Entry], None] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        for name, bound in (("most_items", most_items), ("most_bytes", most_bytes)):
            if bound < 1:
                raise ValueError(
                    f"MemoryTier: {name} is {bound!r}, so that nothing could be held: give it 1 "
                    f"or more, or use no memory tier"
                )
        self.largest = most_bytes // LARGEST_SHARE
        """Bytes that one entry may count."""
        self._now = now
        self._held = _Held(most_items, most_bytes, on_evicted, now)
        self._hits = self._misses = self._stale = 0
        follow_forks(self)

    def get(self, key: str, stale: bool = False) -> Hit | None:
        """The entry if it is fresh, or, with ``stale``, not past its ``stale_until``."""
        with self._lock:
            try:
                entry = self._held[key][0]
            except KeyError:
                self._misses += 1
                return None
            now = self._now()
            if now < entry.fresh_until:
                old = False
                self._hits += 1
            elif stale and now < entry.stale_until:
                old = True
                self._stale += 1
            else:
                self._misses += 1
                return None
        age = now - entry.written
        # As Hit(…) does it, in half the time.
        return tuple.__new__(Hit, (entry, "memory", old, age if age > 0.0 else 0.0))

    def peek(self, key: str) -> Entry | None:
        """The entry, whatever its age; neither counted nor a use."""
        with self._lock:
            return self._held.peek(key)

    def put(self, key: str, entry: Entry) -> bool:
        """Hold an entry; False when it is too large, and then nothing is held of the key."""
        size = size_of(key, entry)
        with self._lock:
            self._held.pop(key, None)
            if size > self.largest:
                return False
            self._held[key] = (entry, size)
        return True

    def delete(self, key: str) -> bool:
        """Forget an entry; whether there was one."""
        with self._lock:
            return self._held.pop(key, None) is not None

    def clear(self) -> None:
        """Forget all entries."""
        with self._lock:
            self._held.clear()

    def items(self) -> list[tuple[str, Entry]]:
        """All entries, the longest held first."""
        with self._lock:
            return [(key, self._held.look(key)[0]) for key in self._held]

    def stats(self) -> dict[str, int]:
        """Counts of served (``hits``, ``stale``) and ``misses``, and what is held."""
        with self._lock:
            return {
                "hits": self._hits,
                "misses": self._misses,
                "stale": self._stale,
                "items": len(self._held),
                "bytes": int(self._held.currsize),
                "evictions": self._held.evictions,
            }

    def forked(self, clean: bool) -> None:
        if not clean:
            self._held = self._held.empty()


def size_of(key: str, entry: Entry) -> int:
    """Bytes that an entry counts in memory."""
    return len(key) + len(entry.data) + OVERHEAD


class _Held(LRUCache[str, tuple[Entry, int]]):
    """cachetools' LRU with a second bound; each value brings its size along, its key's included."""

    def __init__(
        self,
        most_items: int,
        most_bytes: int,
        on_evicted: Callable[[str, Entry], None] | None,
        now: Callable[[], float],
    ) -> None:
        super().__init__(most_bytes, getsizeof=lambda value: value[1])
        self.evictions = 0
        self._most_items = most_items
        self._on_evicted = on_evicted
        self._now = now
        self._swept = -SWEEP_PAUSE

    def empty(self) -> _Held:
        return _Held(self._most_items, int(self.maxsize), self._on_evicted, self._now)

    def look(self, key: str) -> tuple[Entry, int]:
        """Without being a use."""
        return Cache.__getitem__(self, key)

    def peek(self, key: str) -> Entry | None:
        return self.look(key)[0] if key in self else None

    def __setitem__(self, key: str, value: tuple[Entry, int]) -> None:
        """The key is not held."""
        while len(self) >= self._most_items:
            self.popitem()
        super().__setitem__(key, value)

    def popitem(self) -> tuple[str, tuple[Entry, int]]:
        """Make room: of those held longest an expired one, or else the least recently used."""
        key = self._expired()
        if key is None:
            key, value = super().popitem()
        else:
            value = self.look(key)
            del self[key]
        self.evictions += 1
        if self._on_evicted is not None:
            self._on_evicted(key, value[0])
        return key, value

    def _expired(self) -> str | None:
        # Those put first expire first, mostly, and lie first; a look at all would take too long.
        now = self._now()
        if 0 <= now - self._swept < SWEEP_PAUSE:
            return None
        for key in islice(self, SWEEP):
            if self.look(key)[0].stale_until <= now:
                return key
        self._swept = now
        return None
