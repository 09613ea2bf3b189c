"""The rights that docs/alerts.md asks for are enough; without them nothing breaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.monitoring.alerts import Alerts
from distributed_breaker.monitoring.presence import Presence, processes
from distributed_breaker.services import Services
from scripts.servers import Server
from tests.faults.test_rights import RIGHTS, grant, url_of
from tests.monitoring.alerts.conftest import settings
from tests.monitoring.alerts.receiver import Receiver
from tests.unit.clock import BRITTLE, fail, wait_until

pytestmark = pytest.mark.servers("valkey")
DOCUMENT = Path(__file__).parents[3] / "docs" / "alerts.md"


@pytest.fixture
def limited(own_server: Callable[..., Server], namespace: str, tmp_path: Path) -> Iterator[tuple]:
    """A process whose user has the rights of the circuits only, and who may grant more."""
    server = own_server()
    client = server.client()
    grant(client)
    file = tmp_path / "breakers.json"
    file.write_text("{}")
    with CircuitBreakerRegistry.from_url(url_of(server), namespace) as registry:
        services = Services(file, environ={}, registry=registry)
        yield client, services
        services.close()
    client.close()


def test_the_rights_are_enough(
    limited: tuple[redis.Redis, Services], receiver: Receiver, tmp_path: Path
) -> None:
    client, services = limited
    (line,) = re.findall(r"^ACL SETUSER breaker (.*)$", DOCUMENT.read_text(), re.MULTILINE)
    client.execute_command("ACL", "SETUSER", "breaker", *line.split())
    presence = Presence(services)
    presence.write()
    alerts = Alerts(services.registry, settings(tmp_path, receiver.url))
    alerts.start()
    breaker = services.registry.breaker("api.http", BRITTLE)
    fail(breaker)
    wait_until(lambda: receiver.of("open"))
    breaker.reset()
    wait_until(lambda: receiver.of("open", "resolved"))
    assert len(processes(services.registry)) == 1
    alerts.close()
    presence.close()
    assert client.acl_log() == []
    assert not set(line.replace("+", "").split()) & set(RIGHTS)


def test_without_them(
    limited: tuple[redis.Redis, Services],
    receiver: Receiver,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, services = limited
    presence = Presence(services)
    presence.write()
    presence.write()
    assert caplog.text.count("refuses what lists the fleet's processes") == 1
    assert [p["id"] for p in processes(services.registry, presence)] == [presence.document()["id"]]
    alerts = Alerts(services.registry, settings(tmp_path, receiver.url))
    alerts.start()
    wait_until(lambda: "for the rights that they need see docs/alerts.md" in caplog.text)
    breaker = services.registry.breaker("api.http", BRITTLE)
    fail(breaker)
    services.registry.flush()
    assert breaker.state == "open"
    alerts.close()
    presence.close()
    assert receiver.got == []
