"""What processes agree on: who evaluates, and who tells an event."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.fleet import Fleet
from distributed_breaker.monitoring.alert_book import Book, OwnBook
from distributed_breaker.monitoring.alert_rules import Event, Incident
from scripts.servers import Server

pytestmark = pytest.mark.servers("valkey")
OPENED = Event("open", "a:b.http", 7, False, 1_000.5)
CLOSED = Event("open", "a:b.http", 9, True, 1_060.5, incident=Incident(7, 1_000.5))


@pytest.fixture
def prefix(namespace: str) -> str:
    return f"cb:{namespace}:alerts"


@pytest.fixture
def books(server: Server, namespace: str) -> Iterator[tuple[Book, Book]]:
    """Those of two processes."""
    with Fleet(server.url, namespace) as one, Fleet(server.url, namespace) as other:
        yield Book(one), Book(other)


def test_one_evaluates_until_it_resigns_or_is_gone(
    books: tuple[Book, Book], raw: redis.Redis, prefix: str
) -> None:
    one, other = books
    assert [one.lead(), other.lead(), one.lead(), other.lead()] == [True, False, True, False]
    key = f"{prefix}:evaluator"
    raw.pexpire(key, 1_000)
    assert one.lead()
    assert raw.pttl(key) > 10_000  # it goes on
    other.resign()  # it has nothing to resign from
    assert raw.exists(key)
    one.resign()
    assert other.lead()
    assert not one.lead()
    raw.delete(key)  # its lease has ended while it was stopped
    assert one.lead()
    other.resign()
    assert [other.lead(), one.lead()] == [False, True]


def test_one_tells_an_event(books: tuple[Book, Book], raw: redis.Redis, prefix: str) -> None:
    one, other = books
    assert [one.claim(OPENED), other.claim(OPENED), one.claim(OPENED)] == ["mine", "other", "other"]
    key = f"{prefix}:open:7:begun:a:b.http"
    assert 50_000 < raw.pttl(key) <= 60_000
    raw.delete(key)  # it was killed before it had told
    assert other.claim(OPENED) == "mine"
    other.told(OPENED)
    assert one.claim(OPENED) == "told"
    assert raw.pttl(key) > 80_000_000
    assert one.incidents() == {"open a:b.http": Incident(7, 1_000.5)}
    assert raw.pttl(f"{prefix}:incidents") > 0
    assert one.claim(CLOSED) == "mine"
    one.told(CLOSED)
    assert other.claim(CLOSED) == "told"
    assert other.incidents() == {}
    other.told(Event("half_open", "a", 8, False, 1.0))
    assert other.incidents() == {}


def test_an_incident_that_cannot_be_read_began_at_some_time(
    books: tuple[Book, Book], raw: redis.Redis, prefix: str
) -> None:
    raw.hset(f"{prefix}:incidents", "open a", "x")
    assert books[0].incidents() == {"open a": Incident(0, 0.0)}


def test_without_a_store() -> None:
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        book = OwnBook(registry)
        assert book.lead()
        assert book.claim(OPENED) == "mine"
        book.told(OPENED)
        assert book.claim(OPENED) == "told"
        assert book.incidents() == {"open a:b.http": Incident(7, 1_000.5)}
        book.told(CLOSED)
        assert book.incidents() == {}
        assert book.histories(["a"]) == {}
