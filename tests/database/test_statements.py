"""Which statements read, and which write or may write."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Sequence,
    Table,
    column,
    delete,
    func,
    insert,
    literal,
    select,
    table,
    text,
    union,
    update,
    values,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateTable

from distributed_breaker.clients.database_statements import LONGEST, reads

CATS = Table("cats", MetaData(), Column("id", Integer))
WRITING = insert(CATS).values(id=1).returning(CATS.c.id)


class Base(DeclarativeBase):
    pass


class Cat(Base):
    __tablename__ = "cat"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize(
    "statement",
    [
        select(CATS),
        select(Cat).where(Cat.id == 1),
        select(func.count()).select_from(CATS),
        select(CATS).where(text("id < now()")),
        select(CATS.c.id).where(CATS.c.id.in_(select(select(CATS.c.id).cte().c.id))),
        union(select(CATS), select(CATS)),
        values(column("a", Integer), name="v").data([(1,)]).select(),
        select(Cat).from_statement(text("SELECT id FROM cat")),
        text("SELECT id FROM cats").columns(CATS.c.id),
        func.now(),
        Session().query(Cat).filter(Cat.id == 5),
        table("cats", column("id")).select(),
        select(literal(1)),
    ],
)
def test_what_sqlalchemy_knows_to_read(statement: Any) -> None:
    assert reads(statement, "postgresql")


@pytest.mark.parametrize(
    "statement",
    [
        insert(CATS),
        update(Cat).values(id=1),
        delete(CATS),
        WRITING,
        select(WRITING.cte()),
        select(CATS).where(CATS.c.id.in_(select(WRITING.cte().c.id))),
        select(CATS).with_for_update(),
        select(CATS).with_for_update(read=True),
        select(func.nextval("numbers")),
        select(Sequence("numbers").next_value()),
        Sequence("numbers"),
        select(text("DELETE FROM cats RETURNING id").columns(CATS.c.id).cte()),
        select(Cat).from_statement(text("DELETE FROM cat RETURNING id")),
        select(Cat).from_statement(insert(Cat).returning(Cat)),
        text("DELETE FROM cats RETURNING id").columns(CATS.c.id),
        select(CATS).where(text("id = nextval('numbers')")),
        CreateTable(CATS),
        Session().query(Cat).with_for_update(),
        object(),
    ],
)
def test_what_sqlalchemy_knows_to_write(statement: Any) -> None:
    assert not reads(statement, "postgresql")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "  -- DELETE\n /* update /* nested */ x */ select id::text from cats where a @> :b",
        "(SELECT 1) UNION (SELECT 2);",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "VALUES (1), (2)",
        "TABLE cats",
        "EXPLAIN ANALYZE SELECT 1",
        "SHOW search_path",
        "SELECT 'DELETE FROM cats'",
        "SELECT $$DELETE$$, $x$UPDATE$x$, E'it\\'s DELETE'",
        'SELECT "delete" FROM cats',
        "SELECT deleted, updated_at, inserted FROM cats",
        "SELECT * FROM cats WHERE id = %(id)s AND name LIKE %s",
        "SELECT replace(name, 'a', 'b') FROM cats",
        "SELECT 1; SELECT 2",
    ],
)
def test_text_that_reads(sql: str) -> None:
    assert reads(sql, "postgresql")
    assert reads(text(sql), "postgresql")


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO cats VALUES (1)",
        "update cats set id = 1",
        "WITH x AS (DELETE FROM cats RETURNING *) SELECT * FROM x",
        "/* SELECT */ DELETE FROM cats",
        "SELECT 1; DROP TABLE cats",
        "SELECT 1; VACUUM",
        "SELECT * INTO copy FROM cats",
        "SELECT * FROM cats FOR UPDATE",
        "SELECT * FROM cats FOR NO KEY UPDATE",
        "SELECT * FROM cats FOR SHARE",
        "SELECT nextval('numbers')",
        "SELECT pg_catalog.setval('numbers', 1)",
        "SELECT \"nextval\"('numbers')",
        "EXPLAIN ANALYZE DELETE FROM cats",
        "EXPLAIN ANALYZE EXECUTE plan",
        "MERGE INTO cats USING dogs ON true WHEN MATCHED THEN DO NOTHING",
        "CALL anything()",
        "DO $$ BEGIN NULL; END $$",
        "COPY cats TO STDOUT",
        "SET search_path = x",
        "PRAGMA user_version",
        "VACUUM",
        "COMMIT",
        "",
        ";",
        "-- nothing",
        "SELECT 'without an end",
        "hello",
    ],
)
def test_text_that_writes_or_cannot_be_told(sql: str) -> None:
    assert not reads(sql, "postgresql")


@pytest.mark.parametrize("dialect", ["sqlite", "mysql", "oracle", "mssql", "", "unheard of"])
def test_other_dialects(dialect: str) -> None:
    assert reads("SELECT a FROM b WHERE c = 'x;y'", dialect)
    assert not reads("DELETE FROM b", dialect)


def test_mysqls_comments_that_are_carried_out() -> None:
    assert not reads("SELECT 1 /*! ; DELETE FROM cats */", "mysql")
    assert not reads("SELECT * FROM cats LOCK IN SHARE MODE", "mysql")


def test_text_is_neither_kept_without_bound_nor_logged(caplog: pytest.LogCaptureFixture) -> None:
    from distributed_breaker.clients import database_statements as module

    caplog.set_level(logging.DEBUG)
    assert reads(f"SELECT '{'x' * LONGEST}'", "postgresql")
    for number in range(module.MOST_REMEMBERED + 10):
        reads(f"SELECT {number}", "postgresql")
    assert module._remembered.cache_info().currsize == module.MOST_REMEMBERED
    assert not reads("GARBAGE secret 'x", "postgresql")
    assert caplog.text == ""
