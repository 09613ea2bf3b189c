"""Streams: what is told to whom, and when nobody is told any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distributed_breaker.monitoring import live, report, tiles
from distributed_breaker.monitoring.asgi import asgi_app
from distributed_breaker.monitoring.endpoints import Endpoints, Request
from distributed_breaker.monitoring.live import QUEUE, Live, Watcher
from distributed_breaker.monitoring.server import Server
from distributed_breaker.monitoring.source import Inside
from distributed_breaker.monitoring.view import View
from distributed_breaker.policy import State
from distributed_breaker.services import Services
from distributed_breaker.snapshot import Snapshot
from scripts.servers import Server as Store
from tests.fleet.process import until
from tests.monitoring.client import PREFIX, Site, first
from tests.monitoring.conftest import OPEN, fail, on_uvicorn

pytestmark = pytest.mark.servers("valkey")


@pytest.fixture
def endpoints(services: Services) -> Iterator[Endpoints]:
    with contextlib.closing(Endpoints(Inside(services), streams=3)) as made:
        yield made


def watch(endpoints: Endpoints, **how: Any) -> Watcher:
    stream = endpoints.answer(Request("GET", "/events", **how)).stream
    assert stream is not None
    return stream


def test_a_trip_is_told_with_its_evidence(
    services: Services, standing: Callable[..., Site]
) -> None:
    with standing().events() as events:
        assert first(events, "fleet")["overall_status"] == "healthy"
        fail(services, OPEN)
        change = first(events, "transition", circuit=OPEN)
        assert (change["from"], change["to"], change["cause"]) == ("closed", "open", "run")
        assert change["detail"]["error"] == "TimeoutError"
        told = first(events, "tiles", overall_status="unhealthy")
        (tile,) = [tile for tile in told["tiles"] if tile["name"] == OPEN]
        assert tile["state"] == "open"
        assert tile["next_attempt_time"] > tile["since"]


def test_a_hundred_dashboards_cost_the_store_one_connection(
    services: Services, server: Store, endpoints: Endpoints
) -> None:
    def connections() -> int:
        with contextlib.closing(server.client()) as client:
            return len(client.client_list())

    endpoints._streams = 100
    assert [len(w.taken()) for w in [watch(endpoints)]]
    until(lambda: endpoints.reader.live.known, "the first look is over")
    before = connections()
    watchers = [watch(endpoints) for _ in range(100)]
    fail(services, OPEN)
    told = [iter(watcher) for watcher in watchers]
    seen: list[bytes] = []
    for events in told:
        data = b""
        while b"event: transition" not in data:
            data += next(events)
        seen.append(data[data.index(b"event: transition") :].partition(b"\n\n")[0])
    assert len(set(seen)) == 1
    assert connections() == before
    for watcher in watchers:
        endpoints.leave(watcher)
    assert len(endpoints.reader.live.watchers) == 1


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_who_has_gone_is_forgotten(
    kind: str, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ASGI servers say so; elsewhere the heartbeat finds out."""
    monkeypatch.setattr(live, "HEARTBEAT", 0.05 if kind == "wsgi" else 60.0)
    with contextlib.ExitStack() as stack:
        if kind == "asgi":
            app = asgi_app(services, prefix=PREFIX)
            endpoints, site = app.endpoints, stack.enter_context(on_uvicorn(app))
        else:
            endpoints = Endpoints(Inside(services))
            site = Site(stack.enter_context(Server(endpoints, port=0)).port)
        with site.events() as events:
            first(events, "fleet")
            assert len(endpoints.reader.live.watchers) == 1
        until(lambda: not endpoints.reader.live.watchers, "it is forgotten")


def test_a_client_that_is_too_slow_is_cut_off() -> None:
    watcher = Watcher()
    for n in range(QUEUE - 1):
        watcher.put(b"%d" % n)
    assert not watcher.ended
    watcher.put(b"too much")
    assert watcher.ended
    assert list(watcher) == [], "nothing is kept for it"
    watcher.put(b"later")
    assert list(watcher) == []


def test_a_silent_line_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HEARTBEAT", 0.01)
    events = iter(Watcher())
    assert next(events) == b"retry: 2000\n\n"
    assert next(events) == b":\n\n"


def test_where_threads_are_few_streams_are_short(endpoints: Endpoints) -> None:
    """The browser comes again by itself."""
    assert b"event: fleet" in b"".join(watch(endpoints, lasting=False))
    for _ in range(3):
        watch(endpoints)
    assert b"event: fleet" in b"".join(watch(endpoints)), "one too many"


def test_streams_end_with_the_server(endpoints: Endpoints) -> None:
    watcher = watch(endpoints)
    events = iter(watcher)
    next(events)
    threading.Timer(0.01, endpoints.close).start()
    for _ in events:
        pass
    assert watcher.ended


# ---------------------------------------------------------------------------- what is told


def view(*names: str, at: float = 1.0, lost: str = "", **known: Any) -> View:
    held = {n: Snapshot(n, State.CLOSED, State.CLOSED, "shared", **known) for n in names}
    return View(at, held, {}, report.Setting(), {}, Inside(), lost)


def tell(live: Live, view: View, now: float, *changes: dict[str, Any]) -> None:
    live.tell(live.prepare(view, list(changes), now))


def kinds(watcher: Watcher) -> list[str]:
    words = b"".join(watcher.taken()).decode().splitlines()
    return [word.removeprefix("event: ") for word in words if word.startswith("event: ")]


def test_only_what_changes_is_told() -> None:
    made = Live()
    watcher = made.join(False, 0.0)
    assert kinds(watcher) == []
    tell(made, view("a", "b"), 0.0)
    assert kinds(watcher) == ["fleet"]
    tell(made, view("a", "b", at=2.0), 1.0)
    assert kinds(watcher) == [], "only the time has gone on"
    tell(made, view("a"), 2.0, {"circuit": "a"})
    assert kinds(watcher) == ["transition", "tiles"]
    tell(made, view(), 2.5)
    assert b'"tiles":[],"gone":["a"]' in b"".join(watcher.taken())
    tell(made, view("a", lost="gone"), 3.0)
    assert kinds(watcher) == ["tiles"]
    tell(made, view("a", lost="gone"), 60.0)
    assert kinds(watcher) == ["fleet"], "once a minute everything"
    tell(made, view("a"), 120.0, {"circuit": "a"})
    assert kinds(watcher) == ["transition", "tiles", "fleet"]


def test_a_cascade_cuts_nobody_off() -> None:
    made = Live()
    watcher = made.join(False, 0.0)
    tell(made, view("a"), 0.0)
    tell(made, view("a"), 1.0, *({"n": n} for n in reversed(range(2 * QUEUE))))
    assert not watcher.ended
    told = b"".join(watcher.taken()).decode()
    assert told.index('{"n":0}') < told.index('{"n":1}'), "in the order in which they happened"
    assert made.timeline[0] == {"n": 2 * QUEUE - 1}


def test_a_newcomer_is_told_at_once_what_is_known() -> None:
    made = Live()
    tell(made, view("a"), 5.0)
    assert kinds(made.join(False, 4.0)) == ["fleet"]
    assert kinds(made.join(False, 6.0)) == [], "it is too old"


def test_transitions_are_kept_and_bounded() -> None:
    made = Live()
    tell(made, view("a"), 0.0, {"n": 1}, {"n": 0})
    for n in range(2, live.SHOWN + 10):
        tell(made, view("a"), n / 10, {"n": n})
    assert len(made.timeline) == live.SHOWN
    assert [change["n"] for change in made.timeline[:3]] == [209, 208, 207]


def test_a_store_that_was_lost_at_first_is_no_cascade_of_news() -> None:
    made = Live()
    watcher = made.join(False, 0.0)
    tell(made, view("a", lost="gone"), 0.0)
    tell(made, view("a", lost="gone"), 1.0)
    assert kinds(watcher) == ["fleet"]
    tell(made, view("a"), 2.0, {"old": 1}, {"old": 0})
    assert kinds(watcher) == ["tiles", "fleet"]
    assert len(made.timeline) == 2


def test_what_was_not_told_is_forgotten() -> None:
    made = Live()
    tell(made, view("a"), 0.0, {"n": 0})
    made.forget()
    watcher = made.join(False, 0.0)
    assert kinds(watcher) == []
    tell(made, view("a"), 1.0, {"n": 1}, {"n": 0})
    assert kinds(watcher) == ["fleet"]
    assert made.timeline == [{"n": 1}, {"n": 0}]


# ---------------------------------------------------------------------------- traffic


def counts(total: int, failed: int = 0, rejected: int = 0) -> dict[str, Any]:
    return {
        "total_requests": total, "failed_requests": failed, "rejected_requests": rejected
    }  # fmt: skip


def test_rates_are_those_of_the_last_samples() -> None:
    made = tiles.Traffics()
    made.add(0.0, {"a": counts(100)})
    assert made.of("a").rate is None
    made.add(1.0, {"a": counts(110)})  # Too soon: nothing is sampled.
    assert made.of("a").rate is None
    made.add(2.0, {"a": counts(110, 4, 1)})
    assert (made.of("a").rate, made.of("a").rejected) == (5.0, 0.5)
    made.add(4.0, {"a": counts(140, 4, 1)})
    assert made.of("a").rate == 10.0
    assert made.of("a").calls == [5.0, 10.0]
    assert made.of("a").bad == [0.5, 0.125]
    made.add(40.0, {"a": counts(150)})
    assert made.of("a").calls == [], "after a gap it begins anew"


def test_a_circuit_that_nobody_calls_does_not_change() -> None:
    made = tiles.Traffics()
    for n in range(5):
        made.add(2.0 * n, {"a": counts(7)})
    assert (made.of("a").rate, made.of("a").calls) == (0.0, [])


def test_samples_are_bounded_and_counts_may_fall() -> None:
    made = tiles.Traffics()
    for n in range(100):
        made.add(2.0 * n, {"a": counts(4 * n)})
    assert len(made.of("a").calls) == len(made.of("a").bad) == tiles.SAMPLES
    made.add(200.0, {"a": counts(0)})  # The store was emptied.
    assert made.of("a").rate == 0.0
    for n in range(101, 200):
        made.add(2.0 * n, {"a": counts(0)})
    assert made.of("a").calls == [], "it was long ago"
