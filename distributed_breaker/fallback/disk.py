"""The disk tier: one SQLite file that the processes of a host share.  No thread, no policy.

The rules that hold across processes stand here, in SQL: what was written later wins, a deletion
leaves a mark that wins over what was written before it, and the bytes are counted by triggers.

The file keeps its bound like this.  Each row counts its data, its key twice (table and index) and
``ROW`` bytes; what exceeds ``most_bytes`` is removed in the transaction that wrote, expired rows
first, then the least recently used.  The same happens when the pages in use exceed ``ROOM`` of it,
since rows fill pages badly.  Freed pages are used again or given back to the file system, and
beyond ``MOST_ROOM`` SQLite itself refuses to grow the file.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..process import OwnLock
from .file_errors import FileError
from .forks import follow_forks
from .memory import LARGEST_SHARE, Entry, Hit
from .private_file import Kind, PrivateFile

T = TypeVar("T")

SMALLEST = 1 << 20  # bytes; below that SQLite's own needs would be the larger part
BUSY = 0.25  # s that a process waits for another one's transaction
BATCH = 500  # entries in a transaction …
BATCH_BYTES = 4 << 20  # … and bytes, unless a single one has more
ROW = 112  # bytes that a row takes beside its data and its key, as measured with short ones
CACHE = 8_000  # KiB of pages that a connection keeps; with SQLite's 2,000 a batch would not fit
LOG_PAGES = 4_000  # pages of the log from which it is worked into the file, at most
ROOM = 1.1  # × most_bytes of pages in use, from which rows are removed
MOST_ROOM = 1.3  # × most_bytes of pages, all in all
EVICTED_AT_ONCE = 500  # rows
EVICTIONS = 20  # times so many in a transaction
MARK_LIFE = 600.0  # s that a deletion is remembered against what other processes still hold
FUTURE = 60.0  # s; what was written later than that from now comes from a clock that was wrong
USED_PRECISION = 60.0  # s
MOST_USED = 10_000  # keys whose use waits to be noted
GIVEN_BACK = 256  # pages in a transaction

_PAGE = 4096
_SCHEMA = """
CREATE TABLE totals (items INTEGER NOT NULL, bytes INTEGER NOT NULL, cleared REAL NOT NULL);
INSERT INTO totals VALUES (0, 0, 0);
CREATE TABLE entries (
  key BLOB PRIMARY KEY NOT NULL,
  size INTEGER NOT NULL,
  written REAL NOT NULL,
  fresh_until REAL NOT NULL,
  stale_until REAL NOT NULL,
  used REAL NOT NULL,
  data BLOB
);
CREATE INDEX entries_by_end ON entries (stale_until);
CREATE INDEX entries_by_use ON entries (used);
CREATE TRIGGER entry_inserted AFTER INSERT ON entries BEGIN
  UPDATE totals SET bytes = bytes + new.size, items = items + (new.data IS NOT NULL);
END;
CREATE TRIGGER entry_deleted AFTER DELETE ON entries BEGIN
  UPDATE totals SET bytes = bytes - old.size, items = items - (old.data IS NOT NULL);
END;
CREATE TRIGGER entry_changed AFTER UPDATE OF data, size ON entries BEGIN
  UPDATE totals SET bytes = bytes + new.size - old.size,
    items = items + (new.data IS NOT NULL) - (old.data IS NOT NULL);
END;
"""
_ROW = "key, data, written, fresh_until, stale_until, used"
_PUT = """
INSERT INTO entries (key, size, written, fresh_until, stale_until, used, data)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET size = excluded.size, written = excluded.written,
  fresh_until = excluded.fresh_until, stale_until = excluded.stale_until, used = excluded.used,
  data = excluded.data
WHERE excluded.written >= written OR written > ?
"""
_DELETE = """
INSERT INTO entries (key, size, written, fresh_until, stale_until, used, data)
VALUES (?, ?, ?, 0, ?, ?, NULL)
ON CONFLICT (key) DO UPDATE SET size = excluded.size, written = max(written, excluded.written),
  fresh_until = 0, stale_until = excluded.stale_until, used = excluded.used, data = NULL
"""


class DiskError(FileError):
    """The disk tier cannot serve: full, read-only, locked for too long, or not to be opened."""


class DiskTier:
    """Entries in ``<folder>/cache.db``, shared with other processes of this user on this host.

    Nothing is opened before the first use.  Every method but ``touch`` and ``close`` may raise
    DiskError.  A damaged file, or one of another version, is removed and made anew with one
    warning.  No write is synced, so that a power loss may undo the last ones: it is a cache.

    Args:
        folder: a folder of its own; made, with rights for this user alone, if it does not exist.
            One in which others may write is refused.
        most_bytes: bound of the file; see the module.  Beside it lies SQLite's write-ahead log,
            for moments: up to a half of a small bound, and about 30 MB of a large one.
        now: the wall clock, in seconds; the same for all processes.

    Raises:
        ValueError: most_bytes is below 1 MiB.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((50, "_counting"),)
    _counting = OwnLock()

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        most_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        if most_bytes < SMALLEST:
            raise ValueError(
                f"DiskTier {os.fspath(folder)!r}: most_bytes is {most_bytes!r}, too little for an "
                f"SQLite file: give it {SMALLEST} or more, or use no disk tier"
            )
        self._kind = _kind(most_bytes)
        # Reads do not wait for this process's own writes.
        self._reads, self._writes = (
            PrivateFile(os.path.join(folder, "cache.db"), self._kind) for _ in range(2)
        )
        self.path = Path(self._writes.path)
        self.folder = self.path.parent
        self.most_bytes = most_bytes
        self.batch_bytes = min(BATCH_BYTES, most_bytes // 16)
        """Bytes that callers should put at once, unless a single entry has more."""
        self._now = now
        self._used: dict[str, float] = {}
        self._counts = dict.fromkeys(("hits", "misses", "stale", "expired", "evictions"), 0)
        follow_forks(self)

    # ------------------------------------------------------------------ reads

    def get(self, key: str, stale: bool = False) -> Hit | None:
        """The entry if it is fresh, or, with ``stale``, not past its ``stale_until``."""
        return self.get_many([key], stale).get(key)

    def get_many(self, keys: Iterable[str], stale: bool = False) -> dict[str, Hit]:
        """Those of the keys that ``get`` would find."""
        wanted = {_blob(key): key for key in keys}
        now = self._now()
        end = "stale_until" if stale else "fresh_until"
        rows: list[Any] = []
        for part in _parts(list(wanted), BATCH):
            marks = ", ".join("?" * len(part))
            # stale_until beside fresh_until: nothing is served beyond it, whatever the other says.
            sql = (
                f"SELECT {_ROW} FROM entries WHERE key IN ({marks}) AND data IS NOT NULL "
                f"AND {end} > ? AND stale_until > ?"
            )
            rows += self._fetch(sql, (*part, now, now))
        hits: dict[str, Hit] = {}
        with self._counting:
            for blob, data, written, fresh_until, stale_until, used in rows:
                key = wanted[blob]
                entry = Entry(data, written, fresh_until, stale_until)
                old = now >= fresh_until
                self._counts["stale" if old else "hits"] += 1
                hits[key] = Hit(entry, "disk", old, max(0.0, now - written))
                if now - used > USED_PRECISION:
                    self._note_use(key, now)
            self._counts["misses"] += len(wanted) - len(rows)
        return hits

    # ------------------------------------------------------------------ writes

    def takes(self, key: str, entry: Entry) -> bool:
        """Whether the entry is small enough to be held."""
        return _size(_blob(key), entry.data) <= self.most_bytes // LARGEST_SHARE

    def put_many(self, entries: Iterable[tuple[str, Entry]]) -> None:
        """Write entries in one transaction, and what ``touch`` has noted.

        One that is written before the one that is there, before its deletion or before the last
        ``clear`` is passed over, and so is one that is too large.  The caller bounds the number
        (``BATCH``) and the bytes (``batch_bytes``).
        """
        now = self._now()
        rows = [
            (
                blob,
                _size(blob, entry.data),
                float(entry.written),
                float(entry.fresh_until),
                float(entry.stale_until),
                now,
                entry.data,
                now + FUTURE,
            )
            for blob, key, entry in ((_blob(key), key, entry) for key, entry in entries)
            if self.takes(key, entry)
        ]
        with self._counting:
            used = [(at, _blob(key)) for key, at in islice(self._used.items(), BATCH)]

        def put(db: sqlite3.Connection) -> None:
            ((cleared,),) = db.execute("SELECT cleared FROM totals").fetchall()
            if cleared > now + FUTURE:
                cleared = 0.0
            db.executemany(_PUT, [row for row in rows if row[2] >= cleared])
            db.executemany("UPDATE entries SET used = max(used, ?) WHERE key = ?", used)

        self._write(put)
        with self._counting:
            for _, blob in used:
                self._used.pop(_text(blob), None)

    def delete_many(self, deleted: Mapping[str, float]) -> None:
        """Delete keys, each with the time of its deletion.

        What was written before that time does not come back, also from a process that still holds
        it, for ``MARK_LIFE`` seconds.
        """
        now = self._now()
        for part in _parts(list(deleted.items()), BATCH):
            blobs = [(_blob(key), float(at)) for key, at in part]
            rows = [(blob, _size(blob), at, now + MARK_LIFE, now) for blob, at in blobs]
            self._write(partial(_mark_deleted, rows))

    def clear(self, at: float | None = None) -> None:
        """Delete everything; what was written before ``at`` (default: now) does not come back."""
        cleared = self._now() if at is None else at
        # A new file: to empty one of a million rows takes seconds.
        self._writes.replace(lambda db: db.execute("UPDATE totals SET cleared = ?", (cleared,)))

    def touch(self, key: str) -> None:
        """Note that a key is in use; ``put_many`` writes it."""
        now = self._now()
        with self._counting:
            self._note_use(key, now)

    @property
    def touched(self) -> bool:
        """Whether ``put_many`` has something to write even without entries."""
        return bool(self._used)

    def _note_use(self, key: str, now: float) -> None:
        if len(self._used) < MOST_USED:
            self._used[key] = now

    def _fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        # All rows at once: a statement that is not at its end would hold the log back.
        return self._reads.read(lambda db: db.execute(sql, parameters).fetchall(), mend=True)

    def _write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        def write(db: sqlite3.Connection) -> tuple[int, int]:
            work(db)
            return self._make_room(db)

        try:
            expired, evicted = self._writes.write(write, mend=True, sync=False)
        except DiskError as error:
            if not error.full:
                raise
            # Perhaps it is only the bound of the file: then rows can go, and there is room.
            more = self.most_bytes // 4
            self._writes.write(lambda db: self._make_room(db, more), mend=True, sync=False)
            expired, evicted = self._writes.write(write, mend=True, sync=False)
        with self._counting:
            self._counts["expired"] += expired
            self._counts["evictions"] += evicted

    def _make_room(self, connection: sqlite3.Connection, more: int = 0) -> tuple[int, int]:
        """Remove what has expired, and what is used least until the bounds hold; bounded."""
        rows = connection.execute(
            "SELECT rowid, data IS NOT NULL FROM entries WHERE stale_until <= ? LIMIT ?",
            (self._now(), 2 * BATCH),
        ).fetchall()
        _remove(connection, rows)
        expired = sum(live for _, live in rows)
        evicted = 0
        for _ in range(EVICTIONS):
            excess = max(self._excess(connection), more)
            if excess <= 0:
                break
            rows = connection.execute(
                "SELECT rowid, size, data IS NOT NULL FROM entries ORDER BY used LIMIT ?",
                (EVICTED_AT_ONCE,),
            ).fetchall()
            gone = []
            freed = 0
            for rowid, size, live in rows:
                if freed >= excess:
                    break
                freed += size
                gone.append((rowid, live))
            _remove(connection, gone)
            evicted += sum(live for _, live in gone)
            more = max(0, more - freed)
            if not gone:
                break
        _give_back(connection)
        return expired, evicted

    def _excess(self, connection: sqlite3.Connection) -> int:
        ((held,),) = connection.execute("SELECT bytes FROM totals").fetchall()
        pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
        in_use = pages * _PAGE - int(ROOM * self.most_bytes)
        return max(int(held) - self.most_bytes, in_use)

    # ------------------------------------------------------------------ the rest

    @property
    def renewals(self) -> int:
        """How often this process had to make the file anew."""
        return self._reads.renewals + self._writes.renewals

    def stats(self) -> dict[str, int]:
        """Counts of this process, and the items and bytes of the file."""
        ((items, held),) = self._fetch("SELECT items, bytes FROM totals")
        return {**self.counts(), "items": items, "bytes": held}

    def counts(self) -> dict[str, int]:
        """Counts of this process alone, without a look at the file: no DiskError."""
        with self._counting:
            return {**self._counts, "renewals": self.renewals}

    def close(self) -> None:
        """Close the file; the next use would open it again."""
        self._reads.close()
        self._writes.close()

    def forked(self, clean: bool) -> None:
        self._used = {}


def _kind(most_bytes: int) -> Kind:
    log_pages = min(LOG_PAGES, most_bytes // 16 // _PAGE)
    return Kind(
        name="the disk tier",
        error=DiskError,
        schema=_SCHEMA,
        version=1,
        application=0,
        pragmas={
            "temp_store": "MEMORY",
            "cache_size": -CACHE,
            "wal_autocheckpoint": log_pages,
            "journal_size_limit": log_pages * _PAGE,
            "max_page_count": int(MOST_ROOM * most_bytes) // _PAGE,
        },
        busy=BUSY,
        cache=True,
        layout="PRAGMA auto_vacuum = INCREMENTAL",
    )


def _mark_deleted(rows: Sequence[Any], db: sqlite3.Connection) -> None:
    db.executemany(_DELETE, rows)


def _remove(connection: sqlite3.Connection, rows: Sequence[tuple[int, int]]) -> None:
    connection.executemany("DELETE FROM entries WHERE rowid = ?", [(row,) for row, _ in rows])


def _give_back(connection: sqlite3.Connection) -> None:
    """Return free pages to the file system when they are many."""
    free = _pragma(connection, "freelist_count")
    if free * 8 > _pragma(connection, "page_count"):
        for _ in range(min(free, GIVEN_BACK)):
            # One by one: Python takes one step of this statement, and a step returns one page.
            connection.execute("PRAGMA incremental_vacuum(1)").fetchall()


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    ((value,),) = connection.execute(f"PRAGMA {name}").fetchall()
    return int(value)


def _blob(key: str) -> bytes:
    # Not as text: SQLite takes no lone surrogates there.
    return key.encode("utf-8", "surrogatepass")


def _text(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogatepass")


def _size(blob: bytes, data: bytes = b"") -> int:
    return 2 * len(blob) + len(data) + ROW


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
