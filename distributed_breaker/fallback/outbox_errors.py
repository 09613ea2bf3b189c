"""What can go wrong with an outbox's file, in words: what failed, and what to do about it."""

from __future__ import annotations

import errno
import sqlite3

BUSY = 2.0  # seconds that one waits for another process's transaction, or for its opening
Identity = tuple[int, int]


class OutboxError(Exception):
    """The outbox cannot be written or read.  The message names the file and the remedy.

    What was to be written is not to be relied on: after a failing disk it may be there or not.
    """


class Damaged(OutboxError):
    """What the file holds is no whole database any more."""

    def __init__(self, message: str, identity: Identity | None) -> None:
        super().__init__(message)
        self.identity = identity


DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# After these a connection is as good as before.
PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL)

_RIGHTS = "give this process the right to read and write it and its folder, or name another file"
_BUSY = f"another process has been writing for {BUSY:g} s: try again"
_REMEDIES = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_PROTOCOL: "too many processes open it at once: try again",
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_READONLY: _RIGHTS,
    sqlite3.SQLITE_PERM: _RIGHTS,
    sqlite3.SQLITE_AUTH: _RIGHTS,
    sqlite3.SQLITE_CANTOPEN: _RIGHTS,
    sqlite3.SQLITE_IOERR: "look whether its disk is full or failing",
}
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def code_of(error: sqlite3.Error | OSError) -> int:
    """SQLite's primary result code; 0: none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def in_words(error: sqlite3.Error | OSError) -> tuple[str, str]:
    """What is wrong, and the remedy."""
    if isinstance(error, OSError):
        remedy = _RIGHTS if error.errno in _DENIED else "look at its disk, or name another file"
        return f"cannot be used ({error.strerror})", remedy
    if code_of(error) in DAMAGE:
        return f"is damaged ({error})", "save it, and read what is left with sqlite3's .recover"
    remedy = _REMEDIES.get(code_of(error), "look at its disk")
    return f"cannot be read or written ({error})", remedy
