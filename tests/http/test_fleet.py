"""Eight processes obey what one of them was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_breaker.services import Services
from scripts.servers import Server
from tests.http.conftest import QUICK
from tests.http.service import Service, answer
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

ROOT = Path(__file__).parents[2]


def test_eight_processes_obey_one_429(
    server: Server, service: Service, namespace: str, tmp_path: Path
) -> None:
    service.scripts["/x"] = [answer(429, Retry_After="40"), answer(200)]
    file = tmp_path / "breakers.json"
    http = {"base_url": service.url, **QUICK}
    settings = {"redis_url": server.url, "namespace": namespace}
    file.write_text(json.dumps({"settings": settings, "services": {"api": {"http": http}}}))
    members = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.http.member", str(file)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(8)
    ]  # fmt: skip

    def ask(member: subprocess.Popen[str]) -> str:
        assert member.stdin is not None
        assert member.stdout is not None
        member.stdin.write("/x\n")
        member.stdin.flush()
        return member.stdout.readline().strip()

    services = Services(file, environ={})
    try:
        for member in members:
            assert member.stdout is not None
            assert member.stdout.readline() == "ready\n"
        assert ask(members[0]) == "429"
        watcher = services.client("http", "api").breaker
        wait_until(lambda: watcher.refusing)
        for member in members:
            wait_until(lambda member=member: ask(member).startswith("open"))  # type: ignore[misc]
        told = [ask(member) for member in members]
        assert all(30 <= int(one.removeprefix("open ")) <= 40 for one in told), told
        totals = watcher.snapshot().totals
        assert (totals["failures"], totals["trips"]) == (0, 1), "the service itself is well"
    finally:
        services.close()
        for member in members:
            member.kill()
            member.communicate()
