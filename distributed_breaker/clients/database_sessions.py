"""Where a database client's sessions come from: what the caller gave, or engines of its own."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.util
import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import URL, Dialect, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool

from ..process import OwnLock
from ..sections import Database

BLOCKING = (Session, scoped_session, sessionmaker, Engine)
ASYNC = (AsyncSession, async_scoped_session, async_sessionmaker, AsyncEngine)

# A URL serves both kinds of calls, so each has the driver that can carry it out.
_BLOCKING_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgresql+asyncpg": "postgresql+psycopg",
    "sqlite+aiosqlite": "sqlite",
}
_ASYNC_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg2": "postgresql+psycopg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+pysqlite": "sqlite+aiosqlite",
}

# Single sessions belong to who gave them: another thread or task must not use them.
_given: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("database_sessions", default=())


class Sessions:
    """The sessions of one client.

    Args:
        name: the client's, for messages.
        section: what the file says.
        opened: told of each engine that is made here.
    """

    _lock = OwnLock()

    def __init__(self, name: str, section: Database, opened: Callable[[Engine], object]) -> None:
        self._name = name
        self.section = section
        self._opened = opened
        self._source: Any = None
        self._lent: weakref.ref[Any] | None = None  # the engine of single sessions
        self._forget()

    def _forget(self) -> None:
        self._engine: Engine | None = None
        self._makers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._maker: Any = None

    # ------------------------------------------------------------------ what is given

    def use(self, source: Any) -> None:
        """Take the sessions from there from now on.

        Raises:
            TypeError: it is none of the things that sessions can come from.
            ValueError: it is no URL that SQLAlchemy can read.
        """
        if isinstance(source, str | URL):
            source = _url(source, f"the db_session of {self._name}")
        elif not isinstance(source, BLOCKING + ASYNC):
            raise TypeError(
                f"the db_session of {self._name} is a {type(source).__name__}: give SQLAlchemy's "
                f"Session, scoped_session, sessionmaker, Engine, their async twins, or a URL"
            )
        if isinstance(source, Session | AsyncSession):
            others = tuple(pair for pair in _given.get() if pair[0]() not in (self, None))
            _given.set((*others, (weakref.ref(self), weakref.ref(source))))
            self._source = type(source)
            self._lent = None if source.bind is None else weakref.ref(source.bind)
            return
        if source != self._source:
            self.close()
            self._source = source

    def _now(self, *, is_async: bool) -> Any:
        """What the sessions come from at this place.

        Raises:
            TypeError: it cannot serve such calls, or there is nothing.
        """
        source = self._source
        if isinstance(source, type):
            found = next((ref() for of, ref in _given.get() if of() is self), None)
            if found is None:
                raise TypeError(
                    f"{self._name} was given a {source.__name__} in another thread or task, which "
                    f"must not be used here: give one here, or a sessionmaker once"
                )
            source = found
        if source is None:
            if self.section.url is None:
                raise TypeError(
                    f"{self._name} has no database: set url in the file, or give db_session to "
                    f"get_database_circuit_breaker"
                )
            source = self._source = _url(self.section.url, f"the url of {self._name}")
        if isinstance(source, BLOCKING if is_async else ASYNC):
            twin = "execute_query and transaction" if is_async else "the methods ending in _async"
            raise TypeError(
                f"{self._name} was given a {type(source).__name__}, so only {twin} can be used; "
                f"for the others give its twin, or a URL"
            )
        return source

    # ------------------------------------------------------------------ sessions

    @property
    def owned(self) -> bool:
        """Whether each session is made for one unit of work, and closed after it."""
        return not (isinstance(self._source, type | scoped_session | async_scoped_session))

    @contextmanager
    def blocking(self) -> Iterator[Session]:
        """A session for one unit of work; one that was given stays open."""
        source = self._now(is_async=False)
        if isinstance(source, Session):
            yield source
        elif isinstance(source, scoped_session):
            yield source()
        elif isinstance(source, sessionmaker):
            with source() as session:
                yield session
        else:
            with self._own_maker(source)() as session:
                yield session

    @asynccontextmanager
    async def asynchronous(self) -> AsyncIterator[AsyncSession]:
        """The same for asyncio."""
        source = self._now(is_async=True)
        if isinstance(source, AsyncSession):
            yield source
        elif isinstance(source, async_scoped_session):
            yield source()
        elif isinstance(source, async_sessionmaker):
            async with source() as session:
                yield session
        else:
            async with self._own_async_maker(source)() as session:
                yield session

    @property
    def engine(self) -> Engine | None:
        """The engine of blocking calls, if sessions are made here from one; None: they are not."""
        source = self._now(is_async=False)
        return self._own_maker(source).kw["bind"] if isinstance(source, URL | Engine) else None

    @property
    def async_engine(self) -> AsyncEngine | None:
        """The same of calls on the running event loop."""
        source = self._now(is_async=True)
        if not isinstance(source, URL | AsyncEngine):
            return None
        engine: AsyncEngine = self._own_async_maker(source).kw["bind"]
        return engine

    def lasting(self) -> Engine | AsyncEngine | None:
        """The engine whose connections any thread may use, wherever sessions come from; None: it
        is not known, or there are several."""
        source = self._source
        if source is None and self.section.url is not None:
            source = self._now(is_async=False)
        if isinstance(source, URL):
            source = self._own_maker(source)
        if isinstance(source, type):
            source = None if self._lent is None else self._lent()
        elif isinstance(source, scoped_session | async_scoped_session):
            source = getattr(source, "session_factory", None) or source.registry.createfunc
        if isinstance(source, sessionmaker | async_sessionmaker):
            source = None if source.kw.get("binds") else source.kw.get("bind")
        if isinstance(source, Engine) and source.dialect.is_async:
            return AsyncEngine(source)  # of a URL for whose database there is no blocking driver
        return source if isinstance(source, Engine | AsyncEngine) else None

    def _own_maker(self, source: Engine | URL) -> Any:
        maker = self._maker
        if maker is None:
            with self._lock:
                if self._maker is None:
                    engine = source if isinstance(source, Engine) else self._make(source)
                    # What a call returns is to be usable when its session is closed.
                    self._maker = sessionmaker(engine, expire_on_commit=False)
                maker = self._maker
        return maker

    def _own_async_maker(self, source: AsyncEngine | URL) -> Any:
        """Connections belong to an event loop, so each has an engine of its own."""
        loop = asyncio.get_running_loop()
        maker = self._makers.get(loop)
        if maker is None:
            engine = source if isinstance(source, AsyncEngine) else self._make_async(source)
            maker = async_sessionmaker(engine, expire_on_commit=False)
            # A connection knows its loop, so a loop that has ended would be kept by its engine.
            for other in list(self._makers):
                if other.is_closed():
                    del self._makers[other]
            self._makers[loop] = maker
        return maker

    # ------------------------------------------------------------------ engines of its own

    def _make(self, url: URL) -> Engine:
        url = _with_driver(url, _BLOCKING_DRIVERS)
        self._engine = create_engine(url, **self._options(url))
        self._opened(self._engine)
        return self._engine

    def _make_async(self, url: URL) -> AsyncEngine:
        url = _with_driver(url, _ASYNC_DRIVERS)
        engine = create_async_engine(url, **self._options(url))
        self._opened(engine.sync_engine)
        return engine

    def _options(self, url: URL) -> dict[str, Any]:
        section, driver = self.section, url.drivername
        options: dict[str, Any] = {"hide_parameters": True}
        dialect: Any = url.get_dialect()
        if issubclass(dialect.get_pool_class(url), QueuePool):
            options["pool_timeout"] = section.connection_timeout
        if driver in ("postgresql+psycopg", "postgresql+psycopg2"):
            options["connect_args"] = {"connect_timeout": math.ceil(section.connection_timeout)}
        elif driver == "postgresql+asyncpg":
            options["connect_args"] = {"timeout": section.connection_timeout}
        elif driver.startswith("sqlite"):
            # How long it waits for another writer, which nothing can interrupt.
            shorter = min(section.read_timeout, section.write_timeout)
            options["connect_args"] = {"timeout": shorter}
        return options

    # ------------------------------------------------------------------ looking

    def dialect(self, *, is_async: bool = False) -> Dialect | None:
        """What statements are compiled with; None: it cannot be told."""
        source = self._now(is_async=is_async)
        if isinstance(source, sessionmaker | async_sessionmaker):
            source = source.kw.get("bind")
        elif isinstance(source, URL):
            drivers = _ASYNC_DRIVERS if is_async else _BLOCKING_DRIVERS
            return _dialect_of(_with_driver(source, drivers).drivername)
        elif not isinstance(source, Engine | AsyncEngine):
            try:
                source = source.get_bind()
            except SQLAlchemyError:
                return None
        return getattr(source, "dialect", None)

    def begun(self, *, is_async: bool) -> bool:
        """Whether a session that was given is in the midst of a transaction."""
        source = self._now(is_async=is_async)
        if isinstance(source, scoped_session | async_scoped_session):
            source = source() if source.registry.has() else None
        return isinstance(source, Session | AsyncSession) and source.in_transaction()

    @property
    def place(self) -> str:
        """A mark of the database, the same in every process."""
        bind = self._source
        if isinstance(bind, sessionmaker | async_sessionmaker):
            bind = bind.kw.get("bind")
        url = bind if isinstance(bind, URL) else getattr(bind, "url", None)
        where = () if url is None else (url.host, url.port, url.database, sorted(url.query.items()))
        return hashlib.sha256(repr(where).encode()).hexdigest()[:8]

    @property
    def known(self) -> Engine | None:
        """The engine, where it is known before a session has been used."""
        source = self._source
        if isinstance(source, sessionmaker | async_sessionmaker):
            source = source.kw.get("bind")
        if isinstance(source, AsyncEngine):
            return source.sync_engine
        return source if isinstance(source, Engine) else self._engine

    # ------------------------------------------------------------------ ends

    def forked(self) -> None:
        """A child must not use its parent's connections, which its parent goes on using."""
        vars(self).pop("_lock", None)
        if self._engine is not None:
            self._engine.dispose(close=False)
        self._makers = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Close the connections of engines of its own; the next call opens new ones."""
        engine = self._engine
        self._forget()
        if engine is not None:
            engine.dispose()

    async def aclose(self) -> None:
        """The same of the running event loop's, before the loop ends."""
        maker = self._makers.pop(asyncio.get_running_loop(), None)
        if maker is not None and isinstance(self._source, URL):
            await maker.kw["bind"].dispose()


@functools.lru_cache(16)
def _dialect_of(driver: str) -> Dialect:
    kind: Any = URL.create(driver).get_dialect()
    made: Dialect = kind()
    return made


def _url(text: str | URL, what: str) -> URL:
    try:
        return make_url(text)
    except ArgumentError:
        # SQLAlchemy's message holds the text, and so the password.
        raise ValueError(
            f"{what} is no URL that SQLAlchemy can read: postgresql://user:password@host/name"
        ) from None


def _with_driver(url: URL, drivers: dict[str, str]) -> URL:
    wanted = drivers.get(url.drivername)
    module = None if wanted is None else wanted.partition("+")[2]
    if wanted is None or (module and importlib.util.find_spec(module) is None):
        return url
    return url.set(drivername=wanted)
