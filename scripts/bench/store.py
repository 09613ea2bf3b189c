"""What guarded calls cost the server, and how fast a trip reaches other processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy, Transition
from scripts.servers import Server

from .report import MISSING, Row, Setting, Table
from .work import Boom, boom, work

RATE = 5_000  # guarded calls a second
SECONDS, QUICK_SECONDS = 5.0, 2.0
FAILING = 100  # in the second measurement one call in so many fails, and is reported at once

WATCHERS = 4
TRIPS, QUICK_TRIPS = 300, 50
ANSWER = 5.0  # s that a watcher may take to tell what it has seen

# Failures are reported at once whatever the policy is; this one never trips.
UNTRIPPABLE = Policy(failure_threshold=1_000_000, failure_rate=None)
BRITTLE = Policy(failure_threshold=1, quorum=1, open_interval=60.0)


def run(setting: Setting) -> Table:
    """Count the commands of paced calls, then time trips."""
    seconds = QUICK_SECONDS if setting.quick else SECONDS
    table = Table(
        f"Store: one process and circuit at {RATE:,} calls/s for {seconds:g} s; "
        f"{WATCHERS} other processes see trips",
        ("figure",),
    )
    with Server.start(setting.server) as server:
        for what, failing in (("closed", 0), (f"1 in {FAILING} fails", FAILING)):
            table.rows += _traffic_rows(what, count_traffic(server, seconds, failing))
        table.rows += propagation(server, QUICK_TRIPS if setting.quick else TRIPS)
    return table


# ------------------------------------------------------------------ commands and bytes


@dataclass(frozen=True)
class Traffic:
    """What reached the server while ``calls`` guarded calls were made in ``seconds``."""

    calls: int
    seconds: float
    by_client: Counter[str]
    in_scripts: Counter[str]
    received: int | None  # bytes by the server, None where it does not count by connection
    sent: int | None


def count_traffic(server: Server, seconds: float, failing: int) -> Traffic:
    """Count what paced calls send, with the flush that tells the server of the last of them."""
    name = f"bench-{uuid.uuid4().hex[:8]}"
    with (
        contextlib.closing(server.client(decode_responses=True)) as client,
        CircuitBreakerRegistry.from_url(server.url, name) as registry,
    ):
        breaker = registry.breaker("paced", UNTRIPPABLE)
        breaker.call(work)
        registry.flush()
        time.sleep(0.2)  # lets the subscription begin, which is paid once per process
        before, bytes_before = _commands(client), _bytes(client)
        with _scripts_watched(server) as in_scripts:
            calls, spent = _paced(breaker, seconds, failing)
            registry.flush()
        after, bytes_after = _commands(client), _bytes(client)
    commands = after - before
    received, sent = (
        None if old is None or new is None else new - old
        for old, new in zip(bytes_before, bytes_after, strict=True)
    )
    return Traffic(calls, spent, commands - in_scripts, in_scripts, received, sent)


def _paced(breaker: CircuitBreaker, seconds: float, failing: int) -> tuple[int, float]:
    """Make RATE calls a second; returns how many, and in which time."""
    good, bad = breaker(work), breaker(boom)
    start = time.monotonic()
    made = 0
    while (spent := time.monotonic() - start) < seconds:
        for _ in range(int(spent * RATE) - made):
            made += 1
            if failing and made % failing == 0:
                with contextlib.suppress(Boom):
                    bad()
            else:
                good()
        time.sleep(0.001)
    return made, spent


def _commands(client: Any) -> Counter[str]:
    """How often each command has run, within scripts too; our own looks are left out."""
    stats = client.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}
    ours = ("info", "monitor", "echo", "client", "hello")
    return Counter({n: c for n, c in calls.items() if n.partition("|")[0] not in ours})


@contextlib.contextmanager
def _scripts_watched(server: Server) -> Iterator[Counter[str]]:
    """Count, at the end of the block, the commands that scripts have run in it.

    INFO does not tell them from the clients' own, but MONITOR does.  The server keeps what it
    has to say until the block is over, so watching takes no time from the calls.
    """
    seen: Counter[str] = Counter()
    end = uuid.uuid4().hex
    client: Any = server.client()
    with contextlib.closing(client), client.monitor() as monitor:
        yield seen
        with contextlib.closing(server.client()) as other:
            other.echo(end)
        for entry in monitor.listen():
            if end in entry["command"]:
                return
            if entry["client_type"] == "lua":
                seen[entry["command"].partition(" ")[0].lower()] += 1


def _bytes(client: Any) -> tuple[int | None, int | None]:
    """Bytes that the server has received and sent on all connections but ours."""
    others = [c for c in client.client_list() if c["id"] != str(client.client_id())]
    if not all("tot-net-in" in c for c in others):
        return None, None
    return (
        sum(int(c["tot-net-in"]) for c in others),
        sum(int(c["tot-net-out"]) for c in others),
    )


def _traffic_rows(what: str, traffic: Traffic) -> list[Row]:
    calls = traffic.calls
    asked, inside = traffic.by_client, traffic.in_scripts
    target = "< 0.01" if what == "closed" else ""
    wire = [MISSING if n is None else f"{n / calls:.2f}" for n in (traffic.received, traffic.sent)]
    return [
        Row(f"{what}: commands per call", (_per(asked, calls),), target, _names(asked)),
        Row(f"{what}: commands inside scripts per call", (_per(inside, calls),), "",
            _names(inside)),
        Row(f"{what}: bytes per call to the server", (wire[0],)),
        Row(f"{what}: bytes per call from the server", (wire[1],), "",
            f"{calls / traffic.seconds:,.0f} calls/s were made"),
    ]  # fmt: skip


def _per(commands: Counter[str], calls: int) -> str:
    return f"{commands.total() / calls:.4f}"


def _names(commands: Counter[str]) -> str:
    return " ".join(f"{name} {count}" for name, count in commands.most_common())


# ------------------------------------------------------------------ trips


def propagation(server: Server, trips: int) -> list[Row]:
    """Time from a failing call that trips the circuit until other processes refuse calls."""
    namespace = f"bench-{uuid.uuid4().hex[:8]}"
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    watchers = []
    for _ in range(WATCHERS):
        ours, theirs = context.Pipe()
        watcher = context.Process(target=watch, args=(server.url, namespace, theirs), daemon=True)
        watcher.start()
        theirs.close()
        watchers.append(watcher)
        pipes.append(ours)
    for pipe in pipes:
        _heard(pipe, "ready")
    with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
        breaker = registry.breaker("trips", BRITTLE)
        breaker.call(work)
        delays = [delay for _ in range(trips) for delay in _trip(breaker, pipes)]
    for watcher in watchers:
        watcher.terminate()
        watcher.join(ANSWER)
    low, high = statistics.median(delays), statistics.quantiles(delays, n=100)[-1]
    seen = f"{len(delays):,} trips seen"
    return [
        Row("trip seen elsewhere: median ms", (f"{low / 1e6:.2f}",), "", seen),
        Row("trip seen elsewhere: p99 ms", (f"{high / 1e6:.2f}",), "goal 10"),
        Row("trip seen elsewhere: longest ms", (f"{max(delays) / 1e6:.2f}",)),
    ]


def _trip(breaker: CircuitBreaker, pipes: list[Connection]) -> list[int]:
    """Trip and reset once; the delays of all watchers in ns."""
    time.sleep(random.uniform(0, 0.01))  # The link must not be met at the same point each time.
    start = time.monotonic_ns()
    with contextlib.suppress(Boom):
        breaker.call(boom)
    delays = [_heard(pipe, "open") - start for pipe in pipes]
    breaker.reset(actor="bench")
    for pipe in pipes:
        _heard(pipe, "closed")
    return delays


def _heard(pipe: Connection, what: str) -> int:
    """When (ns) a watcher saw ``what``."""
    if not pipe.poll(ANSWER):
        raise RuntimeError(f"a process has not seen {what!r} within {ANSWER:g} s")
    seen, at = pipe.recv()
    if seen != what:
        raise RuntimeError(f"a process saw {seen!r} where {what!r} was due")
    return int(at)


def watch(url: str, namespace: str, pipe: Connection) -> None:
    """In a process of its own: tell what happens to the circuit, until terminated."""
    with CircuitBreakerRegistry.from_url(url, namespace) as registry:
        breaker = registry.breaker("trips", BRITTLE)

        def tell(change: Transition) -> None:
            pipe.send((str(change.new), time.monotonic_ns()))

        breaker.on_transition(tell)
        breaker.call(work)
        pipe.send(("ready", time.monotonic_ns()))
        with contextlib.suppress(EOFError):
            pipe.recv()  # Nothing comes; the other side may end.
