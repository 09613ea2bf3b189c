"""Eight processes on two hosts, whose Redis is killed and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from distributed_breaker.services import Services
from scripts.servers import Server
from tests.cache.conftest import PREFIX, settings
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

ROOT = Path(__file__).parents[2]


def test_redis_is_killed_under_eight_processes(
    cache_server: Server, raw: redis.Redis, tmp_path: Path
) -> None:
    stop, down = tmp_path / "stop", tmp_path / "down"
    files = []
    for host in ("one", "two"):
        file = tmp_path / f"{host}.json"
        file.write_text(json.dumps(settings(cache_server, tmp_path / host)))
        files.append(file)
    command = [sys.executable, "-m", "tests.cache.member"]
    members = [
        subprocess.Popen(
            [*command, str(files[n % 2]), f"p{n}", str(stop), str(down)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for n in range(8)
    ]  # fmt: skip
    try:
        for member in members:
            assert member.stdout is not None
            assert member.stdout.readline() == "ready\n"
        total = PREFIX + "total"
        wait_until(lambda: int(raw.get(total) or 0) > 200)
        cache_server.kill()
        down.touch()
        wait_until(lambda: len(list(tmp_path.glob("down.p*"))) == 8, timeout=60)
        down.unlink()
        cache_server.restart(empty=False)
        before = int(raw.get(total) or 0)
        wait_until(lambda: int(raw.get(total) or 0) > before + 200, timeout=30)
        stop.touch()
        told = []
        for member in members:
            out, _ = member.communicate(timeout=60)
            told.append(json.loads(out))
    finally:
        for member in members:
            member.kill()
            member.wait()
    assert [one["wrong"] for one in told] == [0] * 8
    # What still waits is brought back by whoever comes next on each host.
    for file in files:
        services = Services(file, environ={})
        client = services.client("cache", "api")
        topics: Callable[[], object] = lambda c=client: c.stats()["outbox"]["topics"]  # type: ignore[attr-defined, misc]  # noqa: E731
        client.get("anything")  # type: ignore[attr-defined]
        wait_until(lambda topics=topics: not topics(), timeout=60)
        services.close()
    for one in told:
        for key, value in one["written"].items():
            assert raw.get(PREFIX + key) == str(value), key
    # What raised may have been carried out before its answer was lost.
    unsure = sum(one["raised"] for one in told)
    added = sum(one["added"] for one in told)
    assert added <= int(raw.get(total) or 0) <= added + unsure
