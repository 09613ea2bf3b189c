"""The protected database: SQLAlchemy's sessions and engines behind two circuits.

Reads and writes have a circuit each, so that broken writes do not stop reads.  A statement is
executed, fetched and committed as one call; so is a transaction.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

from sqlalchemy import Engine, exc, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..fallback.outbox import Outbox, Replayed
from ..keys import DAY
from ..policy import Policy, check_number
from ..process import OwnLock, follow_process
from ..sections import Circuit, Database
from .client import Client, users_folder
from .database_errors import (
    KINDS,
    DatabaseOpenException,
    QueryTimeout,
    ReadOnlyViolation,
)
from .database_events import EngineEvents
from .database_outbox import WriteQueue
from .database_query import Attempts, SlowQueries
from .database_sessions import Sessions
from .database_statements import needs_no_session, only_changes, reads
from .database_stored import StoredReads
from .database_transaction import MOST_TEXTS, Transaction
from .database_work import Params, Work, current
from .database_writes import Written

__all__ = [
    "DatabaseClient",
    "DatabaseOpenException",
    "QueryTimeout",
    "ReadOnlyViolation",
    "Written",
]

E = TypeVar("E", Engine, AsyncEngine)

# For what is called under a circuit by ``call`` and ``guard``; the client's own calls look closer.
FAILURES = (exc.OperationalError, exc.InterfaceError, exc.InternalError)


class DatabaseClient(Client):
    """A service's database.

    Its sessions come from ``db_session``: a Session, scoped_session, sessionmaker, Engine, one of
    their twins for asyncio, or a URL; without one from the section's ``url``.

    Every method has a twin whose name ends in ``_async``.  For all of them:

    Raises:
        DatabaseOpenException: the circuit is open.  It is a ``CircuitBreakerOpenException`` and
            also SQLAlchemy's ``OperationalError``.
        QueryTimeout: it took too long; also SQLAlchemy's ``OperationalError``.
        ReadOnlyViolation: something that may write was given with ``read_only=True``.
        sqlalchemy.exc.SQLAlchemyError: the database's own errors, as SQLAlchemy gives them.
        TypeError, ValueError: there are no sessions for such a call, or a bad argument.
    """

    section: Database
    _lock = OwnLock()

    def _begin(self) -> None:
        self._events: weakref.WeakKeyDictionary[Engine, EngineEvents] = weakref.WeakKeyDictionary()
        self._counts: dict[str, int] = dict.fromkeys(
            ("calls", "reads", "writes", "transactions", "retries", "served_stale", *KINDS), 0
        )
        self.slow = SlowQueries()
        self._replica: Sessions | None = None
        self._stored: StoredReads | None = None
        self._writes: WriteQueue | None = None
        self._exhausted = 0  # calls in a row that got no connection from the pool
        self._engine: weakref.ref[Engine] | None = None
        follow_process(self)

    @property
    def stored(self) -> StoredReads | None:
        """Results that are kept; None: ``enable_cache_fallback`` is off."""
        section = self.section
        if not section.enable_cache_fallback:
            return None
        if self._stored is None:
            with self._lock:
                if self._stored is None:
                    base = users_folder("XDG_CACHE_HOME", ".cache")
                    folder = base / f"{self.name}-{self._sessions.place}"
                    self._stored = StoredReads(folder, section.cache_ttl, section.stale_ttl)
        return self._stored

    @staticmethod
    def policy(policy: Policy) -> Policy:
        """Only what says that the database is unwell counts."""
        return replace(policy, record=FAILURES)

    def use(self, **explicit: Any) -> None:
        """Take what a later caller of the getter says; None says nothing.

        Raises:
            TypeError, ValueError: sessions cannot come from there.
        """
        if "_sessions" not in vars(self):
            self._sessions = Sessions(self.name, self.section, self._opened)
        source = explicit.get("db_session")
        if source is not None:
            self._sessions.use(source)
        super().use(**explicit)

    def configure(self, section: Circuit) -> None:
        """Go by the new times from the next call on; ``url`` is read when it is first needed."""
        super().configure(section)
        for sessions in self._all_sessions():
            sessions.section = cast(Database, section)

    def _all_sessions(self) -> list[Sessions]:
        return [one for one in (self._sessions, self._replica) if one is not None]

    # ------------------------------------------------------------------ statements

    def execute_query(
        self,
        statement: Any,
        params: Params = None,
        read_only: bool = False,
        timeout: float | None = None,
        cache: bool | None = None,
    ) -> Any:
        """Execute a statement, fetch all of its rows, and commit.

        Within ``transaction()``, and in a session that has begun one, it is part of that
        transaction, and nothing is committed here.

        Args:
            statement: text with parameters as ``:name``, a statement of Core or the ORM, or a
                legacy ``Query``.
            params: values by name; a list of such for several executions of one statement.
            read_only: the statement must not write.  PostgreSQL is told so, and refuses what is a
                write in disguise.
            timeout: seconds for the whole call, with all its attempts; None: the section's
                ``read_timeout`` or ``write_timeout``.
            cache: whether rows are kept, and kept ones are the answer while the circuit is open;
                None: with ``read_only=True``.  Only while ``enable_cache_fallback`` is on.

        Returns:
            Rows as dictionaries by their columns' names, in a list whose ``stale`` and ``age`` tell
            whether they were kept; objects if the statement selects one mapped class; of a
            statement without rows ``Written``, the number of rows that it has changed.  While the
            circuit refuses writes, a single one waits on disk, and its ``Written`` is ``queued``.
        """
        statement = text(statement) if isinstance(statement, str) else statement
        outer = self._outer()
        made = self._attempts(statement, params, read_only, timeout, cache, outer, is_async=False)
        if outer is not None:
            return made.work().execute_within(outer.session, statement, params)
        if made.may_wait and (written := made.behind()) is not None:
            return written
        while True:
            try:
                sessions = self._sessions_of(made)
                return made.answered(self._execute(sessions, made.work(), statement, params))
            except SQLAlchemyError as error:
                wait = made.again(error)
                if wait is None:
                    return made.instead(error)
            time.sleep(wait)

    def _execute(self, sessions: Sessions, work: Work, statement: Any, params: Params) -> Any:
        engine = sessions.engine if needs_no_session(statement) else None
        with work:
            if engine is not None:
                with engine.connect() as connection:
                    return work.execute_on(connection, statement, params)
            with sessions.blocking() as session:
                return work.execute(session, statement, params, sessions.owned)

    async def execute_query_async(
        self,
        statement: Any,
        params: Params = None,
        read_only: bool = False,
        timeout: float | None = None,
        cache: bool | None = None,
    ) -> Any:
        """As ``execute_query``."""
        statement = text(statement) if isinstance(statement, str) else statement
        outer = self._outer()
        made = self._attempts(statement, params, read_only, timeout, cache, outer, is_async=True)
        if outer is not None and outer.async_session is not None:
            session, work = outer.async_session, made.work()
            return await session.run_sync(work.execute_within, statement, params)
        if made.may_wait and (written := await asyncio.to_thread(made.behind)) is not None:
            return written
        while True:
            try:
                sessions = self._sessions_of(made)
                done = await self._execute_async(sessions, made.work(), statement, params)
                return made.answered(done)
            except SQLAlchemyError as error:
                wait = made.again(error)
                if wait is None:
                    return await asyncio.to_thread(made.instead, error)
            await asyncio.sleep(wait)

    async def _execute_async(
        self, sessions: Sessions, work: Work, statement: Any, params: Params
    ) -> Any:
        engine = sessions.async_engine if needs_no_session(statement) else None
        async with work:
            if engine is not None:
                async with engine.connect() as connection:
                    return await connection.run_sync(work.execute_on, statement, params)
            async with sessions.asynchronous() as session:
                owned = sessions.owned
                return await session.run_sync(work.execute, statement, params, owned)

    def _attempts(
        self,
        statement: Any,
        params: Params,
        read_only: bool,
        timeout: float | None,
        cache: bool | None,
        outer: Transaction | None,
        *,
        is_async: bool,
    ) -> Attempts:
        dialect = self._sessions.dialect(is_async=is_async)
        language = "" if dialect is None else dialect.name
        kind = self.kind_of(statement, language)
        if outer is not None:
            read_only = read_only or outer.read_only
            timeout = outer.timeout if timeout is None else timeout
        if read_only and kind == "write":
            raise ReadOnlyViolation(
                f"{self.name}: a {type(statement).__name__} that is not known to be a read was "
                f"given where only reads are allowed: leave out read_only=True"
            )
        self._counts[f"{kind}s"] += 1
        if self._writes is None and self.section.enable_write_queue:
            self._writing().care()  # something may wait since an earlier life of the process
        stores = kind == "read" and (read_only if cache is None else cache)
        replica, queue = False, None
        if kind == "read" and outer is None:
            read_only = read_only or self.read_only
            # What has begun a transaction must see its own writes.
            replica = "replica" in self.circuits and not self._sessions.begun(is_async=is_async)
        elif (
            outer is None
            and self.section.enable_write_queue
            and only_changes(statement, language)
            and not self._sessions.begun(is_async=is_async)
        ):
            queue = self._writing()
        seconds = self._time(kind, timeout)
        return Attempts(
            self, statement, params, dialect, kind, read_only, seconds, stores, replica, queue
        )

    def _sessions_of(self, made: Attempts) -> Sessions:
        if not made.on_replica:
            return self._sessions
        if self._replica is None:
            with self._lock:
                if self._replica is None:
                    replica = Sessions(self.name, self.section, self._opened)
                    replica.use(self.section.read_url)
                    self._replica = replica
        return self._replica

    # ------------------------------------------------------------------ transactions

    @contextmanager
    def transaction(
        self, timeout: float | None = None, read_only: bool = False
    ) -> Iterator[Session]:
        """A transaction: commits when the block ends, rolls back when it raises.

        The whole block is one call, and its end is its outcome; errors that are not the database's
        count as nothing.  One within another is a savepoint of it.

        Args:
            timeout: seconds for each of its statements, for the commit, and for each pause between
                them; None: the section's ``write_timeout``, or ``read_timeout`` if it only reads.
            read_only: it must not write.

        Yields:
            The session.
        """
        outer = self._outer()
        if outer is not None:
            self._may_nest(outer, read_only)
            with outer.session.begin_nested():
                yield outer.session
            return
        with self._transaction(timeout, read_only) as work, self._sessions.blocking() as session:
            try:
                work.begin(session)
                yield session
                work.commit()
            except BaseException:
                work.abort()
                raise
            finally:
                self._wrote(work)

    @asynccontextmanager
    async def transaction_async(
        self, timeout: float | None = None, read_only: bool = False
    ) -> AsyncIterator[AsyncSession]:
        """As ``transaction``."""
        outer = self._outer()
        if outer is not None and outer.async_session is not None:
            self._may_nest(outer, read_only)
            async with outer.async_session.begin_nested():
                yield outer.async_session
            return
        work = self._transaction(timeout, read_only)
        async with work, self._sessions.asynchronous() as session:
            work.async_session = session
            try:
                await session.run_sync(work.begin)
                yield session
                await session.run_sync(lambda _: work.commit())
            except BaseException:
                await session.run_sync(lambda _: work.abort())
                raise
            finally:
                self._wrote(work)

    def _outer(self) -> Transaction | None:
        """The transaction of this client's that this thread or task is in the midst of."""
        work = current(self)
        return work if isinstance(work, Transaction) else None

    def _transaction(self, timeout: float | None, read_only: bool) -> Transaction:
        kind = "read" if read_only else "write"
        self._counts["transactions"] += 1
        return Transaction(self, self.circuits[kind], self._time(kind, timeout), read_only)

    def _wrote(self, work: Transaction) -> None:
        """A transaction is over: of what it may have written to nothing is kept any more."""
        if self.stored is None or not work.texts:
            return
        dialect = work.session.get_bind().dialect.name
        texts = [text for text in work.texts if not reads(text, dialect)]
        self.stored.sent(texts, dialect, all_of_them=len(work.texts) < MOST_TEXTS)

    def _may_nest(self, outer: Transaction, read_only: bool) -> None:
        if read_only is not outer.read_only:
            raise ReadOnlyViolation(
                f"{self.name}: a transaction within another must have the same read_only "
                f"({outer.read_only}), since it is a part of it"
            )

    # ------------------------------------------------------------------ what waits

    def replay(self) -> Replayed:
        """Carry out what waits, as far as the database takes it; done by itself.

        On an event loop call it by ``asyncio.to_thread``.

        Raises:
            OutboxError: the file cannot be read or written.
        """
        return self._writing().replay()

    @property
    def outbox(self) -> Outbox:
        """Where writes wait."""
        return self._writing().outbox

    def _writing(self) -> WriteQueue:
        if self._writes is None:
            with self._lock:
                self._writes = self._writes or WriteQueue(self, self._sessions)
        return self._writes

    # ------------------------------------------------------------------ existing engines

    def protect(self, engine: E) -> E:
        """Guard every statement of an engine from now on, whoever sends it; returns the engine.

        Each statement is a call under its circuit, and savepoints and rollbacks are never refused.
        Connections that are opened from now on end statements after the longer one of the
        section's times.

        Raises:
            TypeError: it is no engine.
        """
        inner = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        if not isinstance(inner, Engine):
            raise TypeError(
                f"{self.name}: protect() takes an Engine or AsyncEngine, not a "
                f"{type(engine).__name__}"
            )
        self._events_of(inner).guard()
        return engine

    def _events_of(self, engine: Engine) -> EngineEvents:
        events = self._events.get(engine)
        if events is None:
            with self._lock:
                events = self._events.get(engine)
                if events is None:
                    events = self._events[engine] = EngineEvents(self, engine)
        return events

    def _opened(self, engine: Engine) -> None:
        self._events_of(engine).own()

    def seen(self, engine: Engine, *, statements: bool = False) -> None:
        """A call uses a connection of this engine; whether its ``statements`` are to be watched."""
        if self._engine is None or self._engine() is not engine:
            self._engine = weakref.ref(engine)
        if statements:
            self._events_of(engine).watch()

    # ------------------------------------------------------------------ what calls go by

    def kind_of(self, statement: Any, dialect: str) -> str:
        """Which circuit a statement is under: ``read`` or ``write``."""
        return "read" if reads(statement, dialect) else "write"

    def seconds(self, kind: str) -> float:
        """The section's time for a kind."""
        return self.section.write_timeout if kind == "write" else self.section.read_timeout

    def _time(self, kind: str, timeout: float | None) -> float:
        """What a call has, or the section's time."""
        return (
            self.seconds(kind) if timeout is None else check_number("timeout", timeout, 0.001, DAY)
        )

    # ------------------------------------------------------------------ reading only

    @property
    def read_only(self) -> bool:
        """Whether the service only reads, since its writes are refused: because they failed or were
        slow, or somebody has said so.  Reads are told to the database as such then."""
        return self.section.enable_read_only_fallback and self.circuits["write"].refusing

    def enter_read_only(self, reason: str = "", seconds: float | None = None) -> None:
        """Have the whole fleet's writes refused.

        Args:
            reason: for the circuit's log.
            seconds: after which they are tried again; None: until ``leave_read_only``.
        """
        self.circuits["write"].force_open(ttl=seconds, reason=reason)

    def leave_read_only(self) -> None:
        """Try to write again."""
        self.circuits["write"].release()

    # ------------------------------------------------------------------ counts

    def tally(self, name: str) -> None:
        """Count one of what ``stats`` tells."""
        self._counts[name] += 1

    def count(self, kind: str) -> None:
        """A call has ended, with a kind of failure or (empty) without."""
        self._counts["calls"] += 1
        if kind:
            self._counts[kind] += 1
        self._exhausted = self._exhausted + 1 if kind == "pool" else 0

    # ------------------------------------------------------------------ looking

    def stats(self) -> dict[str, Any]:
        """Counts of this process, and its connections.

        ``calls`` that have ended; ``reads``, ``writes`` and ``transactions`` that were asked for;
        ``retries`` that were made; ``served_stale``, results that were kept; ``slow_queries``, how
        many and their texts without values; ``stored``, what is kept; ``failures`` by their kind;
        of the ``pool`` that was used last its ``size``, how many connections are ``checked_out``
        and how many of them are ``overflow``, and how many calls in a row got none
        (``exhausted_in_a_row``); None: there is no pool, or it is not watched; ``queued`` writes
        that had to wait, and ``replayed`` ones; the host's ``outbox``.
        """
        counts = dict(self._counts)
        return {
            "failures": {kind: counts.pop(kind) for kind in KINDS},
            **counts,
            "slow_queries": self.slow.stats(),
            "stored": None if self._stored is None else self._stored.stats(),
            "pool": self._pool(),
            **self._writing().stats(),
        }

    def _pool(self) -> dict[str, int] | None:
        engine = self._sessions.known or (None if self._engine is None else self._engine())
        if engine is None or not self.section.enable_pool_monitoring:
            return None
        figures = {}
        for name, method in (
            ("size", "size"), ("checked_out", "checkedout"), ("overflow", "overflow")
        ):  # fmt: skip
            ask = getattr(engine.pool, method, None)
            if ask is not None:  # one kind of pool has a number in its place
                figures[name] = max(0, ask() if callable(ask) else ask)
        return {**figures, "exhausted_in_a_row": self._exhausted}

    def problems(self) -> list[str]:
        """What is wrong with the pool, and with what waits."""
        waiting = self._writing().problems()
        found = self._pool()
        if found is None or self._exhausted < self.section.max_pool_failures:
            return waiting
        figures = ", ".join(
            f"{found[name]} {name.replace('_', ' ')}"
            for name in ("size", "checked_out", "overflow")
            if name in found
        )
        return [
            f"{self._exhausted} calls in a row got no connection from the pool ({figures}): raise "
            f"its size, or look for what keeps connections",
            *waiting,
        ]

    # ------------------------------------------------------------------ ends

    def forked(self) -> None:
        """A child has connections of its own."""
        vars(self).pop("_lock", None)
        self.slow = SlowQueries()
        for sessions in self._all_sessions():
            sessions.forked()
        if self._writes is not None:
            self._writes.forked()

    def close(self) -> None:
        """Listen to no engine any more, and close the connections of engines of its own; what
        waits stays on disk."""
        if self._writes is not None:
            self._writes.close()
        for events in list(self._events.values()):
            events.stop()
        self._events.clear()
        for sessions in self._all_sessions():
            sessions.close()
        if self._stored is not None:
            self._stored.close()

    async def aclose(self) -> None:
        """Close the running event loop's connections, before the loop ends."""
        for sessions in self._all_sessions():
            await sessions.aclose()
