"""Flask: guarded routes, blueprints, coroutine functions, and the answer to a refusal."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from flask import Blueprint, Flask, abort

from distributed_breaker import CircuitBreaker
from distributed_breaker.clients.redis_guard import CacheOpenException
from distributed_breaker.integrations.flask import CircuitBreakers, protect
from tests.integrations import views
from tests.required import need
from tests.unit.clock import FakeClock


class Shop:
    """An application with one guarded route, plain and in a blueprint."""

    def __init__(self, breaker: CircuitBreaker, *, asynchronous: bool = False) -> None:
        self.app = Flask("shop")
        CircuitBreakers().init_app(self.app)
        blueprint = Blueprint("parts", __name__, url_prefix="/parts")

        @protect(breaker)
        def item(kind: str) -> Any:
            return serve(kind)

        @protect(breaker)
        async def item_async(kind: str) -> Any:
            return serve(kind)

        view: Any = item_async if asynchronous else item
        self.app.get("/<kind>")(view)
        blueprint.get("/<kind>")(view)
        self.app.register_blueprint(blueprint)

    def ask(self, path: str, headers: dict[str, str]) -> views.Got:
        got = self.app.test_client().get(path, headers=headers)
        small = {name.lower(): value for name, value in got.headers}
        return views.Got(got.status_code, small, got.text)


def serve(kind: str) -> Any:
    if kind == "boom":
        raise OSError("the database is down")
    if kind.startswith("abort"):
        abort(int(kind[-3:]))
    if kind == "missing":
        return {"found": False}, 404
    if kind == "broken":
        return "it does not work", 502
    return {"kind": kind}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "coroutine"])
@pytest.mark.parametrize("path", ["/boom", "/parts/boom", "/broken", "/abort503"])
def test_the_life_of_a_route(
    breaker: CircuitBreaker, clock: FakeClock, path: str, asynchronous: bool
) -> None:
    if asynchronous and importlib.util.find_spec("asgiref") is None:
        need("asgiref, which Flask needs for coroutine functions, is not installed")
    shop = Shop(breaker, asynchronous=asynchronous)
    ours = ("/missing", "/abort404", "/parts/abort401")
    views.the_callers_own_mistakes_do_not_count(shop.ask, breaker, ours)
    status = {"/broken": 502, "/abort503": 503}.get(path, 500)
    views.a_failure_opens_it(shop.ask, breaker, path, status)
    views.a_refusal_is_answered(shop.ask, "/good", clock)
    views.a_refusal_is_answered(shop.ask, "/parts/good", clock)
    views.it_closes_again(shop.ask, breaker, "/good", clock)


def test_a_clients_refusal_is_answered_too() -> None:
    """It is also an error of the client's library, for which another handler may stand."""
    app = Flask("shop")
    CircuitBreakers(app)
    app.register_error_handler(ConnectionError, lambda error: ("not this one", 500))

    @app.get("/")
    def cached() -> str:
        raise CacheOpenException("web_app.cache", 3.2)

    got = app.test_client().get("/")
    assert (got.status_code, got.headers["Retry-After"]) == (503, "4")
