"""The store is lost: one alert for each host, without a store to agree through."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.monitoring.alerts import Alerts
from distributed_breaker.monitoring.host_mark import STALE, HostMark
from scripts.servers import Server
from tests.monitoring.alerts.conftest import settings
from tests.monitoring.alerts.receiver import Receiver
from tests.unit.clock import fail, wait_until

pytestmark = pytest.mark.servers("valkey")


def test_two_processes_of_one_host(
    own_server: Callable[..., Server], namespace: str, receiver: Receiver, tmp_path: Path
) -> None:
    server = own_server()
    registries = [CircuitBreakerRegistry.from_url(server.url, namespace) for _ in range(2)]
    made = [
        Alerts(registry, settings(tmp_path, receiver.url, store_lost_after=0.2))
        for registry in registries
    ]
    for alerts in made:
        alerts.start()
    try:
        breaker = registries[0].breaker("api.http")
        wait_until(lambda: server.client().exists(f"cb:{namespace}:alerts:evaluator"))
        server.kill()
        wait_until(lambda: receiver.of("store_lost"))
        wait_until(lambda: all(alerts._lost for alerts in made))
        fail(breaker, 5)  # decided here alone, and not told: nobody knows what the others do
        server.restart()
        wait_until(lambda: receiver.of("store_lost", "resolved"), timeout=20)
        wait_until(lambda: not any(alerts._lost for alerts in made))
    finally:
        for alerts, registry in zip(made, registries, strict=True):
            alerts.close()
            registry.close()
    lost, back = receiver.of("store_lost")[0], receiver.of("store_lost", "resolved")[0]
    assert lost["incident"] == back["incident"]
    assert back["duration"] > 0
    assert not [got for got in receiver.got if got["kind"] == "store_lost"][2:]


def test_a_mark_is_taken_and_given_back_once(tmp_path: Path) -> None:
    one, other = HostMark(tmp_path / "new", "shop"), HostMark(tmp_path / "new", "shop")
    assert [one.take(7), other.take(8), one.take(9)] == [True, False, False]
    assert [other.give_back(8), one.give_back(7)] == [7, None]
    assert other.take(9)


def test_a_mark_that_nobody_keeps_counts_for_nothing(tmp_path: Path) -> None:
    mark = HostMark(tmp_path / "new", "shop")
    assert mark.take(1)
    (file,) = (tmp_path / "new").iterdir()
    long_ago = time.time() - STALE - 1
    os.utime(file, (long_ago, long_ago))
    mark.keep()
    assert not HostMark(tmp_path / "new", "shop").take(2)
    os.utime(file, (long_ago, long_ago))
    assert HostMark(tmp_path / "new", "shop").take(3)
    file.write_text("x")
    assert mark.give_back(4) == 4


def test_without_a_folder_each_process_tells_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mark = HostMark(tmp_path / "file" / "folder", "shop")
    assert mark.take(1)
    assert mark.take(2)
    mark.keep()
    assert mark.give_back(3) == 3
