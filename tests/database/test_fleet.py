"""Four processes whose database stops, is killed, and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.services import Services
from scripts.postgres import Postgres, why_missing
from scripts.servers import Server
from tests.required import need
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

ROOT = Path(__file__).parents[2]


class Member:
    """One of the processes."""

    def __init__(self, file: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.database.member", str(file)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def told(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """One that the test may stop."""
    need(why_missing())
    server = Postgres.start()
    with contextlib.closing(server.connect()) as connection:
        connection.execute("CREATE TABLE cats (id int PRIMARY KEY, name text)")
    yield server
    server.stop()


def test_a_database_that_stops_and_goes_on(
    server: Server, own_postgres: Postgres, namespace: str, tmp_path: Path
) -> None:
    file = tmp_path / "breakers.json"
    database = {
        "url": own_postgres.url(), "read_timeout": 0.5, "write_timeout": 0.5, "max_retries": 0,
        "failure_threshold": 2, "timeout": 0.3, "jitter": 0.0, "success_threshold": 1,
        "enable_write_queue": False,
    }  # fmt: skip
    settings = {"redis_url": server.url, "namespace": namespace}
    file.write_text(json.dumps({"settings": settings, "services": {"api": {"database": database}}}))
    members = [Member(file) for _ in range(4)]

    def ask(line: str) -> list[Any]:
        """All of them at once."""
        for member in members:
            member.ask(line)
        return [member.told() for member in members]

    services = Services(file, environ={})
    watched = services.client("database", "api").circuits
    fresh, kept = [{"n": 1, "stale": False}] * 4, [{"n": 1, "stale": True}] * 4
    try:
        assert [member.told() for member in members] == ["ready"] * 4
        told = ask("INSERT INTO cats VALUES (1, 'Tom')")
        assert sorted(map(str, told)) == ["1"] + ["IntegrityError"] * 3
        assert ask("read") == fresh
        assert watched["write"].state == "closed", "mistakes open nothing"

        signal_all(own_postgres, signal.SIGSTOP)
        assert "QueryTimeout" in ask("read")
        wait_until(lambda: ask("read") == kept)
        wait_until(lambda: ask("UPDATE cats SET name = 'x'") == ["open"] * 4)
        assert not any(circuit.state == "closed" for circuit in watched.values())

        signal_all(own_postgres, signal.SIGCONT)
        wait_until(lambda: ask("UPDATE cats SET name = 'y'") == [1] * 4)
        wait_until(lambda: ask("read") == fresh)
        assert {circuit.state for circuit in watched.values()} == {"closed"}
    finally:
        signal_all(own_postgres, signal.SIGCONT)
        services.close()
        for member in members:
            member.process.kill()
            member.process.communicate()


def signal_all(postgres: Postgres, number: int) -> None:
    """To the server and all of its processes, each of which is alone in its group."""
    pid = postgres.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in (pid, *map(int, children)):
        os.kill(each, number)
