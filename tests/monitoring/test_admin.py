"""Who may step in, how often, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from distributed_breaker.monitoring import admin
from distributed_breaker.monitoring.admin import Admin, Limit, RefusedError
from distributed_breaker.monitoring.endpoints import Endpoints
from distributed_breaker.monitoring.source import Inside
from distributed_breaker.services import Services
from tests.monitoring.client import Site, first
from tests.monitoring.conftest import CLOSED, OPEN, TOKEN, fail

pytestmark = pytest.mark.servers("valkey")

Standing = Callable[..., Site]


def test_without_a_token_nobody_may(services: Services, standing: Standing) -> None:
    site = standing(token="")
    for action in ("reset", "force-open", "force-closed", "release"):
        said = site.post(action, TOKEN, circuit=OPEN, reason="r")
        assert (said.status, "CIRCUIT_BREAKER_ADMIN_TOKEN" in said.json["error"]) == (403, True)
    with site.events() as events:
        assert first(events, "fleet")["admin"] is False
    assert site.get(f"/circuits/{OPEN}")["health"]["state"] == "closed"


def test_the_environment_gives_the_token(
    services: Services, standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_ADMIN_TOKEN", TOKEN)
    site = standing(token=None)
    assert site.post("reset", TOKEN, circuit=OPEN).status == 200


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"],
)
def test_a_wrong_token(given: str) -> None:
    checked = Admin(TOKEN)
    with pytest.raises(RefusedError) as refused:
        checked.check(given, "10.0.0.1")
    assert refused.value.status == 401
    assert TOKEN not in str(refused.value)
    checked.check(f"bearer  {TOKEN}", "10.0.0.1")


def test_guessing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(admin.time, "monotonic", lambda: now[0])
    checked = Admin(TOKEN)

    def refusal(given: str, address: str = "10.0.0.1") -> tuple[int, float]:
        try:
            checked.check(f"Bearer {given}", address)
        except RefusedError as refused:
            return refused.status, refused.wait
        return 200, 0.0

    assert [refusal("wrong")[0] for _ in range(12)] == [401] * 10 + [429] * 2
    status, wait = refusal(TOKEN)
    assert (status, 0 < wait <= 6.0) == (429, True), "even the right one must wait"
    assert refusal(TOKEN, "10.0.0.2")[0] == 200, "others need not"
    now[0] += wait
    assert refusal(TOKEN)[0] == 200


def test_a_limit_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit(1, 60.0)
    for n in range(admin.ADDRESSES + 1):
        limit.take(f"address {n}")
    assert limit.wait("address 0") == 0.0
    assert limit.wait("address 1") > 0


def test_too_many_steps(
    services: Services, standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "STEPS", 2)
    site = standing()
    said = [site.post("reset", TOKEN, circuit=OPEN) for _ in range(3)]
    assert [one.status for one in said] == [200, 200, 429]
    assert 1 <= int(said[-1].headers["retry-after"]) <= 30


def test_a_short_token_is_complained_about(caplog: pytest.LogCaptureFixture) -> None:
    Admin("secret")
    assert "shorter than 16" in caplog.text
    assert "secret" not in caplog.text


def test_who_did_what_and_why_is_kept(
    services: Services, standing: Standing, caplog: pytest.LogCaptureFixture
) -> None:
    site = standing()
    fail(services, OPEN)
    assert site.post("reset", TOKEN, service="web_app", reason="it's\nmended").status == 200
    (record,) = [r for r in caplog.records if r.name == "distributed_breaker.audit"]
    noted = json.loads(record.getMessage().partition(": ")[2])
    assert noted == record.admin_action  # type: ignore[attr-defined]
    assert (noted["action"], noted["actor"]) == ("reset", "http@127.0.0.1")
    assert {one["circuit"]: one["before"] for one in noted["circuits"]} == {
        OPEN: "open", CLOSED: "closed",
    }  # fmt: skip
    assert "\n" not in record.getMessage()
    (change, *_) = site.get(f"/circuits/{OPEN}")["history"]
    assert (change["cause"], change["detail"]["actor"]) == ("reset", "http@127.0.0.1")
    assert change["detail"]["reason"] == "it's\nmended"


def test_the_override_of_a_whole_service(services: Services, standing: Standing) -> None:
    site = standing()
    said = site.post("force-open", TOKEN, service="web_app", reason="migration", ttl=600)
    assert {one["circuit"]: one["after"] for one in said.json["done"]} == {
        OPEN: "forced_open", CLOSED: "forced_open",
    }  # fmt: skip
    found = site.get(f"/circuits/{OPEN}")["health"]
    assert found["ends_at"] > found["since"]
    assert services.registry.breaker("api_v1.http").snapshot().state.value == "closed"
    said = site.post("release", TOKEN, circuit=OPEN, reason="done")
    assert said.json["done"][0]["after"] == "half_open"


def test_a_circuit_that_nobody_has_called_gets_the_policy_of_the_file(
    services: Services, server: Any, namespace: str, standing: Standing
) -> None:
    with server.client() as client:
        client.flushall()
    site = standing()
    services.close()  # It would put its circuits back.
    said = site.post("force-open", TOKEN, circuit=OPEN, reason="r")
    assert said.json["done"][0]["before"] is None
    assert site.get(f"/circuits/{OPEN}")["policy"]["failure_threshold"] == 3


def test_what_went_wrong_is_for_the_log(
    services: Services, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    standing: Standing,
) -> None:  # fmt: skip
    def fails(*_: object) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(Endpoints, "_health", fails)
    said = standing().ask("GET", "/health")
    assert said.status == 500
    assert b"hunter2" not in said.body
    assert b"Traceback" not in said.body
    assert "password=hunter2" in caplog.text


def test_metrics_that_are_switched_off(
    tmp_path: Any, server: Any, namespace: str, standing: Standing
) -> None:
    from tests.monitoring.conftest import configured

    services = configured(tmp_path, server.url, namespace, monitoring_enabled=False)
    site = standing(services)
    assert site.ask("GET", "/metrics").status == 404
    assert "monitoring_enabled" in site.get("/metrics/prometheus")["error"]
    assert site.ask("GET", "/health").status == 200
    services.close()
    assert Inside(services).setting().monitoring_enabled is False
