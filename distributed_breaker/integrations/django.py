"""Django: guarded views, and 503 for what a circuit refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.http import Http404, HttpRequest, HttpResponse
from django.http.multipartparser import MultiPartParserError

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from . import web

# Errors that Django answers with a status below 500.
STATUS_OF = {
    Http404: 404,
    PermissionDenied: 403,
    BadRequest: 400,
    SuspiciousOperation: 400,
    MultiPartParserError: 400,
}


class CircuitBreakerMiddleware:
    """Every refusal that a view meets becomes 503 with ``Retry-After``.

    Goes into ``MIDDLEWARE`` by its path.  What an inner middleware raises is out of its reach:
    Django makes 500 of that first.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self._get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        """The response, or where ASGI serves what is to be awaited for it."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Django's hook; None leaves an error to others."""
        if not isinstance(error, CircuitBreakerOpenException):
            return None
        said = web.answer(error, request.headers.get("Accept", ""))
        return HttpResponse(
            said.body, status=web.STATUS, headers=said.headers, content_type=said.content_type
        )


def protect(breaker: CircuitBreaker) -> Callable[[web.View], web.View]:
    """Guard a view, a function or a coroutine function; with ``method_decorator`` a class's.

    An error and a status of 500 and more are failures; ``Http404`` and Django's other answers to
    the caller's own mistakes are not.  What is rendered or streamed after the view is not guarded.

    Raises:
        TypeError: it is not a breaker.
    """
    return lambda view: web.protected(breaker, view, _finished, _status_of)


def _finished(returned: Any) -> tuple[Any, int]:
    return returned, getattr(returned, "status_code", 200)


def _status_of(error: Exception) -> int | None:
    return next((status for kind, status in STATUS_OF.items() if isinstance(error, kind)), None)
