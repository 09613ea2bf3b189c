"""What is answered at which path: rules only, and no web framework.

Carriers (Flask, ASGI, WSGI) turn their requests into ``Request`` and send what ``Answer`` says.
The paths are below a prefix, which is the carriers' business; every link in a page is relative.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from ..errors import StoreUnavailable
from ..process import OwnLock, follow_process
from . import report
from .admin import Admin, RefusedError, order_of
from .exposition import exposition, process_name
from .figures import Figures
from .live import Watcher
from .reader import Reader
from .source import ACTIONS, Source
from .view import as_json

PREFIX = "/circuit-breakers"
TOKEN = "CIRCUIT_BREAKER_ADMIN_TOKEN"
LARGEST = 16_384  # bytes of a request's body
JSON = "application/json"
TEXTS = ("text/plain", "application/openmetrics-text")
EVENTS = "text/event-stream"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "json": JSON,
    "webmanifest": "application/manifest+json",
    "woff2": "font/woff2",
}
# Nothing is kept by browsers and proxies, shown in frames of others, or loaded from elsewhere.
ALWAYS = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)
PLACEHOLDER = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Circuit breakers</title>
<h1>Circuit breakers</h1>
<p><a href="health">health</a> <a href="metrics">metrics</a> <a href="timeline">timeline</a></p>
"""

log = logging.getLogger("distributed_breaker")


class Request(NamedTuple):
    """What somebody asks.

    Attributes:
        method: in capitals.
        path: below the prefix, decoded; ``/health``.
        accept, authorization: these headers, empty when they are not given.
        body: at most ``LARGEST`` bytes and one.
        address: whose it is.
        last: the last part of the path that was asked for, for a redirect.
        lasting: whether a thread can be spared for as long as somebody watches.
        only: the first parts of the paths that are answered; None: all.
    """

    method: str
    path: str
    accept: str = ""
    authorization: str = ""
    body: bytes = b""
    address: str = ""
    last: str = ""
    lasting: bool = True
    only: Collection[str] | None = None


class Answer(NamedTuple):
    """What is sent.

    Attributes:
        status: HTTP's.
        headers: all of them, but for those of the connection.
        body: the whole of it; empty for HEAD.
        stream: what follows, for as long as somebody watches; None: nothing.  Whoever sends it
            must call ``Endpoints.leave`` in the end.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    stream: Watcher | None = None


class Endpoints:
    """The endpoints of one fleet.

    Args:
        source: where it is looked at from.
        token: who gives it may step in; None: the variable CIRCUIT_BREAKER_ADMIN_TOKEN says; empty:
            nobody.
        streams: how many dashboards may be open at once as streams; the others ask again and again.
    """

    _lock = OwnLock()

    def __init__(self, source: Source, *, token: str | None = None, streams: int = 100) -> None:
        self.source = source
        self.admin = Admin(os.environ.get(TOKEN) if token is None else token)
        self._streams = streams
        self._reader: Reader | None = None
        follow_process(self)

    @property
    def reader(self) -> Reader:
        """The one of this process; made when it is first wanted, and anew after a fork."""
        if self._reader is None:
            with self._lock:
                if self._reader is None:
                    reader = Reader(self.source)
                    reader.live.admin = self.admin.configured
                    self._reader = reader
        return self._reader

    def answer(self, request: Request) -> Answer:
        """What to send; never raises."""
        try:
            answer = self._answer(request)
        except RefusedError as refused:
            more = [("Retry-After", str(math.ceil(refused.wait)))] if refused.wait else []
            if refused.status == 401:
                more.append(("WWW-Authenticate", "Bearer"))
            answer = _error(refused.status, str(refused), *more)
        except StoreUnavailable as error:
            answer = _error(503, str(error), ("Retry-After", "1"))
        except Exception:
            # What went wrong is for the log; it may hold what must not be seen.
            log.exception("a request of the monitoring can't be answered")
            answer = _error(500, "this can't be answered; the log of this process says why")
        if request.method == "HEAD":
            if answer.stream is not None:
                self.leave(answer.stream)
            answer = answer._replace(body=b"", stream=None)
        return answer

    def leave(self, stream: Watcher) -> None:
        """A stream is over."""
        self.reader.leave(stream)

    def close(self) -> None:
        """End all streams; done at exit, too."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def forked(self) -> None:
        """A child looks for itself."""
        vars(self).pop("_lock", None)
        self._reader = None
        self.source.forked()

    # ------------------------------------------------------------------ routes

    def _answer(self, request: Request) -> Answer:
        first, _, rest = request.path.removeprefix("/").partition("/")
        if request.only is not None and first not in request.only:
            return _error(404, f"there is only {', '.join(sorted(request.only))} at this port")
        if first in ACTIONS and not rest:
            return self._step_in(first, request) if request.method == "POST" else _allow("POST")
        find = self._found(first, rest, request)
        if find is None:
            return _error(404, f"there is nothing here; below the prefix there is {PATHS}")
        return find() if request.method in ("GET", "HEAD") else _allow("GET, HEAD")

    def _found(self, first: str, rest: str, request: Request) -> Callable[[], Answer] | None:
        if first == "circuits" and rest:
            return lambda: self._circuit(rest)
        if first == "assets" and rest:
            return lambda: _asset(rest)
        if not request.path:
            return lambda: _redirect(f"{request.last}/" if request.last else "./")
        return {
            "/": _page,
            "/health": self._health,
            "/live": lambda: _json(200, {"alive": True}),
            "/ready": self._ready,
            "/metrics": lambda: self._metrics(request.accept),
            "/metrics/prometheus": lambda: self._prometheus(request.accept),
            "/timeline": lambda: _json(200, {"transitions": self.reader.timeline()}),
            "/processes": lambda: _json(200, {"processes": self.reader.processes()}),
            "/events": lambda: self._events(request),
            "/schema": lambda: _sent(200, JSON, schema()),
        }.get(request.path)

    def _health(self) -> Answer:
        view = self.reader.view()
        unhealthy = view.fleet_health["overall_status"] == report.Status.UNHEALTHY
        return _sent(503 if unhealthy else 200, JSON, view.health_json)

    def _ready(self) -> Answer:
        """Whether requests may be sent here.  A process of the fleet works without its store."""
        view = self.reader.view()
        ready = self.reader.has_seen or not self.source.wants_view()
        return _json(200 if ready else 503, {"ready": ready, "store": view.store})

    def _metrics(self, accept: str) -> Answer:
        kinds = (kind.partition(";")[0].strip().lower() for kind in accept.split(","))
        if next((kind for kind in kinds if kind in (JSON, *TEXTS)), JSON) in TEXTS:
            answer = self._prometheus(accept)
        else:
            self._collected()
            answer = _sent(200, JSON, self.reader.view().metrics_json)
        answer.headers.append(("Vary", "Accept"))
        return answer

    def _prometheus(self, accept: str) -> Answer:
        self._collected()
        view = self.reader.view()

        def make() -> tuple[str, bytes]:
            figures = Figures.of(
                None if view.lost else view.snapshots,
                view.own,
                view.setting.namespace,
                process_name(),
                clients=self.source.stats(),
                configured=view.configured,
                rejected=bool(self.source.configuration()["problem"]),
            )
            return exposition(accept, figures)

        return _sent(200, *self.reader.once(view, f"text {accept}", make))

    def _collected(self) -> None:
        if not self.source.setting().monitoring_enabled:
            raise RefusedError(404, "settings.monitoring_enabled is false, so there are no metrics")

    def _circuit(self, name: str) -> Answer:
        view = self.reader.view()
        health = view.fleet_health["circuit_breakers"].get(name)
        if health is None:
            return _error(404, f"there is no circuit {name[:128]!r}")
        found, configured = view.snapshots.get(name), view.configured.get(name)
        return _json(200, {
            "name": name,
            "health": health,
            "metrics": view.fleet_metrics["circuit_breakers"][name],
            "policy": report.policy(found, configured),
            "history": self.reader.history(name),
        })  # fmt: skip

    def _events(self, request: Request) -> Answer:
        if request.method == "HEAD":
            return _sent(200, EVENTS, b"")
        reader = self.reader
        short = not request.lasting or len(reader.live.watchers) >= self._streams
        headers = [("Content-Type", EVENTS), ("X-Accel-Buffering", "no"), *ALWAYS]
        return Answer(200, headers, stream=reader.watch(short=short))

    def _step_in(self, action: str, request: Request) -> Answer:
        self.admin.check(request.authorization, request.address)
        if len(request.body) > LARGEST:
            return _error(413, f"the body is larger than {LARGEST} bytes")
        view = self.reader.view()
        if view.lost:
            raise StoreUnavailable(view.lost)
        order = order_of(action, request.body, view, request.address)
        done = self.admin.carry_out(order, view, self.source.fleet(), request.address)
        self.reader.refresh()
        failed = all(one.error for one in done)
        return _json(503 if failed else 200, {
            "done": [
                {**one._asdict(), "before": one.before or None, "after": one.after or None,
                 "error": one.error or None}
                for one in done
            ]
        })  # fmt: skip


PATHS = (
    "/, /health, /live, /ready, /metrics, /metrics/prometheus, /circuits/<name>, /timeline, "
    "/processes, /events and /schema"
)


# ---------------------------------------------------------------------------- answers


def _sent(status: int, content_type: str, body: bytes, *more: tuple[str, str]) -> Answer:
    length = ("Content-Length", str(len(body)))
    return Answer(status, [("Content-Type", content_type), length, *more, *ALWAYS], body)


def _json(status: int, document: Any, *more: tuple[str, str]) -> Answer:
    return _sent(status, JSON, as_json(document), *more)


def _error(status: int, message: str, *more: tuple[str, str]) -> Answer:
    return _json(status, {"error": message}, *more)


def _allow(methods: str) -> Answer:
    return _error(405, f"only {methods} can be used here", ("Allow", methods))


def _redirect(where: str) -> Answer:
    # Relative, so that it is right behind every proxy.
    return _sent(308, "text/plain; charset=utf-8", b"", ("Location", where))


def _page() -> Answer:
    return _sent(200, TYPES["html"], dashboard().get("index.html", PLACEHOLDER))


def _asset(name: str) -> Answer:
    found = dashboard().get(name)
    content_type = TYPES.get(name.rpartition(".")[2])
    if found is None or content_type is None:
        return _error(404, f"the dashboard has no file {name[:100]!r}")
    return _sent(200, content_type, found)


@functools.cache
def dashboard() -> Mapping[str, bytes]:
    """The dashboard's files, by name.  What is not in its folder can't be asked for."""
    folder = files(__package__) / "dashboard"
    if not folder.is_dir():
        return {}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@functools.cache
def schema() -> bytes:
    """The JSON Schema of the documents."""
    return (files(__package__) / "schema.json").read_bytes()


def below(prefix: str, path: str) -> str | None:
    """A path without the prefix, None where it is elsewhere.

    Raises:
        ValueError: it is no prefix: ``/circuit-breakers``, or nothing.
    """
    if prefix and not (prefix.startswith("/") and not prefix.endswith("/")):
        raise ValueError(f"a prefix begins with a slash and ends without one, unlike {prefix!r}")
    if path == prefix or path.startswith(f"{prefix}/"):
        return path[len(prefix) :]
    return None
