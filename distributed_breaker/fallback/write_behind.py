"""What one process has for the disk tier and has not brought there yet, and how it gets there.

No trouble with the disk reaches a caller: what waits goes on waiting, within its bounds, and there
is a look at the disk every ``RETRY`` seconds.

The order of what a process does with a key is kept on disk by one lock, which is held from the
moment that something is taken to be written until it is committed.  A deletion is first noted as a
debt: nothing of the key is read from disk, and nothing is written there, before it is paid.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, ClassVar, TypeVar

from ..process import OwnLock, before_uwsgi_forks, uwsgi_without_threads
from ..workers import start_thread
from .disk import BATCH, MARK_LIFE, DiskError, DiskTier
from .forks import follow_forks
from .memory import Entry, size_of
from .trouble import Trouble

log = logging.getLogger("distributed_breaker")

T = TypeVar("T")
Pair = tuple[str, Entry]

MOST_DIRTY = 10_000  # entries that wait to be written
MOST_DEBTS = 10_000  # deletions that wait; with more of them the whole disk tier is to be cleared
PATIENCE = 1.0  # s that a call waits for another thread's transaction
LONGEST_WAIT = MARK_LIFE / 2  # s that anything waits for a disk in trouble
END = 2.0  # s that close waits for the thread


class WriteBehind:
    """The way to one disk tier, and from it.

    Args:
        disk: the disk tier, which belongs to this object from now on.
        most_bytes: how many bytes of entries may wait.
        seconds: after which a put value is on disk.
        on_saved: told which entries are on disk now; no lock of this object is held then.
        on_renewed: told that the disk tier was made anew, and so is empty; likewise.
        now: the wall clock, in seconds.
        clock: a monotonic clock, in seconds, for the pauses when the disk is in trouble.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((10, "_writing"), (35, "_lock"))
    _writing = OwnLock()  # around what changes the disk, from its taking to its commit
    _lock = OwnLock()  # around every change of what waits; nobody is called within it

    def __init__(
        self,
        disk: DiskTier,
        *,
        most_bytes: int,
        seconds: float,
        on_saved: Callable[[list[Pair]], None],
        on_renewed: Callable[[], None],
        now: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self.disk = disk
        self.closed = False
        self.dropped = 0
        """Entries that could not wait any longer."""
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._on_saved = on_saved
        self._on_renewed = on_renewed
        self._now = now
        # A full disk can still be read.
        self._reading = Trouble(clock, "no answers from the disk tier")
        self._storing = Trouble(clock, "nothing is kept by the disk tier")
        self._renewals = 0
        self._held = {"items": 0, "bytes": 0}  # of the disk, as last seen
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

    # ------------------------------------------------------------------ what waits

    def add(self, key: str, entry: Entry) -> None:
        """Have an entry wait, in the place of an older one of its key."""
        with self._lock:
            self._forget(key)
            self._dirty[key] = entry
            self._dirty_bytes += size_of(key, entry)
            while len(self._dirty) > MOST_DIRTY or self._dirty_bytes > self._most_bytes:
                self._forget(next(iter(self._dirty)))
                self.dropped += 1

    def get(self, key: str) -> Entry | None:
        """The entry that waits, if one does."""
        return self._dirty.get(key)

    def forget(self, key: str) -> None:
        """Let an entry wait no longer."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: str) -> None:
        entry = self._dirty.pop(key, None)
        if entry is not None:
            self._dirty_bytes -= size_of(key, entry)

    def _drop_all(self) -> None:
        self.dropped += len(self._dirty)
        self._dirty.clear()
        self._dirty_bytes = 0

    def owe(self, keys: Iterable[str], at: float, *, forget: bool) -> None:
        """Have deletions wait; with ``forget``, what waits of the keys waits no longer."""
        with self._lock:
            for key in keys:
                self._debts[key] = at
                if forget:
                    self._forget(key)
            if len(self._debts) > MOST_DEBTS:
                self._owe_all(at)

    def owe_all(self, at: float) -> None:
        """Have one of everything wait, of what waits itself, too."""
        with self._lock:
            self._drop_all()
            self._owe_all(at)

    def _owe_all(self, at: float) -> None:
        self._debts.clear()
        self._clear_at = at

    def of_disk(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that the disk may be asked for."""
        with self._lock:
            return [k for k in keys if k not in self._debts and self._clear_at is None]

    def waits(self) -> bool:
        """Whether anything is to be written."""
        return bool(self._dirty or self._debts or self._clear_at is not None or self.disk.touched)

    def _is_much(self) -> bool:
        return len(self._dirty) >= BATCH or 2 * self._dirty_bytes >= self._most_bytes

    # ------------------------------------------------------------------ asking the disk

    def read(self, work: Callable[[], T], otherwise: T) -> T:
        """What the disk answers; ``otherwise`` when it is in trouble."""
        return self._ask(self._reading, work, otherwise)

    def _store(self, work: Callable[[], None]) -> bool:
        """Whether the disk has done it."""

        def store() -> bool:
            work()
            return True

        return self._ask(self._storing, store, False)

    def _ask(self, trouble: Trouble, work: Callable[[], T], otherwise: T) -> T:
        if not trouble.admits():
            return otherwise
        try:
            answer = work()
        except DiskError as error:
            trouble.failed(str(error))
            answer = otherwise
        else:
            trouble.worked()
        if self.disk.renewals != self._renewals:
            self._renewals = self.disk.renewals
            self._on_renewed()
        return answer

    # ------------------------------------------------------------------ the way to disk

    @contextlib.contextmanager
    def deleting(self) -> Iterator[None]:
        """What is owed within this is carried out at its end, or soon; what is being written when
        it begins is written before, as far as ``PATIENCE`` allows."""
        with self._turn() as ours:
            yield
            paid = ours and self._pay()
        if not paid:
            self.see_to_it()

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

    def _pay(self) -> bool:
        """Carry out the deletions that wait; within ``_writing``.  False on trouble."""
        with self._lock:
            debts, clear_at = dict(self._debts), self._clear_at
        if not debts and clear_at is None:
            return True

        def pay() -> None:
            if clear_at is not None:
                self.disk.clear(clear_at)
            self.disk.delete_many(debts)

        if not self._store(pay):
            return False
        with self._lock:
            if self._clear_at == clear_at:
                self._clear_at = None
            for key, at in debts.items():
                if self._debts.get(key) == at:
                    del self._debts[key]
        return True

    def flush(self) -> None:
        """Write what waits to disk now, if the disk works; at most what was there at the start."""
        for _ in range(MOST_DIRTY // BATCH + 2):
            if not self._write_batch():
                return

    def _write_batch(self) -> bool:
        """Write some of what waits; whether there is more."""
        with self._turn() as ours:
            if not ours:
                return False
            if self._storing.lasted(LONGEST_WAIT):
                with self._lock:
                    # Others may have deleted some of it; soon the marks of that will be gone.
                    self._drop_all()
            if not self._pay():
                return False
            batch = self._next_batch()
            if not batch and not self.disk.touched:
                return False
            return self._put(batch) and bool(self._dirty)

    def _next_batch(self) -> list[Pair]:
        now = self._now()
        batch: list[Pair] = []
        left = self.disk.batch_bytes
        with self._lock:
            for key, entry in list(islice(self._dirty.items(), 2 * BATCH)):
                if entry.stale_until <= now:
                    self._forget(key)
                    continue
                left -= size_of(key, entry)
                if len(batch) == BATCH or (left < 0 and batch):
                    break
                batch.append((key, entry))
        return batch

    def write_now(self, entries: list[Pair]) -> list[Pair]:
        """Write entries before returning; those that could not be written are returned."""
        left: list[Pair] = []
        with self._turn() as ours:
            for part in _batches(entries, self.disk.batch_bytes):
                if not (ours and self._pay() and self._put(part)):
                    left += part
        return left

    def _put(self, entries: list[Pair]) -> bool:
        if not self._store(partial(self.disk.put_many, entries)):
            return False
        self._on_saved(entries)
        with self._lock:
            for key, entry in entries:
                if self._dirty.get(key) is entry:
                    self._forget(key)
        return True

    # ------------------------------------------------------------------ the thread

    def see_to_it(self) -> None:
        """Have the thread write in a while, or at once where there is much."""
        much = self._is_much()
        event = self._much if much else self._something
        if (event.is_set() or not (much or self.waits())) and self._pid == os.getpid():
            return
        with self._lock:
            if self.closed:
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
            (end if self._storing.error else much).wait(self._seconds)
            if end.is_set():
                return
            something.clear()
            much.clear()
            try:
                self.flush()
            except BaseException:
                log.exception("the thread of the disk tier goes on after an error")
            if self.waits():
                something.set()

    # ------------------------------------------------------------------ the rest

    def stats(self) -> dict[str, Any]:
        """Of the disk tier: counts of this process, what it holds, whether it ``works``, and if
        not, the ``error`` in words."""
        if not self.closed:
            self._held = self.read(self.disk.stats, self._held)
        error = self._storing.error or self._reading.error
        return {
            **self.disk.counts(),
            "items": self._held["items"],
            "bytes": self._held["bytes"],
            "works": not error,
            "error": error,
        }

    def close(self) -> None:
        """Write what waits, for a few seconds at most, and close the file.  Safe to call twice."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            thread = self._thread if self._pid == os.getpid() else None
            for event in (self._end, self._something, self._much):
                event.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(END)
        self.flush()
        self.disk.close()

    def forked(self, clean: bool) -> None:
        """The parent writes what waits; the deletions are carried out twice, which is the same."""
        self._begin()


def _batches(entries: list[Pair], most_bytes: int) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
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
