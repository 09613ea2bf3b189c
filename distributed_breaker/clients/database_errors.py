"""What an error of a database says: which are the database's failures, and which the caller's.

PostgreSQL's drivers give the SQLSTATE that the server sent; its first two characters are the class.
SQLite has result codes of its own.  Of other databases only the type of the error is known.
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from sqlalchemy import exc

from ..errors import CircuitBreakerOpenException
from ..policy import Outcome


class DatabaseOpenException(CircuitBreakerOpenException, exc.OperationalError):
    """A call was refused because its circuit does not admit it.

    It is also SQLAlchemy's OperationalError, so that code which copes with an unreachable database
    copes with this.
    """

    # What SQLAlchemy's own errors have; there is no statement, since none was sent.
    statement: Any = None
    params: Any = None
    orig: Any = None
    code: Any = None
    ismulti = None
    connection_invalidated = hide_parameters = False

    def __init__(self, *args: Any) -> None:
        CircuitBreakerOpenException.__init__(self, *args)
        self.detail: list[str] = []


class QueryTimeout(exc.OperationalError):
    """A call has taken longer than it may; also SQLAlchemy's OperationalError.

    Attributes:
        circuit: name of its circuit.
        timeout: seconds that it had.
    """

    def __init__(self, circuit: str, timeout: float, orig: BaseException | None = None) -> None:
        super().__init__(None, None, orig or TimeoutError())
        self.circuit = circuit
        self.timeout = timeout

    def __str__(self) -> str:
        return f"a call under the circuit {self.circuit!r} took longer than {self.timeout:g} s"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.circuit, self.timeout)


class ReadOnlyViolation(exc.InvalidRequestError):
    """A statement that may write was given where only reads are allowed; it was not sent."""


def refused(error: CircuitBreakerOpenException) -> DatabaseOpenException:
    """The same refusal as the native error."""
    if isinstance(error, DatabaseOpenException):
        return error
    return DatabaseOpenException(*error.__reduce__()[1])


# ---------------------------------------------------------------------------- verdicts


class Verdict(NamedTuple):
    """What an error is to the circuit, and for people: a kind out of ``KINDS``."""

    outcome: Outcome
    kind: str


KINDS = ("connection", "timeout", "conflict", "resources", "server", "read_only", "pool")

# Whole classes of SQLSTATEs that are the database's failures, and single ones; the longest counts.
# What is not listed is the caller's: the server has answered, so it is well.
_FAILURES = {
    "08": "connection",  # connection exception
    "25006": "read_only",  # a write, and the server has become a replica
    "25P04": "timeout",  # transaction_timeout
    "40": "conflict",  # serialization failure, deadlock
    "53": "resources",  # disk full, out of memory, too many connections
    "57": "connection",  # shutdown, crash, cannot connect now
    "57014": "timeout",  # statement_timeout, or cancelled
    "58": "server",  # errors of the system: files, input and output
    "F0": "server",  # its configuration
    "XX": "server",  # internal errors, data corrupted
}
_CALLERS = ("40002",)  # an integrity constraint that was checked at the commit

# The same of SQLite's primary result codes.
_SQLITE = {
    sqlite3.SQLITE_BUSY: "timeout",
    sqlite3.SQLITE_LOCKED: "conflict",
    sqlite3.SQLITE_INTERRUPT: "timeout",
    sqlite3.SQLITE_NOMEM: "resources",
    sqlite3.SQLITE_FULL: "resources",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_CANTOPEN: "connection",
    sqlite3.SQLITE_PERM: "connection",
    sqlite3.SQLITE_NOTADB: "connection",
    sqlite3.SQLITE_IOERR: "server",
    sqlite3.SQLITE_CORRUPT: "server",
    sqlite3.SQLITE_PROTOCOL: "server",
    sqlite3.SQLITE_INTERNAL: "server",
}

_ANSWERED = Verdict(Outcome.SUCCESS, "")
_NOTHING = Verdict(Outcome.IGNORED, "")


def verdict(error: BaseException, *, read_only: bool = False) -> Verdict:
    """What an error is.

    Args:
        error: SQLAlchemy's, or the driver's own.
        read_only: the call was forbidden to write, so that a refused write is the caller's mistake.
    """
    if isinstance(error, exc.TimeoutError):
        # The pool is this process's own, and whoever holds its connections is counted himself.
        return Verdict(Outcome.IGNORED, "pool")
    if isinstance(error, QueryTimeout):
        return Verdict(Outcome.FAILURE, "timeout")
    if isinstance(error, CircuitBreakerOpenException):
        return _NOTHING
    if isinstance(error, exc.DBAPIError):
        kind, known = _kind_of(error.orig)
        if not known and error.connection_invalidated:
            kind, known = "connection", True
    else:
        kind, known = _kind_of(error)
    if kind == "read_only" and read_only:
        kind = ""
    if kind:
        return Verdict(Outcome.FAILURE, kind)
    return _ANSWERED if known else _NOTHING


def sqlstate(error: BaseException | None) -> str | None:
    """The SQLSTATE that the server sent, as psycopg, asyncpg and psycopg2 call it."""
    code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return code if isinstance(code, str) and len(code) == 5 else None


def _kind_of(error: BaseException | None) -> tuple[str, bool]:
    """The kind of failure of a driver's error (empty: none), and whether the database sent it."""
    state = sqlstate(error)
    if state is not None:
        if state in _CALLERS:
            return "", True
        return _FAILURES.get(state) or _FAILURES.get(state[:2], ""), True
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return ("", False) if code is None else (_SQLITE.get(code & 0xFF, ""), True)
    # Python's database interface has the same names in all drivers.
    names = {one.__name__ for one in type(error).__mro__}
    if names & {"IntegrityError", "DataError", "NotSupportedError"}:
        return "", not hasattr(error, "sqlstate")
    if names & {"OperationalError", "InterfaceError", "InternalError"} or isinstance(
        error, OSError | EOFError
    ):
        return "connection", True
    return "", False
