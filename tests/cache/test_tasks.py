"""Tasks for Celery, whose broker is a real server that goes away."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from distributed_breaker import CircuitBreakerRegistry, Policy
from distributed_breaker.clients.tasks import TaskQueue
from distributed_breaker.fallback.outbox import Outbox
from scripts.servers import Server
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

POLICY = Policy(failure_threshold=1, success_threshold=1, open_interval=0.05, jitter=0.0)


@pytest.fixture
def broker(own_server: Any) -> Server:
    server: Server = own_server(tcp=True, args=["--appendonly", "yes", "--appendfsync", "always"])
    return server


@pytest.fixture
def tasks(broker: Server, tmp_path: Path) -> Iterator[TaskQueue]:
    app = Celery("shop", broker=broker.url, set_as_current=False)
    app.conf.broker_transport_options = {"socket_connect_timeout": 1, "socket_timeout": 2}
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        breaker = registry.breaker("shop.tasks", POLICY)
        tasks = TaskQueue(app, breaker, Outbox(tmp_path / "outbox.db"))
        yield tasks
        tasks.close()
        app.close()


def queued(broker: Server) -> list[tuple[str, str, list[Any]]]:
    """What a worker will get: name, id and arguments, the oldest first."""
    client = broker.client(decode_responses=True)
    try:
        messages = [json.loads(text) for text in reversed(client.lrange("celery", 0, -1))]
    except redis.RedisError:
        return []
    finally:
        client.close()
    found = []
    for message in messages:
        args, _, _ = json.loads(base64.b64decode(message["body"]))
        found.append((message["headers"]["task"], message["headers"]["id"], args))
    return found


def test_they_go_to_celery_at_once(tasks: TaskQueue, broker: Server) -> None:
    first = tasks.enqueue("shop.mail", ["someone", 1])
    second = tasks.enqueue("shop.bill", kwargs={"sum": 5})
    assert queued(broker) == [("shop.mail", first, ["someone", 1]), ("shop.bill", second, [])]
    assert tasks.waiting() == 0


def test_they_wait_while_the_broker_is_away(tasks: TaskQueue, broker: Server) -> None:
    ids = [tasks.enqueue("shop.mail", [0])]
    broker.kill()
    ids += [tasks.enqueue("shop.mail", [number]) for number in range(1, 4)]
    assert tasks.waiting() == 3
    broker.restart(empty=False)
    wait_until(lambda: tasks.waiting() == 0)
    ids.append(tasks.enqueue("shop.mail", [4]))
    assert queued(broker) == [("shop.mail", one, [n]) for n, one in enumerate(ids)]


def test_they_survive_the_process(tasks: TaskQueue, broker: Server, tmp_path: Path) -> None:
    broker.kill()
    waiting = tasks.enqueue("shop.mail", ["later"])
    tasks.close()
    broker.restart(empty=False)
    app = Celery("shop", broker=broker.url, set_as_current=False)
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        fresh = TaskQueue(
            app, registry.breaker("shop.tasks", POLICY), Outbox(tmp_path / "outbox.db")
        )
        assert fresh.waiting() == 1
        wait_until(lambda: fresh.waiting() == 0)
        assert queued(broker) == [("shop.mail", waiting, ["later"])]
        fresh.close()
        app.close()


@pytest.mark.parametrize("args", [[object()], [b"x"], [{1: 2}]])
def test_what_cannot_wait_is_refused_in_words(
    tasks: TaskQueue, broker: Server, args: list[Any]
) -> None:
    broker.kill()
    with pytest.raises((TypeError, ValueError)):
        tasks.enqueue("shop.mail", args)
    assert tasks.waiting() == 0
