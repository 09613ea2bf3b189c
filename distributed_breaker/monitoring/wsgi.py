"""The endpoints as a WSGI application, which may be mounted in another one.

    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = DispatcherMiddleware(app, {"/circuit-breakers": wsgi_app()})

Whoever watches a dashboard holds a thread of the server.  So only a few do, and none where there is
just one: the others' browsers ask again every two seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from ..services import Services
from .endpoints import LARGEST, Answer, Endpoints, Request, below
from .live import Watcher
from .source import Inside

STREAMS = 2  # threads that may be held

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


def wsgi_app(
    services: Services | None = None,
    *,
    prefix: str = "",
    token: str | None = None,
    streams: int = STREAMS,
) -> Application:
    """An application that answers for this process.

    Args:
        services: whose circuits; None: those that the getters use, when they are first wanted.
        prefix: below which the paths are, beside where the application is mounted.
        token: of the admin; None: CIRCUIT_BREAKER_ADMIN_TOKEN says.
        streams: threads that dashboards may hold.

    Raises:
        ValueError: the prefix is none.
    """
    return Application(Endpoints(Inside(services), token=token, streams=streams), prefix)


class Application:
    """Carries requests of WSGI to the endpoints.

    Args:
        endpoints: what answers.
        prefix: below which the paths are; others are not found.
        only: the first parts of the paths that are answered; None: all.
    """

    def __init__(
        self, endpoints: Endpoints, prefix: str = "", only: Collection[str] | None = None
    ) -> None:
        below(prefix, "")
        self.endpoints = endpoints
        self._prefix = prefix
        self._only = only

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        whole = environ.get("PATH_INFO", "").encode("latin-1").decode(errors="replace")
        path = below(self._prefix, whole)
        at = environ.get("SCRIPT_NAME", "") + whole
        answer = self.endpoints.answer(Request(
            environ["REQUEST_METHOD"].upper(),
            f"/{whole}" if path is None else path,
            environ.get("HTTP_ACCEPT", ""),
            environ.get("HTTP_AUTHORIZATION", ""),
            _body(environ),
            environ.get("REMOTE_ADDR", ""),
            at.rpartition("/")[2],
            bool(environ.get("wsgi.multithread")),
            self._only,
        ))  # fmt: skip
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", answer.headers)
        return [answer.body] if answer.stream is None else Stream(self.endpoints, answer)


class Stream:
    """The body of an answer that goes on; servers close it when its reader has gone."""

    def __init__(self, endpoints: Endpoints, answer: Answer) -> None:
        assert answer.stream is not None
        self._endpoints = endpoints
        self._watcher: Watcher = answer.stream

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._watcher
        finally:
            self.close()

    def close(self) -> None:
        """Nobody watches any more."""
        self._endpoints.leave(self._watcher)


def _body(environ: dict[str, Any]) -> bytes:
    """The body, as far as it may be used: a larger one is one byte longer than it may be."""
    length = environ.get("CONTENT_LENGTH", "")
    if environ["REQUEST_METHOD"].upper() != "POST" or not (length.isascii() and length.isdigit()):
        return b""
    body: bytes = environ["wsgi.input"].read(min(int(length), LARGEST + 1))
    return body
