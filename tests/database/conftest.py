"""A PostgreSQL of the tests' own, a schema in it for each, and clients whose circuits are alone."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.clients.database import DatabaseClient
from distributed_breaker.services import Services
from scripts.postgres import Postgres, why_missing
from tests.required import need

Start = Callable[..., DatabaseClient]

# Nothing opens them, so that all outcomes of a test are counted.
STURDY = {
    "failure_threshold": 1_000, "failure_rate": None, "read_timeout": 5, "write_timeout": 5,
    "max_retries": 0,
}  # fmt: skip
# The first failure opens a circuit, and nothing but a test closes it.
BRITTLE = {"failure_threshold": 1, "success_threshold": 1, "timeout": 60.0, "jitter": 0.0}

_schemas = itertools.count()


@pytest.fixture(scope="session")
def _postgres() -> Iterator[Postgres]:
    server = Postgres.start()
    yield server
    server.stop()


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Postgres:
    """A server that later tests use too: stop single connections of it only."""
    need(why_missing())
    server: Postgres = request.getfixturevalue("_postgres")
    return server


@pytest.fixture
def schema(postgres: Postgres) -> str:
    """A fresh schema with one table."""
    name = f"s{next(_schemas)}"
    with postgres.connect() as connection:
        connection.execute(f"CREATE SCHEMA {name}")
        connection.execute(f"CREATE TABLE {name}.cats (id int PRIMARY KEY, name text)")
    return name


@pytest.fixture
def url(postgres: Postgres, schema: str) -> str:
    """Where the schema is."""
    return postgres.url(schema)


@pytest.fixture
def lite(tmp_path: Path) -> str:
    """The URL of a SQLite file with the same table."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(tmp_path / "lite.db")) as connection:
        connection.execute("CREATE TABLE cats (id int PRIMARY KEY, name text)")
    return f"sqlite:///{tmp_path / 'lite.db'}"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients keep on disk is the test's own."""
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(source, **section)``: a client as another process would have it."""
    with contextlib.ExitStack() as stack:
        count = itertools.count()

        def start(source: Any = None, **section: Any) -> DatabaseClient:
            file = tmp_path / f"{next(count)}.json"
            file.write_text(
                json.dumps(
                    {
                        "settings": {"redis_url": "memory://"},
                        "services": {"api": {"database": STURDY | section}},
                    }
                )
            )
            services = Services(file, environ={})
            stack.callback(services.close)
            client = services.client("database", "api", db_session=source)
            assert isinstance(client, DatabaseClient)
            return client

        yield start


def counts(client: DatabaseClient, kind: str) -> tuple[int, int, int]:
    """Successes, failures and ignored ones that a circuit has counted."""
    totals = client.circuits[kind].snapshot().totals
    good = totals["calls"] - totals["failures"] - totals["ignored"]
    return good, totals["failures"], totals["ignored"]


@contextlib.contextmanager
def failing(errors: Any, block: Any, match: str | None = None) -> Iterator[Any]:
    """A block of several statements, in the midst or at the end of which there is an error."""
    with pytest.raises(errors, match=match), block as value:
        yield value


@contextlib.asynccontextmanager
async def failing_async(errors: Any, block: Any) -> AsyncIterator[Any]:
    """The same for an asynchronous one."""
    with pytest.raises(errors):
        async with block as value:
            yield value
