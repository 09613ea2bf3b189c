"""What the database client costs beside a bare session, and while its circuit is open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from sqlalchemy import Column, Integer, MetaData, Table, Text, create_engine, select, text
from sqlalchemy.orm import Session

from distributed_breaker.clients.database import DatabaseClient
from distributed_breaker.services import Services
from scripts.postgres import Postgres

from .figures import Row, Spread, Topic
from .setting import Setting
from .timing import Case, measure

ASKING, ANSWERING = 100, 1_000  # calls in a round, with and without the server
CATS = Table("cats", MetaData(), Column("id", Integer), Column("name", Text))
METHOD = (
    "One client, one PostgreSQL on a unix socket, one row that is looked up by its key and comes "
    "as a dictionary. A bare one is `Session(engine)` with one `execute`, on an engine with the "
    "same `statement_timeout`. What `execute_query` adds is its time less that of a bare one, "
    "round by round. An open circuit answers from this process's memory. Writes wait one by one, "
    "each synced to disk, while their circuit is open; then it is closed."
)


def run(setting: Setting) -> Topic:
    """Measure all of it, with a server of its own."""
    count = setting.count(5, 60)
    with contextlib.ExitStack() as stack:
        server = Postgres.start()
        stack.callback(server.stop)
        with server.connect() as connection:
            connection.execute("CREATE TABLE cats (id int PRIMARY KEY, name text)")
            connection.execute("INSERT INTO cats VALUES (1, 'Tom')")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stack.enter_context(mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}))
        client = _client(server.url(), folder)
        stack.callback(client.close)
        options = {"options": "-cstatement_timeout=5000"}
        bare = create_engine(server.url().replace(":", "+psycopg:", 1), connect_args=options)
        stack.callback(bare.dispose)

        def query(statement: Any, params: Any) -> list[dict[str, Any]]:
            with Session(bare) as session:
                return [dict(row) for row in session.execute(statement, params).mappings()]

        asked = {
            "text": (text("SELECT id, name FROM cats WHERE id = :id"), {"id": 1}),
            "Core": (select(CATS).where(CATS.c.id == 1), None),
        }
        cases = []
        for kind, (statement, params) in asked.items():
            names = {"s": statement, "p": params, "query": query, "ours": client.execute_query}
            cases += [
                Case(f"bare {kind}", "query(s, p)", names, ASKING),
                Case(kind, "ours(s, p)", names, ASKING),
                Case(f"safe {kind}", "ours(s, p, read_only=True, cache=False)", names, ASKING),
                Case(f"kept {kind}", "ours(s, p, read_only=True)", names, ASKING),
            ]
        samples = measure(cases, count, asyncio.run)
        rows = []
        for kind in asked:
            base = samples[f"bare {kind}"]
            rows.append(Row(f"a bare `session.execute`, {kind}", "µs", Spread.of(base)))
            for name, words in (
                (kind, ""),
                (f"safe {kind}", ", read only"),
                (f"kept {kind}", ", read only and kept"),
            ):
                pairs = zip(samples[name], base, strict=True)
                added = Spread.of(took - without for took, without in pairs)
                rows.append(Row(f"`execute_query` adds, {kind}{words}", "µs", added, target="≤ 10"))
        client.circuits["read"].force_open(ttl=600)
        names = {"s": asked["text"][0], "p": {"id": 1}, "ours": client.execute_query}
        assert client.execute_query(*asked["text"], read_only=True).stale
        case = Case("open", "ours(s, p, read_only=True)", names, ANSWERING)
        spread = Spread.of(measure([case], count, asyncio.run)["open"])
        rows.append(Row("a kept result, circuit open", "µs", spread))
        client.circuits["read"].reset()
        rows += _waiting(client, setting.count(300, 1_000))
    return Topic("database", "The database client", METHOD, rows)


def _waiting(client: DatabaseClient, writes: int) -> list[Row]:
    """Writes that wait, and how long it takes to carry them out."""
    statement = text("INSERT INTO cats VALUES (:id, 'Kit')")
    breaker = client.circuits["write"]
    breaker.force_open(ttl=600)
    took = []
    for number in range(2, writes + 2):
        start = time.perf_counter()
        client.execute_query(statement, {"id": number})
        took.append((time.perf_counter() - start) * 1e3)
    breaker.reset()
    start = time.perf_counter()
    while client.outbox.waiting(client.name) and time.perf_counter() - start < 60:
        time.sleep(0.01)
    seconds = Spread.exactly(time.perf_counter() - start)
    rows = client.execute_query("SELECT count(*) AS n FROM cats")
    assert rows == [{"n": writes + 1}], rows
    return [
        Row("a write while the circuit is open, synced", "ms", Spread.of(took)),
        Row(f"{writes:,} waiting writes are carried out", "s", seconds, target="≤ 2"),
    ]


def _client(url: str, folder: Path) -> DatabaseClient:
    file = folder / "breakers.json"
    content = {
        "settings": {"redis_url": "memory://"},
        "services": {"api": {"database": {"url": url, "outbox_path": str(folder / "outbox.db")}}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    client = Services(file, environ={}).client("database", "api")
    assert isinstance(client, DatabaseClient)
    return client
