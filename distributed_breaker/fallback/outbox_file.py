"""The SQLite file under an outbox: opening it, transactions, forks and damage.

What is synced when: the file is in WAL mode with ``synchronous=FULL``, so every transaction that
changes something ends with an fsync of the log before it returns, and survives kill -9 as well as
a power loss, as far as the disk itself keeps what it says it has synced.  Folders that are made,
and the first entry in one, are synced too.  It must lie on a local disk: WAL needs memory that
the processes share.  Nothing here knows of entries.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..process import OwnLock, before_uwsgi_forks, follow_process
from .outbox_errors import BUSY, DAMAGE, PASSING, Damaged, Identity, OutboxError, code_of, in_words

QUEUE = 10.0  # seconds that a thread waits for the other threads of its process
MOST_DAMAGED = 3  # damaged files that may stand beside the file
REOPENINGS = 3  # tries of a transaction whose file was moved meanwhile
APPLICATION = 0x44424F58  # in SQLite's header: it is ours, and no other program's

PRAGMAS = {
    "synchronous": "FULL",
    # They change something on macOS only, where an fsync alone does not reach the disk.
    "fullfsync": "ON",
    "checkpoint_fullfsync": "ON",
    "journal_size_limit": str(16 * 2**20),
}

T = TypeVar("T")
log = logging.getLogger("distributed_breaker")


def _sync(folder: str) -> None:
    """Make the names in a folder durable, where its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class OutboxFile:
    """One SQLite file, opened when it is first used, and again after ``close`` and after a fork.

    There is one connection per process, guarded by a lock.  SQLite lets one writer in at a time
    anyway, so connections of their own would give threads nothing but more locks to wait for, and
    a fork has to find all of them closed: SQLite keeps in the process's memory which locks it has
    on a file, and a child that inherits this believes that it has them too.

    Args:
        path: the file.  Folders that are missing are made for this user alone (0700), and so is
            the file (0600); what exists keeps its mode.
        schema: SQL that makes the tables, with which a new file begins.
        version: of the schema.
    """

    _lock = OwnLock()

    def __init__(self, path: str | os.PathLike[str], schema: str, version: int) -> None:
        # SQLite follows links to find its log, and a later chdir must change nothing.
        self.path = os.path.realpath(os.fspath(path))
        self.trouble = ""
        self._schema = schema
        self._version = version
        self._connection: sqlite3.Connection | None = None
        self._identity: Identity | None = None
        self._forking: int | None = None
        key = id(self)
        _files[key] = weakref.ref(self, lambda _: _files.pop(key, None))
        follow_process(self)

    def __del__(self) -> None:
        connection = vars(self).get("_connection")
        if connection is not None:
            connection.close()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what ``work`` reads with one statement, which is a transaction of its own.

        Raises:
            OutboxError: the file cannot be read.
        """
        return self._transact(self._ask, work)

    def write(self, work: Callable[[sqlite3.Connection], T], *, mend: bool = False) -> T:
        """Carry out ``work`` in one transaction, durable on return; what it raises undoes it.

        It may run more than once, so it must change nothing but the file.

        Args:
            mend: a damaged file is moved aside, and ``work`` is carried out on a new one.

        Raises:
            OutboxError: the file cannot be written.
        """
        if not mend:
            return self._write(work)
        for _ in range(2):
            # A second look with another connection: one that is broken itself condemns no file.
            try:
                return self._write(work)
            except Damaged as error:
                damage = error
        self._move_aside(damage)
        return self._write(work)

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        result = self._transact(self._commit, work)
        self.trouble = ""
        return result

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._lock.acquire(timeout=QUEUE):
            try:
                self._close()
            finally:
                self._lock.release()

    # ------------------------------------------------------------------------ transactions

    def _transact(
        self,
        way: Callable[[Callable[[sqlite3.Connection], T]], T],
        work: Callable[[sqlite3.Connection], T],
    ) -> T:
        with self._held():
            try:
                for _ in range(REOPENINGS):
                    result = way(work)
                    # Who moved the file aside did so before or after this transaction.  After, it
                    # went with all the rest; before, nobody will ever look for it there.
                    if self._identity == self._look():
                        return result
                    self._close()
                raise self._failed("is being replaced again and again", "find out by whom")
            except (sqlite3.Error, OSError) as error:
                raise self._explain(error) from error
            finally:
                if before_uwsgi_forks():
                    self._close()  # uWSGI tells nobody before it forks.

    def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return work(self._connection or self._open())

    def _commit(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection or self._open()
        try:
            # SQLite has no queue: those that write without a pause would starve another process.
            # One at a time waits here for the writer, who has to come here before it writes again.
            with self._alone():
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
        lock = self._lock
        if not lock.acquire(timeout=QUEUE):
            raise self._failed(f"was not free for {QUEUE:g} s", "use it from fewer threads at once")
        try:
            yield
        finally:
            lock.release()

    def _look(self) -> Identity | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    # ------------------------------------------------------------------------ opening

    def _open(self) -> sqlite3.Connection:
        if self.path in _inherited:
            raise self._failed(
                "was in use by another thread while this process was forked",
                "fork when no thread uses it, or start processes anew (spawn)",
            )
        self._make_folder()
        with self._alone():
            self._make_file()
            self._identity = self._look()
            connection = sqlite3.connect(
                self.path, timeout=BUSY, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._connection = connection
        return connection

    def _make_folder(self) -> None:
        missing, folder = [], os.path.dirname(self.path)
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            _sync(os.path.dirname(folder))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else opens or moves the file, or begins to write, meanwhile.

        The lock has a file of its own: closing any handle of the database itself would take
        SQLite's locks away from the other connections of this process.
        """
        handle = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            end = time.monotonic() + BUSY
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise self._failed(
                            f"was not free for {BUSY:g} s", "use it from fewer processes at once"
                        ) from None
                    time.sleep(0.002)
            try:
                yield
            finally:
                # A child that was forked just now shares the handle, and with it the lock.
                fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def _make_file(self) -> None:
        # SQLite would make it readable for all, as the umask says; its log takes the file's mode.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            # Somebody removed a file and left its log, which must not be taken for the new one's.
            for end in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + end)
            _sync(os.path.dirname(self.path))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        def ask(question: str) -> object:
            return connection.execute(question).fetchone()[0]

        program, version = ask("PRAGMA application_id"), ask("PRAGMA user_version")
        new = (program, version, ask("SELECT count(*) FROM sqlite_master")) == (0, 0, 0)
        if not new and program != APPLICATION:
            raise self._failed("is another program's database", "name another file")
        if not new and version != self._version:
            raise self._failed(
                f"has schema version {version}, and this release knows {self._version}",
                "use the release that made it, or name another file",
            )
        for name, value in PRAGMAS.items():
            connection.execute(f"PRAGMA {name} = {value}")
        if ask("PRAGMA journal_mode = WAL") != "wal":
            raise self._failed("lies where no write-ahead log can be", "put it on a local disk")
        if new:
            connection.executescript(
                f"BEGIN IMMEDIATE; {self._schema}; PRAGMA application_id = {APPLICATION};"
                f"PRAGMA user_version = {self._version}; COMMIT;"
            )

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    # ------------------------------------------------------------------------ forks

    def before_fork(self) -> None:
        """Leave nothing open that the child would inherit; nobody opens it before the fork."""
        if self._lock.acquire(timeout=QUEUE):
            self._forking = threading.get_ident()
            self._close()

    def after_fork(self) -> None:
        """In the parent: go on."""
        if self._forking == threading.get_ident():
            self._forking = None
            self._lock.release()

    def forked(self) -> None:
        """In the child: the lock is another process's, and so is a connection that was in use."""
        vars(self).pop("_lock", None)
        self._forking = None
        if self._connection is not None:
            _inherited[self.path] = self._connection
            self._connection = None

    # ------------------------------------------------------------------------ troubles

    def _failed(self, what: str, remedy: str) -> OutboxError:
        error = OutboxError(f"the outbox {self.path} {what}: {remedy}")
        self.trouble = str(error)
        return error

    def _explain(self, error: sqlite3.Error | OSError) -> OutboxError:
        """The error in words; what a connection that met it thinks of the file is forgotten."""
        code = code_of(error)
        if code not in PASSING:
            self._close()
        failed = self._failed(*in_words(error))
        return Damaged(str(failed), self._identity) if code in DAMAGE else failed

    def damaged(self) -> list[str]:
        """The damaged files that stand beside it, by their paths, oldest first."""
        folder, name = os.path.split(self.path)
        try:
            names = os.listdir(folder)
        except OSError:
            return []
        begin = name + ".damaged-"
        ours = (n for n in names if n.startswith(begin) and not n.endswith(("-wal", "-shm")))
        return [os.path.join(folder, name) for name in sorted(ours)]

    def _move_aside(self, damage: Damaged) -> None:
        """Make room for a new file.  Nothing is ever deleted: it is work that nobody has done."""
        with self._held():
            self._close()
            try:
                with self._alone():
                    if self._look() != damage.identity:
                        return  # Another process has done it.
                    kept = self.damaged()
                    if len(kept) >= MOST_DAMAGED:
                        raise self._failed(
                            f"is damaged, and so are {len(kept)} before it", f"save {kept[0]}, …"
                        )
                    aside = self._rename()
            except OSError as error:
                raise self._explain(error) from error
        log.error(
            "the outbox %s was damaged and goes on in a new file; what it held is not delivered: "
            "read what is left in %s with sqlite3's .recover",
            self.path,
            aside,
        )

    def _rename(self) -> str:
        aside = self.path + time.strftime(".damaged-%Y%m%dT%H%M%SZ", time.gmtime())
        while os.path.exists(aside):
            aside += "+"
        # The log goes first: should this process die in between, the damaged file loses its log,
        # while a new file that found this log would take it for its own.
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path + "-wal", aside + "-wal")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path + "-shm")
        os.rename(self.path, aside)
        _sync(os.path.dirname(self.path))
        return aside


_files: dict[int, weakref.ref[OutboxFile]] = {}
# Connections that a child must neither use nor close, by their files.
_inherited: dict[str, sqlite3.Connection] = {}


def _all_files() -> list[OutboxFile]:
    """Always in the same order, so that two threads that fork don't wait for each other."""
    files = [reference() for _, reference in sorted(_files.copy().items())]
    return [file for file in files if file is not None]


def _before_fork() -> None:
    for file in _all_files():
        file.before_fork()


def _after_fork() -> None:
    for file in _all_files():
        file.after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)
