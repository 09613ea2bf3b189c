"""What many circuits cost: the server's memory and time, and those of one process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from scripts.servers import Server

from .children import ask, children, hear
from .figures import Row, Spread, Topic
from .setting import Setting
from .subjects import Guarded, Ours, Rules, Subject, boom, using, work

SIZES, QUICK_SIZES = (1, 100, 10_000), (1, 100, 1_000)  # making 10,000 takes too long for quick
RATE = 500  # calls/s over all circuits
FAILING = 1_000  # circuits up to which each has a failure in the end
KEYS = 300  # that are looked at
THREADED = 1_000  # circuits from which a library with a thread for each is left out
METHOD = (
    "One process makes so many circuits and a good call through each. The memory of the server is "
    "that of its keys (MEMORY USAGE), the memory of the process what is resident more than after "
    f"the first circuit. Then it makes {RATE} calls/s, one circuit after another, for some "
    "seconds; the shares are of one core: of the process, its calls included, and of the server. "
    "In the end each circuit has a failure, and the keys are looked at again. Peers in memory "
    "stand beside ours for the process only."
)


@dataclass(frozen=True)
class Cost:
    """What one process has used."""

    resident: float  # KB added by each circuit
    share: float  # of one core, %


def run(setting: Setting) -> Topic:
    """Make few and many circuits of each library."""
    kinds: list[type[Subject]] = [Ours, *setting.shared, *setting.in_memory]
    rows: list[Row] = []
    limits: list[str] = []
    patience, seconds = setting.either(0.7, 20.0), setting.either(0.3, 2.5)
    with Server.start(setting.server) as server, contextlib.closing(server.client()) as client:
        for size in QUICK_SIZES if setting.quick else SIZES:
            columns: dict[str, dict[str, Spread]] = {name: {} for name in COLUMNS}
            for kind in kinds:
                if size >= THREADED and kind.title == "interlock-cb + Redis":
                    limits.append(
                        f"{kind.title} is left out with {size:,} circuits: each has a thread of "
                        "its own and asks the server every second."
                    )
                    continue
                if setting.quick and size != SIZES[1] and not kind.shared:
                    continue
                figures, made = _measure(kind, server, client, size, patience, seconds)
                if made < size:
                    limits.append(
                        f"{kind.title} made {made:,} of {size:,} circuits in {patience:g} s; its "
                        "figures are of these."
                    )
                for name, figure in figures.items():
                    columns[name][kind.title] = Spread.exactly(figure)
            rows += _rows(size, columns)
    drawn = [row.name for row in rows if "memory" in row.name]
    return Topic("circuits", "Many circuits", METHOD, rows, limits, drawn)


COLUMNS = {
    "server memory per circuit": "KB",
    "server memory per circuit, without logs": "KB",
    "server memory per circuit with a failure": "KB",
    "server time": "% of a core",
    "process memory per circuit": "KB",
    "process time": "% of a core",
}


def _rows(size: int, columns: dict[str, dict[str, Spread]]) -> list[Row]:
    rows = []
    for name, by_title in columns.items():
        # One circuit's share is lost among what a connection and a script take.
        if by_title and not (size == 1 and "memory" in name):
            what = f"{size:,} circuit{'s' * (size > 1)}"
            target = "≤ 2" if name.endswith("without logs") else ""
            ours = by_title.pop(Ours.title)
            rows.append(Row(f"{what}: {name}", COLUMNS[name], ours, by_title, target=target))
    return rows


def _measure(
    kind: type[Subject], server: Server, client: Any, size: int, patience: float, seconds: float
) -> tuple[dict[str, float], int]:
    client.flushall()
    with children(make, [(kind, server.url, size, patience, seconds)]) as (pipe,):
        hear(pipe)
        made = ask(pipe, "make", 2 * patience + 60.0)
        stored, kept = _stored(client)
        before, start = _spent(client), time.monotonic()
        cost: Cost = ask(pipe, "call")
        share = (_spent(client) - before) / (time.monotonic() - start) * 100
        failed = ask(pipe, "fail")
        stored_failed, _ = _stored(client)
    figures = {
        "process memory per circuit": cost.resident,
        "process time": cost.share,
    }
    if kind.shared:
        figures["server memory per circuit"] = stored / made
        figures["server memory per circuit, without logs"] = kept / made
        figures["server time"] = share
        if failed:
            figures["server memory per circuit with a failure"] = stored_failed / made
    return figures, made


def _stored(client: Any) -> tuple[float, float]:
    """KB of all keys, and of those that are not a circuit's log.

    Of many keys some are looked at and stand for the rest.
    """
    some = list(itertools.islice(client.scan_iter(count=KEYS), KEYS))
    sizes = [(key.endswith(b":log"), client.memory_usage(key, samples=0) or 0) for key in some]
    share = client.dbsize() / max(len(some), 1) / 1024
    kept = sum(size for is_log, size in sizes if not is_log)
    return sum(size for _, size in sizes) * share, kept * share


def _spent(client: Any) -> float:
    cpu = client.info("cpu")
    return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


# ------------------------------------------------------------------ in the fresh process


def make(
    kind: type[Subject], url: str, size: int, patience: float, seconds: float, pipe: Connection
) -> None:
    """Make circuits, then call; tell what that took."""
    with using(kind, url) as subject:
        rules = Rules(failures=1_000_000)
        subject.guard("first", rules).call(work)
        subject.settle()
        time.sleep(0.1)
        gc.collect()
        resident = _resident()
        ask(pipe, "ready")
        names = ["first", *(f"circuit-{number}" for number in range(1, size))]
        declared = subject.declare(names, rules)
        guards: list[Guarded] = []
        end = time.monotonic() + patience
        for name in names:
            guarded = subject.guard(name, rules)
            guarded.call(work)
            guards.append(guarded)
            if time.monotonic() > end:
                break
        subject.settle()
        gc.collect()
        resident = _resident() - resident
        there = max(declared, len(guards))
        ask(pipe, there)
        pipe.send(_call(guards, resident / there, seconds))
        pipe.recv()
        # All of them at 10,000 circuits would take minutes, and tell the same.
        if len(guards) <= FAILING:
            for guarded in guards:
                with contextlib.suppress(Exception):
                    guarded.call(boom)
            subject.settle()
        pipe.send(len(guards) <= FAILING)
        pipe.recv()


def _call(guards: list[Guarded], resident: float, seconds: float) -> Cost:
    """Call through one after another."""
    start, spent = time.monotonic(), time.process_time()
    made = 0
    while (now := time.monotonic() - start) < seconds:
        for _ in range(min(int(now * RATE) - made, 50)):
            with contextlib.suppress(Exception):  # Some raise what their client raises.
                guards[made % len(guards)].call(work)
            made += 1
        time.sleep(0.002)
    share = (time.process_time() - spent) / (time.monotonic() - start) * 100
    return Cost(resident, share)


def _resident() -> float:
    """KB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024
