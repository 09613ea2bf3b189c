"""What a real process exports for Prometheus: right, readable, equal from each process, and never
going back when it must not."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics import exposition as openmetrics

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.monitoring.exposition import (
    exposition,
    families,
    figures_of,
    look,
)
from distributed_breaker.monitoring.prometheus import register
from distributed_breaker.services import Services
from scripts.servers import Server
from tests.fleet.process import BOUND, ROOT, until
from tests.monitoring import rules
from tests.monitoring.exported import Exported
from tests.monitoring.promql import Scene, evaluate

FORMATS = ["text/plain", "application/openmetrics-text"]
REACHABLE = "circuit_breaker_store_reachable"

pytestmark = pytest.mark.servers("valkey")


# ---------------------------------------------------------------------------- live


@pytest.fixture
def file(server: Server, namespace: str, tmp_path: Path) -> Path:
    """A service with a database, a cache and an HTTP client, whose circuits are on the server."""
    path = tmp_path / "breakers.json"
    http = {"base_url": "http://127.0.0.1:1", "failure_threshold": 2, "max_retries": 0,
            "enable_request_queue": True, "outbox_path": str(tmp_path / "http.db"),
            "timeout": 600.0, "quorum": 1}  # fmt: skip
    cache = {"redis_url": server.url, "cache_key_prefix": namespace,
             "disk_cache_dir": str(tmp_path / "disk"),
             "outbox_path": str(tmp_path / "cache.db")}  # fmt: skip
    database = {"url": f"sqlite:///{tmp_path / 'data.db'}", "outbox_path": str(tmp_path / "d.db")}
    settings = {"redis_url": server.url, "namespace": namespace}
    services = {"api": {"http": http, "cache": cache, "database": database}}
    path.write_text(json.dumps({"settings": settings, "services": services}))
    return path


@pytest.fixture
def services(file: Path) -> Iterator[Services]:
    with contextlib.closing(Services(file, environ={})) as services:
        traffic(services)
        yield services


def traffic(services: Services) -> None:
    """Calls of all kinds; the circuit of HTTP opens."""
    http, cache = services.client("http", "api"), services.client("cache", "api")
    database = services.client("database", "api")
    for _ in range(5):
        with contextlib.suppress(CircuitBreakerOpenException, ConnectionError, OSError):
            http.get("/nobody-listens")  # type: ignore[attr-defined]
    cache.set("a", 1)  # type: ignore[attr-defined]
    assert cache.get("a") == 1  # type: ignore[attr-defined]
    assert database.execute_query("SELECT 1 AS one", read_only=True) == [{"one": 1}]  # type: ignore[attr-defined]
    services.registry.flush(BOUND)


@pytest.mark.parametrize("accept", FORMATS)
def test_prometheus_client_would_say_the_same(services: Services, accept: str) -> None:
    """The text is written here; this holds it against the one that the package writes."""
    ours = Exported.of(*exposition(accept, look(services)))
    registry = CollectorRegistry()
    register(registry, services)
    write = openmetrics.generate_latest if "open" in accept else generate_latest
    theirs = Exported.of(accept, write(registry))
    steady = {s: v for s, v in ours.series.items() if "_age_" not in s[0]}
    assert steady == {s: v for s, v in theirs.series.items() if "_age_" not in s[0]}
    assert len(steady) > 80
    for name, family in ours.families.items():
        other = theirs.families[name]
        assert (family.type, family.documentation) == (other.type, other.documentation)


@pytest.mark.parametrize("accept", FORMATS)
def test_live_traffic(services: Services, accept: str) -> None:
    found = Exported.of(*exposition(accept, look(services)))
    http = {"circuit": "api.http", "service": "api"}
    assert found["circuit_breaker_state", {"state": "open", **http}] == 1
    assert found["circuit_breaker_trips_total", http] == 1
    assert found["circuit_breaker_calls_total", {"outcome": "failure", **http}] == 2
    assert found["circuit_breaker_rejections_total", http] == 3
    assert found["circuit_breaker_call_duration_seconds_count", http] == 2
    reads = {"circuit": "api.database.read", "outcome": "success"}
    assert found["circuit_breaker_calls_total", reads] == 1
    assert found["circuit_breaker_store_reachable"] == 1
    assert found["circuit_breaker_configuration_rejected"] == 0
    assert found["circuit_breaker_pending_outcomes"] == 0
    client = {"client": "api.http"}
    assert found["circuit_breaker_http_attempts_total", client] == 2
    assert found["circuit_breaker_outbox_waiting", client] == 0
    assert found["circuit_breaker_outbox_works", client] == 1
    assert found["circuit_breaker_cache_items", {"client": "api.cache", "tier": "memory"}] == 1
    assert found["circuit_breaker_database_pool_checked_out", {"client": "api.database"}] == 0
    failures = found.all(("circuit_breaker_database_failures_total", {"client": "api.database"}))
    assert len(failures) > 4


def test_a_model(tmp_path: Path) -> None:
    path = tmp_path / "breakers.json"
    ml = {"max_cpu_usage": 100.0, "max_memory_usage": 100.0, "warmup_on_start": False}
    settings = {"redis_url": "memory://"}
    path.write_text(json.dumps({"settings": settings, "services": {"api": {"ml": ml}}}))
    with contextlib.closing(Services(path, environ={})) as services:
        client: Any = services.client("ml", "api", model=abs, version="v1")
        for _ in range(3):  # the first one loads the model, the second one is kept
            client.predict(np.ones((1, 4)))
        found = Exported.of(*exposition("", look(services)))
    for name, labels, value in (
        ("predictions_total", {"source": "model"}, 2),
        ("predictions_total", {"source": "cache"}, 1),
        ("predictions_total", {"source": "default"}, 0),
        ("model_ready", {}, 1),
        ("waiting", {}, 0),
        ("runs_total", {}, 2),
        ("inputs_total", {}, 2),
        ("batch_size", {}, 32),
        ("refused_total", {}, 0),
        ("timeouts_total", {}, 0),
    ):
        assert found[f"circuit_breaker_ml_{name}", {"client": "api.ml", **labels}] == value, name
    assert found["circuit_breaker_cache_items", {"client": "api.ml"}] == 1


def test_alerts_of_live_traffic(file: Path) -> None:
    with contextlib.closing(Services(file, environ={})) as services:
        before = Exported.of(*exposition("", look(services)))
        traffic(services)
        scene = Scene(before, Exported.of(*exposition("", look(services))))
    groups = rules.read(ROOT / "docs/prometheus/alerts.yml")["groups"]
    fired = {
        (rule["alert"].removeprefix("CircuitBreaker"), dict(labels)["circuit"])
        for rule in groups[0]["rules"]
        for labels in evaluate(rule["expr"], scene)
    }
    assert fired == {("Open", "api.http"), ("HighRejection", "api.http")}


def test_a_reset_takes_nothing_away(services: Services) -> None:
    before = Exported.of(*exposition("", look(services)))
    services.client("http", "api").breaker.reset(actor="a test", reason="to see")
    after = Exported.of(*exposition("", look(services)))
    assert after["circuit_breaker_state", {"circuit": "api.http", "state": "closed"}] == 1
    counted = [s for s in before.series if s[0].endswith(("_total", "_count", "_sum", "_bucket"))]
    assert len(counted) > 50
    assert [s for s in counted if after.series[s] < before.series[s]] == []


def test_the_durations_of_one_process(services: Services) -> None:
    breaker = services.client("cache", "api").breaker
    before = Exported.of(*exposition("", look(services)))
    name = "circuit_breaker_local_call_duration_seconds"
    which = {"circuit": breaker.name}
    had = sum(value for _, value in before.all((f"{name}_count", which)))
    for _ in range(3):
        breaker.call(int)
    waiting = Exported.of(*exposition("", look(services)))
    assert waiting[f"{name}_count", which] == had + 3, "also before the store has them"
    services.registry.flush()
    after = Exported.of(*exposition("", look(services)))
    assert after[f"{name}_count", which] == had + 3
    assert after[f"{name}_bucket", {**which, "le": "+Inf"}] == had + 3
    assert 0 <= after[f"{name}_sum", which] < 60


def test_two_processes_say_the_same_of_the_fleet(services: Services, file: Path) -> None:
    with contextlib.ExitStack() as stack:
        members = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.monitoring.exporter", str(file)],
                    cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )
            )
            for _ in range(2)
        ]  # fmt: skip
        for member in members:
            stack.callback(member.kill)
        told = []
        for member in members:
            assert member.stdout is not None
            assert member.stdout.readline() == "ready\n"
        for member in members:
            assert member.stdin is not None
            assert member.stdout is not None
            member.stdin.write("text/plain\n")
            member.stdin.flush()
            told.append(Exported.of(*json.loads(member.stdout.readline())))
    told.append(Exported.of(*exposition("", look(services))))
    first, second, third = told
    assert len(first.of_the_fleet()) > 50
    assert first.of_the_fleet() == second.of_the_fleet() == third.of_the_fleet()
    own = [set(one.series) - set(one.of_the_fleet()) for one in told]
    assert all(own)
    assert not own[0] & own[1], "what is of one process can't be taken for another one's"


def test_without_the_store_nothing_is_said_of_the_fleet(
    own_server: Callable[..., Server], namespace: str, tmp_path: Path
) -> None:
    """A process's own counts in their place would look as if the fleet's had gone back."""
    server = own_server(args=["--appendonly", "yes", "--appendfsync", "always"])
    path = tmp_path / "breakers.json"
    settings = {"redis_url": server.url, "namespace": namespace}
    path.write_text(json.dumps({"settings": settings, "services": {"api": {"database": {}}}}))
    with contextlib.closing(Services(path, environ={})) as services:
        breaker = services.client("database", "api").breaker
        for _ in range(10):
            breaker.call(int)
        services.registry.flush(BOUND)
        before = Exported.of(*exposition("", look(services)))
        server.kill()
        lost = until(lambda: _seen(services, reachable=0), "it is noticed")
        until(lambda: breaker.snapshot().source == "shadow", "the shadow decides")
        lost = Exported.of(*exposition("", look(services)))
        assert lost.of_the_fleet() == {}
        labels = {"circuit": "api.database.write", "source": "shadow", "state": "closed"}
        assert lost["circuit_breaker_local_state", labels] == 1
        server.restart(empty=False)
        after = until(lambda: _seen(services, reachable=1), "it is back")
        calls = (
            "circuit_breaker_calls_total",
            {"outcome": "success", "circuit": "api.database.write"},
        )
        assert after[calls] >= before[calls] == 10


def _seen(services: Services, reachable: int) -> Exported | None:
    found = Exported.of(*exposition("", look(services)))
    return found if found[REACHABLE] == reachable else None


# ---------------------------------------------------------------------------- one process alone


def test_processes_at_memory_are_fleets_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "breakers.json"
    path.write_text(
        json.dumps({"settings": {"redis_url": "memory://"}, "services": {"a": {"database": {}}}})
    )
    with contextlib.closing(Services(path, environ={})) as services:
        services.client("database", "a").breaker.call(int)
        found = Exported.of(*exposition("", look(services)))
        calls = "circuit_breaker_calls_total", {"outcome": "success", "circuit": "a.database.write"}
        assert found[calls] == 1
        ((series, _),) = found.all(calls)
        fleet, process = dict(series[1])["fleet"].split("@")
        assert (fleet, found[REACHABLE, {"process": process}]) == ("default", 1)


def test_a_look_from_outside_will_do(services: Services) -> None:
    """Endpoints ask once for all that come; then the figures are made of what they have seen."""
    from distributed_breaker.fleet import Fleet

    registry = services.registry
    with Fleet(services.configuration.redis_url, registry.namespace) as fleet:
        outside = Exported.of(*exposition("", figures_of(services, fleet.snapshot())))
    inside = Exported.of(*exposition("", look(services)))
    assert outside.of_the_fleet() == inside.of_the_fleet()
    assert set(outside.series) == set(inside.series)


# ---------------------------------------------------------------------------- an application's own


def test_an_application_exports_it_with_its_own(services: Services) -> None:
    registry = CollectorRegistry()
    ours = register(registry, services)
    text = generate_latest(registry).decode()
    assert 'circuit_breaker_state{circuit="api.http"' in text
    with pytest.raises(ValueError, match="Duplicated"):
        register(registry, services)
    some = registry.restricted_registry(["circuit_breaker_trips_total"])
    assert set(Exported.of("", generate_latest(some)).families) == {"circuit_breaker_trips"}
    registry.unregister(ours)
    assert generate_latest(registry) == b""


def test_it_goes_with_the_metrics_of_several_processes(services: Services, tmp_path: Path) -> None:
    """What prometheus-client gathers from files of all workers is not touched, and we are not."""
    (tmp_path / "metrics").mkdir()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path / "metrics"))
    register(registry, services)
    assert len(Exported.of("", generate_latest(registry)).of_the_fleet()) > 50


def test_fleet_and_process_can_be_told_apart(services: Services) -> None:
    """So that only one of many processes exports what is the same from all."""
    found = look(services)
    fleet = {family.name for family, _ in families(found, process=False)}
    process = {family.name for family, _ in families(found, fleet=False)}
    assert "circuit_breaker_state" in fleet
    assert "circuit_breaker_store_reachable" in process
    assert not fleet & process
    registry = CollectorRegistry()
    register(registry, services, fleet=False)
    assert Exported.of("", generate_latest(registry)).of_the_fleet() == {}
