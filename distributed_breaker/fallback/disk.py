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

import contextlib
import fcntl
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..process import OwnLock
from .forks import follow_forks
from .memory import LARGEST_SHARE, Entry, Hit

log = logging.getLogger("distributed_breaker")

T = TypeVar("T")

VERSION = 1  # of the schema
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
RENEWAL_PAUSE = 10.0  # s between two renewals by one process: two versions must not take turns
GIVEN_BACK = 256  # pages in a transaction

_PAGE = 4096
_SCHEMA = """
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
_TOTALS = """
CREATE TABLE totals (items INTEGER NOT NULL, bytes INTEGER NOT NULL, cleared REAL NOT NULL);
INSERT INTO totals VALUES (0, 0, 0);
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

# Connections that came through a fork.  They must be neither used nor closed in the child.
_left_behind: list[sqlite3.Connection] = []


class DiskError(Exception):
    """The disk tier cannot serve: full, read-only, locked for too long, or not to be opened."""


class DiskTier:
    """Entries in ``<folder>/cache.db``, shared with other processes of this user on this host.

    Nothing is opened before the first use.  Every method but ``touch`` and ``close`` may raise
    DiskError.  A damaged file, or one of another version, is removed and made anew with one
    warning: it is a cache.

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
        self.folder = Path(folder)
        self.path = self.folder / "cache.db"
        self.most_bytes = most_bytes
        self.batch_bytes = min(BATCH_BYTES, most_bytes // 16)
        """Bytes that callers should put at once, unless a single entry has more."""
        self._now = now
        self._renewed_at = float("-inf")
        self._used: dict[str, float] = {}
        self._counts = dict.fromkeys(("hits", "misses", "stale", "expired", "evictions"), 0)
        self.renewals = 0
        """How often this process had to make the file anew."""
        self._reads = _Line(self, reads=True)
        self._writes = _Line(self, reads=False)
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
            parameters = (*part, now, now)
            rows += self._reads.run(partial(_fetch, sql=sql, parameters=parameters))
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

        def put(connection: sqlite3.Connection) -> None:
            ((cleared,),) = connection.execute("SELECT cleared FROM totals").fetchall()
            if cleared > now + FUTURE:
                cleared = 0.0
            connection.executemany(_PUT, [row for row in rows if row[2] >= cleared])
            connection.executemany("UPDATE entries SET used = max(used, ?) WHERE key = ?", used)

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
            self._write(partial(_executemany, sql=_DELETE, rows=rows))

    def clear(self, at: float | None = None) -> None:
        """Delete everything; what was written before ``at`` (default: now) does not come back."""
        cleared = self._now() if at is None else at

        def clear(connection: sqlite3.Connection) -> None:
            # A new file: to empty one of a million rows takes seconds.
            self._begin(connection)
            try:
                with self._alone():
                    self._unlink()
                    new = self._open()
                    try:
                        new.execute("UPDATE totals SET cleared = ?", (cleared,))
                    finally:
                        new.close()
            finally:
                connection.execute("ROLLBACK")

        self._change(clear)

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

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        expired = evicted = 0

        def write(connection: sqlite3.Connection) -> None:
            nonlocal expired, evicted
            self._begin(connection)
            work(connection)
            expired, evicted = self._make_room(connection)
            connection.execute("COMMIT")

        def make_room(connection: sqlite3.Connection) -> None:
            self._begin(connection)
            self._make_room(connection, self.most_bytes // 4)
            connection.execute("COMMIT")

        try:
            self._change(write)
        except _FullError:
            # Perhaps it is only the bound of the file: then rows can go, and there is room.
            self._change(make_room)
            self._change(write)
        with self._counting:
            self._counts["expired"] += expired
            self._counts["evictions"] += evicted

    def _change(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Once more when another process has put a new file in place in the last moment."""
        try:
            self._writes.run(work)
        except _MovedError:
            self._writes.run(work)

    def _begin(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if self.file() != self._writes.file:
            raise _MovedError(f"{self.path} is another file than before, again and again")

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

    def stats(self) -> dict[str, int]:
        """Counts of this process, and the items and bytes of the file."""
        totals = partial(_fetch, sql="SELECT items, bytes FROM totals")
        ((items, held),) = self._reads.run(totals)
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

    # ------------------------------------------------------------------ the file

    def _configure(self, connection: sqlite3.Connection) -> None:
        """A place for tests: what a connection is told beside the rest."""

    def file(self) -> tuple[int, int] | None:
        """Which file is there: another process may have removed it, or made it anew."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def connect(self) -> tuple[sqlite3.Connection, tuple[int, int] | None]:
        """A new connection, and the file it leads to, made if it is not there, or not ours."""
        self._check_folder()
        with self._alone():
            return self._open(), self.file()

    def _open(self) -> sqlite3.Connection:
        for again in (True, False):
            self._make_file()
            connection = sqlite3.connect(
                self.path, timeout=BUSY, isolation_level=None, check_same_thread=False
            )
            try:
                if self._prepare(connection):
                    return connection
                why = "it has another schema"
            except BaseException as error:
                connection.close()
                if not again or not _is_damage(error):
                    raise
                why = str(error)
            connection.close()
            self._remove_file(why)
        raise DiskError(f"{self.path} cannot be made anew")

    def renew(self, file: tuple[int, int] | None, why: str) -> None:
        """Remove the file that is damaged, unless another process has done so."""
        with self._alone():
            if self.file() == file:
                self._remove_file(why)

    def _check_folder(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        found = os.stat(self.folder)
        if not stat.S_ISDIR(found.st_mode):
            raise DiskError(f"{self.folder} is no folder: remove it, or name another one")
        if found.st_mode & 0o022:
            raise DiskError(
                f"others may write in {self.folder} (mode {stat.S_IMODE(found.st_mode):o}): take "
                f"that right away (chmod go-w), or name another folder"
            )

    def _make_file(self) -> None:
        # Only where there is none: closing a file that SQLite has open, in this process, too,
        # would give up SQLite's locks on it.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, flags, 0o600))
        found = os.lstat(self.path)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise DiskError(f"{self.path} is no file of this user: remove it")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process opens, makes or removes the file meanwhile."""
        lock = os.open(self.folder / "cache.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + BUSY
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DiskError(f"{self.folder} is locked by another process") from None
                    time.sleep(0.002)
            yield
        finally:
            os.close(lock)

    def _prepare(self, connection: sqlite3.Connection) -> bool:
        """Make the schema where there is none; False when there is another one."""
        version = _pragma(connection, "user_version")
        ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
        if version != VERSION and (version or tables):
            return False
        if version != VERSION:
            connection.execute(f"PRAGMA page_size = {_PAGE}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        ((mode,),) = connection.execute("PRAGMA journal_mode = WAL").fetchall()
        if mode != "wal":
            raise DiskError(f"{self.folder} lies where SQLite cannot share a file: name another")
        log_pages = min(LOG_PAGES, self.most_bytes // 16 // _PAGE)
        for pragma in (
            "synchronous = NORMAL",
            "temp_store = MEMORY",
            f"cache_size = -{CACHE}",
            f"wal_autocheckpoint = {log_pages}",
            f"journal_size_limit = {log_pages * _PAGE}",
            f"max_page_count = {int(MOST_ROOM * self.most_bytes) // _PAGE}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        if version != VERSION:
            connection.execute("BEGIN IMMEDIATE")
            for statement in (*_statements(_TOTALS), *_statements(_SCHEMA)):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        self._configure(connection)
        return True

    def _remove_file(self, why: str) -> None:
        at = time.monotonic()
        if at - self._renewed_at < RENEWAL_PAUSE:
            raise DiskError(f"{self.path} was made anew only just now, and again: {why}")
        self._renewed_at = at
        self._unlink()
        with self._counting:
            self.renewals += 1
        log.warning("the disk tier %s is made anew: %s", self.path, why)

    def _unlink(self) -> None:
        for name in ("cache.db-wal", "cache.db-shm", "cache.db"):
            (self.folder / name).unlink(missing_ok=True)


class _MovedError(DiskError):
    """The file that is open is no longer the one at the path."""


class _FullError(DiskError):
    """There is no room, in the file or on the disk."""


class _Line:
    """One connection and its lock: reads do not wait for this process's own writes."""

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((40, "_lock"),)
    _lock = OwnLock()

    def __init__(self, tier: DiskTier, reads: bool) -> None:
        self._tier = tier
        self._reads = reads
        self._connection: sqlite3.Connection | None = None
        self.file: tuple[int, int] | None = None
        self._pid = 0
        self._unclean = False
        follow_forks(self)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Let ``work`` do something with the connection; once more with a new file on damage."""
        with self._lock:
            for last in (False, True):
                try:
                    return work(self._ready())
                except sqlite3.Error as error:
                    self._settle(error)
                    if _code(error) == sqlite3.SQLITE_FULL:
                        raise _FullError(f"{self._tier.path}: {error}") from error
                    if last or not _is_damage(error):
                        raise DiskError(f"{self._tier.path}: {error}") from error
                    self._renew(str(error))
                except OSError as error:
                    self._close()
                    raise DiskError(f"{self._tier.path}: {error}") from error
                except BaseException:
                    self._close()  # also an interruption must leave no transaction open
                    raise
        raise AssertionError("unreachable")

    def _renew(self, why: str) -> None:
        try:
            self._tier.renew(self.file, why)
        except OSError as error:
            raise DiskError(f"{self._tier.path} cannot be removed: {error}") from error

    def _ready(self) -> sqlite3.Connection:
        if self._pid != os.getpid():
            self._leave_behind()
        if self._unclean:
            raise DiskError("the process was forked while another thread was inside SQLite")
        file = self._tier.file()
        if self._connection is not None and file == self.file:
            return self._connection
        self._close()
        connection, self.file = self._tier.connect()
        if self._reads:
            connection.execute("PRAGMA query_only = 1")
        self._connection = connection
        self._pid = os.getpid()
        return connection

    def _settle(self, error: sqlite3.Error) -> None:
        """Leave no transaction open; after all but the everyday errors begin with a new one."""
        if self._connection is None:
            return
        if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
            self._close()
            return
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._close()

    def _close(self) -> None:
        # SQLite looks itself whether the path still leads to the file it has open, and leaves the
        # log of a new one alone.
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def close(self) -> None:
        with self._lock:
            if self._pid == os.getpid():
                self._close()

    def forked(self, clean: bool) -> None:
        self._leave_behind()
        self._unclean = self._unclean or not clean

    def _leave_behind(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            _left_behind.append(connection)


def _fetch(connection: sqlite3.Connection, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
    # All rows at once: a statement that is not at its end would hold the log back.
    return connection.execute(sql, parameters).fetchall()


def _executemany(connection: sqlite3.Connection, sql: str, rows: list[Any]) -> None:
    connection.executemany(sql, rows)


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


def _statements(script: str) -> list[str]:
    """The statements of a script; executescript would end the transaction."""
    statements = []
    lines: list[str] = []
    for line in script.strip().splitlines():
        lines.append(line)
        if sqlite3.complete_statement("\n".join(lines)):
            statements.append("\n".join(lines))
            lines = []
    return statements


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary code; 0 where the error is Python's own."""
    code: int = getattr(error, "sqlite_errorcode", 0) or 0
    return code & 0xFF


def _is_damage(error: BaseException) -> bool:
    """Whether the file itself is broken: that goes away with it."""
    if not isinstance(error, sqlite3.Error):
        return False
    code = _code(error)
    if code == sqlite3.SQLITE_ERROR:
        return "no such" in str(error)  # a table or a column
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _blob(key: str) -> bytes:
    # Not as text: SQLite takes no lone surrogates there.
    return key.encode("utf-8", "surrogatepass")


def _text(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogatepass")


def _size(blob: bytes, data: bytes = b"") -> int:
    return 2 * len(blob) + len(data) + ROW


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
