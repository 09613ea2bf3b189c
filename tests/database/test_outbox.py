"""Writes that wait while the write circuit is open: each is carried out once, and in order."""

from __future__ import annotations

import asyncio
import datetime
import enum
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from sqlalchemy import (
    JSON,
    Column,
    ColumnDefault,
    DateTime,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    TextClause,
    Uuid,
    bindparam,
    create_engine,
    delete,
    exc,
    func,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from typer.testing import CliRunner

from distributed_breaker.cli.app import app
from distributed_breaker.clients.database import DatabaseClient, DatabaseOpenException, Written
from distributed_breaker.clients.database_replay import KEPT, TABLE
from distributed_breaker.clients.database_statements import only_changes
from distributed_breaker.clients.database_values import NotKept, decode, encode
from distributed_breaker.fallback.outbox import OutboxError, Replayed
from distributed_breaker.services import Services
from scripts.postgres import Postgres, why_missing
from tests.database.conftest import BRITTLE, Start
from tests.database.test_timeouts import stopped
from tests.fleet.process import BOUND, ROOT
from tests.required import need
from tests.unit.clock import wait_until

NAME = "api.database"
ADD = "INSERT INTO log (word) VALUES (:word)"


@pytest.fixture(params=["postgresql", "sqlite"])
def place(request: pytest.FixtureRequest) -> str:
    """A database with a table in which the order of rows can be seen."""
    found: str = request.getfixturevalue("url" if request.param == "postgresql" else "lite")
    return with_log(found)


@pytest.fixture
def server(url: str) -> str:
    return with_log(url)


def with_log(place: str) -> str:
    number = "serial" if place.startswith("postgresql") else "integer"
    engine = create_engine(psycopg3(place))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE log (n {number} PRIMARY KEY, word text)"))
    engine.dispose()
    return place


def psycopg3(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def open_it(client: DatabaseClient) -> None:
    client.circuits["write"].force_open(actor="test", reason="test")


def let_go(client: DatabaseClient) -> None:
    """Let the circuit close; what waits is carried out by itself."""
    client.circuits["write"].release(actor="test", reason="test")


def nothing_waits(client: DatabaseClient) -> None:
    wait_until(lambda: client.outbox.waiting(NAME) == 0)


def words(client: DatabaseClient) -> list[str]:
    return [row["word"] for row in client.execute_query("SELECT word FROM log ORDER BY n")]


def add(client: DatabaseClient, *named: str) -> list[Written]:
    return [client.execute_query(ADD, {"word": word}) for word in named]


# ---------------------------------------------------------------------------- what is kept

PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.decimals() | st.uuids()
    | st.datetimes(timezones=st.just(datetime.timezone(datetime.timedelta(hours=-3, minutes=7))))
)  # fmt: skip
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    again = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    # Which of two equal times one is, no database asks.
    assert repr(again) == repr(value).replace(", fold=1", "")


def test_values_that_are_nearly_plain() -> None:
    class Markup(str):
        pass

    assert type(encode(Markup("<b>"))) is str
    assert decode(encode(bytearray(b"\0a"))) == decode(encode(memoryview(b"\0a"))) == b"\0a"
    for value in (object(), {1, 2}, enum.Enum("Size", "small").small):  # type: ignore[attr-defined]
        with pytest.raises(NotKept, match=f"is a {type(value).__name__}, which cannot be kept"):
            encode([value])


@pytest.mark.parametrize(
    ("statement", "may"),
    [
        ("INSERT INTO t VALUES (:a, 'returning; x')", True),
        ("insert into t select * from u;", True),
        ("WITH a AS (SELECT 1) UPDATE t SET x = (SELECT 1) WHERE y IN :returning", True),
        ("DELETE FROM t USING u WHERE t.a = u.a -- returning", True),
        ("MERGE INTO t USING u ON t.a = u.a WHEN MATCHED THEN DELETE", True),
        ("INSERT INTO t VALUES (1) RETURNING a", False),
        ("WITH a AS (DELETE FROM t RETURNING x) SELECT * FROM a", False),
        ("WITH a AS (SELECT 1) SELECT a FROM a FOR UPDATE", False),
        ("DELETE FROM t; DELETE FROM u", False),
        ("SELECT * FROM t FOR UPDATE", False),
        ("CREATE TABLE t (a int)", False),
        ("TRUNCATE t", False),
        ("CALL f()", False),
        ("COMMIT", False),
        ("", False),
        ("DELETE FROM t WHERE a = 'x", False),
    ],
)
def test_which_statements_may_wait(statement: str, may: bool) -> None:
    for dialect in ("postgresql", "sqlite"):
        assert only_changes(text(statement), dialect) is may


# ---------------------------------------------------------------------------- all the same


class Base(DeclarativeBase):
    pass


class Mood(enum.Enum):
    calm = "c"
    wild = "w"


class Bird(Base):
    """Whose attributes are called otherwise than its columns, with defaults of all kinds."""

    __tablename__ = "birds"
    number: Mapped[int] = mapped_column("id", primary_key=True)
    name: Mapped[str] = mapped_column("called", default="nobody")
    facts: Mapped[Any | None] = mapped_column(
        "facts", JSON, default=lambda: {"legs": 2, ":b": "5%"}
    )
    mood: Mapped[Mood] = mapped_column("mood", Enum(Mood), default=Mood.calm)
    born: Mapped[Any | None] = mapped_column("born", DateTime, default=lambda: next(Bird.times))
    changed: Mapped[Any | None] = mapped_column("changed", Integer, onupdate=lambda: 7)
    price: Mapped[Any | None] = mapped_column("price", Numeric(8, 2))
    photo: Mapped[Any | None] = mapped_column("photo", LargeBinary)
    ring: Mapped[Any | None] = mapped_column("ring", Uuid)
    times: ClassVar[Iterator[datetime.datetime]]
    length: Mapped[Any | None] = mapped_column("length", Integer, default=func.length("abc"))
    eggs: Mapped[Any | None] = mapped_column("eggs", Integer, server_default=text("4"))


class Heir(Base):
    """One table for several classes."""

    __tablename__ = "heirs"
    number: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str | None]
    __mapper_args__: ClassVar[dict[str, str]] = {"polymorphic_on": "kind"}


BIRDS: Any = Bird.__table__
RING = uuid.UUID(int=5)
LOG = Table("log", MetaData(), Column("n", Integer, primary_key=True), Column("word", String))
STATEMENTS: list[tuple[Any, Any]] = [
    (insert(Bird).values(number=1, name="Tit: 5% 'a' :b %(c)s", ring=RING, photo=b"\0\xff"), None),
    (insert(Bird), {"number": 2, "mood": Mood.wild, "facts": [1, {"x": None}]}),
    (insert(BIRDS), [{"id": 3, "called": "Ted"}, {"id": 4, "called": "%s"}]),
    (insert(Bird), [{"number": 5, "price": Decimal("1.50")}, {"number": 6, "price": None}]),
    (insert(Bird).values([{"number": 7}, {"number": 8}]), None),
    (insert(BIRDS).from_select(["id", "called"], select(BIRDS.c.id + 10, literal("x:y"))), None),
    (update(Bird).where(Bird.number.in_([1, 2, 5])).values(price=Decimal("2.25"), facts={}), None),
    (update(Bird).where(Bird.number == bindparam("who")), {"who": 2, "called": "by name"}),
    (update(Bird).where(Bird.number == 3).values(eggs=Bird.eggs + 1, born=None), None),
    (delete(Bird).where(Bird.number == 4, Bird.facts["legs"].as_integer() == 2), None),
    (text(r"UPDATE birds SET called = '\:no' || :x || ' 50% \:y' || :z WHERE id = 5").bindparams(
        z="z"), {"x": "x"}),
    (text("UPDATE birds SET eggs = 0 WHERE id IN :ids").bindparams(
        bindparam("ids", expanding=True)), {"ids": [5, 6]}),
    (text("UPDATE birds SET facts = :f, born = :b WHERE id = 7").bindparams(
        bindparam("f", type_=JSON), bindparam("b", type_=DateTime)),
        {"f": {"a": ["ü"]}, "b": datetime.datetime(2020, 1, 2, 3, 4, 5, 6)}),
    (text("DELETE FROM birds WHERE id = :id"), [{"id": 17}, {"id": 18}]),
    ("UPDATE birds SET called = 'no parameters 100%' WHERE id = 8", None),
]  # fmt: skip


@pytest.mark.parametrize("how", ["postgresql", "sqlite", "async", "translated"])
def test_what_waited_changes_what_it_would_have_changed_at_once(
    start: Start, request: pytest.FixtureRequest, how: str
) -> None:
    place = request.getfixturevalue("lite" if how == "sqlite" else "url")
    options = {"schema_translate_map": {None: "other"}} if how == "translated" else {}
    engine = create_engine(psycopg3(place), execution_options=options)
    if options:
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA IF EXISTS other CASCADE"))
            connection.execute(text("CREATE SCHEMA other"))
    Base.metadata.create_all(engine)
    source: Any = create_async_engine(psycopg3(place)) if how == "async" else engine
    client = start(source)

    def execute(statement: Any, params: Any) -> Any:
        if how == "async":
            return runner.run(client.execute_query_async(statement, params))
        return client.execute_query(statement, params)

    changed: list[int] = []

    def outcome(*, waits: bool) -> list[Any]:
        Bird.times = iter(datetime.datetime(2026, 1, day) for day in range(1, 29))
        for statement, params in STATEMENTS:
            if options and isinstance(statement, str | TextClause):
                continue  # text says itself which schema it means
            written = execute(statement, params)
            assert written.queued is waits, statement
            changed.append(int(written))
        let_go(client)
        nothing_waits(client)
        with engine.begin() as connection:
            found = connection.execute(select(BIRDS).order_by(BIRDS.c.id)).all()
            connection.execute(delete(BIRDS))
        return list(found)

    with asyncio.Runner() as runner:
        at_once = outcome(waits=False)
        open_it(client)
        later = outcome(waits=True)
        runner.run(client.aclose())
        if how == "async":
            runner.run(source.dispose())
    assert len(at_once) > 8
    if not options:
        assert changed[:15] == [1, 1, 2, 2, 2, 8, 3, 1, 1, 1, 1, 2, 1, 2, 1]
    assert later == at_once
    assert client.problems() == []
    engine.dispose()


# ---------------------------------------------------------------------------- coming back


def test_writes_wait_and_are_carried_out_in_order(start: Start, place: str) -> None:
    client = start(place)
    assert repr(add(client, "at once")[0]) == "1"
    open_it(client)
    first, _, last = [*add(client, *"ab"), client.execute_query(insert(LOG).values(word="c"))]
    assert (first, first.queued, bool(first)) == (0, True, False)
    assert first.key is not None
    assert first.key != last.key
    assert client.execute_query("UPDATE log SET word = word || '!' WHERE word != 'a'").queued
    assert words(client) == ["at once"], "reads go on"
    entries = client.outbox.entries()
    assert entries[0].key == first.key
    assert [entry.kind for entry in entries] == [*["INSERT LOG"] * 3, "UPDATE LOG"]
    let_go(client)
    nothing_waits(client)
    assert words(client) == ["at once!", "a", "b!", "c!"]
    keys = client.execute_query(f"SELECT key FROM {TABLE}")
    assert first.key in [row["key"] for row in keys]
    figures = client.stats()
    assert (figures["queued"], figures["replayed"], figures["outbox"]["topics"]) == (4, 4, {})
    assert client.circuits["write"].snapshot().totals["fallbacks"] == 4
    direct = add(client, "d")[0]
    assert (direct, direct.queued, direct.key) == (1, False, None)


async def test_on_an_event_loop(start: Start, place: str) -> None:
    client = start(place)
    open_it(client)
    run = client.execute_query_async
    assert [(await run(ADD, {"word": word})).queued for word in "ab"] == [True, True]
    with pytest.raises(DatabaseOpenException):
        await run(f"{ADD} RETURNING n", {"word": "x"})
    with pytest.raises(DatabaseOpenException):
        async with client.transaction_async():
            pytest.fail("it ran though the circuit is open")
    let_go(client)
    await asyncio.to_thread(nothing_waits, client)
    assert not (await run(ADD, {"word": "c"})).queued
    assert await asyncio.to_thread(words, client) == ["a", "b", "c"]
    await client.aclose()


def looks(client: DatabaseClient) -> bool:
    """Whether it looks for others that wait before it writes."""
    if client._writes is None:
        client.execute_query("SELECT 1")
    return client._writing().some_may_wait


def test_after_a_change_of_the_circuit_others_are_looked_for(start: Start, lite: str) -> None:
    client = start(lite)
    wait_until(lambda: not looks(client))
    open_it(client)
    wait_until(lambda: looks(client))


def test_what_comes_later_waits_behind(start: Start, server: str) -> None:
    """The circuit is closed, and somebody is still about to carry out what came first.  What
    cannot wait is executed all the same."""
    client, other = start(server), start(server)
    wait_until(lambda: not looks(other))
    open_it(client)
    add(client, "a")
    taken, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        taken.set()
        assert go_on.wait(BOUND)
        raise DatabaseOpenException("held")

    thread = threading.Thread(target=client.outbox.replay, args=(NAME, hold))
    thread.start()
    assert taken.wait(BOUND)
    let_go(client)
    assert add(client, "b")[0].queued
    assert asyncio.run(client.execute_query_async(ADD, {"word": "c"})).queued
    wait_until(lambda: looks(other))
    assert add(other, "d")[0].queued, "also of another process of the host"
    assert client.execute_query(f"{ADD} RETURNING word", {"word": "now"}) == [{"word": "now"}]
    with client.transaction() as session:
        session.execute(text(ADD), {"word": "too"})
    client.execute_query("INSERT INTO log (word) VALUES (:x ->> 'a')", {"x": Jsonb({"a": "x"})})
    go_on.set()
    thread.join()
    nothing_waits(client)
    assert words(client) == ["now", "too", "x", *"abcd"]


def test_what_cannot_wait_is_refused(start: Start, server: str) -> None:
    client = start(server)
    open_it(client)
    for statement in (
        f"{ADD} RETURNING n",
        insert(BIRDS).returning(BIRDS.c.id),
        "CREATE TABLE x ()",
    ):
        with pytest.raises(DatabaseOpenException) as caught:
            client.execute_query(statement, {"word": "x"})
        assert caught.value.__cause__ is None
    with pytest.raises(DatabaseOpenException), client.transaction():
        pytest.fail("it ran though the circuit is open")
    table = Table("t", MetaData(), Column("a", Integer), Column("b", JSON))
    table.c.a.default = ColumnDefault(lambda context: context.get_current_parameters()["b"])
    table.c.a.default._set_parent(table.c.a)
    heirs = insert(Heir).values(number=1)
    for statement, params, why in (
        (
            ADD,
            {"word": object()},
            "the parameter 'word' is a object, which cannot be kept on disk",
        ),
        (ADD, {"word": ["secret", {"secret"}]}, "the parameter 'word' is a set"),
        (ADD, {}, "it cannot be compiled: InvalidRequestError"),
        (ADD, {"word": "\ud800"}, "it holds text that is none"),
        (ADD, {"word": "x" * 2**20}, "it has more than 1048576 bytes: split it"),
        (ADD, [{"word": "x"}, {}], "all of several executions must have the same parameters"),
        (
            insert(table),
            {"a": 1, "b": {1}},
            "the parameter 'b' is a set, which is nothing for its",
        ),
        (insert(table), {"b": 1}, "the default of the column 'a' cannot be told before"),
        (insert(table), {"c": 1}, "it has no parameter 'c'"),
        (update(Bird).where(Bird.number == 1), {"name": "x"}, "it has no parameter 'name'"),
        (
            update(Bird),
            [{"number": 1, "name": "x"}],
            "the ORM's update by primary keys cannot wait",
        ),
        (heirs, None, "Heir has heirs or several tables: use its table"),
    ):
        with pytest.raises(DatabaseOpenException) as caught:
            client.execute_query(statement, params)
        assert str(caught.value.__cause__).startswith(why)
        assert "secret" not in str(caught.value.__cause__)
    assert client.outbox.entries() == []
    off = start(server, enable_write_queue=False)
    open_it(off)
    with pytest.raises(DatabaseOpenException):
        add(off, "x")
    assert (off.stats()["outbox"], off.problems()) == (None, [])


def test_only_what_was_never_sent_waits(start: Start, server: str, postgres: Postgres) -> None:
    client = start(server, **BRITTLE)
    pid = client.execute_query("SELECT pg_backend_pid() AS pid")[0]["pid"]
    with postgres.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    with pytest.raises(exc.OperationalError) as caught:
        add(client, "x")
    assert not isinstance(caught.value, DatabaseOpenException)
    assert client.outbox.entries() == []
    assert add(client, "a")[0].queued
    client.circuits["write"].force_closed(actor="test", reason="test")
    nothing_waits(client)
    assert words(client) == ["a"]


def test_what_another_circuit_has_refused_to_connect_waits_too(start: Start, lite: str) -> None:
    """Nothing was sent."""
    engine, other = create_engine(with_log(lite)), start()
    other.protect(engine)
    for circuit in other.circuits.values():
        circuit.force_open(actor="test", reason="test")
    client = start(engine)
    assert add(client, "a")[0].queued
    for circuit in other.circuits.values():
        circuit.force_closed(actor="test", reason="test")
    nothing_waits(client)
    assert words(client) == ["a"]
    engine.dispose()


def test_what_is_kept_of_a_table_ends_with_a_replay(start: Start, lite: str) -> None:
    client = start(with_log(lite))
    question = "SELECT word FROM log"
    assert client.execute_query(question, read_only=True) == []
    open_it(client)
    add(client, "a")
    let_go(client)
    nothing_waits(client)
    client.circuits["read"].force_open(actor="test", reason="test")
    with pytest.raises(DatabaseOpenException):
        client.execute_query(question, read_only=True)


def test_in_whose_transaction_or_database_it_would_be(start: Start, lite: str) -> None:
    """A part of a transaction cannot wait, nor what nobody could carry out."""
    engine = create_engine(with_log(lite))
    with Session(engine) as session:
        client = start(session)
        open_it(client)
        assert add(client, "a")[0].queued
        session.execute(text("SELECT 1"))
        with pytest.raises(DatabaseOpenException):
            add(client, "x")
        session.rollback()
        let_go(client)
        nothing_waits(client)
        assert words(client) == ["a"]
    with engine.connect() as connection:
        autocommit = create_engine(lite, isolation_level="AUTOCOMMIT")
        places: list[tuple[Any, str]] = [
            (sessionmaker(connection), "it is not known by which engine"),
            (sessionmaker(binds={Bird: engine}), "it is not known by which engine"),
            (autocommit, "an engine in AUTOCOMMIT has no transactions"),
            ("sqlite://", "a database in memory is another one"),
            (
                create_engine("mysql+pymysql://", module=sqlite3),
                "writes wait for PostgreSQL and",
            ),
        ]
        for source, why in places:
            client = start(source)
            open_it(client)
            with pytest.raises(DatabaseOpenException) as caught:
                client.execute_query(delete(BIRDS))
            assert str(caught.value.__cause__).startswith(why)
    scoped = scoped_session(sessionmaker(engine))
    client = start(scoped)
    open_it(client)
    assert add(client, "b")[0].queued
    let_go(client)
    nothing_waits(client)
    assert words(client) == ["a", "b"]
    scoped.remove()
    engine.dispose()


async def test_the_engine_of_each_source(start: Start, lite: str, monkeypatch: Any) -> None:
    place = lite.replace(":", "+aiosqlite:", 1)
    engine = create_async_engine(place)
    maker = async_sessionmaker(engine)
    session = AsyncSession(engine)
    for source in (engine, maker, session, async_scoped_session(maker, asyncio.current_task)):
        client = start(source)
        assert client._sessions.lasting() is engine
        with pytest.raises(TypeError, match=r"await asyncio\.to_thread\(client\.replay\)"):
            client.replay()
    monkeypatch.setattr("distributed_breaker.clients.database_sessions._BLOCKING_DRIVERS", {})
    client = start(place)  # as if there were no blocking driver
    open_it(client)
    assert (await client.execute_query_async("INSERT INTO cats VALUES (1, 'Tom')")).queued
    let_go(client)
    await asyncio.to_thread(nothing_waits, client)
    assert await client.execute_query_async("SELECT id FROM cats") == [{"id": 1}]
    await client.aclose()
    await engine.dispose()


def test_no_room(start: Start, server: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    client = start(server, outbox_path=str(tmp_path / "folder"))
    assert not add(client, "a")[0].queued
    open_it(client)
    with pytest.raises(DatabaseOpenException) as caught:
        add(client, "b")
    assert isinstance(caught.value.__cause__, OutboxError)
    assert "writes cannot wait on disk" in client.problems()[0]


def test_a_mistake_is_parked_and_told(start: Start, place: str, caplog: Any) -> None:
    client = start(place)
    client.execute_query("INSERT INTO cats VALUES (1, 'first')")
    open_it(client)
    add(client, "a")
    for id in (1, 2):
        client.execute_query("INSERT INTO cats VALUES (:id, :name)", {"id": id, "name": "secret"})
    client.execute_query("INSERT INTO nowhere VALUES ('secret')")
    add(client, "b")
    let_go(client)
    nothing_waits(client)
    assert words(client) == ["a", "b"]
    assert client.execute_query("SELECT id FROM cats ORDER BY id") == [{"id": 1}, {"id": 2}]
    parked = client.outbox.entries(parked=True)
    code, gone = (
        ("23505", "42P01")
        if place.startswith("postgresql")
        else ("SQLITE_CONSTRAINT", "SQLITE_ERROR")
    )
    assert [code in parked[0].error, gone in parked[1].error] == [True, True]
    assert "secret" not in str([entry.error for entry in parked]) + caplog.text
    assert client.problems() == ["2 writes are parked, see `breakers outbox list`"]
    assert str(client.circuits["write"].state) == "closed"
    client.execute_query("DELETE FROM cats")
    assert client.outbox.retry([parked[0].id]) == 1
    client.replay()
    assert client.execute_query("SELECT name FROM cats") == [{"name": "secret"}]


def test_a_payload_of_another_driver_or_version_is_parked(start: Start, lite: str) -> None:
    client = start(with_log(lite))
    client.outbox.add(NAME, "write", {"sql": "DELETE FROM log"}, key="1")
    client.outbox.add(
        NAME, "write", {"sql": "x", "style": "format", "many": False, "values": [[]]}, key="2"
    )
    client.replay()
    assert [entry.error for entry in client.outbox.entries(parked=True)] == [
        "Parked: it is no write of this driver's: KeyError",
        "Parked: it is no write of this driver's: ValueError",
    ]


def test_the_table_of_keys(start: Start, server: str, postgres: Postgres, schema: str) -> None:
    """It is made when it is missing; while it cannot be made, everything waits."""
    client = start(server)
    with postgres.connect() as connection:
        connection.execute(f"CREATE ROLE {schema}")
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO {schema}")
        connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {schema}")
        connection.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {schema}")
    limited = start(server.replace("options=", f"options=-crole%3D{schema}%20"))
    open_it(limited)
    add(limited, "a")
    let_go(limited)
    told = f"writes wait since the table {TABLE} cannot be used: InsufficientPrivilege 42501"
    wait_until(lambda: told in limited.problems())
    assert limited.outbox.entries()[0].attempts == 0
    with postgres.connect() as connection:
        connection.execute(f"CREATE TABLE {schema}.{TABLE} (key text PRIMARY KEY, at bigint)")
        connection.execute(f"INSERT INTO {schema}.{TABLE} VALUES ('old', %s), ('new', %s)", [
            time.time() - KEPT - 9, time.time() - KEPT + 900,
        ])  # fmt: skip
        connection.execute(f"GRANT ALL ON {schema}.{TABLE} TO {schema}")
    nothing_waits(limited)
    assert words(client) == ["a"]
    assert limited.problems() == []
    keys = client.execute_query(f"SELECT key FROM {TABLE} WHERE length(key) < 5")
    assert keys == [{"key": "new"}]


def test_two_processes_that_make_the_table_at_once(
    start: Start, server: str, postgres: Postgres, schema: str
) -> None:
    client = start(server)
    open_it(client)
    add(client, "a")
    client.close()  # its thread ends
    client.circuits["write"].force_closed(actor="test", reason="test")
    found: list[Replayed] = []
    thread = threading.Thread(target=lambda: found.append(client.replay()))
    with postgres.connect() as connection, postgres.connect() as monitor:
        with connection.transaction():
            connection.execute(f"CREATE TABLE {schema}.{TABLE} (key text PRIMARY KEY, at bigint)")
            thread.start()
            waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ %s"
            wait_until(lambda: monitor.execute(waits, [f"CREATE TABLE.*{TABLE}"]).fetchone())
        thread.join()
    assert found[0].delivered == 1


# ---------------------------------------------------------------------------- what dies

LIFE = """
import os, signal, sys
from functools import partial
from distributed_breaker.clients import waiting
from distributed_breaker.fallback import outbox, outbox_lease
from distributed_breaker.services import Services
from sqlalchemy import event

file, where, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
waiting.Outbox = partial(outbox.Outbox, lease=0.3)
client = Services(file, environ={}).client("database", "api")

def die(*_, **__):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if where == "settle":  # the writes are committed, and still in the outbox
    settle = outbox_lease.Lease.settle
    outbox_lease.Lease.settle = lambda *args: (die(), settle(*args))[1]
elif where:
    event.listen(client._sessions.lasting(), where, die)
while client.outbox.waiting():
    client.replay()
print(client.stats()["replayed"])
"""


def life(file: str, where: str = "", count: int = 0) -> subprocess.Popen[str]:
    """A process that carries out what waits until nothing does, or until it kills itself."""
    return subprocess.Popen(
        [sys.executable, "-c", LIFE, file, where, str(count)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def written(folder: Path, url: str, count: int) -> str:
    """The configuration of processes for which so many writes wait."""
    file = folder / "breakers.json"
    section = BRITTLE | {"url": url, "outbox_path": str(folder / "o.db")}
    services = {"api": {"database": section}}
    file.write_text(json.dumps({"settings": {"redis_url": "memory://"}, "services": services}))
    made = Services(file, environ={})
    client: Any = made.client("database", "api")
    open_it(client)
    add(client, *map(str, range(count)))
    made.close()
    return str(file)


def test_killed_at_any_point(start: Start, server: str, tmp_path: Path) -> None:
    """After the commit and before the outbox knows of it, in the midst of the writes, and at the
    commit."""
    file = written(tmp_path, server, 160)
    for where, count in (
        ("settle", 1),
        ("settle", 70),
        ("before_cursor_execute", 9),
        ("commit", 2),
    ):
        with life(file, where, count) as process:
            assert process.wait(BOUND) == -9
    with life(file) as process:
        assert process.wait(BOUND) == 0
    assert words(start(server)) == [str(number) for number in range(160)]


def test_two_processes_of_a_host(start: Start, server: str, tmp_path: Path) -> None:
    file = written(tmp_path, server, 300)
    with life(file) as one, life(file) as two:
        done = [int(process.communicate(timeout=BOUND)[0]) for process in (one, two)]
    assert sum(done) == 300
    assert words(start(server)) == [str(number) for number in range(300)]


def test_two_that_both_believe_that_it_is_their_turn(start: Start, server: str) -> None:
    """One slept, lost its lease, and goes on in the midst of the other's work."""
    clients = [start(server), start(server)]
    for client in clients:
        open_it(client)
    add(clients[0], *map(str, range(120)))
    for client in clients:
        client.circuits["write"].force_closed(actor="test", reason="test")
        client.close()  # its thread ends
    entries = clients[0].outbox.entries(limit=200)
    barrier = threading.Barrier(2, timeout=BOUND)

    def carry_out(client: DatabaseClient) -> None:
        queue = client._writing()
        client.outbox.waiting()
        for entry in entries:
            if entry.id % 20 == 1:
                barrier.wait()
            queue._deliver(entry)

    threads = [threading.Thread(target=carry_out, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words(clients[0]) == [str(number) for number in range(120)]


def test_the_server_is_killed(start: Start, tmp_path: Path) -> None:
    need(why_missing())
    own = Postgres.start(synchronous_commit="on")
    try:
        url = with_log(own.url())
        client = start(url, **{**BRITTLE, "timeout": 0.05})
        sent = [str(number) for number in range(60)]
        for number, word in enumerate(sent):
            if number in (10, 40):
                own.kill()
            if number in (25, 50):
                own.restart()
            try:
                add(client, word)
            except exc.OperationalError:
                sent[number] = ""  # it may have been applied, so it must not wait
        nothing_waits(client)
        found = words(client)
        assert [word for word in found if word in sent] == list(filter(None, sent))
        assert len(set(found)) == len(found)
        assert sent.count("") <= 2 + len(found) - len([word for word in found if word in sent])
    finally:
        own.stop()


def test_only_its_own_failures_are_held_against_a_write(start: Start, server: str) -> None:
    """A write that the server ends is tried again; the others wait until it is parked."""
    client = start(server, write_timeout=0.05, failure_threshold=1_000)
    open_it(client)
    add(client, *"abcd")
    client.execute_query("INSERT INTO log SELECT 9, 'slow' FROM pg_sleep(9)")
    add(client, "e")
    client.close()  # its thread ends
    client.circuits["write"].force_closed(actor="test", reason="test")
    assert client.replay().delivered == 3, "it is not to blame for what comes in its transaction"
    assert [entry.attempts for entry in client.outbox.entries()] == [0, 0, 0]
    wait_until(lambda: client.replay().delivered)
    slow, after = client.outbox.entries()
    assert "QueryCanceled 57014" in slow.error
    assert (slow.attempts, after.attempts, words(client)) == (1, 0, [*"abcd"])


def test_a_server_that_stops_in_the_midst_of_a_write(
    start: Start, server: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed_breaker.clients.database_limits.GRACE", 0.05)
    client = start(server, write_timeout=1)
    pid = client.execute_query("SELECT pg_backend_pid() AS pid")[0]["pid"]
    open_it(client)
    client.execute_query("INSERT INTO log SELECT 9, 'slow' FROM pg_sleep(9)")
    client.circuits["write"].force_closed(actor="test", reason="test")
    sleeps = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
    with postgres.connect() as monitor:
        wait_until(lambda: monitor.execute(sleeps, [pid]).fetchone())
        with stopped(pid):
            wait_until(lambda: client.stats()["failures"]["timeout"])


def test_a_server_that_has_stopped(
    start: Start, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay does not wait for it for ever, and nobody listens to the engine afterwards."""
    monkeypatch.setattr("distributed_breaker.clients.database_limits.GRACE", 0.05)
    engine = create_engine(psycopg3(server))
    client = start(engine, write_timeout=0.2)
    pid = client.execute_query("SELECT pg_backend_pid() AS pid")[0]["pid"]
    open_it(client)
    add(client, *"ab")
    with stopped(pid):
        client.circuits["write"].force_closed(actor="test", reason="test")
        wait_until(lambda: client.stats()["failures"]["timeout"] == 1)
    nothing_waits(client)
    assert words(client) == ["a", "b"]
    assert [entry.attempts for entry in client.outbox.entries()] == []
    assert not list(engine.dispatch.before_cursor_execute)
    engine.dispose()


# ---------------------------------------------------------------------------- the command


def test_the_command(start: Start, lite: str, tmp_path: Path) -> None:
    file = written(tmp_path, with_log(lite), 3)
    said = CliRunner().invoke(app, ["outbox", "list", "--config", file])
    assert f"{NAME}: 3 wait, 0 parked ({tmp_path / 'o.db'})" in said.output
    ids = ["--id", "1"]
    said = CliRunner().invoke(app, ["outbox", "purge", "-s", "api", "--config", file, *ids])
    assert f"{NAME}: 1 thrown away" in said.output
    said = CliRunner().invoke(app, ["outbox", "replay", "--config", file])
    assert (said.exit_code, said.output) == (0, f"{NAME}: 2 carried out, 0 still wait\n")
    assert words(start(lite)) == ["1", "2"]
