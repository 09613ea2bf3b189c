"""An engine whose statements are guarded, without a change of the code that uses it.

SQLAlchemy tells of each statement before it is sent and when it has ended, whoever sends it: Core,
the ORM's flush, a legacy query.  A statement is one call under its circuit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, Engine, event
from sqlalchemy.sql.elements import (
    ReleaseSavepointClause,
    RollbackToSavepointClause,
    SavepointClause,
)
from sqlalchemy.util import await_only

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..permit import Permit
from ..policy import Outcome
from .database_errors import QueryTimeout, refused, sqlstate, verdict
from .database_limits import Watch, deadlines, open_with, watch
from .database_work import WORK, Work, current

if TYPE_CHECKING:
    from .database import DatabaseClient

# The end of a savepoint must never be refused: it is how an application cleans up.
_SAVEPOINTS = (SavepointClause, RollbackToSavepointClause, ReleaseSavepointClause)
_CALL = "_circuit_breaker_call"


class _Call(NamedTuple):
    """A statement that is under way."""

    breaker: CircuitBreaker
    permit: Permit
    watch: Watch | None
    timeout: float


class EngineEvents:
    """What a client does with the events of one engine.

    Args:
        client: whose circuits and times hold.
        engine: listened to until ``stop``.
    """

    def __init__(self, client: DatabaseClient, engine: Engine) -> None:
        self._client = client
        self._engine = weakref.ref(engine)  # which holds its listeners, and so this
        self._own = self._guards = False
        self._statements: dict[str, Callable[..., Any]] = {
            "before_cursor_execute": self._before,
            "after_cursor_execute": self._after,
            "handle_error": self._failed,
        }
        self._connections: dict[str, Callable[..., Any]] = {"do_connect": self._connect}

    def own(self) -> None:
        """The engine is the client's own: its connections begin with the client's times."""
        self._own = True
        self._listen(self._connections)

    def watch(self) -> None:
        """Watch the statements of the client's transactions.

        SQLAlchemy takes some 50 µs more for each statement of an engine that is listened to, so
        that is done only when there is a transaction.
        """
        self._listen(self._statements)

    def guard(self) -> None:
        """Guard also what is no part of the client's own calls."""
        self._guards = True
        self._listen(self._statements | self._connections)

    def _listen(self, listeners: dict[str, Callable[..., Any]]) -> None:
        engine = self._engine()
        for name, listener in listeners.items():
            if engine is not None and not event.contains(engine, name, listener):
                event.listen(engine, name, listener)

    def stop(self) -> None:
        """Listen no more.  Safe to call twice."""
        engine = self._engine()
        for name, listener in (self._statements | self._connections).items():
            if engine is not None and event.contains(engine, name, listener):
                event.remove(engine, name, listener)

    # ------------------------------------------------------------------ statements

    def _before(
        self, conn: Connection, cursor: Any, text: str, params: Any, context: Any, many: bool
    ) -> None:
        work = _work_of(conn)
        if work is not None:
            work.statement_begins(conn, text)
            return
        statement = _statement_of(context, text)
        if not self._guards or isinstance(statement, _SAVEPOINTS):
            return
        kind = self._client.kind_of(statement, conn.dialect.name)
        breaker, timeout = self._client.circuits[kind], self._client.seconds(kind)
        permit = _acquire(breaker, conn.dialect.is_async)
        setattr(context, _CALL, _Call(breaker, permit, watch(conn, timeout), timeout))

    def _after(
        self, conn: Connection, cursor: Any, text: str, params: Any, context: Any, many: bool
    ) -> None:
        work = _work_of(conn)
        if work is not None:
            work.statement_ends()
        call = _take(context)
        if call is not None:
            self._client.count("")
            call.permit.success()

    def _failed(self, about: Any) -> BaseException | None:
        """An error of a statement, of its rows, or of a commit; not of connecting."""
        conn, error = about.connection, about.original_exception
        work = None if conn is None else _work_of(conn)
        call = _take(about.execution_context)
        if work is not None:
            work.statement_ends()
            work.failed(about.sqlalchemy_exception or error)
        if conn is None or work is not None or not self._guards:
            return None
        if call is None:
            # Rows and commits are no calls of their own, unless they fail.
            if not isinstance(error, Exception) or _is_ours(error):
                return None
            statement = _statement_of(about.execution_context, "")
            kind = self._client.kind_of(statement, conn.dialect.name)
            return self._settle([self._client.circuits[kind]], None, error)
        if not isinstance(error, Exception):
            call.permit.ignore()  # cancelled
            return None
        late = call.watch is not None and call.watch.fired
        if late or sqlstate(error) == "57014":
            error = QueryTimeout(call.breaker.name, call.timeout, error)
        elif about.is_disconnect:
            error = about.sqlalchemy_exception or error
        return self._settle([call.breaker], call.permit, error)

    def _settle(
        self, breakers: list[CircuitBreaker], permit: Permit | None, error: Exception
    ) -> BaseException | None:
        """Have an error counted; what is to be raised instead of it.

        Args:
            breakers: the circuits for which it counts.
            permit: of the call that it ends; None: it ends none, and counts only as a failure.
            error: which.
        """
        outcome, kind = verdict(error)
        self._client.count(kind)
        if permit is None:
            for breaker in breakers if outcome is Outcome.FAILURE else ():
                with suppress(CircuitBreakerOpenException):
                    breaker.acquire().failure(error)
        elif outcome is Outcome.FAILURE:
            permit.failure(error)
        elif outcome is Outcome.SUCCESS:
            permit.success()
        else:
            permit.ignore()
        return error if isinstance(error, QueryTimeout) else None

    # ------------------------------------------------------------------ connections

    def _connect(self, dialect: Any, record: Any, cargs: Any, cparams: Any) -> Any:
        """Open a connection, unless both circuits refuse; an error counts for both, since without
        a connection nobody can read or write."""
        section = self._client.section
        longer = max(section.read_timeout, section.write_timeout)
        if self._own or self._guards:
            usual = section.read_timeout if self._own else longer
            open_with(dialect, record, cparams, usual, longer)
        if not self._guards or current(self._client) is not None:
            return None
        circuits = list(self._client.circuits.values())
        if all(breaker.refusing for breaker in circuits):
            _acquire(circuits[-1], is_async=False).ignore()
        try:
            return dialect.connect(*cargs, **cparams)
        except Exception as error:
            self._settle(circuits, None, error)
            raise


def _is_ours(error: Exception) -> bool:
    return isinstance(error, CircuitBreakerOpenException)


def _work_of(conn: Connection) -> Work | None:
    work: Work | None = getattr(conn, WORK, None)
    return work


def _statement_of(context: Any, text: str) -> Any:
    """What was executed, as SQLAlchemy knows it; else its text."""
    found = getattr(context, "invoked_statement", None)
    return text if found is None else found


def _take(context: Any) -> _Call | None:
    """The call of a statement, which is over."""
    call: _Call | None = getattr(context, _CALL, None)
    if call is not None:
        delattr(context, _CALL)
        if call.watch is not None:
            deadlines.over(call.watch)
    return call


def _acquire(breaker: CircuitBreaker, is_async: bool) -> Permit:
    try:
        if not is_async or breaker.state == "closed":
            return breaker.acquire()
        permit: Permit = await_only(breaker.acquire_async())
        return permit
    except CircuitBreakerOpenException as error:
        raise refused(error) from None
