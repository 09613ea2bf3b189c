"""The endpoints as a blueprint of Flask.

app.register_blueprint(blueprint())
"""

from __future__ import annotations

import flask

from ..services import Services
from .endpoints import LARGEST, PREFIX, Endpoints, Request
from .source import Inside
from .wsgi import STREAMS, Stream

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def blueprint(
    services: Services | None = None,
    *,
    prefix: str = PREFIX,
    token: str | None = None,
    streams: int = STREAMS,
) -> flask.Blueprint:
    """A blueprint that answers for this process; for arguments see ``wsgi.wsgi_app``."""
    endpoints = Endpoints(Inside(services), token=token, streams=streams)
    made = flask.Blueprint("circuit_breakers", __name__, url_prefix=prefix)

    def answer(path: str | None = None) -> flask.Response:
        request = flask.request
        found = endpoints.answer(Request(
            request.method,
            "" if path is None else f"/{path}",
            request.headers.get("Accept", ""),
            request.headers.get("Authorization", ""),
            request.stream.read(LARGEST + 1) if request.method == "POST" else b"",
            request.remote_addr or "",
            request.path.rpartition("/")[2],
            request.is_multithread,
        ))  # fmt: skip
        body = found.body if found.stream is None else Stream(endpoints, found)
        return flask.Response(body, found.status, found.headers)

    for rule, defaults in (("", {}), ("/", {"path": ""}), ("/<path:path>", {})):
        made.add_url_rule(
            rule,
            endpoint="answer",
            view_func=answer,
            defaults=defaults,
            methods=METHODS,
            provide_automatic_options=False,
            strict_slashes=True,
        )
    return made
