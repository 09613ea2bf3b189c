"""What runs beside the services of a process goes by the configuration in force."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker import services as all_services
from distributed_breaker.cli.place import find
from distributed_breaker.cli.serving import alert
from distributed_breaker.fleet import Fleet
from distributed_breaker.monitoring.beside import Beside, fleet_processes
from distributed_breaker.monitoring.presence import Presence, processes
from distributed_breaker.services import Services, current, initialize, shut_down
from scripts.servers import Server
from tests.monitoring.alerts.receiver import Receiver
from tests.unit.clock import fail, wait_until

pytestmark = pytest.mark.servers("valkey")

Configure = Callable[..., Path]


@pytest.fixture
def configure(server: Server, namespace: str, tmp_path: Path) -> Configure:
    """Write a configuration whose circuits trip at the first failure."""

    def write(name: str = "breakers.json", version: int = 1, **settings: Any) -> Path:
        given = {
            "settings": {
                "redis_url": server.url,
                "namespace": namespace,
                "config_version": version,
                **settings,
            },
            "services": {"api": {"http": {"failure_threshold": version, "quorum": 1}}},
        }
        path = tmp_path / name
        path.with_suffix(".new").write_text(json.dumps(given))
        os.replace(path.with_suffix(".new"), path)
        return path

    return write


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    shut_down()


def test_the_document(configure: Configure, namespace: str, raw: redis.Redis) -> None:
    services = initialize(configure())
    services.client("http", "api")
    (beside,) = services.beside
    assert isinstance(beside, Beside)
    wait_until(lambda: [p["service"] for p in fleet_processes()] == ["api"])
    (found,) = fleet_processes()
    assert found["pid"] == os.getpid()
    assert found["host"] == socket.gethostname()
    assert found["circuits"] == 1
    assert found["mirror_age"] is not None
    assert found["degraded"] is False
    assert found["quarantined"] == found["policy_mismatch"] == []
    assert found["config_version"] == 1
    assert found["started_at"] <= found["seen_at"]
    key = f"cb:{namespace}:process:{found['id']}"
    wait_until(lambda: raw.exists(key))
    assert 20_000 < raw.pttl(key) <= 35_000
    assert len(str(raw.get(key))) < 1_000
    wait_until(lambda: raw.pttl(f"cb:{namespace}:processes") > 0)
    shut_down()
    assert not raw.exists(key)
    assert not raw.exists(f"cb:{namespace}:processes")


def test_what_cannot_be_read_is_left_out(
    configure: Configure, namespace: str, raw: redis.Redis, server: Server
) -> None:
    ids = f"cb:{namespace}:processes"
    for number, text in enumerate(["", "[", "[]", "{}", '{"id": "x"}']):
        raw.set(f"cb:{namespace}:process:{number}", text)
        raw.zadd(ids, {str(number): number})
    raw.zadd(ids, {"expired": 9})
    with Fleet(server.url, namespace) as fleet:
        assert processes(fleet) == []


def test_a_policy_that_is_not_the_fleets(configure: Configure) -> None:
    old = Services(configure(version=1), environ={})
    new = Services(configure("new.json", version=2), environ={})
    try:
        for services in (old, new):
            services.client("http", "api").breaker.snapshot()
            services.registry.flush()
        old.client("http", "api").breaker.call(int)
        old.registry.flush()
        assert Presence(old).document()["policy_mismatch"] == ["api.http"]
        assert Presence(new).document()["policy_mismatch"] == []
    finally:
        old.close()
        new.close()


def test_a_store_that_is_away_leaves_this_process(
    own_server: Callable[..., Server], configure: Configure
) -> None:
    server = own_server()
    services = initialize(configure(redis_url=server.url))
    breaker = services.client("http", "api").breaker
    breaker.snapshot()
    server.kill()
    fail(breaker)
    wait_until(lambda: fleet_processes()[0]["degraded"])
    assert [p["pid"] for p in fleet_processes()] == [os.getpid()]


def test_alerts_come_and_go_with_the_file(
    configure: Configure,
    receiver: Receiver,
    raw: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.presence.EVERY", 0.1)
    path = configure()
    services = initialize(path)
    breaker = services.client("http", "api").breaker
    (beside,) = services.beside
    assert isinstance(beside, Beside)
    alerts = {
        "channels": {"hook": {"type": "webhook", "url": receiver.url}},
        "outbox_path": str(tmp_path / "outbox.db"),
        "evaluate_every": 0.1,
    }
    configure(alerts=alerts)
    wait_until(lambda: beside._alerts is not None)
    fail(breaker)
    wait_until(lambda: receiver.of("open"))
    evaluator = f"cb:{services.registry.namespace}:alerts:evaluator"
    assert raw.exists(evaluator)
    configure()
    wait_until(lambda: not raw.exists(evaluator))  # it has resigned, as the last thing that it does
    breaker.reset()
    shut_down()
    assert receiver.of("open", "resolved") == []


def test_the_server_of_its_own_sends_alerts(
    configure: Configure, receiver: Receiver, tmp_path: Path
) -> None:
    """``breakers serve``, for a fleet whose processes have none configured."""
    alerts = {
        "channels": {"hook": {"type": "webhook", "url": receiver.url}},
        "outbox_path": str(tmp_path / "outbox.db"),
        "evaluate_every": 0.1,
    }
    services = Services(configure(), environ={})
    file = configure("serve.json", alerts=alerts)
    with ExitStack() as stack:
        stack.callback(services.close)
        alert(find(None, None, file, None), stack)
        fail(services.client("http", "api").breaker)
        wait_until(lambda: receiver.of("open"))


def test_where_monitoring_is_off_nobody_is_listed(configure: Configure) -> None:
    services = initialize(configure(monitoring_enabled=False))
    services.client("http", "api").breaker.snapshot()
    (beside,) = services.beside
    assert isinstance(beside, Beside)
    assert beside._tick() > 0
    with Fleet(services.configuration.redis_url, services.registry.namespace) as fleet:
        assert processes(fleet) == []


def test_a_defect_in_it_keeps_nobody_from_work(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Services) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(all_services, "companions", [broken])
    initialize(configure())
    assert current().client("http", "api").breaker.call(int) == 0
    assert "a defect" in caplog.text
