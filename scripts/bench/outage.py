"""The longest wait of a call while the server hangs (SIGSTOP) or is gone (SIGKILL).

Every scenario has a server and a fresh process of its own, and all run at the same time beside
scenarios in which nothing happens: what those show is the noise of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any

from distributed_breaker import CircuitBreakerOpenException, CircuitBreakerRegistry, Policy
from scripts.servers import Server

from .report import Row, Setting, Table
from .work import Boom, boom, trip, work

SECONDS, QUICK_SECONDS = 6.0, 3.0  # the link polls every 2 s, so it meets the fault within them
PAUSE = 0.001  # s between two calls
FAILING = 50  # one call in so many fails while closed, which makes the link speak at once
INTERVAL = 0.4  # s that a circuit stays open before it is probed
WAITED = 1_000_000  # ns from which a call has waited, and was not merely slow
ANSWER = 30.0  # s that a process may take to get ready
FAULTS = {"nothing": "server well", "pause": "SIGSTOP", "kill": "SIGKILL"}

NEVER = "0"
BOUNDED = "≤ 300 each"
ONCE = "≤ 300, once"


@dataclass(frozen=True)
class Scenario:
    """What a circuit does when which fault strikes; ``starting``: before its first call."""

    state: str  # "closed", "open", "probing", "starting"
    fault: str  # a method of Server, or "nothing"

    @property
    def target(self) -> str:
        if self.fault == "nothing":
            return ""
        return {"probing": BOUNDED, "starting": ONCE}.get(self.state, NEVER)


SCENARIOS = [
    Scenario(state, fault)
    for state in ("closed", "open", "probing", "starting")
    for fault in FAULTS
]


@dataclass(frozen=True)
class Waits:
    """How long the calls of one scenario took, in ns."""

    calls: int
    median: int
    longest: list[int]  # of those that waited, longest first
    worst: int


def run(setting: Setting) -> Table:
    """Run all scenarios at once."""
    seconds = QUICK_SECONDS if setting.quick else SECONDS
    table = Table(
        f"Outage: the longest call in ms, {1 / PAUSE:,.0f} calls/s for {seconds:g} s after the "
        f"fault, {len(SCENARIOS)} fresh processes at once",
        ("worst", "median"),
    )
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server.start(setting.server)) for _ in SCENARIOS]
        waits = strike(servers, seconds)
    table.rows = [_row(*pair) for pair in zip(SCENARIOS, waits, strict=True)]
    return table


def _row(scenario: Scenario, waits: Waits) -> Row:
    note = f"{len(waits.longest)} of {waits.calls:,} over 1 ms"
    if waits.longest:
        note += ": " + ", ".join(f"{ns / 1e6:.1f}" for ns in waits.longest[:4])
    figures = (f"{waits.worst / 1e6:.2f}", f"{waits.median / 1e6:.4f}")
    return Row(f"{scenario.state}, {FAULTS[scenario.fault]}", figures, scenario.target, note)


def strike(servers: list[Server], seconds: float) -> list[Waits]:
    """Let each process get ready, strike its server at once, and hear how long calls took."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, tuple[Scenario, Server]] = {}
    for scenario, server in zip(SCENARIOS, servers, strict=True):
        ours, theirs = context.Pipe()
        arguments = (scenario.state, server.url, seconds, theirs)
        context.Process(target=suffer, args=arguments, daemon=True).start()
        theirs.close()
        pipes[ours] = (scenario, server)
    waiting = set(pipes)
    while waiting:
        ready = [p for p in wait_for_any(list(waiting), ANSWER) if isinstance(p, Connection)]
        if not ready:
            raise RuntimeError(f"{len(waiting)} processes did not get ready")
        for pipe in ready:
            pipe.recv()
            scenario, server = pipes[pipe]
            if scenario.fault != "nothing":
                getattr(server, scenario.fault)()
            pipe.send("go")
            waiting.remove(pipe)
    return [_told(pipe) for pipe in pipes]


def _told(pipe: Connection) -> Waits:
    if not pipe.poll(ANSWER):
        raise RuntimeError("a process did not tell how long its calls took")
    told = pipe.recv()
    assert isinstance(told, Waits)
    return told


# ------------------------------------------------------------------ in the fresh process


def suffer(state: str, url: str, seconds: float, pipe: Connection) -> None:
    """Bring a circuit into its state, let the fault strike, and time calls for some seconds."""
    logging.disable()  # That the store is down is what is wanted here.
    namespace = f"bench-{uuid.uuid4().hex[:8]}"
    with CircuitBreakerRegistry.from_url(url, namespace) as registry:
        if state == "starting":
            pipe.send("ready")
            pipe.recv()
        breaker = registry.breaker("outage", _policy(state))
        if state == "closed":
            breaker.call(work)
        elif state in ("open", "probing"):
            trip(breaker)
        if state != "starting":
            pipe.send("ready")
            pipe.recv()
        # A probe fails, so that the circuit is probed again and again.
        bad = breaker(boom)
        pipe.send(time_calls(bad if state == "probing" else breaker(work), bad, seconds))


def _policy(state: str) -> Policy:
    if state in ("open", "probing"):
        interval = 3_600.0 if state == "open" else INTERVAL
        return Policy(failure_threshold=1, quorum=1, open_interval=interval, jitter=0.0)
    return Policy(failure_threshold=1_000_000, failure_rate=None)


def time_calls(call: Callable[[], None], bad: Callable[[], None], seconds: float) -> Waits:
    """Call again and again, with short pauses."""
    took: list[int] = []
    clock = time.perf_counter_ns
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        function = bad if len(took) % FAILING == FAILING - 1 else call
        start = clock()
        with contextlib.suppress(CircuitBreakerOpenException, Boom):
            function()
        took.append(clock() - start)
        time.sleep(PAUSE)
    longest = sorted((ns for ns in took if ns >= WAITED), reverse=True)
    return Waits(len(took), round(statistics.median(took)), longest, max(took))
