"""Processes: a fork's child has connections of its own, and who needs no database imports none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.fleet.process import BOUND, ROOT

FORK = """
import json, os, sys

from distributed_breaker.services import Services

client = Services(sys.argv[1], environ={}).client("database", "api")

def pid():
    return client.execute_query("SELECT pg_backend_pid() AS pid", timeout=20)[0]["pid"]

mine = pid()
child = os.fork()
if child == 0:
    found = [pid() for _ in range(2)]
    try:
        client.execute_query("SELECT pg_sleep(60)", timeout=0.05)
    except Exception as error:
        found.append(type(error).__name__)
    os.write(1, json.dumps(found).encode())
    os._exit(0)
os.waitpid(child, 0)
os.write(1, ("\\n" + json.dumps([mine, pid()])).encode())
"""

IMPORTS = """
import sys
import circuit_breaker_config
import distributed_breaker.services
print(sorted({"sqlalchemy", "sqlglot"} & set(sys.modules)))
sys.modules["sqlglot"] = None
try:
    circuit_breaker_config.get_database_circuit_breaker("api")
except ImportError as error:
    print(error)
"""


def run(program: str, *arguments: str, **environment: str) -> list[str]:
    """What a fresh interpreter prints."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def write(folder: Any, url: str) -> str:
    file = folder / "breakers.json"
    settings = {"redis_url": "memory://"}
    services = {"api": {"database": {"url": url}}}
    file.write_text(json.dumps({"settings": settings, "services": services}))
    return str(file)


def test_a_fork(tmp_path: Any, url: str) -> None:
    """The parent goes on with its connection, which the child has left alone."""
    child, parent = map(json.loads, run(FORK, write(tmp_path, url)))
    assert child[2] == "QueryTimeout"
    assert child[0] == child[1]
    assert parent[0] == parent[1]
    assert child[0] != parent[0]


def test_only_who_wants_a_database_needs_its_packages(tmp_path: Any) -> None:
    file = write(tmp_path, "sqlite://")
    imported, message = run(IMPORTS, CIRCUIT_BREAKER_CONFIG=file)
    assert imported == "[]"
    assert message == (
        "a database needs the package sqlglot: install distributed-breaker[database]"
    )
