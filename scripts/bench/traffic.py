"""What guarded calls cost the server: commands, bytes and its time, at three rates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from scripts.servers import Server

from .children import ask, children
from .figures import Row, Spread, Topic
from .setting import Setting
from .subjects import Guarded, Ours, Rules, Subject, boom, using, work

RATES = (100, 5_000, 50_000)  # calls/s
FAILING = 100  # in a measurement of its own one call in so many fails, and is reported at once
METHOD = (
    "One fresh process with one circuit at a time makes calls at the given rate, or at the rate "
    "that it can make: the column “made” tells it for ours and the best peer. The server "
    "counts commands (those within scripts too), bytes in both directions and the processor time "
    "that it has used. All is per guarded call. Ours is flushed at the end, so that nothing is "
    "left out."
)


@dataclass(frozen=True)
class Bill:
    """What the server has counted so far."""

    commands: int
    octets: int
    seconds: float  # of processor time

    @classmethod
    def of(cls, client: Any) -> Bill:
        """Ask the server; our own questions are left out where they can be told apart."""
        clients = [c for c in client.client_list() if c["id"] != str(client.client_id())]
        stats, cpu = client.info("stats"), client.info("cpu")
        octets = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
        if all("tot-net-in" in c for c in clients):
            octets = sum(int(c["tot-net-in"]) + int(c["tot-net-out"]) for c in clients)
        commands = sum(
            row["calls"]
            for name, row in client.info("commandstats").items()
            if name.removeprefix("cmdstat_").partition("|")[0] not in ("info", "client", "hello")
        )
        return cls(commands, octets, float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]))

    def since(self, before: Bill, calls: int) -> dict[str, float]:
        """What was added meanwhile, for each of so many calls."""
        return {
            "commands": (self.commands - before.commands) / calls,
            "bytes": (self.octets - before.octets) / calls,
            "server time": (self.seconds - before.seconds) / calls * 1e6,
        }


def run(setting: Setting) -> Topic:
    """Measure ours and all peers with Redis at each rate."""
    kinds: list[type[Subject]] = [Ours, *setting.shared]
    seconds = setting.either(0.3, 2.5)
    rounds = setting.count(1, 2)
    rows: list[Row] = []
    with Server.start(setting.server) as server, contextlib.closing(server.client()) as client:
        for rate in RATES:
            rows += _rows(f"{rate:,} calls/s", kinds, server, client, (rate, seconds, 0), rounds)
        if not setting.quick:
            what = f"{RATES[1]:,} calls/s, 1 in {FAILING} fails"
            rows += _rows(what, kinds, server, client, (RATES[1], seconds, FAILING), rounds)
    drawn = [row.name for row in rows if "commands" in row.name]
    return Topic("traffic", "What calls cost the server", METHOD, rows, (), drawn)


def _rows(
    what: str,
    kinds: list[type[Subject]],
    server: Server,
    client: Any,
    pace: tuple[int, float, int],
    rounds: int,
) -> list[Row]:
    columns: dict[str, dict[str, list[float]]] = {}
    made: dict[str, float] = {}
    for _ in range(rounds):
        for kind in kinds:
            figures, rate = _measure(kind, server, client, pace)
            made[kind.title] = rate
            for name, figure in figures.items():
                columns.setdefault(name, {}).setdefault(kind.title, []).append(figure)
    rows = []
    for (name, unit), by_title in zip(UNITS.items(), columns.values(), strict=True):
        spreads = {title: Spread.of(values) for title, values in by_title.items()}
        ours = spreads.pop(Ours.title)
        row = Row(f"{what}: {name}", unit, ours, spreads)
        best = row.best()
        rates = f"{made[Ours.title]:,.0f}"
        if best is not None:
            rates += f", {made[best[0]]:,.0f}"
        target = "< 0.01" if name == "commands" and what == "5,000 calls/s" else ""
        rows.append(Row(row.name, unit, ours, spreads, target=target, extra={"made": rates}))
    return rows


UNITS = {"commands": "", "bytes": "B", "server time": "µs"}


def _measure(
    kind: type[Subject], server: Server, client: Any, pace: tuple[int, float, int]
) -> tuple[dict[str, float], float]:
    client.flushall()
    with children(paced, [(kind, server.url, *pace)]) as (pipe,):
        ask(pipe, "connect")
        before = Bill.of(client)
        calls, seconds = ask(pipe, "call")
        after = Bill.of(client)
    return after.since(before, calls), calls / seconds


# ------------------------------------------------------------------ in a process of its own


def paced(
    kind: type[Subject], url: str, rate: int, seconds: float, failing: int, pipe: Connection
) -> None:
    """Make calls at a rate; tell how many, and in which time."""
    with using(kind, url) as subject:
        pipe.recv()
        # One that never opens, but counts failures as ever.
        guarded = subject.guard("paced", Rules(failures=1_000_000))
        guarded.call(work)
        subject.settle()
        time.sleep(0.1)  # lets the subscription begin, which is paid once per process
        pipe.send("connected")
        pipe.recv()
        answer = pace_calls(guarded, rate, seconds, failing)
        subject.settle()
        pipe.send(answer)
        pipe.recv()


def pace_calls(guarded: Guarded, rate: int, seconds: float, failing: int = 0) -> tuple[int, float]:
    """Make ``rate`` calls a second, or as many as can be made."""
    call: Callable[[Callable[[], Any]], Any] = guarded.call
    start = time.monotonic()
    end = start + seconds
    made = 0
    while (now := time.monotonic()) < end:
        # In small steps: where each call asks the server, a step may take long.
        for _ in range(min(int((now - start) * rate) - made, 200)):
            made += 1
            function = boom if failing and made % failing == 0 else work
            with contextlib.suppress(Exception):  # Some raise what their client raises.
                call(function)
        if made >= int((time.monotonic() - start) * rate):
            time.sleep(0.001)
    return max(made, 1), time.monotonic() - start
