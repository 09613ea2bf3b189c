"""The command that serves what is known of a fleet over HTTP: serve."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from ..monitoring.alerts import Alerts
from ..monitoring.endpoints import PREFIX, Endpoints
from ..monitoring.presence import processes
from ..monitoring.server import HEALTH, METRICS, Server
from ..monitoring.source import Outside
from .options import Json
from .place import Place
from .terminal import HEALTHY, UNHEALTHY, USAGE, FailureError, complain, show_json

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    where: Place,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="0.0.0.0: all of this machine's.")] = "127.0.0.1",
    prefix: Annotated[str, typer.Option(help="Below which the paths are.")] = PREFIX,
    ports_of_file: Annotated[
        bool,
        typer.Option(
            "--ports-of-file",
            help="Also /health at settings.health_check_port, /metrics at settings.metrics_port.",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Serve health, metrics and the dashboard of a fleet until Ctrl-C or SIGTERM."""
    if host not in LOOPBACK:
        complain(f"Whoever reaches {host} can read all of this; only stepping in needs the token")
    with ExitStack() as stack:
        endpoints = _endpoints(where)
        made = [_listen(endpoints, host, port, prefix=prefix.rstrip("/"))]
        stack.callback(made[0].close)
        for own, only in _ports(where, ports_of_file):
            made.append(_listen(endpoints, host, own, prefix="", only=only))
            stack.callback(made[-1].close)
        alert(where, stack)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda *_: stop.set())
            stack.callback(signal.signal, number, before)
        for server in made:
            server.start()
        urls = [server.url for server in made]
        if as_json:
            show_json({"serving": where.title, "urls": urls}, indent=None)
        else:
            typer.echo(f"Serving {where.title} at {', '.join(urls)}; Ctrl-C ends")
        stop.wait()
    return HEALTHY


def alert(where: Place, stack: ExitStack) -> None:
    """Be one of the processes that may send the fleet's alerts, if the configuration wants any."""
    settings = where.loaded.configuration.settings if where.loaded else None
    if settings is None or not (settings.enabled and settings.alerts.channels):
        return
    fleet = stack.enter_context(where.fleet())
    alerts = Alerts(
        fleet,
        settings.alerts,
        environment=settings.environment,
        processes=lambda: processes(fleet),
    )
    stack.callback(alerts.close)
    alerts.start()


def _endpoints(where: Place) -> Endpoints:
    try:
        return Endpoints(Outside(where.url, where.namespace, where.loaded, where.problem))
    except ValueError as error:
        raise FailureError(str(error), USAGE) from None


def _listen(endpoints: Endpoints, host: str, port: int, **how: Any) -> Server:
    try:
        return Server(endpoints, host, port, **how)
    except ValueError as error:
        raise FailureError(str(error), USAGE) from None
    except OSError as error:
        said = f"can't listen at {host}:{port}: {error.strerror or error}"
        raise FailureError(said, UNHEALTHY) from None


def _ports(where: Place, wanted: bool) -> list[tuple[int, frozenset[str]]]:
    if not wanted:
        return []
    if where.loaded is None:
        raise FailureError("--ports-of-file needs a configuration file: give --config", USAGE)
    settings = where.loaded.configuration.settings
    ports = {settings.health_check_port: HEALTH}
    # One port may be both.
    metrics = ports.get(settings.metrics_port, frozenset()) | METRICS
    return list({**ports, settings.metrics_port: metrics}.items())
