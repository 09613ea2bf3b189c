"""pytest finds the plugin by itself, and pays nothing for it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

CONFTEST = """
import sys

def pytest_configure():
    assert "pytest_distributed_breaker" in sys.modules
    assert "distributed_breaker" not in sys.modules, "nothing of the library yet"
    assert "redis" not in sys.modules
"""
TEST = """
from distributed_breaker.testing import assert_tripped, fail_next, trip

def test_it(circuit_breakers, circuit_breaker_clock):
    breaker = circuit_breakers.breaker("b")
    trip(breaker)
    assert_tripped(breaker)
    circuit_breaker_clock.advance(breaker.snapshot().retry_after)
    assert breaker.call(lambda: 1) == 1
"""


def test_the_entry_point_is_registered() -> None:
    (found,) = entry_points(group="pytest11", name="pytest_distributed_breaker")
    assert found.value == "pytest_distributed_breaker"


def test_a_project_that_only_has_it_installed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST)
    plugins = ["-p", "pytest_distributed_breaker"]  # by name, since nothing else is loaded here
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *plugins],
        cwd=tmp_path,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
