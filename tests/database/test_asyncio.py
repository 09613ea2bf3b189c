"""The same on an event loop: twins of the calls, sources, errors, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import create_engine, exc, func, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from distributed_breaker.clients.database import (
    DatabaseOpenException,
    QueryTimeout,
    ReadOnlyViolation,
)
from tests.database.conftest import BRITTLE, Start, counts, failing_async
from tests.database.test_queries import Cat
from tests.database.test_timeouts import ENDLESS, PID, stopped


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url.replace(":", "+psycopg:", 1))
    yield engine
    await engine.dispose()


@pytest.mark.parametrize("given", ["session", "scoped", "maker", "engine", "url", "sqlite"])
async def test_all_that_sessions_come_from(
    start: Start, engine: AsyncEngine, url: str, lite: str, given: str
) -> None:
    session = AsyncSession(engine, expire_on_commit=False)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    sources: dict[str, Any] = {
        "session": session, "scoped": async_scoped_session(maker, asyncio.current_task),
        "maker": maker, "engine": engine, "url": url, "sqlite": lite,
    }  # fmt: skip
    client = start(sources[given])
    run = client.execute_query_async
    assert await run("INSERT INTO cats VALUES (:id, 'Tom')", {"id": 1}) == 1
    async with client.transaction_async() as inside:
        inside.add(Cat(id=2, name="Tim"))
        assert await run(select(func.count().label("n")).select_from(Cat)) == [{"n": 2}]
    (cat,) = await run(select(Cat).where(Cat.id == 2), read_only=True)
    assert cat.name == "Tim"
    legacy = Session().query(Cat).filter(Cat.id == 1)
    assert (await run(legacy))[0].name == "Tom"
    assert counts(client, "write") == (2, 0, 0)
    assert counts(client, "read") == (2, 0, 0)
    with pytest.raises(ReadOnlyViolation):
        await run("DELETE FROM cats", read_only=True)
    async with failing_async(ZeroDivisionError, client.transaction_async()):
        await run("DELETE FROM cats")
        async with client.transaction_async():
            await run("SELECT 1")
        raise ZeroDivisionError
    assert len(await run("SELECT * FROM cats")) == 2
    if given == "scoped":
        await sources[given].remove()
    await session.close()
    await client.aclose()


async def test_failures_and_refusals(start: Start) -> None:
    client = start("postgresql://postgres@/postgres?host=/nowhere", **BRITTLE)
    with pytest.raises(exc.OperationalError):
        await client.execute_query_async("SELECT 1")
    with pytest.raises(DatabaseOpenException):
        await client.execute_query_async("SELECT 1")
    with pytest.raises(exc.OperationalError):
        async with client.transaction_async():
            pytest.fail("it ran without a connection")
    with pytest.raises(DatabaseOpenException):
        async with client.transaction_async():
            pytest.fail("it ran though the circuit is open")
    await client.aclose()


async def test_timeouts(start: Start, url: str, lite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_breaker.clients.database_limits.GRACE", 0.05)
    client, other = start(url), start(lite)
    run = client.execute_query_async
    with pytest.raises(QueryTimeout):
        await run("SELECT pg_sleep(30)", timeout=0.1)
    with pytest.raises(QueryTimeout):
        await other.execute_query_async(ENDLESS, timeout=0.1)
    assert await other.execute_query_async("SELECT 1 AS one") == [{"one": 1}]
    with stopped((await run(PID))[0]["pid"]), pytest.raises(QueryTimeout):
        await run("SELECT 1", timeout=0.1)
    assert await run("SELECT 1 AS one") == [{"one": 1}]
    assert counts(client, "read") == (2, 2, 0)
    await client.aclose()
    await other.aclose()


async def test_a_cancelled_call_is_ignored_and_its_connection_given_back(
    start: Start, url: str
) -> None:
    client = start(url)

    async def slow() -> None:
        async with client.transaction_async() as session:
            await session.execute(text("SELECT pg_sleep(30)"))

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(slow(), 0.1)
    assert counts(client, "write") == (0, 0, 1)
    pool = client.stats()["pool"]
    assert pool["checked_out"] == 0
    await client.aclose()


async def test_a_task_that_is_started_within_a_transaction_is_no_part_of_it(
    start: Start, url: str
) -> None:
    client = start(url)

    async def write() -> Any:
        return await client.execute_query_async("INSERT INTO cats VALUES (1)")

    async with failing_async(ZeroDivisionError, client.transaction_async()):
        await asyncio.create_task(write())
        raise ZeroDivisionError
    assert await client.execute_query_async("SELECT id FROM cats") == [{"id": 1}]
    await client.aclose()


async def test_the_other_kind_of_calls_is_refused_with_a_hint(
    start: Start, engine: AsyncEngine, url: str
) -> None:
    with pytest.raises(TypeError, match="AsyncEngine, so only the methods ending in _async"):
        start(engine).execute_query("SELECT 1")
    blocking = create_engine(url.replace(":", "+psycopg:", 1))
    with pytest.raises(TypeError, match="Engine, so only execute_query and transaction"):
        await start(blocking).execute_query_async("SELECT 1")


def test_event_loops_have_engines_of_their_own(start: Start, url: str) -> None:
    client = start(url)

    async def use() -> Any:
        try:
            return await client.execute_query_async("SELECT 1 AS one")
        finally:
            await client.aclose()

    for _ in range(2):
        assert asyncio.run(use()) == [{"one": 1}]
    assert client.execute_query("SELECT 2 AS two") == [{"two": 2}]


def test_nothing_is_kept_for_loops_that_have_ended(start: Start, url: str) -> None:
    client = start(create_async_engine(url.replace(":", "+psycopg:", 1), poolclass=NullPool))
    loops = [asyncio.new_event_loop() for _ in range(3)]
    for loop in loops:
        loop.run_until_complete(client.execute_query_async("SELECT 1"))
        loop.close()
    assert len(client._sessions._makers) == 1, "though the loops themselves are still there"
