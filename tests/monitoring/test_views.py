"""Whose view is answered: the fleet's, whoever answers, and while the store is away a process's."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.errors import StoreUnavailable
from distributed_breaker.monitoring.endpoints import Endpoints, Request
from distributed_breaker.monitoring.reader import Reader
from distributed_breaker.monitoring.source import Inside, Outside
from distributed_breaker.services import Services
from scripts.servers import Server as Store
from tests.fleet.process import BOUND, until
from tests.monitoring.client import Site, first, valid
from tests.monitoring.conftest import CLOSED, OPEN, TOKEN, configured, fail, make_circuits

pytestmark = pytest.mark.servers("valkey")

Standing = Callable[..., Site]


def quarantine(services: Services, name: str) -> None:
    """Let one process alone see failures: its shadow opens, the fleet's circuit stays closed."""
    breaker = services.registry.breaker(name)

    def boom() -> None:
        raise TimeoutError("no answer")

    def sick() -> bool:
        with contextlib.suppress(Exception):
            breaker.call(boom)
        return breaker.snapshot().source == "quarantine"

    until(sick, "it is in quarantine")


# ---------------------------------------------------------------------------- equal answers


def test_two_workers_give_equal_answers(
    services: Services, server: Store, namespace: str, tmp_path: Path, standing: Standing
) -> None:
    with contextlib.closing(configured(tmp_path, server.url, namespace)) as other:
        make_circuits(other)  # From now on both count as active, and one alone can't trip.
        fail(services, OPEN)
        quarantine(other, CLOSED)
        services.registry.flush(10)
        other.registry.flush(10)
        one, two = standing(), standing(other)
        for path, kind in (("/health", "health"), ("/metrics", "metrics")):
            here, there = valid(one.get(path), kind), valid(two.get(path), kind)
            for own in ("process", "clients", "configuration", "timestamp"):
                del here[own], there[own]
            assert here == there
        assert one.get("/timeline") == two.get("/timeline")
        name = f"/circuits/{OPEN}"
        assert one.get(name)["history"] == two.get(name)["history"]
        # What only one of them knows stands apart.
        assert two.get("/health")["process"]["quarantined"] == [CLOSED]
        assert one.get("/health")["process"]["quarantined"] == []
        assert two.get("/health")["circuit_breakers"][CLOSED]["state"] == "closed"


def test_from_outside_the_same_is_seen(
    services: Services, server: Store, namespace: str, standing: Standing
) -> None:
    fail(services, OPEN)
    services.registry.flush(10)
    source = Outside(server.url, namespace, services.loaded)
    with contextlib.closing(Reader(source)) as reader:
        seen, inside = (
            valid(json.loads(reader.view().health_json), "health"),
            standing().get("/health"),
        )
        for own in ("process", "clients", "timestamp"):
            del seen[own], inside[own]
        assert seen == inside


def test_looking_changes_nothing(services: Services, server: Store, standing: Standing) -> None:
    """A GET leaves every key as it is."""
    services.registry.flush(10)
    services.close()  # Its own polls and good outcomes would change something.
    site = standing()

    def everything() -> dict[str, Any]:
        with contextlib.closing(server.client()) as client:
            return {key: client.dump(key) for key in client.scan_iter()}

    before = everything()
    assert before
    for path in ("/health", "/metrics", f"/circuits/{OPEN}", "/timeline", "/processes", "/ready"):
        assert site.ask("GET", path).status == 200
    with site.events() as events:
        next(events)
    assert everything() == before


def test_circuits_in_memory(tmp_path: Path, standing: Standing) -> None:
    with contextlib.closing(configured(tmp_path, "memory://", "alone")) as services:
        make_circuits(services)
        site = standing(services)
        assert valid(site.get("/health"), "health")["overall_status"] == "healthy"
        said = site.post("force-open", TOKEN, circuit=CLOSED, reason="drill")
        assert said.json["done"][0]["after"] == "forced_open"
        assert site.ask("GET", "/health").status == 503
        assert site.get("/timeline")["transitions"] == []
        assert site.post("release", TOKEN, service="web_app").status == 200


# ---------------------------------------------------------------------------- outages


def test_a_dead_store_is_told_as_degraded(
    own_server: Callable[..., Store], namespace: str, tmp_path: Path, standing: Standing
) -> None:
    store = own_server()
    with contextlib.closing(configured(tmp_path, store.url, namespace)) as services:
        make_circuits(services)
        site = standing(services)
        fail(services, OPEN)
        with CircuitBreakerRegistry.from_url(store.url, namespace) as elsewhere:
            elsewhere.breaker("elsewhere.http").call(int)
        until(lambda: "elsewhere.http" in site.get("/health")["circuit_breakers"], "it is seen")
        assert site.ask("GET", "/health").status == 503
        with site.events() as events:
            first(events, "fleet")
            store.kill()
            lost = first(events, "tiles", store=until(lambda: lost_store(site)))
            assert lost["overall_status"] == "unhealthy"  # The shadow keeps it open.
            said = site.ask("GET", "/health")
            assert said.status == 503
            found = valid(said.json, "health")
            assert found["circuit_breakers"][OPEN]["state"] == "open"
            assert found["circuit_breakers"][CLOSED]["status"] == "degraded"
            assert found["circuit_breakers"]["elsewhere.http"]["status"] == "degraded"
            assert "can't be reached" in found["store"]["problem"]
            # The process still works, so it is alive and ready, and shows what it knows.
            assert site.ask("GET", "/live").status == 200
            assert site.ask("GET", "/ready").status == 200
            assert site.ask("GET", "/").status == 200
            assert valid(site.get("/metrics"), "metrics")["store"]["reachable"] is False
            assert valid(site.get(f"/circuits/{OPEN}"), "circuit")["history"] == []
            assert site.get("/timeline")["transitions"][0]["circuit"] == "elsewhere.http"
            refused = site.post("reset", TOKEN, circuit=OPEN)
            assert (refused.status, "can't be reached" in refused.json["error"]) == (503, True)
            store.restart()
            until(lambda: site.get("/health")["store"]["reachable"], "it is back")
            first(events, "tiles", store={"reachable": True, "problem": None})


def lost_store(site: Site) -> Any:
    store = site.get("/health")["store"]
    return None if store["reachable"] else store


def test_a_store_that_hangs(
    own_server: Callable[..., Store], namespace: str, tmp_path: Path, standing: Standing
) -> None:
    store = own_server()
    with contextlib.closing(configured(tmp_path, store.url, namespace)) as services:
        make_circuits(services)
        site = standing(services)
        assert site.ask("GET", "/health").status == 200
        store.pause()
        try:
            lost = until(lambda: lost_store(site), "it is noticed")
            assert "does not answer in time" in lost["problem"]
            assert site.get("/health")["overall_status"] == "degraded"
            assert site.ask("GET", "/ready").status == 200
            assert site.post("reset", TOKEN, circuit=OPEN).status == 503
        finally:
            store.resume()
        until(lambda: site.get("/health")["store"]["reachable"], "it is back")


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://ann:hunter2@127.0.0.1:{probe.getsockname()[1]}/0"


def test_a_store_that_never_was_there(
    nobody: str, namespace: str, tmp_path: Path, standing: Standing
) -> None:
    with contextlib.closing(configured(tmp_path, nobody, namespace)) as services:
        site = standing(services)
        for path in ("/health", "/metrics", "/ready", "/timeline", f"/circuits/{OPEN}", "/schema"):
            said = site.ask("GET", path)
            assert said.status == 200
            assert b"hunter2" not in said.body
        assert site.get("/health")["overall_status"] == "degraded"
        with site.events() as events:
            whole = valid(first(events, "fleet"), "fleet_event")
            assert whole["store"]["reachable"] is False
            assert {tile["status"] for tile in whole["tiles"]} == {"degraded"}


def test_a_lost_store_is_not_asked_for_more(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Outside(nobody, "x")
    monkeypatch.setattr(source.fleet(), "histories", lambda *_: pytest.fail("it is asked"))
    with contextlib.closing(Reader(source)) as reader:
        assert reader.view().lost
        assert (reader.history("a"), reader.timeline(), reader.processes()) == ([], [], [])


def test_from_outside_nothing_is_ready_before_the_store_has_answered(
    own_server: Callable[..., Store],
) -> None:
    store = own_server()
    store.kill()
    with contextlib.closing(Endpoints(Outside(store.url, "x"))) as endpoints:

        def status(path: str) -> int:
            return endpoints.answer(Request("GET", path)).status

        assert (status("/ready"), status("/live"), status("/health")) == (503, 200, 200)
        store.restart()
        until(lambda: status("/ready") == 200, "it is ready")
        store.kill()
        until(lambda: endpoints.reader.view().lost, "it is noticed")
        assert status("/ready") == 200, "what was seen can be shown"


# ---------------------------------------------------------------------------- the one reader


def test_many_ask_and_the_store_is_asked_once(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.reader.FRESH", 60.0)
    source, asked = Inside(services), []
    fleet = source.fleet()
    look = fleet.snapshot
    monkeypatch.setattr(fleet, "snapshot", lambda: asked.append(1) or look())
    with contextlib.closing(Reader(source)) as reader:
        views: list[Any] = []
        threads = [threading.Thread(target=lambda: views.append(reader.view())) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
        assert len(asked) == 1
        assert len(views) == 20
        assert len({id(view.health_json) for view in views}) == 1, "and is written down once"


def test_what_is_asked_beside_is_asked_once_of_each_view(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.reader.FRESH", 60.0)
    fail(services, OPEN)
    source = Inside(services)
    fleet: Any = source.fleet()
    asked: list[Any] = []
    ask = fleet.histories
    monkeypatch.setattr(fleet, "histories", lambda *which: asked.append(which) or ask(*which))
    with contextlib.closing(Reader(source)) as reader:
        timelines = [reader.timeline() for _ in range(3)]
        histories = [reader.history(OPEN) for _ in range(3)]
        assert len(asked) == 2
        assert reader.history("nobody") == []
        assert timelines[0][0] == {"circuit": OPEN, **histories[2][0]}
        reader.refresh()
        assert reader.history(OPEN) == histories[0]
        assert len(asked) == 3


def test_transitions_that_a_reader_slept_through_are_told_later(services: Services) -> None:
    with contextlib.closing(Reader(Inside(services))) as reader:
        reader._closed = True  # No thread: the test looks.
        watcher = reader.watch()
        b"".join(watcher.taken())
        breaker = services.registry.breaker(OPEN)
        breaker.force_open(reason="one")
        breaker.release(reason="two")
        breaker.reset(reason="three")
        services.registry.breaker("new.http").call(int)
        services.registry.flush(10)
        reader._step()
        told = b"".join(watcher.taken()).decode()
        assert [told.count(f'"reason":"{n}"') for n in ("one", "two", "three")] == [1, 1, 1]
        assert told.index('"one"') < told.index('"two"') < told.index('"three"')
        assert '"circuit":"new.http"' in told
        reader._step()
        assert "transition" not in b"".join(watcher.taken()).decode()
        assert len([c for c in reader.live.timeline if c["circuit"] == OPEN]) == 4


def test_what_happened_while_nobody_watched_stands_in_the_timeline(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.reader.LINGER", 0.0)
    with contextlib.closing(Reader(Inside(services))) as reader:
        reader._closed = True  # No thread: the test looks.
        reader.leave(reader.watch())
        services.registry.breaker(OPEN).force_open(reason="unseen")
        reader._step()  # for somebody who does not watch
        watcher = reader.watch()
        reader._step()
        assert '"reason":"unseen"' in b"".join(watcher.taken()).decode()


def test_the_thread_ends_when_nobody_looks(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.reader.LINGER", 0.05)
    with contextlib.closing(Reader(Inside(services))) as reader:

        def threads() -> list[str]:
            return [t.name for t in threading.enumerate() if t.name == "circuit-breaker-reader"]

        before = len(threads())
        reader.view()
        watcher = reader.watch()
        assert len(threads()) == before + 1
        reader.leave(watcher)
        until(lambda: len(threads()) == before, "it ends")
        assert not reader.view().lost
        assert len(threads()) == before + 1


def test_who_comes_while_the_store_is_lost_does_not_wait_for_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.reader.PATIENCE", 1.0)
    source, goes_on = Inside(services), threading.Event()
    fleet: Any = source.fleet()

    def gone() -> None:
        raise StoreUnavailable("gone")

    with contextlib.closing(Reader(source)) as reader:
        monkeypatch.setattr(fleet, "snapshot", gone)
        assert reader.view().lost == "gone"
        monkeypatch.setattr(fleet, "snapshot", lambda: goes_on.wait(BOUND) and gone())
        reader.refresh()
        assert reader.view().lost == "gone", "and not that it waited in vain"
        goes_on.set()


def test_a_look_that_fails_is_tried_again(
    services: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("distributed_breaker.monitoring.reader.PATIENCE", 0.1)
    source = Inside(services)
    with contextlib.closing(Reader(source)) as reader:
        fleet: Any = source.fleet()
        look = fleet.snapshot
        monkeypatch.setattr(fleet, "snapshot", lambda: 1 / 0)
        assert "does not answer" in reader.view().lost
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.setattr(fleet, "snapshot", look)
        until(lambda: not reader.view().lost, "it looks again")


def test_without_threads_callers_look_themselves(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("distributed_breaker.monitoring.reader.start_thread", none)
    with contextlib.closing(Reader(Inside(services))) as reader:
        assert reader.view().fleet_health["overall_status"] == "healthy"
        assert len(list(reader.watch(short=True))) == 1, "all there is, at once"


FORKS = """
import json, os, sys
from distributed_breaker.monitoring.wsgi import wsgi_app
from distributed_breaker.services import initialize
from werkzeug.test import Client

services = initialize(sys.argv[1], environ={})
client = Client(wsgi_app(prefix="/p"))
services.registry.breaker("web_app.http").call(int)
services.registry.flush(10)
said = [client.get("/p/health").json["process"]["pid"] == os.getpid()]
if child := os.fork():
    _, code = os.waitpid(child, 0)
    print(said + [code, client.get("/p/health").json["store"]["reachable"]])
else:
    found = client.get("/p/health").json
    good = found["process"]["pid"] == os.getpid() and found["store"]["reachable"]
    os._exit(0 if good else 7)
"""


def test_after_a_fork_parent_and_child_look_for_themselves(services: Services) -> None:
    (file,) = services.status.files
    done = subprocess.run(
        [sys.executable, "-c", FORKS, file],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.stdout == "[True, 0, True]\n", done.stderr
