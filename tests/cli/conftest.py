"""The command, run in this process or as one of its own, on a fleet of real processes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from distributed_breaker.cli.app import app
from scripts.servers import Server
from tests.fleet.conftest import fleet_of  # noqa: F401 - a fixture
from tests.fleet.harness import Fleet, client_of
from tests.fleet.process import BOUND

ROOT = Path(__file__).parents[2]
VARIABLES = (
    "CIRCUIT_BREAKER_CONFIG CIRCUIT_BREAKER_REDIS_URL CIRCUIT_BREAKERS_ENABLED ENVIRONMENT "
    "REDIS_URL REDIS_HOST REDIS_PORT REDIS_PASSWORD FORCE_COLOR NO_COLOR"
).split()


class Said:
    """What a command has printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"{self.code}\n{self.out}\n{self.err}"

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Breakers = Callable[..., Said]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a configuration, and an environment that says nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture
def breakers() -> Breakers:
    """Run the command in this process: ``breakers("status", "--json")``."""

    def run(*words: str, **environment: str) -> Said:
        result = CliRunner().invoke(app, list(words), env=environment)
        error = result.exception
        assert error is None or isinstance(error, SystemExit), result.exc_info
        assert "Traceback" not in result.output
        return Said(result.exit_code, result.stdout, result.stderr)

    return run


def start(*words: str, cwd: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a process of its own."""
    command = [sys.executable, "-m", "distributed_breaker.cli", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)


def on_terminal(*words: str, interrupt: str = "", **environment: str) -> tuple[int, str]:
    """What the command prints on a terminal, and its exit code; Ctrl-C once ``interrupt`` shows.

    It is pressed again each second: Python loses one that comes while a finalizer runs.
    """
    ours, its = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", **environment}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        process = start(*words, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    printed, pressed, wait = "", 0, BOUND
    while True:
        if not select.select([ours], [], [], wait)[0]:
            if not 0 < pressed < 10:
                break
            pressed += 1
            process.send_signal(signal.SIGINT)
            continue
        try:
            part = os.read(ours, 65_536).decode(errors="replace")
        except OSError:  # EIO: the other end is closed
            break
        if not part:
            break
        printed += part
        if interrupt and interrupt in printed and not pressed:
            pressed, wait = 1, 1.0
            process.send_signal(signal.SIGINT)
    os.close(ours)
    return process.wait(BOUND), printed


@pytest.fixture
def fleet(server: Server, fleet_of: Callable[[str], Fleet]) -> Fleet:  # noqa: F811
    return fleet_of(server.url)


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with client_of(server) as client:
        yield client


@pytest.fixture
def there(server: Server, namespace: str) -> tuple[str, ...]:
    """The options that lead to the test's fleet."""
    return ("--url", server.url, "--namespace", namespace)


@pytest.fixture
def configure(tmp_path: Path, namespace: str) -> Callable[..., Path]:
    """Write a configuration file: ``configure({"web_app": {"cache": {}}}, config_version=2)``."""

    def write(services: dict[str, Any], name: str = "circuits.json", **settings: Any) -> Path:
        path = tmp_path / name
        given = {"settings": {"namespace": namespace, **settings}, "services": services}
        path.write_text(json.dumps(given))
        return path

    return write
