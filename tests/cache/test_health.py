"""What is said of tiers and outboxes, and the probe that no caller has to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from circuit_breaker_config import (
    circuit_breaker_health,
    circuit_breaker_metrics,
    get_cache_circuit_breaker,
    get_task_queue,
    initialize_circuit_breakers,
)
from distributed_breaker import State
from distributed_breaker.clients.cache import CacheClient
from distributed_breaker.services import UnknownService, shut_down
from scripts.servers import Server
from tests.cache.conftest import Start, settings
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

NAME = "api.cache"


@pytest.fixture
def begin(cache_server: Server, tmp_path: Path) -> Any:
    """The process's own services, as an application has them."""

    def begin(store: dict[str, str] | None = None, **section: Any) -> CacheClient:
        file = tmp_path / "breakers.json"
        content = settings(cache_server, tmp_path, **section)
        content["settings"] |= store or {}
        file.write_text(json.dumps(content))
        initialize_circuit_breakers(file, environ={})
        return get_cache_circuit_breaker("api")

    yield begin
    shut_down()


def test_health_and_metrics_tell_of_the_tiers(begin: Any) -> None:
    cache = begin()
    health = circuit_breaker_health()
    assert health["clients"] == {NAME: {"status": "healthy", "problems": []}}
    cache.set("a", 1)
    cache.get("a")
    found = circuit_breaker_metrics()["clients"][NAME]
    assert found["tiers"]["memory"]["items"] == 1
    assert found["lost"] == found["queued"] == 0


def test_a_disk_that_fails_is_said_and_memory_serves(
    begin: Any, cache_server: Server, tmp_path: Path
) -> None:
    (tmp_path / "no folder").write_text("")
    there = str(tmp_path / "no folder")
    cache = begin(disk_cache_dir=there, outbox_path=f"{there}/outbox.db")
    health = circuit_breaker_health()  # before anything was stored
    assert health["overall_status"] == health["clients"][NAME]["status"] == "degraded"
    outbox, disk = health["clients"][NAME]["problems"]
    assert outbox.startswith("changes cannot wait on disk: ")
    assert disk.startswith("the disk tier fails, values are in memory only: ")
    cache.set("a", 1, durable=True)
    cache_server.kill()
    assert cache.get("a") == 1
    with pytest.raises(redis.ConnectionError):
        cache.set("a", 2)
    assert "1 changes were lost: no Redis, no room on disk" in cache.problems()


def test_parked_and_lost_changes_are_said(start: Start, cache_server: Server) -> None:
    cache = start()
    cache_server.kill()
    cache.outbox.add("api.cache", "steal", {}, key="nightscan:x")
    assert cache.replay().parked == 1
    assert cache.problems() == ["1 changes are parked, see `breakers outbox list`"]
    cache.outbox.purge(topic="api.cache")
    cache.close()
    Path(cache.outbox.path).write_bytes(b"no database" * 100)
    Path(cache.outbox.path).chmod(0o600)
    assert cache.set("a", 1) is False
    assert any("damaged" in problem for problem in cache.problems())


def test_a_corrupt_disk_file_costs_what_it_held(
    start: Start, cache_server: Server, tmp_path: Path
) -> None:
    cache = start()
    cache.set("a", 1, durable=True)
    cache.close()
    (file,) = (tmp_path / "here" / "disk").rglob("cache.db")
    file.write_bytes(b"no database" * 1_000)
    again = start(host="here")
    again.set("b", 2, durable=True)
    cache_server.kill()
    assert again.get("a", "gone") == "gone"
    another = start(host="here")
    assert another.get("b") == 2, "from the file that was made anew"
    assert another.problems() == []


def test_a_health_check_key_is_the_probe(
    begin: Any, server: Server, cache_server: Server, namespace: str
) -> None:
    """The circuit closes although nobody calls any more."""
    store = {"redis_url": server.url, "namespace": namespace}
    cache = begin(store, health_check_key="health", success_threshold=2)
    breaker = cache.breaker
    wait_until(lambda: breaker.check is not None and breaker.check.passed)
    cache_server.kill()
    with pytest.raises(redis.ConnectionError):
        cache.get("a")
    assert breaker.state is State.OPEN
    cache_server.restart(empty=False)
    wait_until(lambda: breaker.state is State.CLOSED)
    cache.configure(cache.section.model_copy(update={"health_check_key": None}))
    assert breaker.check is None


def test_a_services_tasks_wait_beside_its_cache(
    begin: Any, own_server: Any, tmp_path: Path
) -> None:
    begin(timeout=60, outbox_path=str(tmp_path / "waiting" / "outbox.db"))
    broker = own_server(tcp=True)
    app = Celery("shop", broker=broker.url, set_as_current=False)
    tasks = get_task_queue("api", app)
    assert get_task_queue("api", app) is tasks
    broker.kill()
    for _ in range(2):
        tasks.enqueue("shop.mail", ["someone"])
    assert tasks.waiting() == 2
    assert (tmp_path / "waiting" / "tasks.db").exists()
    assert circuit_breaker_health()["circuit_breakers"]["api.tasks"]["state"] == "open"
    topics = circuit_breaker_metrics()["clients"]["api.tasks"]["outbox"]["topics"]
    assert topics["api.tasks"]["waiting"] == 2
    with pytest.raises(UnknownService, match="unknown service 'other'"):
        get_task_queue("other", app)
    app.close()
