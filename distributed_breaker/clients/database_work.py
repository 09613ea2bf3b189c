"""One unit of work under a circuit, and what a statement gives.

All of it is written for a blocking session; asyncio's run it with ``run_sync``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import Connection, Engine, inspect
from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Query, Session, SessionTransaction

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..policy import Outcome
from .database_errors import QueryTimeout, refused, sqlstate, verdict
from .database_limits import tell, told, watched
from .database_values import Rows
from .database_writes import Written

if TYPE_CHECKING:
    from .database import DatabaseClient

# The units that this context is in the midst of, from the outermost to the innermost.
_within: ContextVar[tuple[Work, ...]] = ContextVar("circuit_breaker_database", default=())
# The attribute of SQLAlchemy's Connection that holds the unit that it is used for.  (Its ``info``
# belongs to the driver's connection, which is another call's as soon as a session has committed.)
WORK = "_circuit_breaker_work"
# PostgreSQL sends it with BEGIN, so it costs nothing.
_READ_ONLY = {"postgresql_readonly": True}
_COUNT = {"preserve_rowcount": True}

Params = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


def here() -> tuple[int, Any]:
    """The thread and the task that run: others may have a copy of their context."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def current(client: DatabaseClient) -> Work | None:
    """The innermost unit of a client in the midst of which this thread or task is."""
    for work in reversed(_within.get()):
        if work.client is client:
            return work if work.place == here() else None
    return None


class Work:
    """One unit.  As a block, asynchronous or not, it is a call under its circuit.

    Args:
        client: whose it is.
        breaker: the circuit.
        timeout: seconds for the whole of it.
        read_only: whether the database is to refuse writes.

    Raises, as a block:
        DatabaseOpenException: the circuit does not admit it.
        QueryTimeout: instead of the driver's error, when it took too long.
    """

    def __init__(
        self, client: DatabaseClient, breaker: CircuitBreaker, timeout: float, read_only: bool
    ) -> None:
        self.client = client
        self.timeout = timeout
        self.read_only = read_only
        self.place = here()
        self._breaker = breaker
        self._guard = breaker.guard()
        self.connected = False
        """Whether it has had a connection, so that something may have been sent."""
        self.context: Any = None
        """SQLAlchemy's, of what was executed."""
        self.seconds = 0.0
        """What it has taken with its connection."""
        self._began = time.monotonic()
        self._fired = False  # whether it was ended here
        self._lost: BaseException | None = None

    # ------------------------------------------------------------------ under the circuit

    def __enter__(self) -> Self:
        try:
            self._permit = self._guard.__enter__()
        except CircuitBreakerOpenException as error:
            raise refused(error) from None
        return self._entered()

    def _entered(self) -> Self:
        _within.set((*_within.get(), self))
        return self

    async def __aenter__(self) -> Self:
        try:
            self._permit = await self._guard.__aenter__()
        except CircuitBreakerOpenException as error:
            raise refused(error) from None
        return self._entered()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _within.set(tuple(one for one in _within.get() if one is not self))
        seen = error
        if isinstance(error, Exception):
            seen = self.as_seen(error)
            said = isinstance(error, PendingRollbackError) and self._lost
            outcome, failed = verdict(said or seen, read_only=self.read_only)
            self.client.count(failed)
            if outcome is Outcome.FAILURE:
                self._permit.failure(error)
            elif outcome is Outcome.SUCCESS:
                self._permit.success()
            else:
                self._permit.ignore()
        elif error is None:
            self.client.count("")
        self._guard.__exit__(kind, error, traceback)
        if seen is not error and seen is not None:
            raise seen from error

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)

    def as_seen(self, error: Exception) -> Exception:
        """An error as callers see it."""
        orig = getattr(error, "orig", None)
        late = self._fired or sqlstate(orig) == "57014"
        if late and isinstance(error, SQLAlchemyError) and not isinstance(error, QueryTimeout):
            return QueryTimeout(self._breaker.name, self.timeout, orig or error)
        return error

    def failed(self, error: BaseException) -> None:
        """The database has answered with an error, which the caller may catch."""
        if verdict(error, read_only=self.read_only).outcome is Outcome.FAILURE:
            self._lost = error

    # ------------------------------------------------------------------ on its session

    def execute(self, session: Session, statement: Any, params: Params, owned: bool) -> Any:
        """Execute and fetch a statement in a transaction of its own, or in the one that there is.

        Args:
            session, statement, params: what.
            owned: the session is closed after this anyway.

        Returns:
            See ``DatabaseClient.execute_query``.
        """
        clause = statement.statement if isinstance(statement, Query) else statement
        if session.in_transaction():
            return self._execute_within(session, clause, statement, params)
        keeps, session.expire_on_commit = session.expire_on_commit, False
        try:
            with self._connected(session, clause=clause) as connection:
                tell(connection, self.timeout)
                result = self._fetch(session, statement, params)
                if owned and self.read_only:
                    session.close()  # there is nothing to commit, and this is less work
                else:
                    session.commit()
                return result
        except BaseException:
            roll_back(session)
            raise
        finally:
            session.expire_on_commit = keeps

    def execute_on(self, connection: Connection, statement: Any, params: Params) -> Any:
        """The same for a statement that needs no session, which would take as much time again.

        Args:
            connection: of nobody else, and closed when this returns.
            statement, params: what.
        """
        if self.read_only and connection.dialect.name == "postgresql":
            connection.execution_options(**_READ_ONLY)
        with self._on(connection):
            try:
                tell(connection, self.timeout)
                result = connection.execute(statement, params, execution_options=_COUNT)
                answer = self._answer(result, statement, params)
                if not self.read_only:
                    connection.commit()
                return answer
            finally:
                connection.close()  # still watched, since it may have to roll back

    def execute_within(self, session: Session, statement: Any, params: Params) -> Any:
        """The same as a part of a transaction of the client's, whose outcome is the only one."""
        clause = statement.statement if isinstance(statement, Query) else statement
        try:
            return self._execute_within(session, clause, statement, params)
        except SQLAlchemyError as error:
            seen = self.as_seen(error)
            if seen is error:
                raise
            raise seen from error

    def _execute_within(self, session: Session, clause: Any, statement: Any, params: Params) -> Any:
        """In somebody's transaction, which goes on as it was."""
        connection = session.connection({"clause": clause})
        around: Work | None = getattr(connection, WORK, None)
        with self._on(connection), ExitStack() as stack:
            if session.autoflush:
                session.flush()  # SQLAlchemy 2.0 does not do it for text
            if around is None and self.read_only and connection.dialect.name == "postgresql":
                # Only the end of a savepoint takes READ ONLY and times back.
                stack.callback(roll_back, session.begin_nested())
                session.connection({"clause": clause})  # which sends the savepoint
                tell(connection, self.timeout)
                connection.exec_driver_sql("SET LOCAL transaction_read_only = on")
            elif around is None or around.timeout != self.timeout:
                stack.enter_context(told(connection, self.timeout))
            return self._fetch(session, statement, params)

    def _fetch(self, session: Session, statement: Any, params: Params) -> Any:
        """Execute a statement and take all of its answer."""
        if isinstance(statement, Query):
            found = statement.with_session(session)
            if _is_entity(found.column_descriptions):
                return found.all()
            return Rows(dict(row._mapping) for row in found.all())
        result = session.execute(statement, params, execution_options=_COUNT)
        if _is_entity(getattr(statement, "column_descriptions", ())):
            return list(result.unique().scalars())
        return self._answer(result, statement, params)

    def _answer(self, result: Any, statement: Any, params: Params) -> Any:
        """An answer's rows as dictionaries, or how many rows were changed."""
        self.context = getattr(getattr(result, "raw", result), "context", None)
        own_rows = getattr(statement, "is_dml", False) and not len(statement.exported_columns)
        if own_rows or not getattr(result, "returns_rows", True):
            # Rows that the ORM has asked for are its own, and its bulk operations know no count.
            sets = 1 if isinstance(params, Mapping) else len(params or ())
            return Written(max(getattr(result, "rowcount", sets), 0))
        names = tuple(result.keys())
        return Rows(dict(zip(names, row, strict=True)) for row in result)

    @contextmanager
    def _connected(self, session: Session, **arguments: Any) -> Iterator[Connection]:
        """Begin a transaction.

        Args:
            session: of which.
            arguments: the statement, by which a session with many engines finds the right one.
        """
        options = None
        if not session.in_transaction():
            session.begin()  # also where it does not begin by itself
            bind = session.get_bind(**arguments) if self.read_only else None
            if isinstance(bind, Engine) and bind.dialect.name == "postgresql":
                options = _READ_ONLY
        connection = session.connection(arguments, execution_options=options)
        with self._on(connection):
            yield connection

    @contextmanager
    def _on(self, connection: Connection) -> Iterator[None]:
        """Use a connection for this unit, and watch it."""
        self.connected = True
        begun = time.monotonic()
        self.client.seen(connection.engine)
        before = getattr(connection, WORK, None)
        setattr(connection, WORK, self)
        left = self.timeout - (time.monotonic() - self._began)
        with watched(connection, left) as watching:
            try:
                yield
            finally:
                self._fired |= watching is not None and watching.fired
                setattr(connection, WORK, before)
                self.seconds = time.monotonic() - begun

    def statement_begins(self, connection: Connection, text: str = "") -> None:
        """SQLAlchemy sends a statement of this unit, which is watched as a whole."""

    def statement_ends(self) -> None:
        """It is over, however it ended."""


def roll_back(what: Session | SessionTransaction) -> None:
    """Roll back; what fails there is not the error that is to be seen."""
    with suppress(SQLAlchemyError):
        what.rollback()


def _is_entity(columns: Any) -> bool:
    """Whether a statement gives objects of one mapped class."""
    if len(columns) != 1:
        return False
    entity = columns[0].get("entity")
    return entity is not None and columns[0].get("expr") is entity and bool(inspect(entity, False))
