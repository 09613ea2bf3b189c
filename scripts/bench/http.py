"""What the HTTP client costs: beside requests' and httpx's own, and while its circuit is open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import requests

from distributed_breaker.clients.http import HttpClient
from distributed_breaker.services import Services

from .figures import Row, Spread, Topic
from .setting import Setting
from .timing import Case, measure

ASKING, ANSWERING = 100, 1_000  # calls in a round, with and without the service
BODY = json.dumps({"label": "cat", "score": 0.98, "model": "v3"}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(BODY),
    BODY,
)
METHOD = (
    "One client, and a service in a process of its own that answers each request over TCP on the "
    "loopback with the same small JSON. What a `get` adds is its time less that of "
    "`requests.Session.get` or `httpx.AsyncClient.get` with the same timeouts and a pool of "
    "connections, round by round. An open circuit answers from this process's memory."
)


def run(setting: Setting) -> Topic:
    """Measure all of it, with a service of its own."""
    count = setting.count(5, 60)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(_service())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        client = _client(url, folder)
        stack.callback(client.close)
        session = stack.enter_context(requests.Session())
        runner = stack.enter_context(asyncio.Runner())
        bare = httpx.AsyncClient(timeout=httpx.Timeout(10.0, connect=3.0))
        cases = [
            Case("requests", f"get('{url}/k', timeout=(3.0, 10.0)).content", {"get": session.get},
                 ASKING),
            Case("get", "get('/k').content", {"get": client.get}, ASKING),
            Case("httpx", f"(await get('{url}/k')).content", {"get": bare.get}, ASKING),
            Case("get_async", "(await get('/k')).content", {"get": client.get_async}, ASKING),
        ]  # fmt: skip
        samples = measure(cases, count, runner.run)
        runner.run(client.aclose())
        runner.run(bare.aclose())
        rows = []
        for name, library, words in (
            ("get", "requests", "`requests.Session.get`"),
            ("get_async", "httpx", "`httpx.AsyncClient.get`"),
        ):
            base, own = samples[library], samples[name]
            added = Spread.of(t - b for t, b in zip(own, base, strict=True))
            bare_spread = Spread.of(base)
            share = {"share of a bare one": f"{added.median / bare_spread.median:.1%}"}
            rows += [
                Row(f"a bare {words}", "µs", bare_spread),
                Row(f"`{name}` adds to it", "µs", added, target="≤ 15", extra=share),
            ]
        client.breaker.force_open(ttl=600)
        assert client.get("/k").stale  # type: ignore[attr-defined]
        opened = [Case("open", "get('/k')", {"get": client.get}, ANSWERING)]
        spread = Spread.of(measure(opened, count, runner.run)["open"])
        rows.append(Row("a stored answer, circuit open", "µs", spread, target="≤ 20"))
    return Topic("http", "The HTTP client", METHOD, rows)


def _client(url: str, folder: Path) -> HttpClient:
    file = folder / "breakers.json"
    content = {
        "settings": {"redis_url": "memory://"},
        "services": {"api": {"http": {"base_url": url}}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    client = Services(file, environ={}).client("http", "api")
    assert isinstance(client, HttpClient)
    return client


@contextlib.contextmanager
def _service() -> Iterator[str]:
    """The URL of a service that ends with this process."""
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        child.stdin.close()


def _serve() -> None:
    """Answer until there is no parent any more."""

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(OSError):
            asked = b""
            while piece := connection.recv(65_536):
                asked += piece
                while b"\r\n\r\n" in asked:
                    asked = asked.partition(b"\r\n\r\n")[2]
                    connection.sendall(ANSWER)

    def accept() -> None:
        while True:
            threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
