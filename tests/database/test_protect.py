"""An existing engine whose every statement is guarded, and the code that uses it unchanged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, exc, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from distributed_breaker import CircuitBreaker
from distributed_breaker.clients import database_limits
from distributed_breaker.clients.database import (
    DatabaseClient,
    DatabaseOpenException,
    QueryTimeout,
)
from scripts.postgres import Postgres
from tests.database.conftest import BRITTLE, Start, counts, failing
from tests.database.test_outcomes import terminate
from tests.database.test_queries import Cat
from tests.database.test_timeouts import ENDLESS, PID, stopped


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = create_engine(url.replace(":", "+psycopg:", 1))
    yield engine
    engine.dispose()


@pytest.fixture
def client(start: Start, engine: Engine) -> DatabaseClient:
    client = start()
    assert client.protect(engine) is engine
    client.protect(engine)  # once more changes nothing
    return client


def test_every_statement_is_a_call(client: DatabaseClient, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Cat).values(id=1, name="Tom"))
        connection.exec_driver_sql("SELECT * FROM cats WHERE id = %(id)s", {"id": 1}).all()
        connection.execute(text("UPDATE cats SET name = 'Tim'"))
    assert (counts(client, "read"), counts(client, "write")) == ((1, 0, 0), (2, 0, 0))
    with Session(engine) as session:
        session.add_all([Cat(id=2), Cat(id=3)])
        session.flush()
        assert session.get(Cat, 1).name == "Tim"  # type: ignore[union-attr]
        session.query(Cat).filter(Cat.id > 1).delete()
        session.commit()
    assert (counts(client, "read"), counts(client, "write")) == ((2, 0, 0), (4, 0, 0))


def test_mistakes_and_savepoints(client: DatabaseClient, engine: Engine) -> None:
    """A refused savepoint would leave an application in the midst of a transaction."""
    with Session(engine) as session:
        session.add(Cat(id=1))
        session.flush()
        with pytest.raises(exc.IntegrityError), session.begin_nested():
            session.execute(text("INSERT INTO cats VALUES (1)"))
        client.circuits["write"].force_open()
        nested = session.begin_nested()
        with pytest.raises(DatabaseOpenException):
            session.execute(text("INSERT INTO cats VALUES (2)"))
        nested.rollback()
        with session.begin_nested():
            assert session.execute(text("SELECT id FROM cats")).scalars().all() == [1]
        session.commit()
    client.circuits["write"].release()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM cats")).scalars().all() == [1]
    assert counts(client, "write") == (2, 0, 0), "a unique violation is an answer"
    assert counts(client, "read") == (2, 0, 0)


def test_the_clients_own_calls_are_counted_once(start: Start, engine: Engine) -> None:
    client = start(engine)
    client.protect(engine)
    client.execute_query("SELECT 1")
    with client.transaction() as session:
        session.execute(text("INSERT INTO cats VALUES (1)"))
        session.execute(text("INSERT INTO cats VALUES (2)"))
    assert (counts(client, "read"), counts(client, "write")) == ((1, 0, 0), (1, 0, 0))
    gone = create_engine("postgresql+psycopg://postgres@/postgres?host=/nowhere")
    client.use(db_session=gone)
    client.protect(gone)
    with pytest.raises(exc.OperationalError):
        client.execute_query("SELECT 1")
    assert (counts(client, "read"), counts(client, "write")) == ((1, 1, 0), (1, 0, 0))


def test_a_connection_that_fails_counts_for_both(start: Start) -> None:
    engine = create_engine("postgresql+psycopg://postgres@/postgres?host=/nowhere")
    client = start(**BRITTLE)
    client.protect(engine)
    with pytest.raises(exc.OperationalError, match="nowhere"):
        engine.connect()
    assert [str(circuit.state) for circuit in client.circuits.values()] == ["open", "open"]
    with pytest.raises(DatabaseOpenException):
        engine.connect()
    client.circuits["read"].reset()
    with pytest.raises(exc.OperationalError, match="nowhere"):
        engine.connect()


def test_a_lost_connection_and_a_failed_commit(
    client: DatabaseClient, engine: Engine, postgres: Postgres
) -> None:
    with failing(exc.OperationalError, Session(engine)) as session:
        terminate(postgres, session)
        session.execute(text("SELECT 1"))
    assert counts(client, "read") == (1, 1, 0)
    with failing(exc.OperationalError, Session(engine)) as session:
        session.execute(text("INSERT INTO cats VALUES (1)"))
        terminate(postgres, session)
        session.commit()
    assert counts(client, "write") == (1, 1, 0), "the commit has failed, too"


def test_times(start: Start, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_limits, "GRACE", 0.05)
    client = start(read_timeout=0.2, write_timeout=0.1)
    client.protect(engine)
    with pytest.raises(QueryTimeout, match=r"0\.2 s"), engine.connect() as connection:
        connection.execute(text("SELECT pg_sleep(30)"))
    with engine.connect() as connection:
        pid = connection.execute(text(PID)).scalar_one()
        with stopped(pid), pytest.raises(QueryTimeout):
            connection.execute(text("SELECT 1"))
    assert counts(client, "read") == (1, 2, 0)


def test_sqlite_and_rows_that_are_fetched_later(start: Start, lite: str) -> None:
    client = start(read_timeout=0.1)
    engine = client.protect(create_engine(lite))
    with pytest.raises(QueryTimeout), engine.connect() as connection:
        connection.execute(text(ENDLESS)).all()
    assert counts(client, "read")[1] == 1
    engine.dispose()


def test_pools_and_threads(start: Start, url: str) -> None:
    client = start()
    engine = client.protect(create_engine(url.replace(":", "+psycopg:", 1), poolclass=NullPool))

    def work() -> None:
        for _ in range(5):
            with Session(engine) as session:
                session.execute(select(Cat)).all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(client, "read") == (20, 0, 0)


def test_a_probe_closes_a_circuit(start: Start, engine: Engine) -> None:
    client = start(**BRITTLE | {"timeout": 0.001})
    client.protect(engine)
    client.circuits["read"].acquire().failure()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert str(client.circuits["read"].state) == "closed"


async def test_an_engine_of_asyncio(start: Start, url: str) -> None:
    client = start(**BRITTLE | {"timeout": 0.001})
    engine = client.protect(create_async_engine(url.replace(":", "+psycopg:", 1)))
    client.circuits["read"].acquire().failure()
    async with engine.connect() as connection:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CircuitBreaker, "acquire", lambda _: pytest.fail("it may block"))
            await connection.execute(text("SELECT 1"))
        assert str(client.circuits["read"].state) == "closed"
        with pytest.raises(exc.ProgrammingError):
            await connection.execute(text("SELECT nothing"))
        await connection.rollback()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.execute(text("SELECT pg_sleep(30)")), 0.1)
    assert counts(client, "read") == (2, 1, 1), "what is cancelled says nothing"
    await engine.dispose()


def test_a_closed_client_listens_no_more(client: DatabaseClient, engine: Engine) -> None:
    client.close()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    assert counts(client, "read") == (0, 0, 0)
    client.close()
