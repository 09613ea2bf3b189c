"""Attempts that are made again, results that are kept, and a service that only reads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, exc, insert, select, text
from sqlalchemy.orm import Session

from distributed_breaker.clients.database import (
    DatabaseClient,
    DatabaseOpenException,
    QueryTimeout,
)
from distributed_breaker.clients.database_sessions import Sessions
from scripts.postgres import Postgres
from tests.database.conftest import BRITTLE, Start, counts
from tests.database.test_queries import CATS, Cat
from tests.unit.clock import wait_until

Ask = Callable[..., Any]


def blocking(client: DatabaseClient, statement: Any, *args: Any, **kwargs: Any) -> Any:
    return client.execute_query(statement, *args, **kwargs)


def on_a_loop(client: DatabaseClient, statement: Any, *args: Any, **kwargs: Any) -> Any:
    async def main() -> Any:
        try:
            return await client.execute_query_async(statement, *args, **kwargs)
        finally:
            await client.aclose()

    return asyncio.run(main())


@pytest.fixture
def client(start: Start, url: str) -> DatabaseClient:
    client = start(url, **BRITTLE)
    client.execute_query("INSERT INTO cats VALUES (1, 'Tom'), (2, 'Kit')")
    return client


# ---------------------------------------------------------------------------- kept results


@pytest.mark.parametrize("ask", [blocking, on_a_loop])
@pytest.mark.parametrize(
    ("statement", "params"),
    [
        ("SELECT id, name FROM cats WHERE id = :id AND name LIKE '%o%'", {"id": 1}),
        (select(CATS).where(CATS.c.id == 1), None),
        (select(Cat.id, Cat.name).where(Cat.id.in_([1, 7])), None),
    ],
)
def test_a_kept_result_answers_while_the_circuit_is_open(
    client: DatabaseClient, statement: Any, params: Any, ask: Ask
) -> None:
    rows = ask(client, statement, params, read_only=True)
    assert (rows, rows.stale, rows.age) == ([{"id": 1, "name": "Tom"}], False, None)
    client.circuits["read"].force_open()
    kept = ask(client, statement, params, read_only=True)
    assert (kept, kept.stale) == (rows, True)
    assert 0 <= kept.age < 60
    assert client.stats()["served_stale"] == 1
    assert client.circuits["read"].snapshot().totals["fallbacks"] == 1
    if params:
        with pytest.raises(DatabaseOpenException):
            ask(client, statement, {"id": 2}, read_only=True)


def test_what_is_kept_is_said(start: Start, url: str, client: DatabaseClient) -> None:
    asked = {
        "SELECT 1 AS one": {"cache": True},
        "SELECT 2 AS two": {},
        "SELECT 3 AS three": {"read_only": True, "cache": False},
        select(Cat): {"cache": True},  # objects belong to a session
    }
    off = start(url, enable_cache_fallback=False)
    for one in (client, off):
        for statement, how in asked.items():
            one.execute_query(statement, **how)
        one.circuits["read"].force_open()
    assert client.execute_query("SELECT 1 AS one", cache=True).stale
    for one in (client, off):
        for statement, how in list(asked.items())[one is client :]:
            with pytest.raises(DatabaseOpenException):
                one.execute_query(statement, **how)


def test_the_attempt_that_opens_the_circuit_is_answered_too(
    client: DatabaseClient, postgres: Postgres, schema: str
) -> None:
    rows = client.execute_query("SELECT name FROM cats", read_only=True)
    terminate(postgres, schema)
    kept = client.execute_query("SELECT name FROM cats", read_only=True)
    assert (kept, kept.stale) == (rows, True)
    assert client.circuits["read"].state == "open"


def test_what_is_written_is_kept_no_longer(start: Start, url: str, schema: str) -> None:
    client = start(url)
    reading = client.circuits["read"]

    def kept() -> bool:
        reading.force_open()
        try:
            return bool(client.execute_query("SELECT count(*) FROM cats", read_only=True).stale)
        except DatabaseOpenException:
            return False
        finally:
            reading.reset()

    def by_a_session() -> None:
        with client.transaction() as session:
            session.add(Cat(id=5, name="Mia"))

    def by_an_error() -> None:
        with pytest.raises(exc.IntegrityError):
            client.execute_query("INSERT INTO cats VALUES (5, 'again')")

    client.execute_query("CREATE TABLE dogs (id int)")
    for write, expected in (
        (lambda: client.execute_query("INSERT INTO dogs VALUES (1)"), True),
        (lambda: client.execute_query("INSERT INTO cats VALUES (3, 'Rex')"), False),
        (lambda: client.execute_query(insert(CATS).values(id=4)), False),
        (by_a_session, False),
        (by_an_error, False),
        (lambda: client.execute_query("DO 'BEGIN END'"), False),
    ):
        client.execute_query("SELECT count(*) FROM cats", read_only=True)
        assert kept()
        write()
        assert kept() is expected
    client.execute_query("SELECT count(*) FROM cats", read_only=True)
    client.close()
    again = start(url, **BRITTLE)
    again.circuits["read"].force_open()
    rows = again.execute_query("SELECT count(*) FROM cats", read_only=True)
    assert rows[0]["count"] == 3, "another process of the host, or a later one"


# ---------------------------------------------------------------------------- another attempt


def terminate(postgres: Postgres, schema: str) -> None:
    """End all connections of a test's client, which wait in its pool."""
    with postgres.connect() as connection:
        mine = f"application_name = '{schema}'"
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")
        wait_until(
            lambda: (
                not connection.execute(f"SELECT 1 FROM pg_stat_activity WHERE {mine}").fetchall()
            )
        )


def test_a_read_is_tried_again(start: Start, url: str, postgres: Postgres, schema: str) -> None:
    client = start(url, max_retries=2)
    client.execute_query("SELECT 1")
    terminate(postgres, schema)
    assert client.execute_query("SELECT 2 AS two") == [{"two": 2}]
    assert client.stats()["retries"] == 1
    assert counts(client, "read") == (2, 1, 0), "every attempt is an outcome"


async def test_a_read_on_a_loop_is_tried_again(
    start: Start, url: str, postgres: Postgres, schema: str
) -> None:
    client = start(url, max_retries=2)
    await client.execute_query_async("SELECT 1")
    terminate(postgres, schema)
    assert await client.execute_query_async("SELECT 2 AS two") == [{"two": 2}]
    assert client.stats()["retries"] == 1
    assert counts(client, "read") == (2, 1, 0)
    await client.aclose()


def test_a_write_that_may_have_been_sent_is_not(
    start: Start, url: str, postgres: Postgres, schema: str
) -> None:
    client = start(url, max_retries=2)
    client.execute_query("INSERT INTO cats VALUES (1, 'Tom')")
    terminate(postgres, schema)
    with pytest.raises(exc.OperationalError):
        client.execute_query("INSERT INTO cats VALUES (2, 'Kit')")
    assert client.stats()["retries"] == 0
    assert client.execute_query("SELECT count(*) FROM cats") == [{"count": 1}]


def test_a_write_without_a_connection_is_tried_again(start: Start, postgres: Postgres) -> None:
    tried = []

    def connect() -> Any:
        tried.append(1)
        if len(tried) < 3:
            raise psycopg.OperationalError("not yet")
        return postgres.connect()

    engine = create_engine("postgresql+psycopg://", creator=connect)
    client = start(engine, max_retries=2)
    assert client.execute_query("CREATE TEMPORARY TABLE t (id int)") == 0
    assert (len(tried), client.stats()["retries"]) == (3, 2)
    assert counts(client, "write") == (1, 2, 0)
    engine.dispose()


@pytest.mark.parametrize(
    "section", [{"max_retries": 0}, {"max_retries": 2, "failure_threshold": 1}]
)
def test_attempts_are_bounded_by_number_and_circuit(start: Start, section: Any) -> None:
    client = start("postgresql://localhost:1/x", **section)
    with pytest.raises(exc.OperationalError) as caught:
        client.execute_query("SELECT 1")
    assert type(caught.value) is exc.OperationalError, "not a refusal"
    assert counts(client, "read") == (0, 1, 0)


def test_attempts_are_bounded_by_time_and_sense(start: Start, url: str) -> None:
    client = start(url, max_retries=20)
    with pytest.raises(QueryTimeout):
        client.execute_query("SELECT pg_sleep(20)", timeout=0.2)
    with pytest.raises(exc.ProgrammingError):
        client.execute_query("SELECT nothing")
    assert client.stats()["retries"] == 0
    away = start("postgresql://localhost:1/x", max_retries=20)
    begun = time.monotonic()
    with pytest.raises(exc.OperationalError):
        away.execute_query("SELECT 1", timeout=0.3)
    assert time.monotonic() - begun < 5


# ---------------------------------------------------------------------------- reading only


def test_reading_only_by_hand(client: DatabaseClient) -> None:
    client.enter_read_only(reason="maintenance")
    assert client.read_only
    with pytest.raises(DatabaseOpenException):
        client.execute_query("DELETE FROM cats RETURNING id")
    with pytest.raises(DatabaseOpenException), client.transaction():
        raise AssertionError
    assert client.execute_query("SHOW transaction_read_only") == [{"transaction_read_only": "on"}]
    with client.transaction(read_only=True) as session:
        assert isinstance(session, Session)
        assert session.scalar(text("SELECT count(*) FROM cats")) == 2
    client.leave_read_only()
    assert client.execute_query("DELETE FROM cats") == 2
    assert not client.read_only
    assert client.execute_query("SHOW transaction_read_only") == [{"transaction_read_only": "off"}]


def test_slow_queries_end_writing(start: Start, url: str) -> None:
    client = start(url, slow_query_threshold=0.05, minimum_calls=2, timeout=60.0)
    slow = "INSERT INTO cats SELECT :id, 'x' FROM pg_sleep(0.1) WHERE 'Tom' <> $$4711$$"
    for number in range(2):
        assert client.execute_query(slow, {"id": number}) == 1
        client.execute_query("SELECT pg_sleep(0.1)")
    assert client.read_only
    with pytest.raises(DatabaseOpenException):
        client.execute_query(f"{slow} RETURNING id", {"id": 3})
    assert len(client.execute_query("SELECT * FROM cats")) == 2, "reads go on"
    found = client.stats()["slow_queries"]
    assert found["count"] == 4
    assert [one["times"] for one in found["texts"].values()] == [2, 2]
    assert "INSERT INTO cats" in "".join(found["texts"])
    assert not any(value in str(found) for value in ("Tom", "4711", "0.1)"))
    off = start(url, slow_query_threshold=0.05, enable_query_analysis=False)
    off.execute_query("SELECT pg_sleep(0.1)")
    assert off.stats()["slow_queries"]["count"] == 0
    still = start(url, enable_read_only_fallback=False, **BRITTLE)
    still.circuits["write"].force_open()
    assert not still.read_only
    assert still.circuits["write"].policy.slow_call_duration is None


# ---------------------------------------------------------------------------- a replica


@pytest.fixture
def replica(postgres: Postgres) -> str:
    """The URL of what stands for a replica: another schema, whose cats have other names."""
    with postgres.connect() as connection:
        connection.execute("DROP SCHEMA IF EXISTS replica CASCADE")
        connection.execute("CREATE SCHEMA replica")
        connection.execute("CREATE TABLE replica.cats AS SELECT 1 AS id, 'Twin'::text AS name")
    return postgres.url("replica")


@pytest.mark.parametrize("ask", [blocking, on_a_loop])
def test_reads_go_to_the_replica(
    start: Start, url: str, replica: str, postgres: Postgres, ask: Ask
) -> None:
    client = start(url, read_url=replica, timeout=60.0)
    client.execute_query("INSERT INTO cats VALUES (1, 'Tom')")
    assert list(client.circuits) == ["replica", "read", "write"]
    assert ask(client, "SELECT name FROM cats") == [{"name": "Twin"}]
    with client.transaction(read_only=True) as session:
        assert session.scalar(text("SELECT name FROM cats")) == "Tom", "it sees the latest"
    with client.transaction():
        assert client.execute_query("SELECT name FROM cats") == [{"name": "Tom"}]
    assert counts(client, "replica") == (1, 0, 0)
    client.circuits["replica"].force_open()
    assert ask(client, "SELECT name FROM cats") == [{"name": "Tom"}]
    assert client.stats()["retries"] == 0
    with pytest.raises(exc.ProgrammingError):
        ask(client, "SELECT nothing FROM cats")


def test_what_the_replica_cannot_answer_is_asked_of_the_database(
    start: Start, url: str, postgres: Postgres, replica: str
) -> None:
    client = start(url, read_url=replica)
    client.execute_query("INSERT INTO cats VALUES (1, 'Tom')")
    assert client.execute_query(select(CATS.c.name)) == [{"name": "Twin"}]
    terminate(postgres, "replica")
    assert client.execute_query(select(CATS.c.name)) == [{"name": "Tom"}]
    assert counts(client, "replica") == (1, 1, 0)
    assert counts(client, "read") == (1, 0, 0)
    with pytest.raises(exc.ProgrammingError):
        client.execute_query("SELECT nothing FROM cats")
    assert counts(client, "read") == (1, 0, 0), "a mistake is not made twice"


def test_a_session_that_has_begun_sees_its_own_writes(start: Start, url: str, replica: str) -> None:
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with Session(engine) as session:
        client = start(session, read_url=replica)
        assert client.execute_query("SELECT name FROM cats") == [{"name": "Twin"}]
        session.execute(insert(CATS).values(id=1, name="Tom"))
        assert client.execute_query("SELECT name FROM cats") == [{"name": "Tom"}]
    engine.dispose()


def test_threads_share_one_pool_of_the_replica(
    start: Start, lite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned: those that came first at once had one each, and all but one were never closed."""
    client = start(lite, read_url=lite)
    both, use = threading.Barrier(2), Sessions.use

    def together(sessions: Sessions, source: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        use(sessions, source)

    monkeypatch.setattr(Sessions, "use", together)

    def found() -> Sessions:
        attempts = client._attempts("SELECT 1", None, False, None, None, None, is_async=False)
        return client._sessions_of(attempts)

    with ThreadPoolExecutor(2) as pool:
        one, other = [asked.result() for asked in (pool.submit(found), pool.submit(found))]
    assert one is other
