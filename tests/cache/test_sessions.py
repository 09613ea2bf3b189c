"""Sessions, by themselves and in a real Flask application."""

from __future__ import annotations

from typing import Any

import flask
import pytest
import redis

from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.clients.sessions import SessionStore, flask_sessions
from scripts.servers import Server
from tests.cache.conftest import PREFIX, Start
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")


def application(cache: CacheClient) -> flask.Flask:
    app = flask.Flask("shop")
    flask_sessions(app, cache)

    @app.post("/add/<item>")
    def add(item: str) -> dict[str, Any]:
        flask.session["basket"] = [*flask.session.get("basket", []), item]
        flask.flash(f"added {item}")
        return {"basket": flask.session["basket"]}

    @app.get("/basket")
    def basket() -> dict[str, Any]:
        return {
            "basket": flask.session.get("basket"),
            "unavailable": flask.session.unavailable,  # type: ignore[attr-defined]
        }

    @app.post("/login")
    def login() -> str:
        app.session_interface.regenerate(flask.session)  # type: ignore[attr-defined]
        flask.session["user"] = "someone"
        return "welcome"

    @app.post("/leave")
    def leave() -> str:
        flask.session.clear()
        return "gone"

    return app


def test_the_store(cache: CacheClient, raw: redis.Redis) -> None:
    store = SessionStore(cache, lifetime=50)
    first, second = store.new_id(), store.new_id()
    assert len(first) > 40
    assert first != second
    assert store.load(first) is None
    assert store.save(first, {"user": 7})
    assert store.load(first) == {"user": 7}
    assert 49_000 < raw.pttl(f"{PREFIX}session:{first}") <= 50_000
    assert store.touch(first, 90)
    assert 89_000 < raw.pttl(f"{PREFIX}session:{first}") <= 90_000
    assert not store.touch(second)
    assert store.delete(first)
    assert store.load(first) is None


def test_a_session_survives_outage_and_restart(
    cache: CacheClient, start: Start, cache_server: Server, raw: redis.Redis
) -> None:
    one, two = SessionStore.new_id(), SessionStore.new_id()
    SessionStore(cache).save(one, {"user": 1})
    cache_server.kill()
    assert SessionStore(cache).save(two, {"user": 2}) is False
    fresh = start()  # the other one is not asked to close: as after kill -9
    assert SessionStore(fresh).load(one) == {"user": 1}
    assert SessionStore(fresh).load(two) == {"user": 2}
    cache_server.restart(empty=False)
    wait_until(lambda: raw.get(f"{PREFIX}session:{two}") == '{"user":2}')


def test_flask_keeps_its_sessions_there(cache: CacheClient, raw: redis.Redis) -> None:
    client = application(cache).test_client()
    assert client.get("/basket").json == {"basket": None, "unavailable": False}
    assert raw.keys(f"{PREFIX}session:*") == []
    client.post("/add/tea")
    assert client.post("/add/milk").json == {"basket": ["tea", "milk"]}
    assert client.get("/basket").json == {"basket": ["tea", "milk"], "unavailable": False}
    cookie = client.get_cookie("session")
    assert cookie is not None
    assert cookie.http_only
    assert raw.keys(f"{PREFIX}session:*") == [f"{PREFIX}session:{cookie.value}"]
    assert application(cache).test_client().get("/basket").json["basket"] is None  # type: ignore[index]


def test_a_login_gets_another_id(cache: CacheClient, raw: redis.Redis) -> None:
    client = application(cache).test_client()
    client.post("/add/tea")
    before = client.get_cookie("session")
    client.post("/login")
    after = client.get_cookie("session")
    assert before is not None
    assert after is not None
    assert before.value != after.value
    assert raw.keys(f"{PREFIX}session:*") == [f"{PREFIX}session:{after.value}"]
    assert client.get("/basket").json["basket"] == ["tea"]  # type: ignore[index]
    client.post("/leave")
    assert raw.keys(f"{PREFIX}session:*") == []


def test_an_id_that_was_made_up_is_not_taken_over(cache: CacheClient) -> None:
    client = application(cache).test_client()
    client.set_cookie("session", "made-up")
    client.post("/add/tea")
    cookie = client.get_cookie("session")
    assert cookie is not None
    assert cookie.value != "made-up"


def test_flask_in_an_outage(start: Start, cache_server: Server) -> None:
    here, elsewhere = application(start()).test_client(), application(start(host="b")).test_client()
    here.post("/add/tea")
    cookie = here.get_cookie("session")
    assert cookie is not None
    elsewhere.set_cookie("session", cookie.value)
    cache_server.kill()
    assert here.post("/add/milk").json == {"basket": ["tea", "milk"]}
    # A host that has never seen it does not log its user out.
    assert elsewhere.get("/basket").json == {"basket": None, "unavailable": True}
    kept = elsewhere.get_cookie("session")
    assert kept is not None
    assert kept.value == cookie.value
    cache_server.restart(empty=False)
    wait_until(lambda: elsewhere.get("/basket").json["basket"] == ["tea", "milk"])  # type: ignore[index]
