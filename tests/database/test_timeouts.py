"""Calls end in time: by the server, by SQLite, and by this process where nobody answers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import create_engine, exc, text
from sqlalchemy.orm import Session

from distributed_breaker.clients import database_limits
from distributed_breaker.clients.database import DatabaseClient, QueryTimeout
from distributed_breaker.clients.database_limits import Deadlines
from scripts.postgres import Postgres
from tests.database.conftest import Start, counts, failing
from tests.unit.clock import wait_until

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
PID = "SELECT pg_backend_pid() AS pid"


def pid_of(client: DatabaseClient, **options: Any) -> int:
    """The server's process behind the client's only connection."""
    pid: int = client.execute_query(PID, **options)[0]["pid"]
    return pid


def halt(pid: int) -> None:
    """Let a process hold its connections and answer nothing."""
    os.kill(pid, signal.SIGSTOP)


def resume(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has seen that its connection is cut
        os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    halt(pid)
    try:
        yield
    finally:
        resume(pid)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_limits, "GRACE", 0.05)


@pytest.mark.parametrize("how", ["call", "section", "read_only", "session", "joined"])
def test_postgresql_ends_what_takes_too_long(start: Start, url: str, how: str) -> None:
    """The server itself does, so that the connection stays."""
    client = start(url, **({"read_timeout": 0.1} if how == "section" else {}))
    options = {} if how == "section" else {"timeout": 0.1}
    if how == "read_only":
        options["read_only"] = True
    engine = create_engine(url.replace(":", "+psycopg:", 1))
    with Session(engine) as session:
        if how in ("session", "joined"):
            client.use(db_session=session)
        if how == "joined":
            session.execute(text("SELECT 1"))
        pid = pid_of(client)
        with pytest.raises(QueryTimeout) as caught:
            client.execute_query("SELECT pg_sleep(30)", **options)
        assert getattr(caught.value.orig, "sqlstate", None) == "57014"
        assert str(caught.value) == (
            "a call under the circuit 'api.database.read' took longer than 0.1 s"
        )
        session.rollback()
        assert pid_of(client) == pid
        with pytest.raises(QueryTimeout, match=r"api\.database\.write"):
            client.execute_query("INSERT INTO cats SELECT 1 FROM pg_sleep(30)", timeout=0.1)
    assert counts(client, "read") == (2, 1, 0)
    assert counts(client, "write") == (0, 1, 0)
    assert client.stats()["failures"]["timeout"] == 2
    engine.dispose()


def test_each_statement_of_a_transaction_has_the_time(start: Start, url: str) -> None:
    client = start(url)
    with failing(QueryTimeout, client.transaction(timeout=0.5)) as session:
        for _ in range(2):
            session.execute(text("SELECT pg_sleep(0.3)"))
        session.execute(text("SELECT pg_sleep(30)"))
    with failing(QueryTimeout, client.transaction(timeout=5)):
        client.execute_query("SELECT pg_sleep(30)", timeout=0.1)
    with client.transaction(), pytest.raises(QueryTimeout):
        client.execute_query("SELECT pg_sleep(30)", timeout=0.1)
    assert counts(client, "write") == (1, 2, 0)


def test_the_server_ends_a_transaction_that_pauses(
    start: Start, url: str, postgres: Postgres
) -> None:
    client = start(url, read_timeout=60, write_timeout=60)
    with failing(exc.DBAPIError, client.transaction(timeout=0.1)) as session:
        pid = session.execute(text(PID)).scalar_one()
        with postgres.connect() as other:
            alive = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
            wait_until(lambda: other.execute(alive, [pid]).fetchone() is None)
        session.execute(text("SELECT 1"))
    assert counts(client, "write")[1] == 0, "the pause was the caller's"


@pytest.mark.parametrize("statement", [ENDLESS, f"INSERT INTO cats (id) {ENDLESS}"])
def test_sqlite_is_interrupted(start: Start, lite: str, statement: str) -> None:
    client = start(lite)
    with pytest.raises(QueryTimeout):
        client.execute_query(statement, timeout=0.1)
    with failing(QueryTimeout, client.transaction(timeout=0.1)) as session:
        session.execute(text(ENDLESS)).all()
    assert client.execute_query("SELECT 1 AS one") == [{"one": 1}]
    assert client.stats()["failures"]["timeout"] == 2


def test_a_server_that_has_stopped(start: Start, url: str, short_grace: None) -> None:
    """It holds the connection and says nothing: the call ends all the same."""
    client = start(url, max_pool_failures=1)
    with stopped(pid_of(client)), pytest.raises(QueryTimeout):
        client.execute_query("SELECT 1", timeout=0.1)
    for at in ("statement", "commit", "rollback"):
        with failing((QueryTimeout, ZeroDivisionError), client.transaction(0.5)) as session:
            pid = session.execute(text(PID)).scalar_one()
            halt(pid)
            if at == "statement":
                session.execute(text("SELECT 1"))
            if at == "rollback":
                raise ZeroDivisionError
        resume(pid)
    assert counts(client, "read") == (1, 1, 0)
    assert counts(client, "write") == (0, 2, 1)
    assert client.execute_query("SELECT 1 AS one") == [{"one": 1}], "by another connection"


def test_calls_that_are_over_are_not_ended() -> None:
    deadlines, ended = Deadlines(), threading.Event()
    over = deadlines.begin(0.01, lambda: pytest.fail("it was over"))
    deadlines.over(over)
    late = deadlines.begin(0.02, ended.set)
    longer = deadlines.begin(60, lambda: None)
    assert ended.wait(10)
    assert (over.fired, late.fired, longer.fired) == (False, True, False)
    deadlines.over(late)
    broken = deadlines.begin(0.01, lambda: 1 / 0)
    wait_until(lambda: broken.fired)
    again = threading.Event()
    deadlines.begin(0.01, again.set)
    assert again.wait(10), "the thread survives what goes wrong there"


def test_new_connections_have_the_sections_times_beside_the_users_options(
    start: Start, url: str, schema: str
) -> None:
    client = start(url, read_timeout=3, write_timeout=4)
    assert client.execute_query("SHOW search_path") == [{"search_path": schema}]
    assert client.execute_query("SHOW statement_timeout") == [{"statement_timeout": "3s"}]
    idle = client.execute_query("SHOW idle_in_transaction_session_timeout")
    assert list(idle[0].values()) == ["4s"]
    with client.transaction() as session:
        assert session.scalar(text("SHOW statement_timeout")) == "4s"
