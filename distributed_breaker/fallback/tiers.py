"""Memory and disk behind one face: who answers, what is written when, and what a deletion means.

Of two values of a key the one with the later ``written`` counts, on both tiers.  No trouble with
the disk reaches a caller: then there is only memory, and a look at the disk every ``RETRY``
seconds.

The order of what a process does with a key is kept on disk by one lock, which is held from the
moment that something is taken to be written until it is committed.  A deletion is first noted as a
debt: nothing of the key is read from disk, and nothing is written there, before it is paid.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from math import isnan
from typing import Any, ClassVar, TypeVar

from ..process import OwnLock, before_uwsgi_forks, uwsgi_without_threads
from ..workers import start_thread
from .disk import BATCH, FUTURE, MARK_LIFE, DiskError, DiskTier
from .forks import follow_forks
from .memory import Entry, Hit, MemoryTier, size_of

log = logging.getLogger("distributed_breaker")

T = TypeVar("T")

MOST_DIRTY = 10_000  # entries that wait to be written
MOST_DEBTS = 10_000  # deletions that wait; with more of them the whole disk tier is to be cleared
PATIENCE = 1.0  # s that a call waits for another thread's transaction
TROUBLES = 3  # in a row after which the disk is left alone …
RETRY = 30.0  # … for so many seconds
LONGEST_WAIT = MARK_LIFE / 2  # s that anything waits for a disk in trouble
END = 2.0  # s that close waits for the thread


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

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((10, "_writing"), (20, "_lock"))
    _writing = OwnLock()  # around what changes the disk, from its taking to its commit
    _lock = OwnLock()  # around every change of memory, and all that waits

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
        self._disk = disk
        self._write_behind = write_behind
        self._now = now
        # A full disk can still be read.
        self._reading = _Trouble(clock, "no answers from the disk tier")
        self._storing = _Trouble(clock, "nothing is kept by the disk tier")
        self._renewals = 0
        self._most_dirty_bytes = most_bytes
        self._held = {"items": 0, "bytes": 0}  # of the disk, as last seen
        self._deletions = 0
        self._demotions = 0
        self._dropped = 0
        self._closed = False
        self._saved: set[str] = set()  # keys of memory whose entries are on disk
        self._debts: dict[str, float] = {}
        self._clear_at: float | None = None
        self._begin()
        follow_forks(self)

    def _begin(self) -> None:
        self._dirty: dict[str, Entry] = {}
        self._dirty_bytes = 0
        self._begin_thread()

    def _begin_thread(self) -> None:
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._something = threading.Event()  # there is something to write …
        self._much = threading.Event()  # … and so much that it should be written at once
        self._end = threading.Event()

    # ------------------------------------------------------------------ reads

    def get(self, key: str, *, stale: bool = False) -> Hit | None:
        """What is known of a key and fresh; with ``stale`` also what is past its fresh life.

        Memory's answer comes first, even if it is stale and the disk's would not be: without
        ``stale`` the disk is asked then.
        """
        hit = self._memory.get(key, stale)
        if hit is not None or self._disk is None:
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
        return self._disk is not None

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
        if missing and self._disk is not None:
            hits |= self._deeper(missing, stale)
        return hits

    def _deeper(self, keys: list[str], stale: bool) -> dict[str, Hit]:
        """From what waits to be written, and from disk; memory holds what was found afterwards."""
        now = self._now()
        waiting: dict[str, Hit] = {}
        with self._lock:
            if self._closed or self._disk is None:
                return {}
            for key in keys:
                entry = self._dirty.get(key)
                if entry is not None and now < (entry.stale_until if stale else entry.fresh_until):
                    old, age = now >= entry.fresh_until, max(0.0, now - entry.written)
                    waiting[key] = Hit(entry, "memory", old, age)
            cleared = self._clear_at is not None
            asked = [k for k in keys if k not in waiting and k not in self._debts and not cleared]
            deletions = self._deletions
        disk = self._disk
        found: dict[str, Hit] = {}
        if asked:
            found = self._ask(self._reading, lambda: disk.get_many(asked, stale), found)
        hits: dict[str, Hit] = {}
        with self._lock:
            for key, hit in (waiting | found).items():
                held = self._memory.peek(key) or self._dirty.get(key)
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
        self._see_to_writing()
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

    def put_many(self, entries: Iterable[tuple[str, Entry]], *, durable: bool = False) -> None:
        """``put`` for each of the pairs."""
        at_once: list[tuple[str, Entry]] = []
        refused: list[str] = []
        for key, entry in entries:
            _check(key, entry)
            with self._lock:
                if not self._is_news(key, entry):
                    continue
                kept = self._memory.put(key, entry)
                self._saved.discard(key)
                self._forget_dirty(key)
                if self._disk is None or self._closed:
                    self._dropped += not kept
                elif not self._disk.takes(key, entry):
                    self._dropped += not kept
                    refused.append(key)
                elif kept:
                    self._mark_dirty(key, entry)
                if not kept or durable:
                    at_once.append((key, entry))
            self._see_to_writing()
        if self._disk is None or self._closed:
            return
        if refused:
            # An older value on disk must not outlive the one that is too large for it.
            self._delete_from_disk(refused)
        if at_once:
            self._write_now([pair for pair in at_once if self._disk.takes(*pair)])

    def _is_news(self, key: str, entry: Entry) -> bool:
        held = self._memory.peek(key) or self._dirty.get(key)
        if held is None or held.written <= entry.written:
            return True
        return held.written > self._now() + FUTURE

    def _mark_dirty(self, key: str, entry: Entry) -> None:
        self._dirty[key] = entry
        self._dirty_bytes += size_of(key, entry)
        while len(self._dirty) > MOST_DIRTY or self._dirty_bytes > self._most_dirty_bytes:
            self._forget_dirty(next(iter(self._dirty)))
            self._dropped += 1

    def _is_much(self) -> bool:
        return len(self._dirty) >= BATCH or 2 * self._dirty_bytes >= self._most_dirty_bytes

    def _forget_dirty(self, key: str) -> None:
        entry = self._dirty.pop(key, None)
        if entry is not None:
            self._dirty_bytes -= size_of(key, entry)

    def _evicted(self, key: str, entry: Entry) -> None:
        """Memory has no room for it; called within ``_lock``."""
        saved = key in self._saved
        self._saved.discard(key)
        now = self._now()
        if self._disk is None or self._closed or entry.stale_until <= now:
            return
        if saved:
            self._disk.touch(key)
        elif key not in self._dirty:
            # Its place in the queue was lost.  What is older than a deletion's mark lives could be
            # something that another process has deleted.
            if entry.written + MARK_LIFE < now or not self._disk.takes(key, entry):
                self._dropped += 1
                return
            self._mark_dirty(key, entry)
        self._demotions += 1

    # ------------------------------------------------------------------ deletions

    def delete(self, key: str) -> None:
        """Forget a key, in memory and on disk."""
        self.delete_many([key])

    def delete_many(self, keys: Iterable[str]) -> None:
        """``delete`` for each of the keys."""
        every = list(dict.fromkeys(keys))
        for start in range(0, len(every), BATCH):
            self._delete_from_disk(every[start : start + BATCH], memory=True)

    def clear(self) -> None:
        """Forget everything, also what other processes have put on disk."""
        at = self._now()
        with self._turn() as ours:
            with self._lock:
                self._deletions += 1
                self._memory.clear()
                self._saved.clear()
                self._drop_dirty()
                if self._disk is None or self._closed:
                    return
                self._debts.clear()
                self._clear_at = at
            if ours:
                self._pay()

    def _delete_from_disk(self, keys: list[str], memory: bool = False) -> None:
        at = self._now()
        with self._turn() as ours:
            with self._lock:
                self._deletions += 1
                for key in keys:
                    if memory:
                        self._memory.delete(key)
                        self._saved.discard(key)
                        self._forget_dirty(key)
                    if self._disk is not None and not self._closed:
                        self._debts[key] = at
                if len(self._debts) > MOST_DEBTS:
                    self._debts.clear()
                    self._clear_at = at
                if self._disk is None or self._closed:
                    return
            paid = ours and self._pay()
        if not paid:
            self._see_to_writing()

    def _pay(self) -> bool:
        """Carry out the deletions that wait; within ``_writing``.  False on trouble."""
        disk = self._disk
        with self._lock:
            debts, clear_at = dict(self._debts), self._clear_at
        if disk is None or not (debts or clear_at is not None):
            return disk is not None

        def pay() -> bool:
            if clear_at is not None:
                disk.clear(clear_at)
            disk.delete_many(debts)
            return True

        if not self._ask(self._storing, pay, False):
            return False
        with self._lock:
            if self._clear_at == clear_at:
                self._clear_at = None
            for key, at in debts.items():
                if self._debts.get(key) == at:
                    del self._debts[key]
        return True

    # ------------------------------------------------------------------ the way to disk

    def flush(self) -> None:
        """Write what waits to disk now, if the disk works; at most what was there at the start."""
        if not self._closed:
            self._flush()

    def _flush(self) -> None:
        for _ in range(MOST_DIRTY // BATCH + 2):
            if not self._write_batch():
                return

    def _write_batch(self) -> bool:
        """Write some of what waits; whether there is more."""
        disk = self._disk
        if disk is None:
            return False
        with self._turn() as ours:
            if not ours:
                return False
            if self._storing.lasted(LONGEST_WAIT):
                with self._lock:
                    # Others may have deleted some of it; soon the marks of that will be gone.
                    self._drop_dirty()
            if not self._pay():
                return False
            batch = self._next_batch(disk)
            if not batch and not disk.touched:
                return False
            if not self._ask(self._storing, lambda: self._put(disk, batch), False):
                return False
            self._are_saved(batch)
            return bool(self._dirty)

    def _next_batch(self, disk: DiskTier) -> list[tuple[str, Entry]]:
        now = self._now()
        batch: list[tuple[str, Entry]] = []
        left = disk.batch_bytes
        with self._lock:
            for key, entry in list(islice(self._dirty.items(), 2 * BATCH)):
                if entry.stale_until <= now:
                    self._forget_dirty(key)
                    continue
                left -= size_of(key, entry)
                if len(batch) == BATCH or (left < 0 and batch):
                    break
                batch.append((key, entry))
        return batch

    def _drop_dirty(self) -> None:
        self._dropped += len(self._dirty)
        self._dirty.clear()
        self._dirty_bytes = 0

    def _write_now(self, entries: list[tuple[str, Entry]]) -> None:
        disk = self._disk
        assert disk is not None
        lost: list[str] = []
        with self._turn() as ours:
            for part in _batches(entries, disk.batch_bytes):
                put = partial(self._put, disk, part)
                if ours and self._pay() and self._ask(self._storing, put, False):
                    self._are_saved(part)
                    continue
                with self._lock:
                    lost += [key for key, entry in part if not self._waits_for_disk(key, entry)]
        if lost:
            with self._lock:
                self._dropped += len(lost)
            self._delete_from_disk(lost)  # the older value that may be there

    def _waits_for_disk(self, key: str, entry: Entry) -> bool:
        return self._dirty.get(key) is entry or self._memory.peek(key) is entry

    @staticmethod
    def _put(disk: DiskTier, entries: list[tuple[str, Entry]]) -> bool:
        disk.put_many(entries)
        return True

    def _are_saved(self, entries: list[tuple[str, Entry]]) -> None:
        with self._lock:
            for key, entry in entries:
                if self._dirty.get(key) is entry:
                    self._forget_dirty(key)
                if self._memory.peek(key) is entry:
                    self._saved.add(key)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[bool]:
        """Nobody else in this process changes the disk; False: one does, and takes too long."""
        lock = self._writing
        ours = lock.acquire(timeout=PATIENCE)
        try:
            yield ours
        finally:
            if ours:
                lock.release()

    def _ask(self, trouble: _Trouble, work: Callable[[], T], otherwise: T) -> T:
        """What the disk answers; ``otherwise`` when it is in trouble.  Not within ``_lock``."""
        disk = self._disk
        if disk is None or not trouble.admits():
            return otherwise
        try:
            answer = work()
        except DiskError as error:
            trouble.failed(str(error))
            answer = otherwise
        else:
            trouble.worked()
        if disk.renewals != self._renewals:
            with self._lock:
                self._renewals = disk.renewals
                self._saved.clear()
        return answer

    # ------------------------------------------------------------------ the thread

    def _see_to_writing(self) -> None:
        """Have the thread write in a while, or at once where there is much."""
        much = self._is_much()
        event = self._much if much else self._something
        if (event.is_set() or not (much or self._waits())) and self._pid == os.getpid():
            return
        with self._lock:
            if self._closed or self._disk is None:
                return
            if self._pid != os.getpid():
                self._begin_thread()  # uWSGI forks without asking Python
            started = self._started()
        if started:
            self._something.set()
            if much:
                self._much.set()
        elif much:
            self._write_batch()

    def _started(self) -> bool:
        if self._thread is not None and self._thread.is_alive():
            return True
        if uwsgi_without_threads() or before_uwsgi_forks():
            return False
        try:
            self._thread = start_thread("circuit-breaker-disk-tier", self._run)
        except RuntimeError:
            return False
        return True

    def _run(self) -> None:
        something, much, end = self._something, self._much, self._end
        while not end.is_set():
            something.wait()
            # While the disk is in trouble there may be much all the time.
            (end if self._storing.error else much).wait(self._write_behind)
            if end.is_set():
                return
            something.clear()
            much.clear()
            try:
                self.flush()
            except BaseException:
                log.exception("the thread of the disk tier goes on after an error")
            if self._waits():
                something.set()

    def _waits(self) -> bool:
        """Whether anything is to be written."""
        if self._dirty or self._debts or self._clear_at is not None:
            return True
        return self._disk is not None and self._disk.touched

    # ------------------------------------------------------------------ the rest

    def stats(self) -> dict[str, Any]:
        """Counts of this process, and what the tiers hold.

        ``demotions``: entries that left memory for the disk; ``dropped``: entries that could not
        wait any longer on the way there, so that the disk may hold an older one of the key.
        ``disk`` is None without a disk tier; its ``works`` is False, with the ``error`` in words,
        after the last attempt has failed.
        """
        disk = self._disk
        told: dict[str, Any] | None = None
        if disk is not None:
            if not self._closed:
                self._held = self._ask(self._reading, disk.stats, self._held)
            error = self._storing.error or self._reading.error
            told = {
                **disk.counts(),
                "items": self._held["items"],
                "bytes": self._held["bytes"],
                "works": not error,
                "error": error,
            }
        with self._lock:
            return {
                "memory": self._memory.stats(),
                "disk": told,
                "demotions": self._demotions,
                "dropped": self._dropped,
            }

    def close(self) -> None:
        """Write what waits, for a few seconds at most, and close the file; memory stays."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread if self._pid == os.getpid() else None
            for event in (self._end, self._something, self._much):
                event.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(END)
        if self._disk is not None:
            self._flush()
            self._disk.close()

    def forked(self, clean: bool) -> None:
        """The parent writes what waits; the deletions are carried out twice, which is the same."""
        self._begin()
        if not clean:
            self._saved = set()


class _Trouble:
    """Whether to ask the disk: after some failures in a row only now and then, and one at a time.

    It is no circuit of this library: nobody else's failures count, and nobody looks at its state.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((60, "_lock"),)
    _lock = OwnLock()

    def __init__(self, clock: Callable[[], float], what: str) -> None:
        self.error = ""
        self._what = what
        self._clock = clock
        self._failures = 0
        self._since = 0.0
        self._retry_at = 0.0
        follow_forks(self)

    def admits(self) -> bool:
        if self._failures < TROUBLES:
            return True
        with self._lock:
            now = self._clock()
            if now < self._retry_at:
                return False
            self._retry_at = now + RETRY
            return True

    def lasted(self, seconds: float) -> bool:
        """Whether the failures have lasted for so long, or for so long again since the last yes."""
        with self._lock:
            now = self._clock()
            if not self._failures or now - self._since < seconds:
                return False
            self._since = now
            return True

    def failed(self, error: str) -> None:
        with self._lock:
            now = self._clock()
            self.error = error
            self._since = self._since if self._failures else now
            self._failures += 1
            self._retry_at = now + RETRY
            first = self._failures == TROUBLES
        if first:
            log.warning("%s until it works again: %s", self._what, error)

    def worked(self) -> None:
        if not self._failures:
            return
        with self._lock:
            loud = self._failures >= TROUBLES
            self._failures = 0
            self.error = ""
        if loud:
            log.warning("the disk tier works again; before: %s", self._what)

    def forked(self, clean: bool) -> None:
        """What was seen of the disk holds for the child, too."""


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


def _batches(
    entries: list[tuple[str, Entry]], most_bytes: int
) -> Iterator[list[tuple[str, Entry]]]:
    batch: list[tuple[str, Entry]] = []
    left = most_bytes
    for key, entry in entries:
        size = size_of(key, entry)
        if batch and (size > left or len(batch) == BATCH):
            yield batch
            batch, left = [], most_bytes
        batch.append((key, entry))
        left -= size
    if batch:
        yield batch
