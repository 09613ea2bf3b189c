"""What the monitoring endpoints cost: an answer, a look at the store, and an open dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from urllib.error import HTTPError
from urllib.request import urlopen

from distributed_breaker import CircuitBreakerRegistry, Policy
from distributed_breaker.monitoring.endpoints import Endpoints, Request
from distributed_breaker.monitoring.reader import Reader
from distributed_breaker.monitoring.server import Server as Standing
from distributed_breaker.monitoring.source import Outside
from scripts.servers import Server

from .figures import Row, Spread, Topic
from .setting import Setting
from .timing import Case, measure

CIRCUITS = 1_000
DASHBOARDS = 100
METHOD = (
    f"A fleet with {CIRCUITS:,} circuits, each with a call, is looked at from outside. A kept "
    "answer is one within a second of the look before; the first one afterwards is the look at the "
    "store and the making of the document together. Over HTTP it is the stand-alone server on the "
    "loopback, with a new connection each time. The work of a tick is all that the reader does in "
    f"each second while dashboards are open, of which there are 1 or {DASHBOARDS}."
)


def run(setting: Setting) -> Topic:
    """Measure answers, looks and ticks."""
    count = setting.count(5, 30)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server.start(setting.server))
        _make_circuits(server.url)
        source = Outside(server.url, "bench")
        endpoints = Endpoints(source, token="")
        standing = stack.enter_context(Standing(endpoints, port=0))
        rows = []
        for path, target in (("/health", "≤ 5 ms"), ("/metrics", "≤ 30 ms")):
            kept = _kept(endpoints, path, count)
            sent = _times(partial(_get, standing.url + path[1:]), count)
            anew = _times(partial(_anew, endpoints, path), count)
            rows += [
                Row(f"`{path}`, kept", "ms", kept, target=target),
                Row(f"`{path}`, kept, over HTTP", "ms", sent, target=target),
                Row(f"`{path}`, the first after a look", "ms", anew),
            ]
        rows += [_tick(source, dashboards, count) for dashboards in (1, DASHBOARDS)]
    return Topic("monitoring", "The monitoring endpoints", METHOD, rows)


def _make_circuits(url: str) -> None:
    with CircuitBreakerRegistry.from_url(url, "bench") as registry:
        for n in range(CIRCUITS):
            registry.breaker(f"service_{n % 20}.http.part_{n}", Policy()).call(int)
        registry.flush(60.0)


def _kept(endpoints: Endpoints, path: str, count: int) -> Spread:
    endpoints.answer(Request("GET", path))
    endpoints.reader._pause = 3600.0
    case = Case("kept", f"answer(Request('GET', {path!r}))",
                {"answer": endpoints.answer, "Request": Request}, 100)  # fmt: skip
    samples = measure([case], count, asyncio.run)["kept"]
    return Spread.of(sample / 1e3 for sample in samples)


def _anew(endpoints: Endpoints, path: str) -> None:
    endpoints.reader._step()
    endpoints.reader._pause = 3600.0
    assert endpoints.answer(Request("GET", path)).status == 200


def _tick(source: Outside, dashboards: int, count: int) -> Row:
    reader = Reader(source)
    reader._closed = True  # No thread: the ticks are made here.
    watchers = [reader.live.join(False, 0.0) for _ in range(dashboards)]

    def tick() -> None:
        reader._step()
        for watcher in watchers:
            watcher.taken()

    tick()
    return Row(f"work of a tick, dashboards: {dashboards}", "ms", _times(tick, count))


def _times(work: Callable[[], object], count: int) -> Spread:
    def once() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    return Spread.of([once() for _ in range(count)])


def _get(url: str) -> bytes:
    try:
        with urlopen(url) as answer:
            body: bytes = answer.read()
            return body
    except HTTPError as error:
        return error.read()
