"""The guide's lines on databases, with its import path and a real Flask app; health and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, jsonify
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy.orm import scoped_session, sessionmaker

from circuit_breaker_config import (
    CircuitBreakerOpenException,
    circuit_breaker_health,
    circuit_breaker_metrics,
    get_database_circuit_breaker,
    initialize_circuit_breakers,
)
from distributed_breaker.services import current, shut_down
from tests.config.test_load import SHIPPED
from tests.database.test_queries import Cat


class Db:
    """What Flask-SQLAlchemy calls ``db``."""

    session: Any


db = Db()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = create_engine(url.replace(":", "+psycopg:", 1))
    db.session = scoped_session(sessionmaker(engine))
    settings = {"redis_url": "memory://"}
    initialize_circuit_breakers(SHIPPED, environ={}, overrides={"settings": settings})
    yield engine
    shut_down()
    db.session.remove()
    engine.dispose()


def get_cached_data() -> list[str]:
    return ["cached"]


def test_the_guides_flask_route(engine: Engine) -> None:
    app = Flask("guide")

    @app.route("/api/data")
    def get_data() -> Any:
        db_circuit = get_database_circuit_breaker("web_app")

        try:
            data = db_circuit.execute_query(
                "SELECT * FROM data WHERE active = true", read_only=True
            )
            return jsonify(data)
        except CircuitBreakerOpenException:
            # Use cached data as fallback
            return jsonify(get_cached_data())

    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE data (id int, at timestamp, active bool)"))
        connection.execute(
            text("INSERT INTO data VALUES (1, '2020-01-02', true), (2, null, false)")
        )
    client = get_database_circuit_breaker("web_app", db_session=db.session)
    web = app.test_client()
    assert web.get("/api/data").json == [
        {"active": True, "at": "Thu, 02 Jan 2020 00:00:00 GMT", "id": 1}
    ]
    client.circuits["read"].force_open()
    assert len(web.get("/api/data").json or []) == 1, "what was read before"
    client.execute_query("UPDATE data SET active = false")
    assert web.get("/api/data").json == ["cached"], "which is not right any more"


def test_the_guides_transaction(engine: Engine) -> None:
    User = Cat  # noqa: N806
    db_circuit = get_database_circuit_breaker("web_app", db_session=db.session)

    # Protected query
    with db_circuit.transaction():
        user = User(id=1, name="test")
        db.session.add(user)
        # Auto-committed by circuit breaker

    db.session.remove()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT name FROM cats")).scalars().all() == ["test"]


def test_health_and_metrics(url: str, tmp_path: Path) -> None:
    file = tmp_path / "breakers.json"

    def write(**section: Any) -> None:
        database = {"url": f"{url}&connect_timeout=2", "connection_timeout": 0.01, **section}
        file.write_text(
            json.dumps(
                {
                    "settings": {"redis_url": "memory://"},
                    "services": {"api": {"database": database}},
                }
            )
        )

    write(max_pool_failures=1)
    initialize_circuit_breakers(file, environ={})
    try:
        client = get_database_circuit_breaker("api")
        name = "api.database"
        assert circuit_breaker_metrics()["clients"][name]["pool"] is None, "nothing is known of it"
        client.execute_query("SELECT 1")
        assert circuit_breaker_health()["clients"][name] == {"status": "healthy", "problems": []}
        engine = client._sessions.known
        assert engine is not None
        held = [engine.connect() for _ in range(15)]
        with pytest.raises(exc.TimeoutError):
            client.execute_query("SELECT 1")
        found = circuit_breaker_health()["clients"][name]
        assert found["status"] == "degraded"
        (problem,) = found["problems"]
        assert problem.startswith(
            "1 calls in a row got no connection from the pool (5 size, 15 checked out, 10 overflow)"
        )
        metrics = circuit_breaker_metrics()["clients"][name]
        assert metrics["pool"] == {
            "size": 5, "checked_out": 15, "overflow": 10, "exhausted_in_a_row": 1,
        }  # fmt: skip
        assert metrics["failures"]["pool"] == 1
        write(enable_pool_monitoring=False, read_timeout=0.1)
        assert current().reload()
        assert client.stats()["pool"] is None
        assert client.problems() == []
        for connection in held:
            connection.close()
        with pytest.raises(exc.OperationalError, match=r"longer than 0\.1 s"):
            client.execute_query("SELECT pg_sleep(30)")
    finally:
        shut_down()
