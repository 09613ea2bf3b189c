"""Several processes, one alert; and each of them is listed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker.fallback.outbox import Outbox
from distributed_breaker.fleet import Fleet
from distributed_breaker.monitoring.presence import processes
from scripts.servers import Server
from tests.monitoring.alerts.receiver import Receiver
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")
ROOT = Path(__file__).parents[3]


class Member:
    """A process, as its test sees it."""

    def __init__(self, file: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.monitoring.alerts.member", str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.communicate(timeout=30)

    def kill(self) -> None:
        with self.process:  # closes its pipes, too
            self.process.kill()


Start = Callable[..., list[Member]]


@pytest.fixture
def start(server: Server, namespace: str, receiver: Receiver, tmp_path: Path) -> Iterator[Start]:
    """Start processes that share a file, an outbox and a circuit."""
    with contextlib.ExitStack() as stack:

        def start(count: int, **settings: Any) -> list[Member]:
            alerts = {
                "channels": {"hook": {"type": "webhook", "url": "${HOOK}", "timeout": 1.0}},
                "outbox_path": str(tmp_path / "outbox.db"),
                "evaluate_every": 0.2,
            }
            given = {
                "settings": {
                    "redis_url": server.url,
                    "namespace": namespace,
                    "alerts": alerts,
                    **settings,
                },
                "services": {"api": {"http": {"failure_threshold": 1, "quorum": 1}}},
            }
            file = tmp_path / "breakers.json"
            file.write_text(json.dumps(given))
            members = [Member(file, HOOK=receiver.url) for _ in range(count)]
            for member in members:
                stack.callback(member.kill)
            assert [member.answer() for member in members] == ["ready"] * count
            return members

        yield start


@pytest.fixture
def fleet(server: Server, namespace: str) -> Iterator[Fleet]:
    with Fleet(server.url, namespace) as fleet:
        yield fleet


def pids(fleet: Fleet) -> set[int]:
    return {process["pid"] for process in processes(fleet)}


def test_four_processes_make_one_alert(
    start: Start,
    fleet: Fleet,
    receiver: Receiver,
    raw: redis.Redis,
    namespace: str,
    tmp_path: Path,
) -> None:
    """Three end, one of which evaluates perhaps; the last one tells the rest."""
    members = start(4)
    last = members[3]
    wait_until(lambda: pids(fleet) == {member.process.pid for member in members})
    members[0].do("fail")
    wait_until(lambda: all(m.do("look") == "open" for m in members))
    wait_until(lambda: receiver.of("open"))
    # One that is killed in the midst of a delivery keeps the others from it for a while.
    with contextlib.closing(Outbox(tmp_path / "outbox.db")) as outbox:
        wait_until(lambda: outbox.waiting() == 0)
    members[0].end()  # it takes itself out, as that is all that it does at its end
    assert pids(fleet) == {member.process.pid for member in members[1:]}
    for member in members[1:3]:
        member.kill()
    raw.delete(f"cb:{namespace}:alerts:evaluator")  # as if its lease had ended
    last.do("reset")
    wait_until(lambda: receiver.of("open", "resolved"), timeout=30)
    assert [(got["kind"], got["event"]) for got in receiver.got] == [
        ("open", "firing"),
        ("open", "resolved"),
    ]
    assert receiver.got[0]["incident"] == receiver.got[1]["incident"]

    child = int(last.do("fork"))
    try:
        wait_until(lambda: {last.process.pid, child} <= pids(fleet))
    finally:
        os.kill(child, signal.SIGKILL)
    last.end()
    assert last.process.pid not in pids(fleet)
