"""Django's Redis cache and its databases behind circuits, on a real server and a real SQLite."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker import CircuitBreakerOpenException, State
from distributed_breaker.services import Services, initialize, shut_down
from scripts.postgres import Postgres, why_missing
from scripts.servers import Server
from tests.required import need

pytestmark = pytest.mark.usefixtures("django")
CACHE = "distributed_breaker.integrations.django_cache.RedisCache"
SQLITE = "distributed_breaker.integrations.django_sqlite3"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """One failure opens a circuit."""
    brittle = {"failure_threshold": 1, "timeout": 60.0}
    file = tmp_path / "breakers.json"
    parts = {"cache": brittle, "database": brittle}
    settings = {"redis_url": "memory://"}
    file.write_text(json.dumps({"settings": settings, "services": {"web_app": parts}}))
    yield initialize(file, environ={})
    shut_down()


@pytest.mark.servers("valkey")
def test_the_cache(services: Services, own_server: Any) -> None:
    from django.core.cache import CacheHandler

    server: Server = own_server(tcp=True)
    options = {"circuit": "web_app.cache", "socket_timeout": 1.0}
    place = {"BACKEND": CACHE, "LOCATION": server.url, "OPTIONS": options}
    cache = CacheHandler({"default": place})["default"]
    circuit = services.circuit("web_app.cache")
    cache.set("name", {"any": b"thing"})
    assert cache.get("name") == {"any": b"thing"}
    assert cache.add("name", 1) is False
    cache.set("count", 1)
    assert cache.incr("count", 2) == 3
    with pytest.raises(ValueError, match="not found"):
        cache.incr("missing")
    assert circuit.state is State.CLOSED, "Redis has answered"
    server.kill()
    with pytest.raises(redis.ConnectionError) as first:
        cache.get("name")
    assert not isinstance(first.value, CircuitBreakerOpenException)
    assert circuit.state is State.OPEN
    with pytest.raises(redis.ConnectionError) as second:
        cache.get("name")
    assert isinstance(second.value, CircuitBreakerOpenException)
    cache.close()


def test_a_database(services: Services, tmp_path: Path) -> None:
    from django.db import IntegrityError, OperationalError
    from django.db.utils import ConnectionHandler

    file = tmp_path / "shop.db"
    place = {
        "ENGINE": SQLITE, "NAME": file, "CIRCUIT": "web_app.database.write",
        "OPTIONS": {"timeout": 0},
    }  # fmt: skip
    connection = ConnectionHandler({"default": place})["default"]
    circuit = services.circuit("web_app.database.write")

    def execute(sql: str) -> Any:
        with connection.cursor() as cursor:
            return cursor.execute(sql).fetchall()

    execute("CREATE TABLE orders (number INTEGER PRIMARY KEY)")
    execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(IntegrityError):
        execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(OperationalError, match="no such table"):
        execute("SELECT * FROM absent")
    assert execute("SELECT number FROM orders") == [(1,)]
    assert circuit.state is State.CLOSED, "the mistakes were the caller's"

    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OperationalError, match="locked"):
        execute("INSERT INTO orders VALUES (2)")
    other.execute("ROLLBACK")
    other.close()
    assert circuit.state is State.OPEN
    with pytest.raises(OperationalError) as refused:
        execute("SELECT number FROM orders")
    assert isinstance(refused.value, CircuitBreakerOpenException)
    connection.close()


def test_a_database_that_cannot_be_opened(services: Services, tmp_path: Path) -> None:
    from django.db import OperationalError
    from django.db.utils import ConnectionHandler

    place = {"ENGINE": SQLITE, "NAME": tmp_path / "no" / "db", "CIRCUIT": "web_app.database.read"}
    connection = ConnectionHandler({"default": place})["default"]
    with pytest.raises(OperationalError, match="unable to open"):
        connection.ensure_connection()
    assert services.circuit("web_app.database.read").state is State.OPEN
    with pytest.raises(OperationalError) as refused:
        connection.ensure_connection()
    assert isinstance(refused.value, CircuitBreakerOpenException)


def test_without_a_circuit_it_says_what_is_missing(tmp_path: Path) -> None:
    from django.core.cache import CacheHandler
    from django.core.exceptions import ImproperlyConfigured
    from django.db.utils import ConnectionHandler

    with pytest.raises(ImproperlyConfigured, match='"CIRCUIT"'):
        ConnectionHandler({"default": {"ENGINE": SQLITE, "NAME": tmp_path / "db"}})["default"]
    with pytest.raises(ImproperlyConfigured, match='"circuit"'):
        CacheHandler({"default": {"BACKEND": CACHE, "LOCATION": "redis://localhost"}})["default"]


def test_postgresql(services: Services) -> None:
    """A constraint that is checked at the commit is the caller's; a server that is gone is not."""
    from django.db import IntegrityError, OperationalError
    from django.db.utils import ConnectionHandler

    need(why_missing())
    server = Postgres.start()
    try:
        place = {
            "ENGINE": "distributed_breaker.integrations.django_postgresql",
            "CIRCUIT": "web_app.database.write",
            "HOST": str(server.folder), "NAME": "postgres", "USER": "postgres",
        }  # fmt: skip
        connection = ConnectionHandler({"default": place})["default"]
        circuit = services.circuit("web_app.database.write")
        with connection.cursor() as cursor:
            unique = "number int UNIQUE DEFERRABLE INITIALLY DEFERRED"
            cursor.execute(f"CREATE TEMPORARY TABLE orders ({unique})")
            connection.set_autocommit(False)
            cursor.execute("INSERT INTO orders VALUES (%s), (%s)", [1, 1])
            with pytest.raises(IntegrityError):
                connection.commit()
            connection.rollback()
            connection.set_autocommit(True)
            cursor.execute("SELECT count(*) FROM orders")
            assert cursor.fetchone() == (0,)
            assert circuit.state is State.CLOSED
            connection.set_autocommit(False)
            cursor.execute("INSERT INTO orders VALUES (1)")
    finally:
        server.stop()
    with pytest.raises(OperationalError):
        connection.commit()
    assert circuit.state is State.OPEN
    connection.close()
    with pytest.raises(OperationalError) as refused:
        connection.ensure_connection()
    assert isinstance(refused.value, CircuitBreakerOpenException)
