"""What execute_query and transaction give, commit and roll back, on PostgreSQL and SQLite."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
    delete,
    exc,
    func,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)  # fmt: skip

from distributed_breaker.clients.database import DatabaseClient, ReadOnlyViolation
from distributed_breaker.clients.database_sessions import _with_driver
from scripts.postgres import Postgres
from tests.database.conftest import Start, counts, failing

CATS = Table("cats", MetaData(), Column("id", Integer), Column("name", Text))


class Base(DeclarativeBase):
    pass


class Cat(Base):
    __tablename__ = "cats"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]


@pytest.fixture(params=["postgresql", "sqlite"])
def place(request: pytest.FixtureRequest) -> str:
    """A database with the table of cats."""
    url: str = request.getfixturevalue("url" if request.param == "postgresql" else "lite")
    return url


@pytest.fixture
def engine(place: str) -> Any:
    engine = create_engine(psycopg3(place))
    yield engine
    engine.dispose()


@pytest.fixture
def client(start: Start, place: str) -> DatabaseClient:
    return start(place)


def psycopg3(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def names(engine: Engine) -> list[str]:
    """What is really there, seen from another connection."""
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT name FROM cats ORDER BY id")).scalars())


def test_text_core_and_orm(client: DatabaseClient, engine: Engine) -> None:
    run = client.execute_query
    assert run("INSERT INTO cats VALUES (:id, :name)", {"id": 1, "name": "Tom"}) == 1
    assert run(insert(CATS), [{"id": 2, "name": "Tim"}, {"id": 3, "name": "Ted"}]) == 2
    assert run(update(Cat).where(Cat.id > 1).values(name="T")) == 2
    assert run("UPDATE cats SET name = 'x' WHERE id = 99") == 0
    assert names(engine) == ["Tom", "T", "T"]
    rows = [{"id": 1, "name": "Tom"}]
    assert run("SELECT * FROM cats WHERE id = :id", {"id": 1}) == rows
    assert json.loads(json.dumps(run(select(CATS).where(CATS.c.id == 1)))) == rows
    assert run(select(Cat.id, Cat.name).where(Cat.id == 1)) == rows
    assert run("SELECT * FROM cats WHERE false") == []
    assert run("INSERT INTO cats VALUES (4, 'Tam') RETURNING id") == [{"id": 4}]
    (cat,) = run(select(Cat).where(Cat.id == 4))
    assert (type(cat), cat.name) == (Cat, "Tam"), "usable though its session is closed"
    assert run(Session().query(Cat).filter(Cat.id == 4))[0].name == "Tam"
    assert run(Session().query(Cat.name).filter(Cat.id == 4)) == [{"name": "Tam"}]
    assert run(select(Cat).from_statement(text("SELECT * FROM cats WHERE id = 1")))[0].id == 1
    assert run("CREATE TABLE dogs (id int)") == 0
    assert counts(client, "write") == (6, 0, 0)
    assert counts(client, "read") == (8, 0, 0)
    figures = client.stats()
    assert (figures["reads"], figures["writes"], figures["calls"]) == (8, 6, 14)


@pytest.mark.parametrize(
    "given", ["session", "scoped", "maker", "explicit", "engine", "url", "section"]
)
def test_all_that_sessions_come_from(start: Start, engine: Engine, place: str, given: str) -> None:
    session = Session(engine)
    source: Any = {
        "session": session,
        "scoped": scoped_session(sessionmaker(engine)),
        "maker": sessionmaker(engine),
        "explicit": sessionmaker(engine, autobegin=False),
        "engine": engine,
        "url": make_url(place),
        "section": None,
    }[given]
    client = start(source, **({"url": place} if given == "section" else {}))
    assert client.execute_query("INSERT INTO cats VALUES (1, 'Tom')") == 1
    with client.transaction() as inside:
        inside.add(Cat(id=2, name="Tim"))
        if given == "session":
            assert inside is session
    (cat,) = client.execute_query(select(Cat).where(Cat.id == 2), read_only=True)
    assert cat.name == "Tim"
    assert names(engine) == ["Tom", "Tim"]
    assert not session.in_transaction(), "what was begun for a call has ended with it"
    session.close()
    if given == "scoped":
        source.remove()


def test_the_orm_in_bulk(client: DatabaseClient) -> None:
    """It gives no count, or asks for rows of its own."""
    run = client.execute_query
    assert run(insert(Cat), {"id": 1, "name": "Tom"}) == 1
    assert run(insert(Cat), [{"id": 2, "name": "Tim"}, {"id": 3, "name": "Ted"}]) == 2
    assert run(update(Cat), [{"id": 2, "name": "T"}, {"id": 3, "name": "T"}]) == 2
    assert run(delete(Cat).where(func.length(Cat.name) == 1)) == 2
    assert run(select(Cat.id)) == [{"id": 1}]


def test_sources_that_are_none(start: Start, engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"api\.database has no database: set url in the file"):
        start().execute_query("SELECT 1")
    with pytest.raises(TypeError, match=r"the db_session of api\.database is a int: give SQL"):
        start(5)
    with pytest.raises(ValueError, match=r"the db_session of api\.database is no URL") as caught:
        start("user:secret at host")
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="timeout=0 must lie between"):
        start(engine).execute_query("SELECT 1", timeout=0)
    with pytest.raises(TypeError, match=r"protect\(\) takes an Engine or AsyncEngine, not a str"):
        start(engine).protect("postgresql://")  # type: ignore[type-var]


def test_a_session_is_used_only_where_it_was_given(start: Start, engine: Engine) -> None:
    session = Session(engine)
    client, found = start(session), []

    def other() -> None:
        try:
            client.execute_query("SELECT 1")
        except TypeError as error:
            found.append(str(error))
        with Session(engine) as own:
            client.use(db_session=own)
            found.append(client.execute_query("SELECT 1 AS one"))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "was given a Session in another thread or task" in found[0]
    assert found[1] == [{"one": 1}]
    assert client.execute_query("SELECT 2 AS two") == [{"two": 2}], "with the first one here"
    session.close()


def test_a_transaction_rolls_back_and_says_why(client: DatabaseClient, engine: Engine) -> None:
    with failing(ZeroDivisionError, client.transaction()) as session:
        session.add(Cat(id=1, name="Tom"))
        session.flush()
        raise ZeroDivisionError
    with failing(exc.IntegrityError, client.transaction()) as session:
        session.add_all([Cat(id=1), Cat(id=1)])
    assert names(engine) == []
    assert counts(client, "write") == (1, 0, 1), "the database has answered once"


def test_queries_within_a_transaction_are_parts_of_it(
    client: DatabaseClient, engine: Engine
) -> None:
    with failing(ZeroDivisionError, client.transaction()):
        client.execute_query("INSERT INTO cats VALUES (1, 'Tom')")
        assert client.execute_query("SELECT name FROM cats", read_only=True) == [{"name": "Tom"}]
        raise ZeroDivisionError
    assert names(engine) == []
    with client.transaction() as outer:
        client.execute_query("INSERT INTO cats VALUES (1, 'Tom')")
        with failing(ZeroDivisionError, client.transaction()) as inner:
            assert inner is outer
            client.execute_query("INSERT INTO cats VALUES (2, 'Tim')")
            raise ZeroDivisionError
    assert names(engine) == ["Tom"], "one within another is a savepoint"
    assert counts(client, "write") == (1, 0, 1)


def test_the_transaction_of_a_given_session_goes_on(start: Start, engine: Engine) -> None:
    """Neither what it holds nor its settings change by a query in its midst."""
    with Session(engine) as session:
        client = start(session)
        session.add(Cat(id=1, name="Tom"))
        assert client.execute_query("SELECT name FROM cats", read_only=True) == [{"name": "Tom"}]
        assert client.execute_query("SELECT name FROM cats") == [{"name": "Tom"}]
        client.execute_query("INSERT INTO cats VALUES (2, 'Tim')")
        assert session.in_transaction()
        if engine.name == "postgresql":
            for setting, value in (("statement_timeout", "0"), ("transaction_read_only", "off")):
                assert session.scalar(text(f"SHOW {setting}")) == value
            assert names(engine) == []
        session.add(Cat(id=3))
        session.commit()
    assert names(engine) == ["Tom", "Tim", None]


def test_a_transaction_commits_what_its_session_had_begun(start: Start, engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Cat(id=1, name="Tom"))
        with start(session).transaction():
            session.add(Cat(id=2, name="Tim"))
    assert names(engine) == ["Tom", "Tim"]


def test_writes_that_are_said_to_be_reads_are_not_sent(
    client: DatabaseClient, engine: Engine
) -> None:
    for statement in ("INSERT INTO cats VALUES (1)", update(Cat).values(name="x"), "anything"):
        with pytest.raises(ReadOnlyViolation, match="leave out read_only=True"):
            client.execute_query(statement, read_only=True)
    with client.transaction(read_only=True), pytest.raises(ReadOnlyViolation):
        client.execute_query("DELETE FROM cats")
    with failing(ReadOnlyViolation, client.transaction(), "must have the same read_only"):
        client.transaction(read_only=True).__enter__()
    assert counts(client, "read") == (1, 0, 0)
    assert client.execute_query("INSERT INTO cats VALUES (1, 'Tom')") == 1


def test_a_write_in_disguise_is_refused_by_the_database(
    client: DatabaseClient, engine: Engine, place: str
) -> None:
    if place.startswith("postgresql"):
        client.execute_query(
            "CREATE FUNCTION sneak() RETURNS int LANGUAGE sql AS 'INSERT INTO cats VALUES (9); "
            "SELECT 1'"
        )
        disguised: Any = "SELECT sneak()"
        with pytest.raises(exc.InternalError, match="read-only transaction"):
            client.execute_query(disguised, read_only=True)
        with Session(engine) as session:
            client.use(db_session=session)
            session.add(Cat(id=1, name="Tom"))
            with pytest.raises(exc.InternalError, match="read-only transaction"):
                client.execute_query(disguised, read_only=True)
            session.commit()
        assert names(engine) == ["Tom"], "the transaction of the session has gone on"
        client.use(db_session=place)
    with (
        pytest.raises(exc.DBAPIError, match=r"read-?only"),
        client.transaction(read_only=True) as s,
    ):
        s.execute(insert(CATS).values(id=5))
    with (
        pytest.raises(exc.DBAPIError, match=r"read-?only"),
        client.transaction(read_only=True) as s,
    ):
        s.add(Cat(id=5))
    assert 5 not in [row["id"] for row in client.execute_query("SELECT id FROM cats")]
    assert counts(client, "read")[1] == 0, "the mistake is the caller's"
    client.execute_query("INSERT INTO cats VALUES (6, 'connections can write again')")


def test_a_given_session_keeps_its_objects(start: Start, engine: Engine) -> None:
    with Session(engine) as session:
        client = start(session)
        client.execute_query("INSERT INTO cats VALUES (1, 'Tom')")
        (cat,) = client.execute_query(select(Cat), read_only=True)
        assert cat in session
        assert "name" in cat.__dict__, "it is not expired, so that it can be used without a query"


def test_a_transaction_that_had_begun_can_still_be_read_only(start: Start, engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        client = start(session)
        with failing(exc.DBAPIError, client.transaction(read_only=True), "read-?only"):
            session.execute(insert(CATS).values(id=5))
        session.execute(insert(CATS).values(id=6))
        session.commit()
    assert names(engine) == [None]


def test_a_bare_url_has_the_driver_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = make_url("postgresql://host/name")
    drivers = {"postgresql": "postgresql+psycopg"}
    assert _with_driver(bare, drivers).drivername == "postgresql+psycopg"
    assert _with_driver(make_url("mysql://host"), drivers).drivername == "mysql"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _with_driver(bare, drivers) is bare


def test_a_joined_collection(start: Start, url: str) -> None:
    class Other(DeclarativeBase):
        pass

    class Owner(Other):
        __tablename__ = "owner"
        id: Mapped[int] = mapped_column(primary_key=True)
        pets: Mapped[list[Pet]] = relationship()

    class Pet(Other):
        __tablename__ = "pet"
        id: Mapped[int] = mapped_column(primary_key=True)
        owner: Mapped[int] = mapped_column(ForeignKey("owner.id"))

    client = start(url)
    with client.transaction() as session:
        Other.metadata.create_all(session.connection())
        session.add(Owner(id=1, pets=[Pet(id=1), Pet(id=2)]))
    (owner,) = client.execute_query(select(Owner).options(joinedload(Owner.pets)))
    assert [pet.id for pet in owner.pets] == [1, 2]
    both = client.execute_query(select(Owner, func.count(Pet.id)).join(Pet).group_by(Owner.id))
    assert (both[0]["Owner"].id, both[0]["count"]) == (1, 2)


def test_no_round_trip_more_than_the_bare_session(
    start: Start, url: str, postgres: Postgres, schema: str
) -> None:
    """What the server has carried out for a read: no more than for a session without the client."""

    def seen(run: Callable[[], object]) -> list[str]:
        run()  # a new connection asks some things
        before = postgres.log().count("\n")
        run()
        lines = [line for line in postgres.log().splitlines()[before:] if f"{schema}|" in line]
        return [
            line.rpartition(": ")[2] for line in lines if "statement: " in line or "execute" in line
        ]

    logged = url.replace("search_path", "log_statement%3Dall+-csearch_path")
    engine = create_engine(psycopg3(logged))

    def bare() -> None:
        with Session(engine) as session:
            session.execute(text("SELECT 1")).all()

    client = start(logged)
    guarded = seen(lambda: client.execute_query("SELECT 1", read_only=True))
    assert guarded == ["BEGIN READ ONLY", "SELECT 1", "ROLLBACK"]
    assert len(seen(bare)) == len(guarded)
    assert len(seen(lambda: client.execute_query("SELECT 1"))) == len(guarded)
    other = seen(lambda: client.execute_query("SELECT 1", timeout=1))
    assert len(other) == len(guarded) + 1, "which is how it would be seen"
    engine.dispose()
