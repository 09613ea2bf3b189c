"""Memory and disk behind one face: who answers, what is kept where, and what a deletion means.

Of two values of a key the one with the later ``written`` counts, on both tiers.  No trouble with
the disk reaches a caller: then there is only memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from math import isnan
from typing import Any, ClassVar

from ..process import OwnLock
from .disk import BATCH, FUTURE, MARK_LIFE, DiskTier
from .forks import follow_forks
from .memory import Entry, Hit, MemoryTier, size_of
from .write_behind import Pair, WriteBehind


class Tiers:
    """A memory tier and, unless ``disk`` is None, a disk tier.

    A deletion reaches this process's memory and the disk; other processes' memories keep what
    they hold to its end.  Call ``close`` at the end: nothing else writes what is left.

    Args:
        most_items: how many entries memory holds.
        most_bytes: how many bytes they may count, and again as many for what waits to be written.
        disk: the disk tier, which belongs to this object from now on.
        write_behind: seconds after which a put value is on disk.
        now: the wall clock, in seconds.
        clock: a monotonic clock, in seconds, for the pauses when the disk is in trouble.

    Raises:
        ValueError: a bound is below 1, or write_behind is not above 0.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((20, "_lock"),)
    _lock = OwnLock()  # around every change of memory, and what goes with it to the disk's side

    def __init__(
        self,
        *,
        most_items: int,
        most_bytes: int,
        disk: DiskTier | None = None,
        write_behind: float = 1.0,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not write_behind > 0:
            raise ValueError(f"Tiers: write_behind is {write_behind!r}: give it seconds above 0")
        self._memory = MemoryTier(
            most_items=most_items, most_bytes=most_bytes, on_evicted=self._evicted, now=now
        )
        self._behind: WriteBehind | None = None
        if disk is not None:
            self._behind = WriteBehind(
                disk,
                most_bytes=most_bytes,
                seconds=write_behind,
                on_saved=self._are_saved,
                on_renewed=self._are_lost,
                now=now,
                clock=clock,
            )
        self._now = now
        self._deletions = 0
        self._demotions = 0
        self._dropped = 0
        self._saved: set[str] = set()  # keys of memory whose entries are on disk
        follow_forks(self)

    @property
    def _open(self) -> WriteBehind | None:
        """The disk's side, until ``close``."""
        behind = self._behind
        return None if behind is None or behind.closed else behind

    # ------------------------------------------------------------------ reads

    def get(self, key: str, *, stale: bool = False) -> Hit | None:
        """What is known of a key and fresh; with ``stale`` also what is past its fresh life.

        Memory's answer comes first, even if it is stale and the disk's would not be: without
        ``stale`` the disk is asked then.
        """
        hit = self._memory.get(key, stale)
        if hit is not None or self._behind is None:
            return hit
        return self._deeper([key], stale).get(key)

    def get_from_memory(self, key: str, *, stale: bool = False) -> Hit | None:
        """``get`` without a look at the disk, so it never waits."""
        return self._memory.get(key, stale)

    def peek(self, key: str) -> Entry | None:
        """What memory holds of a key, whatever its age; neither counted nor a use."""
        return self._memory.peek(key)

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk tier, be it well or not."""
        return self._behind is not None

    def get_many(self, keys: Iterable[str], *, stale: bool = False) -> dict[str, Hit]:
        """What ``get`` would find, by key."""
        hits: dict[str, Hit] = {}
        missing = []
        for key in dict.fromkeys(keys):
            hit = self._memory.get(key, stale)
            if hit is None:
                missing.append(key)
            else:
                hits[key] = hit
        if missing and self._behind is not None:
            hits |= self._deeper(missing, stale)
        return hits

    def _deeper(self, keys: list[str], stale: bool) -> dict[str, Hit]:
        """From what waits to be written, and from disk; memory holds what was found afterwards."""
        behind = self._open
        if behind is None:
            return {}
        now = self._now()
        found: dict[str, Hit] = {}
        with self._lock:
            for key in keys:
                entry = behind.get(key)
                if entry is not None and now < (entry.stale_until if stale else entry.fresh_until):
                    old, age = now >= entry.fresh_until, max(0.0, now - entry.written)
                    found[key] = Hit(entry, "memory", old, age)
            asked = behind.of_disk(key for key in keys if key not in found)
            deletions = self._deletions
        if asked:
            nothing: dict[str, Hit] = {}
            found |= behind.read(lambda: behind.disk.get_many(asked, stale), nothing)
        hits: dict[str, Hit] = {}
        with self._lock:
            for key, hit in found.items():
                held = self._memory.peek(key) or behind.get(key)
                if held is not None and held.written > hit.entry.written:
                    # It has been put meanwhile, or its life is over: neither is the older one's.
                    newer = self._memory.get(key, stale)
                    if newer is not None:
                        hits[key] = newer
                    continue
                hits[key] = hit
                # What was deleted meanwhile must not come back with what was read before.
                if deletions == self._deletions:
                    self._promote(key, hit)
        behind.see_to_it()
        return hits

    def _promote(self, key: str, hit: Hit) -> None:
        held = self._memory.peek(key)
        if held is not None and held.written == hit.entry.written:
            return
        if size_of(key, hit.entry) <= self._memory.largest:
            self._memory.put(key, hit.entry)
            if hit.tier == "disk":
                self._saved.add(key)

    # ------------------------------------------------------------------ puts

    def put(self, key: str, entry: Entry, *, durable: bool = False) -> None:
        """Hold an entry, unless one of the key is held that was written later.

        An entry larger than an eighth of memory's bytes goes to disk only, before this returns.

        Args:
            key: any text.
            entry: the value and its life.
            durable: write it to disk before returning, if the disk works.

        Raises:
            TypeError, ValueError: the entry is not one.
        """
        self.put_many([(key, entry)], durable=durable)

    def put_many(self, entries: Iterable[Pair], *, durable: bool = False) -> None:
        """``put`` for each of the pairs."""
        at_once: list[Pair] = []
        refused: list[str] = []
        for key, entry in entries:
            _check(key, entry)
            behind = self._open
            with self._lock:
                if not self._is_news(key, entry):
                    continue
                kept = self._memory.put(key, entry)
                self._saved.discard(key)
                if behind is None:
                    self._dropped += not kept
                    continue
                behind.forget(key)
                if not behind.disk.takes(key, entry):
                    self._dropped += not kept
                    refused.append(key)
                elif kept:
                    behind.add(key, entry)
                if not kept or durable:
                    at_once.append((key, entry))
            behind.see_to_it()
        if refused:
            # An older value on disk must not outlive the one that is too large for it.
            self._delete(refused, from_memory=False)
        if at_once:
            self._write_now(at_once)

    def _is_news(self, key: str, entry: Entry) -> bool:
        held = self._memory.peek(key)
        if held is None and self._behind is not None:
            held = self._behind.get(key)
        if held is None or held.written <= entry.written:
            return True
        return held.written > self._now() + FUTURE

    def _write_now(self, entries: list[Pair]) -> None:
        behind = self._open
        if behind is None:
            return
        left = behind.write_now([pair for pair in entries if behind.disk.takes(*pair)])
        with self._lock:
            lost = [
                key
                for key, entry in left
                if behind.get(key) is not entry and self._memory.peek(key) is not entry
            ]
            self._dropped += len(lost)
        if lost:
            self._delete(lost, from_memory=False)  # the older value that may be there

    def _are_saved(self, entries: list[Pair]) -> None:
        with self._lock:
            self._saved |= {key for key, entry in entries if self._memory.peek(key) is entry}

    def _are_lost(self) -> None:
        with self._lock:
            self._saved.clear()

    def _evicted(self, key: str, entry: Entry) -> None:
        """Memory has no room for it; called within ``_lock``."""
        saved = key in self._saved
        self._saved.discard(key)
        behind, now = self._open, self._now()
        if behind is None or entry.stale_until <= now:
            return
        if saved:
            behind.disk.touch(key)
        elif behind.get(key) is None:
            # Its place in the queue was lost.  What is older than a deletion's mark lives could be
            # something that another process has deleted.
            if entry.written + MARK_LIFE < now or not behind.disk.takes(key, entry):
                self._dropped += 1
                return
            behind.add(key, entry)
        self._demotions += 1

    # ------------------------------------------------------------------ deletions

    def delete(self, key: str) -> None:
        """Forget a key, in memory and on disk."""
        self.delete_many([key])

    def delete_many(self, keys: Iterable[str]) -> None:
        """``delete`` for each of the keys."""
        every = list(dict.fromkeys(keys))
        for start in range(0, len(every), BATCH):
            self._delete(every[start : start + BATCH], from_memory=True)

    def _delete(self, keys: list[str], from_memory: bool) -> None:
        at, behind = self._now(), self._open
        with contextlib.nullcontext() if behind is None else behind.deleting(), self._lock:
            self._deletions += 1
            if from_memory:
                for key in keys:
                    self._memory.delete(key)
                self._saved.difference_update(keys)
            if behind is not None:
                behind.owe(keys, at, forget=from_memory)

    def clear(self) -> None:
        """Forget everything, also what other processes have put on disk."""
        at, behind = self._now(), self._open
        with contextlib.nullcontext() if behind is None else behind.deleting(), self._lock:
            self._deletions += 1
            self._memory.clear()
            self._saved.clear()
            if behind is not None:
                behind.owe_all(at)

    # ------------------------------------------------------------------ the rest

    def flush(self) -> None:
        """Write what waits to disk now, if the disk works; at most what was there at the start."""
        behind = self._open
        if behind is not None:
            behind.flush()

    def stats(self) -> dict[str, Any]:
        """Counts of this process, and what the tiers hold.

        ``demotions``: entries that left memory for the disk; ``dropped``: entries that could not
        wait any longer on the way there, so that the disk may hold an older one of the key.
        ``disk`` is None without a disk tier; its ``works`` is False, with the ``error`` in words,
        after the last attempt has failed.
        """
        behind = self._behind
        disk = None if behind is None else behind.stats()
        with self._lock:
            return {
                "memory": self._memory.stats(),
                "disk": disk,
                "demotions": self._demotions,
                "dropped": self._dropped + (0 if behind is None else behind.dropped),
            }

    def close(self) -> None:
        """Write what waits, for a few seconds at most, and close the file; memory stays."""
        if self._behind is not None:
            self._behind.close()

    def forked(self, clean: bool) -> None:
        if not clean:
            self._saved = set()


def _check(key: str, entry: Entry) -> None:
    if not isinstance(entry.data, bytes):
        raise TypeError(
            f"the entry of {key!r}: data is a {type(entry.data).__name__}: encode it to bytes"
        )
    if not entry.fresh_until <= entry.stale_until or isnan(entry.written):
        raise ValueError(
            f"the entry of {key!r}: written {entry.written!r}, fresh_until {entry.fresh_until!r}, "
            f"stale_until {entry.stale_until!r}: give numbers, and let stale_until be the last"
        )
