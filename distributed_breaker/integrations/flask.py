"""Flask: guarded routes, and 503 for what a circuit refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from . import web


class CircuitBreakers:
    """The extension: every refusal that a request meets becomes 503 with ``Retry-After``.

    That covers refusals by any breaker or protected client, in blueprints too, unless the
    application itself handles the error.

    Args:
        app: the application; None: ``init_app`` follows.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Answer for an application; for as many as there are."""
        app.register_error_handler(CircuitBreakerOpenException, _refused)


def protect(breaker: CircuitBreaker) -> Callable[[web.View], web.View]:
    """Guard a route, below its decorator: ``@app.get(…)``, then ``@protect(breaker)``.

    An error and a status of 500 and more are failures; ``abort(404)`` and other answers to the
    caller's own mistakes are not.  What a streamed response does after the view is not guarded.
    Coroutine functions are guarded as such.

    Raises:
        TypeError: it is not a breaker.
    """
    return lambda view: web.protected(breaker, view, _finished, _status_of)


def _finished(returned: Any) -> tuple[Response, int]:
    response = current_app.make_response(returned)
    return response, response.status_code


def _status_of(error: Exception) -> int | None:
    return error.code if isinstance(error, HTTPException) else None


def _refused(refusal: CircuitBreakerOpenException) -> Response:
    said = web.answer(refusal, request.headers.get("Accept", ""))
    return Response(said.body, web.STATUS, said.headers, content_type=said.content_type)
