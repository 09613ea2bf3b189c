"""The commands that look at a fleet: status, metrics, monitor, explain."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.live import Live

from ..errors import StoreUnavailable
from ..fleet import Fleet
from ..monitoring import report, text
from ..snapshot import Snapshot
from .options import Circuit, Json, OneCircuit, OneService
from .place import Place
from .terminal import CODES, HEALTHY, busy, console, on_terminal, show_json

SHOWN_ERRORS = 5


def status(
    where: Place,
    service: OneService = None,
    circuit: OneCircuit = None,
    as_json: Json = False,
) -> int:
    """How well each circuit is. Exits with 0 healthy, 1 unhealthy, 2 degraded."""
    with where.fleet() as fleet, busy(f"Asking {where.title}"):
        found = _health(where, fleet.snapshot(), service, circuit)
    if as_json:
        show_json(found)
    elif on_terminal():
        console().print(text.health_table(found, where.title, time.time()))
    else:
        _print(text.summary_line(found), *text.circuit_lines(found))
    return CODES[found["overall_status"]]


def _health(
    where: Place,
    held: Mapping[str, Snapshot],
    service: str | None,
    circuit: str | None,
    lost: str = "",
) -> dict[str, Any]:
    found = report.health(*where.narrowed(held, service, circuit), time.time(), lost)
    return {**found, "configuration": {"problem": where.problem or None}}


def _print(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


def metrics(
    where: Place,
    service: OneService = None,
    circuit: OneCircuit = None,
    as_json: Json = False,
) -> int:
    """Counts, rates and response times of each circuit, over the whole fleet."""
    with where.fleet() as fleet, busy(f"Asking {where.title}"):
        held = fleet.snapshot()
    found = report.metrics(*where.narrowed(held, service, circuit), time.time(), where.setting)
    if as_json:
        show_json(found)
    elif on_terminal():
        console().print(text.metrics_table(found))
    else:
        _print(*text.metric_lines(found))
    return HEALTHY


def monitor(
    where: Place,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between refreshes.")
    ] = 30.0,
    count: Annotated[
        int, typer.Option("--count", "-n", min=0, help="Refreshes; 0: until Ctrl-C.")
    ] = 0,
    service: OneService = None,
    circuit: OneCircuit = None,
    as_json: Json = False,
) -> int:
    """Watch the circuits: a live table, or in a pipe a line per circuit and refresh."""
    live = on_terminal() and not as_json
    title = f"{where.title}, every {interval:g} s, Ctrl-C ends"
    code = HEALTHY
    try:
        with where.fleet() as fleet, _screen(live) as show:
            for found in _watched(where, fleet, service, circuit, interval, count):
                code = CODES[found["overall_status"]]
                if live:
                    show(text.health_table(found, title, time.time()))
                elif as_json:
                    show_json(found, indent=None)
                else:
                    _print(text.summary_line(found), *text.circuit_lines(found))
    except KeyboardInterrupt:
        return HEALTHY
    return code


def _watched(
    where: Place,
    fleet: Fleet,
    service: str | None,
    circuit: str | None,
    interval: float,
    count: int,
) -> Iterator[dict[str, Any]]:
    """The health now, and after each interval.

    A store that cannot be asked at first ends the command; later an outage is part of what is
    shown, beside what was seen last.
    """
    held, lost = fleet.snapshot(), ""
    for number in itertools.count(1):
        yield _health(where, held, service, circuit, lost)
        if number == count:
            return
        time.sleep(interval)
        try:
            held, lost = fleet.snapshot(), ""
        except StoreUnavailable as error:
            lost = str(error)


@contextlib.contextmanager
def _screen(live: bool) -> Iterator[Callable[[Any], None]]:
    if not live:
        yield lambda _: None
        return
    with Live(console=console(), auto_refresh=False) as screen:
        yield functools.partial(screen.update, refresh=True)


def explain(
    circuit: Circuit,
    where: Place,
    as_json: Json = False,
) -> int:
    """Why a circuit is open: evidence, reporters, last errors, history, when it retries."""
    with where.fleet() as fleet, busy(f"Asking {where.title}"):
        held = fleet.snapshot()
        found = _health(where, held, None, circuit)["circuit_breakers"][circuit]
        history = [report.change(entry) for entry in fleet.history(circuit)]
    found["last_trip"] = _evidence(history) or found["last_trip"]
    errors = [entry for entry in history if entry["detail"].get("error")]
    sentences = text.explanation(circuit, found, time.time())
    if as_json:
        show_json({
            "circuit": circuit,
            "timestamp": report.iso(time.time()),
            "explanation": sentences,
            **found,
            "policy": report.policy(held.get(circuit), where.circuits.get(circuit)),
            "errors": errors,
            "history": history,
        })  # fmt: skip
        return CODES[found["status"]]
    _print(*sentences)
    _list("Last errors", text.history_lines(errors[:SHOWN_ERRORS]))
    _list("Reporters", text.reporter_lines(found))
    _list("History, newest first", text.history_lines(history))
    return CODES[found["status"]]


def _evidence(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last trip out of the log, which has also kept what was counted then."""
    kept = ("cause", "time", "window", "run", "reporters", "detail")
    trips = (entry for entry in history if entry["from"] == "closed" and entry["to"] == "open")
    return next(({key: trip[key] for key in kept} for trip in trips), None)


def _list(title: str, lines: Iterable[str]) -> None:
    lines = [f"  {line}" for line in lines]
    if lines:
        _print(f"\n{title}:", *lines)
