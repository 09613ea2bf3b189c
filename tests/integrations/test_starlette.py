"""Starlette and FastAPI: guarded endpoints, the answer to a refusal, WebSockets left alone."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from distributed_breaker import CircuitBreaker, CircuitBreakerOpenException
from distributed_breaker.integrations.starlette import (
    CircuitBreakerMiddleware,
    install,
    protect,
)
from tests.integrations import views
from tests.required import need
from tests.unit.clock import FakeClock

with warnings.catch_warnings():
    # It would rather have a successor of httpx, which this library does not use.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient


def serve(kind: str) -> Response:
    if kind == "boom":
        raise OSError("the database is down")
    if kind.startswith("http"):
        raise HTTPException(int(kind[-3:]))
    return JSONResponse({"kind": kind}, {"missing": 404, "broken": 502}.get(kind, 200))


class Shop:
    """An application with one guarded endpoint."""

    def __init__(self, app: Any) -> None:
        self._client = TestClient(app, raise_server_exceptions=False)

    def ask(self, path: str, headers: dict[str, str]) -> views.Got:
        got = self._client.get(path, headers=headers)
        return views.Got(got.status_code, dict(got.headers), got.text)


def routes(breaker: CircuitBreaker, asynchronous: bool) -> list[Route]:
    @protect(breaker)
    def item(request: Request) -> Response:
        return serve(request.path_params["kind"])

    @protect(breaker)
    async def item_async(request: Request) -> Response:
        return serve(request.path_params["kind"])

    return [Route("/{kind}", item_async if asynchronous else item)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["function", "coroutine"])
@pytest.mark.parametrize("way", ["handler", "middleware"])
@pytest.mark.parametrize("path", ["/boom", "/broken", "/http503"])
def test_the_life_of_an_endpoint(
    breaker: CircuitBreaker, clock: FakeClock, path: str, way: str, asynchronous: bool
) -> None:
    app = Starlette(routes=routes(breaker, asynchronous))
    install(app) if way == "handler" else app.add_middleware(CircuitBreakerMiddleware)
    shop = Shop(app)
    views.the_callers_own_mistakes_do_not_count(shop.ask, breaker, ("/missing", "/http404"))
    status = {"/broken": 502, "/http503": 503}.get(path, 500)
    views.a_failure_opens_it(shop.ask, breaker, path, status)
    views.a_refusal_is_answered(shop.ask, "/good", clock)
    views.it_closes_again(shop.ask, breaker, "/good", clock)


def refusing(*_: object) -> Any:
    raise CircuitBreakerOpenException("secret-internal-name", 5.0)


@pytest.mark.parametrize("way", ["handler", "middleware"])
def test_a_websocket_is_left_alone(way: str) -> None:
    """It works, and a refusal goes through as it would without us."""

    async def early(socket: WebSocket) -> None:
        refusing()

    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        if await socket.receive_text() == "work":
            refusing()
        await socket.send_text("hello")
        await socket.close()

    app = Starlette(routes=[WebSocketRoute("/", echo), WebSocketRoute("/early", early)])
    install(app) if way == "handler" else app.add_middleware(CircuitBreakerMiddleware)
    client = TestClient(app)
    with pytest.raises(CircuitBreakerOpenException), client.websocket_connect("/early"):
        pass
    with client.websocket_connect("/") as socket:
        socket.send_text("greet")
        assert socket.receive_text() == "hello"
    with (  # noqa: PT012 - the error comes out of the block's end
        pytest.raises(CircuitBreakerOpenException),
        client.websocket_connect("/") as socket,
    ):
        socket.send_text("work")
        socket.receive_text()


async def test_the_middleware_cannot_answer_twice() -> None:
    """A refusal in the midst of a response goes through."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        refusing()

    sent: list[str] = []

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def receive() -> Message:
        return {"type": "http.request"}

    with pytest.raises(CircuitBreakerOpenException):
        await CircuitBreakerMiddleware(app)({"type": "http", "headers": []}, receive, send)
    assert sent == ["http.response.start"]


def test_an_endpoint_of_fastapi_keeps_its_parameters(
    breaker: CircuitBreaker, clock: FakeClock
) -> None:
    if importlib.util.find_spec("fastapi") is None:
        need("fastapi is not installed")
    from fastapi import FastAPI

    app = FastAPI()
    install(app)

    @app.get("/{number}")
    @protect(breaker)
    def item(number: int, double: bool = False) -> dict[str, int]:
        return {"number": number * (1 + double) // (number - 13)}

    shop = Shop(app)
    assert shop.ask("/14?double=true", {}).body == '{"number":28}'
    assert shop.ask("/text", {}).status == 422
    assert breaker.snapshot().totals["calls"] == 1, "a wrong parameter does not reach the circuit"
    views.a_failure_opens_it(shop.ask, breaker, "/13")
    views.a_refusal_is_answered(shop.ask, "/14", clock)
