"""Starlette, FastAPI and other ASGI applications: guarded endpoints, and 503 for refusals.

WebSockets are left alone: a refusal there goes through as the error that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from . import web


def install(app: Starlette) -> None:
    """Answer every refusal that a request meets with 503 and ``Retry-After``.

    Args:
        app: of Starlette or FastAPI.
    """
    app.add_exception_handler(CircuitBreakerOpenException, _refused)


class CircuitBreakerMiddleware:
    """The same for any ASGI application.  Put it inside what adds headers, such as CORS.

    A refusal after the response has begun goes through: it is too late for another answer.

    Args:
        app: the application around which it stands.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except CircuitBreakerOpenException as refusal:
            if begun:
                raise
            await _response(Request(scope), refusal)(scope, receive, send)


def protect(breaker: CircuitBreaker) -> Callable[[web.View], web.View]:
    """Guard an endpoint, below its route's decorator; a function or a coroutine function.

    An error and a status of 500 and more are failures; an HTTPException below that is not.  A
    FastAPI endpoint keeps its parameters, and errors in these never reach the circuit.  What a
    streamed response does after the endpoint is not guarded.

    Raises:
        TypeError: it is not a breaker.
    """
    return lambda view: web.protected(breaker, view, _finished, _status_of)


def _finished(returned: Any) -> tuple[Any, int]:
    # FastAPI's endpoints also return values, of which it makes responses.
    return returned, returned.status_code if isinstance(returned, Response) else 200


def _status_of(error: Exception) -> int | None:
    return error.status_code if isinstance(error, HTTPException) else None


async def _refused(connection: HTTPConnection, refusal: Exception) -> Response:
    if not isinstance(connection, Request) or not isinstance(refusal, CircuitBreakerOpenException):
        raise refusal
    return _response(connection, refusal)


def _response(request: Request, refusal: CircuitBreakerOpenException) -> Response:
    said = web.answer(refusal, request.headers.get("Accept", ""))
    return Response(said.body, web.STATUS, said.headers, said.content_type)
