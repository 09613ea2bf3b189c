"""What can go wrong with a private SQLite file, in words: what failed, and what to do about it."""

from __future__ import annotations

import errno
import sqlite3

Identity = tuple[int, int]
"""Which file it is, whatever its name: its device and its number there."""
Written = tuple[int, int, int]
"""When its log was written last, in ns since 1970, and what tells that apart from another time."""


class FileError(Exception):
    """The file cannot be written or read.  The message names the file and the remedy.

    What was to be written is not to be relied on: after a failing disk it may be there or not.
    """

    full = False
    """There is no room, in the file or on its disk."""
    damaged: Identity | None = None
    """The file that is no whole database any more, or none of ours, and has to make room."""


class Refused(Exception):
    """A file cannot be used, for a reason that is none of the system's: what it is, and the remedy.

    It becomes a FileError, which says of which file.
    """

    def __init__(self, what: str, remedy: str, foreign: bool = False) -> None:
        super().__init__(what, remedy)
        self.foreign = foreign
        """What the file holds is not ours."""


Failure = sqlite3.Error | OSError | Refused
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL)

_RIGHTS = "give this process the right to read and write it and its folder, or name another file"
_BUSY = "another process has been writing for too long: try again"
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


def code_of(error: Failure) -> int:
    """SQLite's primary result code; 0: none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_damage(error: Failure) -> bool:
    """Whether the file itself is broken, which goes away with it."""
    # An error without a class of its own is one of our statements, or a table that it misses.
    missing = code_of(error) == sqlite3.SQLITE_ERROR and "no such" in str(error)
    return missing or code_of(error) in DAMAGE


def is_passing(error: Failure) -> bool:
    """Whether a connection is as good afterwards as before."""
    return isinstance(error, Refused) or code_of(error) in PASSING


def in_words(error: Failure) -> tuple[str, str]:
    """What is wrong, and the remedy."""
    if isinstance(error, Refused):
        what, remedy = error.args
        return what, remedy
    if isinstance(error, OSError):
        remedy = _RIGHTS if error.errno in _DENIED else "look at its disk, or name another file"
        return f"cannot be used ({error.strerror})", remedy
    if is_damage(error):
        return f"is damaged ({error})", "save it, and read what is left with sqlite3's .recover"
    remedy = _REMEDIES.get(code_of(error), "look at its disk")
    return f"cannot be read or written ({error})", remedy
