"""A fork in the midst of an import leaves its lock taken in the child: the link imports nothing.

A server that loads the application and then forks does so milliseconds after the breakers were
made, while the link's threads make their first connections.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from scripts.servers import Server
from tests.fleet.process import BOUND, ROOT

pytestmark = pytest.mark.servers("valkey")

# In a fresh interpreter: what other tests have imported must not count.
PROGRAM = """
import json, sys, threading

class Witness:
    found = []

    def find_spec(self, name, path, target=None):
        if threading.current_thread().name.startswith("circuit-breaker"):
            self.found.append(name)

sys.meta_path.insert(0, Witness())

from distributed_breaker import CircuitBreakerRegistry, Policy

registry = CircuitBreakerRegistry.from_url(sys.argv[1], sys.argv[2])
policy = Policy(failure_threshold=1, open_interval=0.05, success_threshold=1, jitter=0.0)
breaker = registry.breaker("imports", policy)
heard = threading.Event()
breaker.on_transition(lambda change: change.new == "closed" and heard.set())
breaker.acquire().failure(ValueError())
registry.flush(10.0)
while not heard.wait(0.01):
    try:
        breaker.call(int)
    except Exception as refused:
        assert "imports" in str(refused)
registry.snapshot(10.0)
breaker.force_open()
breaker.reset()
assert breaker.snapshot().source == "shared"
registry.close()
print(json.dumps(Witness.found))
"""


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_the_links_threads_import_nothing(
    own_server: Callable[..., Server], namespace: str, tcp: bool
) -> None:
    server = own_server(tcp=tcp)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.url, namespace],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == []
