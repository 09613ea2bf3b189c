"""The tests' own server ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.postgres import Postgres, why_missing
from tests.fleet.process import ROOT
from tests.required import need
from tests.unit.clock import wait_until

PROGRAM = """
import sys
from scripts.postgres import Postgres

server = Postgres.start()
print(server.pid, server.folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_it_dies_with_its_parent_and_leaves_nothing(state: str) -> None:
    need(why_missing())
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert Path("/proc", pid).exists()
        if state == "stopped":
            os.kill(int(pid), signal.SIGSTOP)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not Path("/proc", pid).exists() and not Path(folder).exists())


def test_binaries_that_its_user_cannot_get_at_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the environment lies in somebody's home."""
    need(why_missing())
    if os.geteuid() != 0:
        pytest.skip("only a server with another user needs a copy")
    monkeypatch.setattr("scripts.postgres.is_open", lambda folder: False)
    server = Postgres.start()
    try:
        assert (server.folder / "package").exists()
        with server.connect() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        server.stop()
    assert not server.folder.exists()
