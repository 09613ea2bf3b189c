"""Four processes share the circuit of their models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_breaker.services import Services
from scripts.servers import Server
from tests.ml.conftest import PATIENT
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

ROOT = Path(__file__).parents[2]


def test_four_processes_share_one_circuit(server: Server, namespace: str, tmp_path: Path) -> None:
    file = tmp_path / "breakers.json"
    ml = PATIENT | {"failure_threshold": 2, "timeout": 40.0, "cache_predictions": False}
    settings = {"redis_url": server.url, "namespace": namespace}
    file.write_text(json.dumps({"settings": settings, "services": {"api": {"ml": ml}}}))
    members = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ml.member", str(file)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]  # fmt: skip

    def ask(member: subprocess.Popen[str], line: str = "predict") -> str:
        assert member.stdin is not None
        assert member.stdout is not None
        member.stdin.write(line + "\n")
        member.stdin.flush()
        return member.stdout.readline().strip()

    def all_are_heard() -> None:
        for member in members:
            wait_until(lambda member=member: ask(member, "flush") == "done")  # type: ignore[misc]

    services = Services(file, environ={})
    try:
        for member in members:
            assert member.stdout is not None
            assert member.stdout.readline() == "ready\n"
        sick, second, third, fourth = members
        assert [ask(member) for member in members] == ["model"] * 4
        watcher = services.client("ml", "api").breaker
        all_are_heard()  # who has been has a voice in what the fleet does
        ask(sick, "gives NaN")
        assert [ask(sick) for _ in range(2)] == ["InvalidPrediction"] * 2
        assert ask(sick).startswith("open"), "in quarantine"
        assert [ask(member) for member in (second, third, fourth)] == ["model"] * 3, "and alone"
        all_are_heard()  # a good call that comes later would end the run
        for member in (second, third):
            ask(member, "fails")
            assert ask(member) == "RuntimeError"
        wait_until(lambda: watcher.snapshot().shared_state == "open")
        for member in members:
            wait_until(lambda member=member: ask(member).startswith("open"))  # type: ignore[misc]
        told = [ask(member) for member in members]
        assert all(30 <= int(one.removeprefix("open ")) <= 40 for one in told), told
        trip = watcher.snapshot().last_trip
        assert trip is not None
        assert (trip.cause, trip.run) == ("run", 2), "one failure each of two processes"
    finally:
        services.close()
        for member in members:
            assert member.stdin is not None
            member.stdin.close()
        codes = [member.wait(30) for member in members]
        for member in members:
            assert member.stdout is not None
            member.stdout.close()
    assert codes == [0] * 4
