"""One SQLite file of this user's, shared by his processes: opening, transactions, forks, damage.

Every transaction goes by the same rules:

- It is carried out on the file that stands at the path.  Who finds afterwards that it was replaced
  meanwhile, or removed, carries it out once more, on the one that is there now.
- The file is in WAL mode.  A transaction that is synced ends with an fsync of the log, and so
  survives a power loss as far as the disk itself keeps what it says it has synced.  One that is
  not synced survives the death of all processes.  A power loss may undo the last ones of that sort,
  but none that a synced one has followed, and never a part of one.
- No connection goes through a fork: SQLite keeps in the process's memory which locks it has on a
  file, and a child that inherits this believes that it has them too.

The file must lie on a local disk: WAL needs memory that the processes share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, TypeVar

from ..process import OwnLock, before_uwsgi_forks, follow_process
from .file_errors import (
    Failure,
    FileError,
    Identity,
    Refused,
    code_of,
    in_words,
    is_damage,
    is_passing,
)
from .file_place import Place
from .forks import follow_forks

QUEUE = 10.0  # seconds that a thread waits for the other threads of its process
RENEWAL_PAUSE = 10.0  # s between two of a process's new caches: two versions must not take turns
REOPENINGS = 3  # tries of a transaction whose file was moved meanwhile

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
log = logging.getLogger("distributed_breaker")


class Kind(NamedTuple):
    """What all files of one use have in common."""

    name: str
    """What messages call it."""
    error: type[FileError]
    schema: str
    """SQL with which a new file begins."""
    version: int
    """Of the schema."""
    application: int
    """In SQLite's header: it is ours, and no other program's.  0 says nothing."""
    pragmas: dict[str, object]
    busy: float
    """Seconds that one waits for another process's transaction, or for its opening."""
    cache: bool
    """It can be made anew: one that is damaged, or has another schema, is removed; its folder is
    its own, and others may not write there.  Else a damaged file is moved aside, a bounded number
    of times, and one of another schema is left alone: it is work that nobody has done."""
    layout: str = ""
    """A statement that a new file is told before all else."""


class PrivateFile:
    """One connection of this process to such a file, guarded by a lock.

    It is opened when it is first used, and again after ``close`` and after a fork.  SQLite lets
    one writer in at a time anyway, so connections of their own would give threads nothing but more
    locks to wait for; who wants to read meanwhile makes a second object.

    Args:
        path: the file.  Folders that are missing are made for this user alone (0700), and so is
            the file (0600); what exists keeps its mode.  A file of another user is refused.
            Beside it lie SQLite's log (``-wal``, ``-shm``) and a lock (``.lock``).
        kind: what it is.
    """

    # Waiting for them bounds a fork, as all transactions are bounded.
    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((40, "_lock"),)
    _lock = OwnLock()

    def __init__(self, path: str | os.PathLike[str], kind: Kind) -> None:
        self.place = Place(path, kind.busy, kind.cache)
        self.path = self.place.path
        self.kind = kind
        self.trouble = ""
        """Why it could not be used when that was last tried, or since it was last written."""
        self.renewals = 0
        """How often this object had to remove a damaged one."""
        self._renewed_at = float("-inf")
        self._connection: sqlite3.Connection | None = None
        self._identity: Identity | None = None
        self._syncs = True
        follow_process(self)
        follow_forks(self)

    def __del__(self) -> None:
        connection = vars(self).get("_connection")
        if connection is not None:
            connection.close()

    def read(self, work: Work[T], *, mend: bool = False) -> T:
        """Return what ``work`` reads with one statement, which is a transaction of its own.

        It may run more than once.

        Args:
            mend: see ``write``.

        Raises:
            FileError: of the kind's class: the file cannot be read.
        """
        return self._mended(lambda: self._transact(lambda: work(self._ready())), mend)

    def write(self, work: Work[T], *, mend: bool = False, sync: bool = True) -> T:
        """Carry out ``work`` in one transaction; what it raises undoes it.

        It may run more than once, so it must change nothing but the file.

        Args:
            mend: a damaged file makes room for a new one, on which ``work`` is carried out.
            sync: it survives a power loss; see the module.

        Raises:
            FileError: of the kind's class: the file cannot be written.
        """
        result = self._mended(lambda: self._transact(lambda: self._commit(work, sync)), mend)
        self.trouble = ""
        return result

    def replace(self, work: Work[object]) -> None:
        """Remove the file and all that it holds; ``work`` is what the new one begins with.

        Raises:
            FileError: of the kind's class.
        """
        with self._held():
            self._close()
            with self.place.alone():
                self.place.remove()
                # Nobody else opens it before the work is done.
                work(self._connect())

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._lock.acquire(timeout=QUEUE):
            try:
                self._close()
            finally:
                self._lock.release()

    # ------------------------------------------------------------------------ transactions

    def _mended(self, transaction: Callable[[], T], mend: bool) -> T:
        if not mend:
            return transaction()
        for _ in range(2):
            # A second look with another connection: one that is broken itself condemns no file.
            try:
                return transaction()
            except FileError as error:
                if error.damaged is None:
                    raise
                damage = error
        self._make_room(damage)
        return transaction()

    def _transact(self, transaction: Callable[[], T]) -> T:
        with self._held():
            for _ in range(REOPENINGS):
                result = transaction()
                # Who moved the file did so before or after this transaction.  After, it went with
                # all the rest; before, nobody will ever look for it there.
                if self._identity == self.place.identity():
                    return result
                self._close()
            raise Refused("is being replaced again and again", "find out by whom")

    def _commit(self, work: Work[T], sync: bool) -> T:
        connection = self._ready()
        if sync != self._syncs:
            connection.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
            self._syncs = sync
        try:
            # SQLite has no queue: those that write without a pause would starve another process.
            # One at a time waits here for the writer, who has to come here before it writes again.
            with self.place.alone():
                connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
            return result
        finally:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The connection is this thread's; what it meets is told as the kind's error."""
        lock = self._lock
        if not lock.acquire(timeout=QUEUE):
            what = f"was not free for {QUEUE:g} s", "use it from fewer threads at once"
            raise self._explain(Refused(*what))
        try:
            yield
        except (sqlite3.Error, OSError, Refused) as error:
            if not is_passing(error):
                self._close()  # What it thinks of the file is forgotten.
            raise self._explain(error) from error
        finally:
            if before_uwsgi_forks():
                self._close()  # uWSGI tells nobody before it forks.
            lock.release()

    # ------------------------------------------------------------------------ opening

    def _ready(self) -> sqlite3.Connection:
        if self._connection is None:
            with self.place.alone():
                return self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        if _inherited:
            raise Refused(
                "cannot be used: another thread was in SQLite while this process was forked",
                "fork when no thread uses such a file, or start processes anew (spawn)",
            )
        self.place.make()
        self._identity = self.place.identity()
        connection = sqlite3.connect(
            self.path, timeout=self.kind.busy, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._syncs = True
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def ask(question: str) -> object:
            return connection.execute(question).fetchone()[0]

        kind = self.kind
        program, version = ask("PRAGMA application_id"), ask("PRAGMA user_version")
        new = (program, version, ask("SELECT count(*) FROM sqlite_master")) == (0, 0, 0)
        if not new and program != kind.application:
            raise Refused("is another program's database", "name another file", foreign=True)
        if not new and version != kind.version:
            raise Refused(
                f"has schema version {version}, and this release knows {kind.version}",
                "use the release that made it, or name another file",
                foreign=True,
            )
        if new:
            connection.execute(kind.layout)
        for name, value in kind.pragmas.items():
            connection.execute(f"PRAGMA {name} = {value}").fetchall()
        if ask("PRAGMA journal_mode = WAL") != "wal":
            raise Refused("lies where no write-ahead log can be", "put it on a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        if new:
            connection.executescript(
                f"BEGIN IMMEDIATE; {kind.schema}; PRAGMA application_id = {kind.application};"
                f"PRAGMA user_version = {kind.version}; COMMIT;"
            )

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # SQLite looks whether the path still leads to the file that it has open, and leaves
            # the log of a new one alone.
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    # ------------------------------------------------------------------------ forks

    def before_fork(self) -> None:
        """Leave nothing open that the child would inherit; the lock is held until the fork."""
        self._close()

    def forked(self, clean: bool = True) -> None:
        """In the child.  A connection that it has inherited is neither used nor closed there.

        Not ``clean``: another thread may have been inside SQLite, with locks that are taken for
        ever now, those of its memory among them; so this process keeps out of SQLite.
        """
        vars(self).pop("_lock", None)
        connection, self._connection = self._connection, None
        if connection is not None or not clean:
            _inherited.append(connection)

    # ------------------------------------------------------------------------ troubles

    def _explain(self, error: Failure) -> FileError:
        what, remedy = in_words(error)
        foreign = self.kind.cache and isinstance(error, Refused) and error.foreign
        damaged = foreign or is_damage(error)
        if damaged and self.kind.cache:
            remedy = "it is made anew"
        failed = self.kind.error(f"{self.kind.name} {self.path} {what}: {remedy}")
        failed.full = code_of(error) == sqlite3.SQLITE_FULL
        failed.damaged = self._identity if damaged else None
        self.trouble = str(failed)
        return failed

    def _make_room(self, damage: FileError) -> None:
        """For a new file, unless another process has done so."""
        with self._held():
            self._close()
            with self.place.alone():
                if self.place.identity() == damage.damaged:
                    (self._remove if self.kind.cache else self._move_aside)(damage)

    def _remove(self, damage: FileError) -> None:
        now = time.monotonic()
        if now - self._renewed_at < RENEWAL_PAUSE:
            raise Refused("was made anew only just now, and again", str(damage))
        self._renewed_at = now
        self.place.remove()
        self.renewals += 1
        log.warning("%s", damage)

    def _move_aside(self, damage: FileError) -> None:
        aside = self.place.move_aside()
        log.error(
            "%s; it goes on in a new file, without what it held: read what is left in %s with "
            "sqlite3's .recover",
            damage,
            aside,
        )


# What a fork has left behind in this process, never to be touched again.
_inherited: list[sqlite3.Connection | None] = []
