"""A transaction under a circuit: one call, whose statements have the whole time each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ..breaker import CircuitBreaker
from .database_limits import Watch, deadlines, only_reads, tell, watch
from .database_work import WORK, Work, roll_back

if TYPE_CHECKING:
    from .database import DatabaseClient

MOST_TEXTS = 100


class Transaction(Work):
    """One transaction.

    Args:
        client, breaker, read_only: see ``Work``.
        timeout: seconds for each statement, for the commit, and for each pause between them.

    Attributes:
        session: whose it is, once it has begun.
        async_session: the same as asyncio's callers see it.
    """

    session: Session
    async_session: AsyncSession | None = None
    # Whether SQLAlchemy tells of its statements, which slows down whoever uses the engine.
    _listens = True

    def __init__(
        self, client: DatabaseClient, breaker: CircuitBreaker, timeout: float, read_only: bool
    ) -> None:
        super().__init__(client, breaker, timeout, read_only)
        self.texts: set[str] = set()
        """Its statements; of very many only some."""
        self._watch: Watch | None = None
        self._block, self._refusal = ExitStack(), ExitStack()

    @contextmanager
    def _on(self, connection: Connection) -> Iterator[None]:
        if self._listens:
            self.client.seen(connection.engine, statements=True)
        setattr(connection, WORK, self)
        try:
            yield
        finally:
            self.statement_ends()
            setattr(connection, WORK, None)

    def begin(self, session: Session) -> None:
        """Begin a transaction, or take over the one that the session has begun by itself."""
        self.session = session
        with ExitStack() as stack:
            connection = stack.enter_context(self._connected(session))
            tell(connection, self.timeout, idle=True)
            if self.read_only:
                self._refusal.enter_context(only_reads(connection))
                # Of one that had begun already, BEGIN could not say it.
                said = connection.get_execution_options().get("postgresql_readonly")
                if connection.dialect.name == "postgresql" and not said:
                    connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            self._block = stack.pop_all()

    def commit(self) -> None:
        """Send what the session holds, and commit."""
        session = self.session
        session.flush()
        self._refusal.close()
        with self._each(session):
            session.commit()
        self._block.close()

    def abort(self) -> None:
        """Roll back what has been begun."""
        with suppress(SQLAlchemyError):
            self._refusal.close()
        with self._each(self.session):
            roll_back(self.session)
        self._block.close()

    @contextmanager
    def _each(self, session: Session) -> Iterator[None]:
        """Watch what is no statement."""
        with suppress(SQLAlchemyError):  # it has none, or has lost it
            if session.in_transaction():
                self.statement_begins(session.connection())
        try:
            yield
        finally:
            self.statement_ends()

    def statement_begins(self, connection: Connection, text: str = "") -> None:
        """Of a transaction each statement has the whole time."""
        if text and len(self.texts) < MOST_TEXTS:
            self.texts.add(text)
        if self._watch is None:
            self._watch = watch(connection, self.timeout)

    def statement_ends(self) -> None:
        """It is over, however it ended."""
        watching, self._watch = self._watch, None
        if watching is not None:
            deadlines.over(watching)
            self._fired |= watching.fired
