"""A fleet with a circuit that is open, and its endpoints behind each of the four carriers."""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import WSGIRequestHandler, make_server

from distributed_breaker.monitoring import reader
from distributed_breaker.monitoring.asgi import asgi_app
from distributed_breaker.monitoring.endpoints import Endpoints
from distributed_breaker.monitoring.flask import blueprint
from distributed_breaker.monitoring.server import Server
from distributed_breaker.monitoring.source import Inside
from distributed_breaker.monitoring.wsgi import wsgi_app
from distributed_breaker.services import Services
from scripts.servers import Server as Store
from scripts.servers import why_missing
from tests.cli.conftest import breakers, configure, nowhere  # noqa: F401 - fixtures
from tests.fleet.process import until
from tests.monitoring.client import PREFIX, Site
from tests.required import need

TOKEN = "a token of more than sixteen characters"
OPEN, CLOSED = "web_app.cache", "web_app.http"


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the waits: nobody should wait a second for the next look."""
    monkeypatch.setattr(reader, "FRESH", 0.1)
    monkeypatch.delenv("CIRCUIT_BREAKER_ADMIN_TOKEN", raising=False)


def configured(folder: Path, url: str, namespace: str, **settings: Any) -> Services:
    """A process of a fleet, as far as a test needs one."""
    file = folder / f"{uuid.uuid4().hex}.json"
    content = {
        "settings": {
            "redis_url": url,
            "namespace": namespace,
            "default_failure_threshold": 3,
            **settings,
        },
        "services": {"web_app": {"cache": {"quorum": 1}, "http": {}}, "api_v1": {"http": {}}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    return Services(file, environ={})


def fail(services: Services, name: str) -> None:
    """Make a circuit open in the whole fleet, by calls that fail."""
    breaker = services.registry.breaker(name)

    def boom() -> None:
        raise TimeoutError("no answer")

    def refused() -> bool:
        with contextlib.suppress(Exception):
            breaker.call(boom)
        return breaker.state.value == "open" and breaker.snapshot().shared_state == "open"

    until(refused, f"{name} opens")


@pytest.fixture
def services(server: Store, namespace: str, tmp_path: Path) -> Iterator[Services]:
    """A process of the test's own fleet."""
    with contextlib.closing(configured(tmp_path, server.url, namespace)) as made:
        make_circuits(made)
        yield made


def make_circuits(services: Services) -> None:
    for name, spec in services.configuration.circuits().items():
        services.registry.breaker(name, spec.policy).call(lambda: None)
    services.registry.flush(10)


@pytest.fixture
def standing(services: Services) -> Iterator[Callable[..., Site]]:
    """Start the stand-alone server: ``standing(services, token=TOKEN)``."""
    with contextlib.ExitStack() as stack:

        def start(process: Services | None = None, **how: Any) -> Site:
            token = how.pop("token", TOKEN)
            endpoints = Endpoints(Inside(process or services), token=token)
            server = stack.enter_context(Server(endpoints, port=0, **how))
            return Site(server.port, how.get("prefix", PREFIX))

        yield start


# ---------------------------------------------------------------------------- four carriers


def _flask(services: Services) -> contextlib.AbstractContextManager[Site]:
    app = flask.Flask("test")
    app.register_blueprint(blueprint(services, token=TOKEN))
    return _werkzeug(app)


def _wsgi(services: Services) -> contextlib.AbstractContextManager[Site]:
    app = wsgi_app(services, token=TOKEN)
    return _werkzeug(DispatcherMiddleware(flask.Flask("test"), {PREFIX: app}))


@contextlib.contextmanager
def _werkzeug(app: Any) -> Iterator[Site]:
    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            """Nobody reads it."""

    made = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    made.daemon_threads, made.block_on_close = True, False
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield Site(made.server_port)
    made.shutdown()
    made.server_close()
    thread.join()


def _starlette(services: Services) -> contextlib.AbstractContextManager[Site]:
    return on_uvicorn(Starlette(routes=[Mount(PREFIX, asgi_app(services, token=TOKEN))]))


@contextlib.contextmanager
def on_uvicorn(app: Any) -> Iterator[Site]:
    """An ASGI application on a real server."""
    server = uvicorn.Server(uvicorn.Config(
        app, "127.0.0.1", 0, log_config=None, ws="none", timeout_graceful_shutdown=1
    ))  # fmt: skip
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "uvicorn has started")
    (port,) = {socket.getsockname()[1] for s in server.servers for socket in s.sockets}
    yield Site(port)
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def _standing(services: Services) -> Iterator[Site]:
    with Server(Endpoints(Inside(services), token=TOKEN), port=0) as server:
        yield Site(server.port)


CARRIERS = {"flask": _flask, "wsgi": _wsgi, "starlette": _starlette, "standing": _standing}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """A process that the carriers of a module share, with one circuit that is open."""
    need(why_missing("valkey"))
    folder = tmp_path_factory.mktemp("shared")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.start("valkey"))
        services = configured(folder, store.url, uuid.uuid4().hex)
        stack.callback(services.close)
        make_circuits(services)
        fail(services, OPEN)
        yield services


@pytest.fixture(scope="module", params=CARRIERS)
def site(request: pytest.FixtureRequest, shared: Services) -> Iterator[Site]:
    """The endpoints behind one of the carriers."""
    with CARRIERS[request.param](shared) as made:
        yield made
