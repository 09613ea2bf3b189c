"""Entries, tiers and processes for the tests of the fallback tiers."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distributed_breaker.fallback.disk import DiskTier
from distributed_breaker.fallback.memory import Entry
from distributed_breaker.fallback.tiers import Tiers
from tests.unit.clock import FakeClock

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
BOUND = 30.0  # s


def entry(
    clock: FakeClock, data: bytes = b'"v"', *, ttl: float = 60.0, stale: float = 600.0
) -> Entry:
    """Put now, fresh for ``ttl`` and served for ``stale`` seconds."""
    now = clock()
    return Entry(data, now, now + ttl, now + stale)


def disk_tier(folder: Path, clock: FakeClock, most_bytes: int = 16 * MIB) -> DiskTier:
    return DiskTier(folder, most_bytes=most_bytes, now=clock)


def make(clock: FakeClock, disk: DiskTier | None = None, **settings: Any) -> Tiers:
    """Tiers whose thread writes at no time that a test would notice: tests call ``flush``."""
    given: dict[str, Any] = {"most_items": 100, "most_bytes": MIB, "write_behind": 3600.0}
    return Tiers(disk=disk, now=clock, clock=clock, **(given | settings))


def data_of(tier: Any, key: str, **arguments: Any) -> bytes | None:
    """What a tier serves of a key."""
    hit = tier.get(key, **arguments)
    return None if hit is None else hit.entry.data


@contextmanager
def program(source: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs ``source``, and ends with the block whatever happens.

    It also ends by itself when its standard input does, if it reads that, as ``say`` does.
    """
    preamble = (
        "import json, os, sys, time\n"
        "from distributed_breaker.fallback.disk import DiskError, DiskTier\n"
        "from distributed_breaker.fallback.memory import Entry\n"
        "from distributed_breaker.fallback.tiers import Tiers\n"
        "def say(what=None):\n"
        "    print(json.dumps(what), flush=True)\n"
        "def hear():\n"
        "    return sys.stdin.readline() or sys.exit()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", preamble + source, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_more_paths()])},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has forked
        process.communicate()


def _more_paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def hear(process: subprocess.Popen[str]) -> Any:
    """The next thing that the process says; it dies or the test's own timeout ends this."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the process has ended: {process.wait(BOUND)}"
    return json.loads(line)


def tell(process: subprocess.Popen[str]) -> None:
    """Let the process go on."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def check_file(path: Path) -> None:
    """The file is whole, and its totals are what its rows say."""
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        ((items, held),) = connection.execute("SELECT items, bytes FROM totals").fetchall()
        sql = "SELECT count(data), coalesce(sum(size), 0) FROM entries"
        assert connection.execute(sql).fetchall() == [(items, held)]
    finally:
        connection.close()
