"""How writes that have waited are carried out: several in a transaction, and each once.

A write has a key.  The transaction that carries it out puts the key into a table of the database,
so that a replay which dies at any point, or sleeps while another one takes over, carries out
nothing twice: what has its key there is only taken out of the outbox.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    MetaData,
    String,
    Table,
    bindparam,
    delete,
    inspect,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable

from ..fallback.outbox import Entry
from ..keys import DAY
from ..policy import Outcome
from .database_errors import sqlstate, verdict
from .database_transaction import Transaction
from .database_writes import CannotWait, Statement, take_up

if TYPE_CHECKING:
    from .database import DatabaseClient

T = TypeVar("T")

TABLE = "circuit_breaker_writes"
_KEYS = Table(
    TABLE,
    MetaData(),
    Column("key", String(32), primary_key=True),
    Column("at", BigInteger, nullable=False),  # s since 1970
)
_INSERTS = {
    name: insert(_KEYS).on_conflict_do_nothing().returning(_KEYS.c.key)
    for name, insert in (("postgresql", postgresql.insert), ("sqlite", sqlite.insert))
}
_OLD = delete(_KEYS).where(_KEYS.c.at < bindparam("before"))
KEPT = 30 * DAY  # s; what was carried out longer ago is in no outbox any more


def transact(
    client: DatabaseClient,
    engine: Engine | AsyncEngine,
    work: Callable[[Replaying, Connection], T],
) -> T:
    """Do something in a transaction under the write circuit; no event loop may be running here.

    Raises:
        DatabaseOpenException: the circuit does not admit it.
        Exception: what ``work`` raises, or the database.
    """
    if isinstance(engine, AsyncEngine):
        return asyncio.run(_transact_async(client, engine.sync_engine, work))
    with _unit(client) as unit, Session(engine) as session:
        return unit.transact(session, work)


async def _transact_async(
    client: DatabaseClient, engine: Engine, work: Callable[[Replaying, Connection], T]
) -> T:
    """With connections that belong to this event loop, and are opened as the engine's own are."""
    twin = AsyncEngine(Engine(engine.pool.recreate(), engine.dialect, engine.url))
    try:
        async with _unit(client) as unit, AsyncSession(twin) as session:
            return await session.run_sync(unit.transact, work)
    finally:
        await twin.dispose()


def _unit(client: DatabaseClient) -> Replaying:
    return Replaying(client, client.circuits["write"], client.section.write_timeout, False)


class Replaying(Transaction):
    """A transaction that watches its statements itself."""

    _listens = False

    @contextmanager
    def watching(self, connection: Connection) -> Iterator[None]:
        """What is sent within has the whole time."""
        self.statement_begins(connection)
        try:
            yield
        finally:
            self.statement_ends()

    def transact(self, session: Session, work: Callable[[Replaying, Connection], T]) -> T:
        """Begin, work, commit; roll back if it fails."""
        try:
            connection = session.connection()
            with self.watching(connection):
                self.begin(session)
            done = work(self, connection)
            self.commit()
            return done
        except BaseException:
            self.session = session
            self.abort()
            raise


class Batch:
    """Several writes in one transaction.

    Attributes:
        at: the one that is being carried out, or the last one while all are being committed; None:
            none is.
        texts: what was sent.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self.at: Entry | None = None
        self.texts: list[str] = []

    def __call__(self, unit: Replaying, connection: Connection) -> None:
        now = int(time.time())
        keys = [{"key": entry.key, "at": now} for entry in self._entries]
        with unit.watching(connection):
            new = set(connection.execute(_INSERTS[connection.dialect.name], keys).scalars())
        for entry in self._entries:
            self.at = entry
            if entry.key in new:
                write = self._taken_up(entry, connection)
                self.texts.append(write.sql)
                with unit.watching(connection):
                    connection.exec_driver_sql(write.sql, write.values)

    def _taken_up(self, entry: Entry, connection: Connection) -> Statement:
        try:
            return take_up(entry.payload, connection.dialect)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise CannotWait(f"it is no write of this driver's: {type(error).__name__}") from error


def make_ready(unit: Replaying, connection: Connection) -> None:
    """See to it that the table of keys is there, and does not grow for ever."""
    with unit.watching(connection):
        # Asked first, since making it needs rights that the table's user may lack.
        if not inspect(connection).has_table(TABLE):
            connection.execute(CreateTable(_KEYS, if_not_exists=True))
        connection.execute(_OLD, {"before": int(time.time() - KEPT)})


def is_unwell(error: Exception) -> bool:
    """Whether the database, or this process's pool, has failed, rather than refused a write."""
    outcome, kind = verdict(error)
    return outcome is Outcome.FAILURE or kind == "pool"


def said(error: BaseException) -> str:
    """An error without values: those of the database hold some."""
    if isinstance(error, CannotWait):
        return str(error)
    orig: Any = getattr(error, "orig", None) or error
    words = [type(orig).__name__, sqlstate(orig) or getattr(orig, "sqlite_errorname", "")]
    with suppress(AttributeError):
        words.append(orig.diag.constraint_name)
    return " ".join(filter(None, words))
