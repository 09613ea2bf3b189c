"""The stand-alone server: what it listens to, and what it does not let clients do to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.monitoring import live
from distributed_breaker.monitoring import server as standing_server
from distributed_breaker.monitoring.endpoints import Endpoints, dashboard
from distributed_breaker.monitoring.exposition import OPENMETRICS, TEXT
from distributed_breaker.monitoring.server import HEALTH, METRICS, Server
from distributed_breaker.monitoring.source import Inside, Outside
from distributed_breaker.services import Services
from scripts.servers import Server as Store
from tests.cli.conftest import Breakers, start
from tests.fleet.process import BOUND, until
from tests.monitoring.client import PREFIX, Site, first, valid
from tests.monitoring.conftest import OPEN
from tests.monitoring.exported import Exported

pytestmark = pytest.mark.servers("valkey")

Standing = Callable[..., Site]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def said(site: Site, sent: bytes) -> bytes:
    """What the server answers to bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", site.port), BOUND) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_a_prefix_and_none(standing: Standing) -> None:
    for prefix in ("/a/b", ""):
        site = standing(prefix=prefix)
        assert site.ask("GET", "/health").status == 200
        assert site.ask("GET", "/").status == 200
    assert Site(site.port, "/elsewhere").ask("GET", "/health").status == 404
    site = standing(prefix="/a/b")
    assert site.ask("GET", "").headers["location"] == "b/"
    assert Site(site.port, "").ask("GET", "/health").status == 404
    assert Site(site.port, "").ask("GET", "/a/bc").status == 404
    for wrong in ("a", "/a/"):
        with pytest.raises(ValueError, match="a prefix begins with a slash"):
            standing(prefix=wrong)


def test_ports_that_say_less(standing: Standing) -> None:
    health, metrics = standing(prefix="", only=HEALTH), standing(prefix="", only=METRICS)
    assert [health.ask("GET", path).status for path in ("/health", "/live", "/ready")] == [200] * 3
    assert metrics.ask("GET", "/metrics").status == 200
    for site, path in ((health, "/metrics"), (health, "/"), (metrics, "/health"), (metrics, "")):
        assert site.ask("GET", path).status == 404
    assert health.post("reset", circuit=OPEN).status == 404


@pytest.mark.parametrize(
    "sent",
    [
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"b" * 70_000 + b"\r\n\r\n",
    ],
    ids=["no path", "version", "tls", "long path", "many headers", "long header"],
)
def test_what_is_no_request(standing: Standing, sent: bytes) -> None:
    answer = said(standing(), sent)
    assert b" 200 " not in answer[:20]
    assert b"Traceback" not in answer
    assert b"Python" not in answer


def test_a_request_that_trickles(standing: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing_server, "ARRIVAL", 0.2)
    site = standing()
    for sent in (b"GET /", b"POST /circuit-breakers/reset HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        assert b" 200 " not in said(site, sent), "it is closed"
    with socket.create_connection(("127.0.0.1", site.port), BOUND) as connection:

        def cut_off() -> bool:
            try:
                connection.sendall(b"a")
            except OSError:
                return True
            return False

        until(cut_off, "it has the same time, however often a byte comes")
    assert site.ask("GET", "/health").status == 200


def test_a_client_that_takes_nothing(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is closed, and its thread is free again."""
    monkeypatch.setattr(standing_server, "SENDING", 0.1)
    with Server(Endpoints(Inside(services)), port=0) as server, socket.socket() as slow:
        watchers = server.endpoints.reader.live.watchers
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(f"GET {PREFIX}/events HTTP/1.1\r\n\r\n".encode())
        (watcher,) = until(lambda: set(watchers), "it watches")
        watcher.put(b":" * 10_000_000)  # more than the buffers on the way can hold
        until(lambda: not watchers, "its stream is closed")
        assert watcher.ended
        assert Site(server.port).ask("GET", "/health").status == 200


def test_no_more_connections_than_it_can_serve(
    standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing_server, "CONNECTIONS", 2)
    monkeypatch.setattr(live, "HEARTBEAT", 0.05)
    site = standing()
    with site.events() as one, site.events() as two:
        first(one, "fleet")
        first(two, "fleet")
        busy = said(site, b"")
        assert busy.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in busy
    until(lambda: said(site, f"GET {PREFIX}/live HTTP/1.1\r\n\r\n".encode()).count(b"alive"))


def test_it_says_little_of_itself(standing: Standing) -> None:
    assert standing().ask("GET", "/health").headers["server"] == "distributed_breaker"


def test_it_listens_only_where_it_is_told(services: Services) -> None:
    with Server(Endpoints(Inside(services)), port=0) as server:
        assert server.url == f"http://127.0.0.1:{server.port}{PREFIX}/"
        with pytest.raises(OSError, match="in use"):
            Server(Endpoints(Inside(services)), port=server.port)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), 1)


def test_the_page_and_its_files(
    standing: Standing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dashboard.cache_clear()
    (tmp_path / "dashboard").mkdir()
    for name, text in (("index.html", "<p>"), ("a.js", "1"), ("a.py", "secret"), ("b.css", "*")):
        (tmp_path / "dashboard" / name).write_text(text)
    monkeypatch.setattr("distributed_breaker.monitoring.endpoints.files", lambda _: tmp_path)
    site = standing()
    assert site.ask("GET", "/").body == b"<p>"
    found = site.ask("GET", "/assets/a.js")
    assert (found.body, found.headers["content-type"]) == (b"1", "text/javascript; charset=utf-8")
    assert site.ask("GET", "/assets/b.css").headers["content-type"] == "text/css; charset=utf-8"
    assert site.ask("GET", "/assets/a.py").status == 404
    dashboard.cache_clear()


def test_the_text_for_prometheus(standing: Standing) -> None:
    """Whoever names JSON first gets it, as those who name nothing."""
    site = standing()
    scrape = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5,*/*;q=0.1"
    for accept, kind in (
        (scrape, OPENMETRICS),
        ("text/plain", TEXT),
        ("application/json, text/plain, */*", "application/json"),
        ("text/html,*/*", "application/json"),
        ("*/*", "application/json"),
    ):
        said = site.ask("GET", "/metrics", {"Accept": accept})
        assert (said.status, said.headers["content-type"]) == (200, kind), accept
    said = site.ask("GET", "/metrics/prometheus")
    found = Exported.of(said.headers["content-type"], said.body)
    assert found["circuit_breaker_state", {"circuit": OPEN, "state": "closed"}] == 1
    assert found["circuit_breaker_store_reachable"] == 1


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def file(configure: Callable[..., Path], server: Store) -> Path:
    made: Path = configure(
        {"web_app": {"cache": {}}},
        redis_url=server.url,
        health_check_port=free_port(),
        metrics_port=free_port(),
    )
    return made


@pytest.fixture
def serving(file: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], list[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def serve(*words: str) -> tuple[subprocess.Popen[str], list[str]]:
        process = start("serve", "--config", str(file), "--port", "0", "--json", *words)
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        return process, json.loads(line)["urls"]

    yield serve
    for process in started:
        process.kill()
        process.communicate()


def at(url: str) -> Site:
    _, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return Site(int(host.rpartition(":")[2]), f"/{path}".rstrip("/"))


def test_the_command_serves_a_fleet(services: Services, serving: Any, file: Path) -> None:
    process, urls = serving("--ports-of-file", "--prefix", "/cb/")
    main, health, metrics = map(at, urls)
    found = valid(main.get("/health"), "health")
    assert set(found["circuit_breakers"]) >= {"web_app.cache", "api_v1.http"}
    assert found["process"]["pid"] == process.pid
    settings = json.loads(file.read_text())["settings"]
    assert (health.port, metrics.port) == (settings["health_check_port"], settings["metrics_port"])
    assert health.ask("GET", "/ready").status == 200
    assert valid(metrics.get("/metrics"), "metrics")["manager_info"]["services_configured"] == 1
    assert main.prefix == "/cb"
    with main.events() as events:
        assert first(events, "fleet")["namespace"] == settings["namespace"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == 0


def test_wrong_usage_of_the_command(
    breakers: Breakers,
    file: Path,
    server: Store,
) -> None:
    where = ("--url", server.url, "--namespace", "x")
    answer = breakers("serve", *where, "--ports-of-file")
    assert (answer.code, "--ports-of-file needs" in answer.err) == (64, True)
    answer = breakers("serve", *where, "--prefix", "a b")
    assert (answer.code, "begins with a slash" in answer.err) == (64, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        answer = breakers("serve", *where, "--port", port)
    assert (answer.code, f"127.0.0.1:{port}" in answer.err) == (1, True)


def test_a_fleet_without_a_file(server: Store) -> None:
    source = Outside(server.url, "x")
    assert source.configuration()["files"] == []
    assert (source.setting().namespace, source.setting().services) == ("x", 0)
    assert source.process({})["pid"] == os.getpid()
    source.close()
