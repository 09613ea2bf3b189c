"""The command ``breakers``: looks at a running fleet through its store, and steps in.

Needs the extra ``cli``.  What each command prints with ``--json``, and the exit codes, are promised
in ``docs/command.md``.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import itertools
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, ParamSpec

import typer
from rich.console import Console
from rich.live import Live
from typer.core import TyperGroup

from . import config
from .errors import StoreUnavailable
from .fleet import Done, Fleet
from .monitoring import doctor, report, text
from .policy import Policy
from .snapshot import Snapshot

HEALTHY, UNHEALTHY, DEGRADED, CANNOT_TELL, USAGE = 0, 1, 2, 3, 64
CODES = {"healthy": HEALTHY, "degraded": DEGRADED, "unhealthy": UNHEALTHY}
SHOWN_NAMES = 40  # in an error that lists what there is

P = ParamSpec("P")

# The base of all errors of usage, which typer does not export.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """A usage error ends with 64, since 2 means degraded here."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _usage():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        with _usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.exit_code = USAGE
        raise


app = typer.Typer(
    cls=Commands,
    help="Look at the circuit breakers of a running fleet, and step in.",
    epilog="Exit codes: 0 healthy or done, 1 unhealthy or failed, 2 degraded, "
    "3 Redis cannot be reached, 64 wrong usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
settings = typer.Typer(help="Look at the configuration file.", no_args_is_help=True)
app.add_typer(settings, name="config")

# ---------------------------------------------------------------------------- options


def _complete_circuit(incomplete: str) -> list[str]:
    """What the configuration names; a completion must not wait for a store."""
    with contextlib.suppress(Exception):
        return [n for n in config.load().configuration.circuits() if n.startswith(incomplete)]
    return []


def _complete_service(incomplete: str) -> list[str]:
    with contextlib.suppress(Exception):
        return [n for n in config.load().configuration.services if n.startswith(incomplete)]
    return []


Circuit = Annotated[str, typer.Argument(help="Name.", autocompletion=_complete_circuit)]
OneCircuit = Annotated[
    str | None,
    typer.Option("--circuit", "-c", help="Only this one.", autocompletion=_complete_circuit),
]
OneService = Annotated[
    str | None,
    typer.Option(
        "--service", "-s", help="Only its circuits (NAME.*).", autocompletion=_complete_service
    ),
]
Url = Annotated[
    str | None,
    typer.Option("--url", help="Redis; else the environment says, else the file."),
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", help="Of the fleet; else the file says.")
]
File = Annotated[
    Path | None,
    typer.Option("--config", help="Else CIRCUIT_BREAKER_CONFIG, else config/circuit_breakers.json"),
]
Environment = Annotated[
    str | None, typer.Option("--environment", "-e", help="Which overlay; else ENVIRONMENT.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable; see docs/command.md.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Who; user@host if not given.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why; the fleet's log keeps it.")]
Ttl = Annotated[
    float | None,
    typer.Option("--ttl", min=0.001, max=31_536_000, help="Seconds after which it ends by itself."),
]


# ---------------------------------------------------------------------------- where to look


class FailureError(Exception):
    """Ends the command with a sentence, an exit code, and (where it matters) what there is."""

    def __init__(self, message: str, code: int, known: Iterable[str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.known = None if known is None else list(known)


class Place(NamedTuple):
    """Which fleet, and what the configuration says of it.

    ``problem`` says why there is no configuration; empty when there is none and none was asked for.
    """

    url: str
    namespace: str
    loaded: config.Loaded | None
    problem: str

    @property
    def circuits(self) -> Mapping[str, report.Configured]:
        return self.loaded.configuration.circuits() if self.loaded else {}

    @property
    def setting(self) -> report.Setting:
        if self.loaded is None:
            return report.Setting()
        c = self.loaded.configuration
        return report.Setting(
            c.settings.environment, c.settings.monitoring_enabled, len(c.services)
        )

    def fleet(self) -> Fleet:
        """Raises FailureError when the URL or the namespace can't be used."""
        try:
            return Fleet(self.url, self.namespace)
        except ValueError as error:
            raise FailureError(str(error), USAGE) from None


def place(
    url: str | None, namespace: str | None, file: Path | None, environment: str | None
) -> Place:
    """Find the fleet: options beat the environment, and that beats the file.

    In an incident a broken file must not keep anybody from looking, so it is only complained about
    where the options say where to look.  No namespace is guessed: an empty one would look healthy.
    """
    loaded, problem = None, ""
    try:
        loaded = config.load(file, environment=environment)
    except config.ConfigurationError as error:
        named = file or os.environ.get("CIRCUIT_BREAKER_CONFIG")
        if named or Path(config.DEFAULT_FILE).exists():
            problem = str(error)
    if problem:
        complain(f"Going on without the configuration: {problem}")
    if problem and namespace is None:
        raise FailureError("give --namespace (and --url), which the file would have said", USAGE)
    found = (loaded or _environment_only()).configuration
    return Place(
        url or _url(found, given=loaded is not None),
        namespace or found.settings.namespace,
        loaded,
        problem,
    )


def _environment_only() -> config.Loaded:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as empty:
        empty.write("{}")
        empty.flush()
        try:
            return config.load(empty.name)
        except config.ConfigurationError as error:
            raise FailureError(str(error), USAGE) from None


def _url(found: config.Configuration, *, given: bool) -> str:
    if not given and found.settings.redis_url is None:
        raise FailureError(
            f"nothing says where Redis is: give --url, set CIRCUIT_BREAKER_REDIS_URL, or run this "
            f"where {config.DEFAULT_FILE} is",
            USAGE,
        )
    return found.redis_url


def chosen(
    names: Iterable[str],
    circuits: Mapping[str, report.Configured],
    service: str | None,
    circuit: str | None,
) -> list[str]:
    """The names that are asked for, out of what the store and the configuration know.

    Raises FailureError, with what there is, when that is nothing.
    """
    if service is not None and circuit is not None:
        raise FailureError("give --service or --circuit, not both", USAGE)
    known = sorted({*names, *circuits})
    if circuit is not None:
        if circuit not in known:
            raise FailureError(f"there is no circuit {circuit!r}", USAGE, known)
        return [circuit]
    if service is not None:
        # The dot keeps web_app_v2 apart from web_app.
        found = [n for n in known if n == service or n.startswith(f"{service}.")]
        if not found:
            services = sorted({report.service_of(name) for name in known})
            raise FailureError(f"no circuit belongs to a service {service!r}", USAGE, services)
        return found
    return known


# ---------------------------------------------------------------------------- how to say it


def command(function: Callable[P, int]) -> Callable[P, None]:
    """Turn what a command returns, or how it fails, into an exit code and one sentence."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            code = function(*args, **kwargs)
        except StoreUnavailable as error:
            code = _failed(str(error), CANNOT_TELL, None, as_json)
        except FailureError as error:
            code = _failed(str(error), error.code, error.known, as_json)
        except KeyboardInterrupt:
            code = 130
        raise typer.Exit(code)

    return run


def _failed(message: str, code: int, known: list[str] | None, as_json: bool) -> int:
    if as_json:
        show_json({"error": message, "known": known or []})
    listed = ""
    if known is not None:
        listed = f"; there are: {', '.join(known[:SHOWN_NAMES])}" if known else "; there is none"
        if len(known) > SHOWN_NAMES:
            listed += f" and {len(known) - SHOWN_NAMES} more"
    complain(f"{message.rstrip('.')}{listed}.")
    return code


def complain(message: str) -> None:
    """Say something to people, beside what is printed for programs."""
    for line in message.splitlines():
        typer.echo(text.clean(line), err=True)


def show_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value that programs read."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def on_terminal() -> bool:
    """Whether somebody looks at what is printed."""
    return sys.stdout.isatty()


def console() -> Console:
    """Where tables go; colour only on a terminal and without NO_COLOR."""
    return Console(highlight=False)


def busy(what: str) -> contextlib.AbstractContextManager[Any]:
    """A live line while somebody waits."""
    waiting = Console(stderr=True, highlight=False)
    return waiting.status(what) if sys.stderr.isatty() else contextlib.nullcontext()


def actor_or_default(actor: str | None) -> str:
    """Who steps in, for the log."""
    if actor:
        return actor
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may have no name for its user.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


# ---------------------------------------------------------------------------- looking


@app.command()
@command
def status(
    service: OneService = None,
    circuit: OneCircuit = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """How well each circuit is. Exits with 0 healthy, 1 unhealthy, 2 degraded."""
    where = place(url, namespace, file, environment)
    with where.fleet() as fleet, busy(f"Asking {fleet.place}"):
        found = _health(where, fleet.snapshot(), service, circuit)
    if as_json:
        show_json(found)
    else:
        _show_health(found, where, fleet)
    return CODES[found["overall_status"]]


def _health(
    where: Place,
    snapshots: Mapping[str, Snapshot],
    service: str | None,
    circuit: str | None,
    lost: str = "",
) -> dict[str, Any]:
    names = chosen(snapshots, where.circuits, service, circuit)
    wanted = {name: s for name, s in snapshots.items() if name in names}
    configured = {name: c for name, c in where.circuits.items() if name in names}
    found = report.health(wanted, time.time(), configured, lost)
    return {**found, "configuration": {"problem": where.problem or None}}


def _show_health(found: dict[str, Any], where: Place, fleet: Fleet) -> None:
    if on_terminal():
        console().print(text.health_table(found, _title(where, fleet), time.time()))
        return
    typer.echo(text.summary_line(found))
    for line in text.circuit_lines(found):
        typer.echo(line)


def _title(where: Place, fleet: Fleet) -> str:
    return f"{where.namespace} at {fleet.place}"


@app.command()
@command
def metrics(
    service: OneService = None,
    circuit: OneCircuit = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Counts, rates and response times of each circuit, over the whole fleet."""
    where = place(url, namespace, file, environment)
    with where.fleet() as fleet, busy(f"Asking {fleet.place}"):
        snapshots = fleet.snapshot()
    names = chosen(snapshots, where.circuits, service, circuit)
    found = report.metrics(
        {name: s for name, s in snapshots.items() if name in names},
        time.time(),
        {name: c for name, c in where.circuits.items() if name in names},
        where.setting,
    )
    if as_json:
        show_json(found)
    elif on_terminal():
        console().print(text.metrics_table(found))
    else:
        for line in text.metric_lines(found):
            typer.echo(line)
    return HEALTHY


@app.command()
@command
def monitor(
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, help="Seconds between refreshes.")
    ] = 30.0,
    count: Annotated[
        int, typer.Option("--count", "-n", min=0, help="Refreshes; 0: until Ctrl-C.")
    ] = 0,
    service: OneService = None,
    circuit: OneCircuit = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Watch the circuits: a live table, or in a pipe a line per circuit and refresh."""
    where = place(url, namespace, file, environment)
    live = on_terminal() and not as_json
    found: dict[str, Any] = {}
    try:
        with where.fleet() as fleet, _screen(live) as show:
            for number in itertools.count(1):
                found = _refreshed(where, fleet, service, circuit, first=number == 1)
                if live:
                    title = f"{_title(where, fleet)}, every {interval:g} s, Ctrl-C ends"
                    show(text.health_table(found, title, time.time()))
                elif as_json:
                    show_json(found, indent=None)
                else:
                    for line in text.circuit_lines(found):
                        typer.echo(line)
                    if found["store"]["problem"]:
                        typer.echo(text.summary_line(found))
                if number == count:
                    break
                time.sleep(interval)
    except KeyboardInterrupt:
        return HEALTHY
    return CODES[found["overall_status"]]


_seen: dict[str, Snapshot] = {}


def _refreshed(
    where: Place, fleet: Fleet, service: str | None, circuit: str | None, *, first: bool
) -> dict[str, Any]:
    """The present health; once something was seen, an outage is part of what is shown."""
    lost = ""
    try:
        snapshots = fleet.snapshot()
        _seen.clear()
        _seen.update(snapshots)
    except StoreUnavailable as error:
        if first:
            raise
        lost = str(error)
    return _health(where, _seen, service, circuit, lost)


@contextlib.contextmanager
def _screen(live: bool) -> Iterator[Callable[[Any], None]]:
    if not live:
        yield lambda _: None
        return
    with Live(console=console(), auto_refresh=False) as screen:
        yield functools.partial(screen.update, refresh=True)


@app.command()
@command
def explain(
    circuit: Circuit,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Why a circuit is open: evidence, reporters, last errors, history, when it retries."""
    where = place(url, namespace, file, environment)
    with where.fleet() as fleet, busy(f"Asking {fleet.place}"):
        snapshots = fleet.snapshot()
        chosen(snapshots, where.circuits, None, circuit)
        history = [report.change(entry) for entry in fleet.history(circuit)]
    found = _health(where, snapshots, None, circuit)["circuit_breakers"][circuit]
    _take_evidence(found, history)
    errors = [entry for entry in history if entry["detail"].get("error")]
    sentences = text.explanation(circuit, found, time.time())
    if as_json:
        show_json({
            "circuit": circuit,
            "timestamp": report.iso(time.time()),
            "explanation": sentences,
            **found,
            "policy": _policy(snapshots.get(circuit), where.circuits.get(circuit)),
            "errors": errors,
            "history": history,
        })  # fmt: skip
        return CODES[found["status"]]
    for sentence in sentences:
        typer.echo(sentence)
    _list("Last errors", text.history_lines(errors[:5]))
    _list("Reporters", (
        f"{r['id']}  bad={r['bad']} run={r['run']} last={r['last']}" for r in found["reporters"]
    ))  # fmt: skip
    _list("History, newest first", text.history_lines(history))
    return CODES[found["status"]]


def _take_evidence(found: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """The circuit itself keeps why it tripped last, the log also what was counted then."""
    trip = found["last_trip"]
    for entry in history:
        if entry["to"] == "open" and entry["cause"] in ("run", "rate", "slow", "retry_after"):
            counted = {key: entry[key] for key in ("window", "run", "reporters")}
            found["last_trip"] = {key: entry[key] for key in ("cause", "time", "detail")} | counted
            return
    found["last_trip"] = trip


def _list(title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if lines:
        typer.echo(f"\n{title}:")
        for line in lines:
            typer.echo(f"  {text.clean(line)}")


def _policy(
    snapshot: Snapshot | None, configured: report.Configured | None
) -> dict[str, Any] | None:
    held = snapshot.policy if snapshot else configured.policy if configured else None
    if held is None:
        return None
    return {name: getattr(held, name) for name in held.numbers._fields}


# ---------------------------------------------------------------------------- stepping in


@app.command()
@command
def reset(
    service: OneService = None,
    circuit: OneCircuit = None,
    actor: Actor = None,
    reason: Reason = "",
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Close circuits in the whole fleet at once: all, a service's, or one."""
    where = place(url, namespace, file, environment)
    with where.fleet() as fleet:
        snapshots = fleet.snapshot()
        names = chosen(snapshots, where.circuits, service, circuit)
        if not names:
            raise FailureError(f"there is no circuit in {_title(where, fleet)} to reset", USAGE)
        who = actor_or_default(actor)
        steps = fleet.reset(_policies(names, where), actor=who, reason=reason)
        return _step_in("reset", steps, who, reason, as_json)


@app.command("force-open")
@command
def force_open(
    circuit: Circuit,
    reason: Reason = "",
    ttl: Ttl = None,
    actor: Actor = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Refuse all calls of the fleet until released, or for --ttl seconds."""
    where = place(url, namespace, file, environment)
    with _one(where, circuit) as fleet:
        who = actor_or_default(actor)
        names = _policies([circuit], where)
        steps = fleet.force_open(names, actor=who, reason=reason, ttl=ttl)
        return _step_in("force-open", steps, who, reason, as_json)


@app.command("force-closed")
@command
def force_closed(
    circuit: Circuit,
    reason: Reason = "",
    ttl: Ttl = None,
    actor: Actor = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Let all calls of the fleet pass until released, or for --ttl seconds."""
    where = place(url, namespace, file, environment)
    with _one(where, circuit) as fleet:
        who = actor_or_default(actor)
        names = _policies([circuit], where)
        steps = fleet.force_closed(names, actor=who, reason=reason, ttl=ttl)
        return _step_in("force-closed", steps, who, reason, as_json)


@app.command()
@command
def release(
    circuit: Circuit,
    reason: Reason = "",
    actor: Actor = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """End an override: forced_open goes on to half_open, forced_closed to closed."""
    where = place(url, namespace, file, environment)
    with _one(where, circuit) as fleet:
        who = actor_or_default(actor)
        steps = fleet.release(_policies([circuit], where), actor=who, reason=reason)
        return _step_in("release", steps, who, reason, as_json)


@contextlib.contextmanager
def _one(where: Place, circuit: str) -> Iterator[Fleet]:
    """The fleet, if it has this circuit: a slip of the keyboard must not make one."""
    with where.fleet() as fleet:
        chosen(fleet.snapshot(), where.circuits, None, circuit)
        yield fleet


def _policies(names: Iterable[str], where: Place) -> dict[str, Policy | None]:
    """The policies that circuits get which the store does not hold yet."""
    specs = where.circuits
    return {name: specs[name].policy if name in specs else None for name in names}


def _step_in(action: str, steps: Iterator[Done], actor: str, reason: str, as_json: bool) -> int:
    done: list[Done] = []
    with busy(action):
        for one in steps:
            done.append(one)
            if not as_json:
                _say(one, action)
    failed = [one for one in done if one.error]
    if as_json:
        show_json({
            "action": action,
            "timestamp": report.iso(time.time()),
            "actor": actor,
            "reason": reason,
            "circuits": {
                one.circuit: {
                    "before": one.before or None, "after": one.after or None,
                    "changed": one.changed, "error": one.error or None,
                }
                for one in done
            },
            "summary": {"total": len(done), "done": len(done) - len(failed), "failed": len(failed)},
        })  # fmt: skip
    if failed:
        names = ", ".join(one.circuit for one in failed[:SHOWN_NAMES])
        complain(f"{len(failed)} of {len(done)} failed: {names}.")
    return UNHEALTHY if failed else HEALTHY


def _say(one: Done, action: str) -> None:
    if one.error:
        line = f"{one.circuit}: failed: {one.error}"
    elif not one.changed:
        line = f"{one.circuit}: {one.after}, nothing to {action}"
    else:
        line = f"{one.circuit}: {one.before or 'not in the store'} -> {one.after}"
    typer.echo(text.clean(line))


# ---------------------------------------------------------------------------- configuration


def _loaded(file: Path | None, environment: str | None) -> config.Loaded:
    try:
        return config.load(file, environment=environment)
    except config.ConfigurationError as error:
        raise FailureError(str(error), UNHEALTHY) from None


def _values(loaded: config.Loaded) -> dict[str, Any]:
    """Each value by its dotted path, as people may see it."""
    dumped = loaded.configuration.model_dump(mode="json", by_alias=True)

    def walk(values: Mapping[str, Any], under: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            path = f"{under}{key}"
            if isinstance(value, dict) and path not in loaded.sources:
                yield from walk(value, f"{path}.")
            else:
                yield path, config.shown(path, value)

    return dict(walk(dumped, ""))


@settings.command("show")
@command
def config_show(file: File = None, environment: Environment = None, as_json: Json = False) -> int:
    """The merged configuration, and where each value came from. Secrets are hidden."""
    loaded = _loaded(file, environment)
    values = _values(loaded)
    if as_json:
        show_json({
            "files": [str(read) for read in loaded.files],
            "environment": loaded.configuration.settings.environment,
            "values": {
                path: {"value": value, "source": loaded.sources.get(path, "default")}
                for path, value in values.items()
            },
        })  # fmt: skip
        return HEALTHY
    for path, value in values.items():
        shown = json.dumps(value, ensure_ascii=False)
        typer.echo(f"{path} = {shown}  ({loaded.sources.get(path, 'default')})")
    return HEALTHY


@settings.command("validate")
@command
def config_validate(
    path: Annotated[Path | None, typer.Argument(help="The file; else as for --config.")] = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Say everything that is wrong with the file. Exits with 1 if anything is."""
    try:
        loaded = config.load(path or file, environment=environment)
    except config.ConfigurationError as error:
        if as_json:
            problems = [one._asdict() for one in error.problems]
            show_json({"valid": False, "files": [], "problems": problems})
        else:
            complain(str(error))
        return UNHEALTHY
    read = [str(one) for one in loaded.files]
    if as_json:
        show_json({"valid": True, "files": read, "problems": []})
    else:
        found = loaded.configuration
        counts = f"{len(found.services)} services, {len(found.circuits())} circuits"
        typer.echo(f"Valid: {', '.join(read)} ({counts}).")
    return HEALTHY


@settings.command("schema")
@command
def config_schema(as_json: Json = False) -> int:
    """The file's JSON Schema."""
    show_json(config.schema())
    return HEALTHY


@settings.command("diff")
@command
def config_diff(
    other: Annotated[Path | None, typer.Argument(help="Another file.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Another environment of the same file.")
    ] = None,
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """What differs from another file, from another environment, or, without either, from the
    policies that the fleet has in force. Exits with 1 if anything does."""
    loaded = _loaded(file, environment)
    if other is not None or against is not None:
        here, there = _values(loaded), _values(_loaded(other or file, against or environment))
        names = ("here", "there")
        pairs = {path: (here.get(path), there.get(path)) for path in sorted({*here, *there})}
        differences = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
    else:
        names = ("file", "fleet")
        where = place(url, namespace, file, environment)
        with where.fleet() as fleet, busy(f"Asking {fleet.place}"):
            snapshots = fleet.snapshot()
        differences = dict(_against_fleet(where.circuits, snapshots))
    one, two = names
    if as_json:
        rows = {path: {one: a, two: b} for path, (a, b) in differences.items()}
        show_json({"equal": not differences, "differences": rows})
    else:
        for path, (a, b) in differences.items():
            typer.echo(f"{path}: {one} {json.dumps(a)}, {two} {json.dumps(b)}")
        if not differences:
            typer.echo("No difference.")
    return UNHEALTHY if differences else HEALTHY


def _against_fleet(
    circuits: Mapping[str, report.Configured], snapshots: Mapping[str, Snapshot]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, spec in circuits.items():
        held = snapshots[name].policy if name in snapshots else None
        if held is not None:
            for number, pair in doctor.compare(spec.policy, held).items():
                yield f"{name}.{number}", pair


# ---------------------------------------------------------------------------- doctor


@app.command("doctor")
@command
def examine(
    url: Url = None,
    namespace: Namespace = None,
    file: File = None,
    environment: Environment = None,
    as_json: Json = False,
) -> int:
    """Examine Redis, the user's rights and the policies, and say what to do.

    Exits with 1 when something does not work, with 2 when something should be mended.
    """
    where = place(url, namespace, file, environment)
    findings = [_about_file(where)]
    live = not as_json
    if live:
        _tell(findings[0])
    code = HEALTHY
    with where.fleet() as fleet:
        try:
            with busy(f"Asking {fleet.place}"):
                snapshots = _snapshots_if_allowed(fleet)
            for finding in doctor.examine(fleet, snapshots, where.circuits):
                findings.append(finding)
                if live:
                    _tell(finding)
        except StoreUnavailable as error:
            findings.append(doctor.unreachable(str(error)))
            complain(f"{error}: {findings[-1].advice}.")
            code = CANNOT_TELL
    verdicts = {finding.verdict for finding in findings}
    if code != CANNOT_TELL and doctor.Verdict.WARNING in verdicts:
        code = DEGRADED
    if code != CANNOT_TELL and doctor.Verdict.PROBLEM in verdicts:
        code = UNHEALTHY
    if as_json:
        show_json({
            "timestamp": report.iso(time.time()),
            "store": fleet.place,
            "namespace": where.namespace,
            "verdict": ["ok", "problem", "warning", "unreachable"][code],
            "findings": [finding._asdict() for finding in findings],
        })  # fmt: skip
    return code


def _tell(finding: doctor.Finding) -> None:
    if on_terminal():
        console().print(text.finding_text(finding))
        return
    for line in text.finding_lines(finding):
        typer.echo(line)


def _snapshots_if_allowed(fleet: Fleet) -> dict[str, Snapshot] | None:
    """None where the user lacks a right, which is one of the findings."""
    try:
        return fleet.snapshot()
    except StoreUnavailable as error:
        if "NOPERM" in str(error):
            return None
        raise


def _about_file(where: Place) -> doctor.Finding:
    if where.problem:
        advice = "processes go on with what they have; mend it before one of them is restarted"
        return doctor.Finding("configuration", doctor.Verdict.PROBLEM, where.problem, advice)
    if where.loaded is None:
        found = f"no {config.DEFAULT_FILE} here, so policies can't be compared"
        return doctor.Finding("configuration", doctor.Verdict.UNKNOWN, found, "give --config")
    files = ", ".join(str(read) for read in where.loaded.files)
    version = where.loaded.configuration.settings.config_version
    return doctor.Finding("configuration", doctor.Verdict.OK, f"{files}, version {version}")


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # An old locale must not end the command.
    app()


if __name__ == "__main__":
    main()
