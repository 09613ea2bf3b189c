"""What each error is to the circuits: the database's failure, its answer, or nothing."""

from __future__ import annotations

import pickle
import sqlite3
import threading
from typing import Any

import pytest
from sqlalchemy import create_engine, exc, text
from sqlalchemy.orm import Session, sessionmaker

from distributed_breaker import CircuitBreakerOpenException, Outcome
from distributed_breaker.clients.database import (
    DatabaseClient,
    DatabaseOpenException,
    QueryTimeout,
)
from distributed_breaker.clients.database_errors import KINDS, verdict
from scripts.postgres import Postgres
from tests.database.conftest import BRITTLE, Start, counts, failing

GOOD, FAILED, NOTHING = (1, 0, 0), (0, 1, 0), (0, 0, 1)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("08000", "connection"), ("08006", "connection"), ("08P01", "connection"),
        ("57P01", "connection"), ("57P02", "connection"), ("57P03", "connection"),
        ("57014", "timeout"), ("25P04", "timeout"),
        ("40001", "conflict"), ("40P01", "conflict"), ("40003", "conflict"),
        ("53000", "resources"), ("53100", "resources"), ("53200", "resources"),
        ("53300", "resources"), ("58000", "server"), ("58030", "server"), ("XX000", "server"),
        ("XX001", "server"), ("F0000", "server"), ("25006", "read_only"),
        ("23505", ""), ("23503", ""), ("23502", ""), ("23514", ""), ("40002", ""), ("42601", ""),
        ("42P01", ""), ("42703", ""), ("42501", ""), ("22001", ""), ("22012", ""), ("22P02", ""),
        ("0A000", ""), ("55P03", ""), ("25P02", ""), ("25P03", ""), ("P0001", ""), ("21000", ""),
    ],
)  # fmt: skip
def test_each_sqlstate(shared: DatabaseClient, code: str, kind: str) -> None:
    """Raised by the server itself."""
    before, failures = counts(shared, "write"), shared.stats()["failures"]
    with pytest.raises(exc.DBAPIError):
        shared.execute_query(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$")
    after = counts(shared, "write")
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (FAILED if kind else GOOD)
    grown = {k: n - failures[k] for k, n in shared.stats()["failures"].items()}
    assert grown == {name: int(name == kind) for name in KINDS}


@pytest.fixture
def shared(start: Start, url: str) -> DatabaseClient:
    return start(url)


def test_mistakes_of_the_callers_open_nothing(start: Start, url: str) -> None:
    client = start(url, **BRITTLE)
    client.execute_query("INSERT INTO cats VALUES (1)")
    for mistake, error in (
        ("INSERT INTO cats VALUES (1)", exc.IntegrityError),
        ("INSERT INTO cats (WHERE", exc.ProgrammingError),
        ("SELECT * FROM nowhere", exc.ProgrammingError),
        ("SELECT 1 / 0", exc.DataError),
        ("SELECT :missing", exc.StatementError),
    ):
        with pytest.raises(error):
            client.execute_query(mistake)
    assert [str(c.state) for c in client.circuits.values()] == ["closed", "closed"]
    assert counts(client, "read") == (2, 0, 1), "what was never sent is no answer"


def test_no_connection_and_no_call_after_it(start: Start) -> None:
    client = start("postgresql://postgres@/postgres?host=/nowhere", **BRITTLE)
    with pytest.raises(exc.OperationalError):
        client.execute_query("SELECT 1")
    with pytest.raises(exc.OperationalError) as caught:
        client.execute_query("SELECT 1")
    refusal = caught.value
    assert isinstance(refusal, DatabaseOpenException)
    assert isinstance(refusal, CircuitBreakerOpenException)
    assert refusal.circuit == "api.database.read"
    assert refusal.retry_after > 50
    assert str(refusal).startswith("circuit 'api.database.read' is open")
    assert (refusal.statement, refusal.params, refusal.connection_invalidated) == (
        None,
        None,
        False,
    )
    refusal.add_detail("which SQLAlchemy does")
    again = pickle.loads(pickle.dumps(refusal))
    assert (type(again), str(again)) == (DatabaseOpenException, str(refusal))
    assert str(client.circuits["write"].state) == "closed"
    for _ in range(2):
        with pytest.raises(exc.OperationalError), client.transaction():
            raise AssertionError("the block of a call without a connection ran")
    with pytest.raises(CircuitBreakerOpenException), client.transaction():
        pass
    assert client.stats()["failures"]["connection"] == 2


def test_six_failing_transactions_are_six_failures(
    start: Start, url: str, postgres: Postgres
) -> None:
    client = start(url)
    for number in range(6):
        with failing(exc.OperationalError, client.transaction()) as session:
            session.execute(text(f"INSERT INTO cats VALUES ({number})"))
            terminate(postgres, session)
            session.execute(text("SELECT 1"))
    assert counts(client, "write") == (0, 6, 0)
    assert client.execute_query("SELECT count(*) AS n FROM cats") == [{"n": 0}]


def terminate(postgres: Postgres, session: Any) -> None:
    """The administrator ends a session's connection."""
    pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
    with postgres.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def test_a_failed_commit_is_an_outcome(start: Start, url: str, postgres: Postgres) -> None:
    client = start(url)
    with failing(exc.OperationalError, client.transaction()) as session:
        session.execute(text("INSERT INTO cats VALUES (1)"))
        terminate(postgres, session)
    assert counts(client, "write") == FAILED
    client.execute_query("ALTER TABLE cats DROP CONSTRAINT cats_pkey")
    client.execute_query("ALTER TABLE cats ADD UNIQUE (id) DEFERRABLE INITIALLY DEFERRED")
    with failing(exc.IntegrityError, client.transaction()) as session:
        session.execute(text("INSERT INTO cats VALUES (1), (1)"))
    assert counts(client, "write") == (3, 1, 0)


def test_a_failure_that_the_block_catches_counts(
    start: Start, url: str, postgres: Postgres
) -> None:
    client = start(url)
    with failing(exc.PendingRollbackError, client.transaction()) as session:
        terminate(postgres, session)
        with pytest.raises(exc.OperationalError):
            session.execute(text("SELECT 1"))
    assert counts(client, "write") == FAILED


def test_a_given_session_can_be_used_again(start: Start, url: str, postgres: Postgres) -> None:
    """Whatever a transaction has ended with, also if it could not even begin."""
    engine = create_engine(url.replace(":", "+psycopg:", 1))
    with Session(engine) as given:
        client = start(given)
        with failing(exc.OperationalError, client.transaction()) as session:
            terminate(postgres, session)
            session.execute(text("SELECT 1"))
        terminate(postgres, given)
        with pytest.raises(exc.OperationalError), client.transaction():
            raise AssertionError("it has begun on a connection that is lost")
        terminate(postgres, given)
        with pytest.raises(exc.OperationalError):
            client.execute_query("SELECT 1", read_only=True)
        given.rollback()
        with client.transaction() as session:
            session.execute(text("INSERT INTO cats VALUES (1)"))
        assert given.execute(text("SELECT id FROM cats")).scalars().all() == [1]
    assert counts(client, "write") == (1, 2, 0)
    assert counts(client, "read") == (0, 1, 0)
    engine.dispose()


def test_a_serialization_failure_and_a_deadlock_are_failures(start: Start, url: str) -> None:
    engine = create_engine(url.replace(":", "+psycopg:", 1), isolation_level="SERIALIZABLE")
    client = start(sessionmaker(engine))
    client.execute_query("INSERT INTO cats VALUES (1), (2)")
    with engine.connect() as other:
        with failing(exc.OperationalError, client.transaction(), "SerializationFailure") as session:
            session.execute(text("SELECT * FROM cats")).all()
            other.execute(text("UPDATE cats SET name = 'x' WHERE id = 1"))
            other.commit()
            session.execute(text("UPDATE cats SET name = 'y' WHERE id = 1"))
        assert counts(client, "write") == (1, 1, 0)
        locked, ended = threading.Event(), []

        def cross() -> None:
            other.execute(text("UPDATE cats SET name = 'z' WHERE id = 2"))
            locked.set()
            try:
                other.execute(text("UPDATE cats SET name = 'z' WHERE id = 1"))
            except exc.OperationalError as error:
                ended.append(error)
            other.rollback()

        thread = threading.Thread(target=cross)
        try:
            with client.transaction() as session:
                session.execute(text("UPDATE cats SET name = 'a' WHERE id = 1"))
                thread.start()
                assert locked.wait(10)
                session.execute(text("UPDATE cats SET name = 'a' WHERE id = 2"))
        except exc.OperationalError as error:
            ended.append(error)
        thread.join()
    assert len(ended) == 1, "one of the two is the victim"
    mine = client.stats()["failures"]["conflict"] - 1
    assert counts(client, "write") == (2 - mine, 1 + mine, 0)
    engine.dispose()


def test_an_exhausted_pool_is_no_failure_of_the_database(start: Start, url: str) -> None:
    engine = create_engine(
        url.replace(":", "+psycopg:", 1), pool_size=1, max_overflow=0, pool_timeout=0.01
    )
    client = start(engine, **BRITTLE, max_pool_failures=2)
    with engine.connect():
        for number in range(1, 3):
            with pytest.raises(exc.TimeoutError):
                client.execute_query("SELECT 1")
            assert len(client.problems()) == (number >= 2)
        assert counts(client, "read") == (0, 0, 2)
        assert client.stats()["failures"]["pool"] == 2
        assert client.problems() == [
            "2 calls in a row got no connection from the pool (1 size, 1 checked out, 0 overflow): "
            "raise its size, or look for what keeps connections"
        ]
    client.execute_query("SELECT 1")
    assert client.problems() == []
    pool = client.stats()["pool"]
    assert pool == {"size": 1, "checked_out": 0, "overflow": 0, "exhausted_in_a_row": 0}
    engine.dispose()


def test_a_pool_whose_size_is_a_number(start: Start) -> None:
    client = start("sqlite://")
    client.execute_query("SELECT 1")
    assert client.stats()["pool"] == {"size": 5, "exhausted_in_a_row": 0}


SQLITE = {
    sqlite3.SQLITE_BUSY: "timeout", sqlite3.SQLITE_LOCKED: "conflict",
    sqlite3.SQLITE_IOERR_READ: "server", sqlite3.SQLITE_CORRUPT: "server",
    sqlite3.SQLITE_FULL: "resources", sqlite3.SQLITE_CANTOPEN: "connection",
    sqlite3.SQLITE_READONLY: "read_only", sqlite3.SQLITE_CONSTRAINT_UNIQUE: "",
    sqlite3.SQLITE_ERROR: "", sqlite3.SQLITE_TOOBIG: "",
}  # fmt: skip


@pytest.mark.parametrize("code", SQLITE)
def test_each_result_of_sqlite(code: int) -> None:
    error = sqlite3.OperationalError("no")
    error.sqlite_errorcode = code
    found = verdict(exc.DBAPIError.instance("SELECT", {}, error, sqlite3.Error))
    kind = SQLITE[code]
    assert found == (Outcome.FAILURE if kind else Outcome.SUCCESS, kind)


def test_drivers_that_have_no_sqlstate() -> None:
    class OperationalError(Exception):
        pass

    class IntegrityError(Exception):
        pass

    class ProgrammingError(Exception):
        pass

    lost = exc.DBAPIError("SELECT", {}, ProgrammingError(), connection_invalidated=True)
    assert verdict(lost) == (Outcome.FAILURE, "connection")
    assert verdict(OperationalError()) == (Outcome.FAILURE, "connection")
    assert verdict(IntegrityError()) == (Outcome.SUCCESS, "")
    assert verdict(ProgrammingError()) == (Outcome.IGNORED, "")
    assert verdict(ValueError()) == (Outcome.IGNORED, "")
    assert verdict(QueryTimeout("c", 1.0)) == (Outcome.FAILURE, "timeout")


def test_no_parameter_stands_in_an_error(start: Start, url: str) -> None:
    client = start(url)
    with pytest.raises(exc.DataError) as caught:
        client.execute_query("SELECT CAST(:secret AS text)::int", {"secret": "hunter2"})
    assert "hidden" in str(caught.value)
    assert "[parameters" not in str(caught.value)
