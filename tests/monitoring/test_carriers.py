"""One table of requests, which Flask, Starlette, a WSGI server and our own answer alike."""

from __future__ import annotations

from typing import Any

import pytest

from tests.monitoring.client import Site, first, valid
from tests.monitoring.conftest import CLOSED, OPEN, TOKEN

READ = "GET, HEAD"
LARGE = b'{"circuit": "' + b"a" * 20_000 + b'"}'

# method, path, status, what the body is by the schema, and headers that must be there
GETS: list[tuple[str, str, int, str, dict[str, str]]] = [
    ("GET", "/", 200, "", {"content-type": "text/html; charset=utf-8"}),
    ("GET", "/health", 503, "health", {"content-type": "application/json"}),
    ("GET", "/live", 200, "", {}),
    ("GET", "/ready", 200, "ready", {}),
    ("GET", "/metrics", 200, "metrics", {"vary": "Accept"}),
    ("GET", f"/circuits/{OPEN}", 200, "circuit", {}),
    ("GET", "/circuits/web%5Fapp.cache", 200, "circuit", {}),
    ("GET", "/timeline", 200, "timeline", {}),
    ("GET", "/processes", 200, "processes", {}),
    ("GET", "/schema", 200, "", {"content-type": "application/json"}),
    ("HEAD", "/health", 503, "", {"content-type": "application/json"}),
    ("HEAD", "/metrics", 200, "", {}),
    ("HEAD", "/events", 200, "", {"content-type": "text/event-stream"}),
    ("HEAD", "/nowhere", 404, "", {}),
    ("GET", "/nowhere", 404, "error", {}),
    ("GET", "/circuits/nobody", 404, "error", {}),
    ("GET", "/circuits/%FF%00", 404, "error", {}),
    ("GET", "/assets/nothing.js", 404, "error", {}),
    ("GET", "/assets/../view.py", 404, "error", {}),
    ("GET", "/assets/%2e%2e/schema.json", 404, "error", {}),
    ("GET", "/reset", 405, "error", {"allow": "POST"}),
    ("PUT", "/force-open", 405, "error", {"allow": "POST"}),
    ("POST", "/health", 405, "error", {"allow": READ}),
    ("DELETE", f"/circuits/{OPEN}", 405, "error", {"allow": READ}),
    ("OPTIONS", "/metrics", 405, "error", {"allow": READ}),
    ("POST", "/reset", 401, "error", {"www-authenticate": "Bearer"}),
]


@pytest.mark.parametrize(("method", "path", "status", "kind", "headers"), GETS)
def test_requests(
    site: Site, method: str, path: str, status: int, kind: str, headers: dict[str, str]
) -> None:
    said = site.ask(method, path)
    assert said.status == status
    assert headers.items() <= said.headers.items()
    assert "script-src 'self'" in said.headers["content-security-policy"]
    assert said.headers["x-content-type-options"] == "nosniff"
    assert said.headers["referrer-policy"] == "no-referrer"
    assert said.headers["cache-control"] == "no-store"
    if kind:
        valid(said.json, kind)
    if method == "HEAD":
        assert said.body == b""
        whole = None if path == "/events" else site.ask("GET", path)
        if whole is not None and whole.headers["content-length"] != "0":
            assert "content-length" in said.headers


def test_the_prefix_alone_leads_to_the_page(site: Site) -> None:
    """Starlette does this by itself; the others say it relatively, which is right behind a proxy
    that takes away a part of the path."""
    said = site.ask("GET", "")
    assert said.status in (307, 308)
    whole = f"http://127.0.0.1:{site.port}/circuit-breakers/"
    assert said.headers["location"] in ("circuit-breakers/", whole)


# What is wrong with an order, and the word of the answer that says so
ORDERS: list[tuple[str, Any, int, str]] = [
    ("reset", b"{", 400, "JSON object"),
    ("reset", b"[]", 400, "JSON object"),
    ("reset", b"\xff\x00", 400, "JSON object"),
    ("reset", b"[" * 10_000, 400, "JSON object"),
    ("reset", None, 400, "JSON object"),
    ("reset", LARGE, 413, "larger than"),
    ("reset", {}, 400, "'circuit' or 'service'"),
    ("reset", {"circuit": OPEN, "service": "web_app"}, 400, "'circuit' or 'service'"),
    ("reset", {"circuit": 7}, 400, "'circuit' must be a text"),
    ("reset", {"circuit": OPEN, "ttl": 5}, 400, "'ttl' is not a key of reset"),
    ("reset", {"circuit": OPEN, "surprise": 5}, 400, "'surprise' is not a key"),
    ("reset", {"circuit": "nobody"}, 404, "no circuit 'nobody'"),
    ("reset", {"service": "web"}, 404, "no circuit belongs"),
    ("force-open", {"circuit": CLOSED}, 400, "needs a 'reason'"),
    ("force-open", {"circuit": CLOSED, "reason": " "}, 400, "needs a 'reason'"),
    ("force-open", {"circuit": CLOSED, "reason": "r", "ttl": 0}, 400, "'ttl' must be seconds"),
    ("force-open", {"circuit": CLOSED, "reason": "r", "ttl": True}, 400, "'ttl' must be seconds"),
    ("force-open", {"circuit": CLOSED, "reason": "r", "ttl": "5"}, 400, "'ttl' must be seconds"),
    (
        "force-open",
        b'{"circuit":"web_app.http","reason":"r","ttl":NaN}',
        400,
        "'ttl' must be seconds",
    ),
]


@pytest.mark.parametrize(("action", "body", "status", "word"), ORDERS)
def test_orders_that_are_wrong(site: Site, action: str, body: Any, status: int, word: str) -> None:
    said = site.ask("POST", f"/{action}", {"Authorization": f"Bearer {TOKEN}"}, body)
    assert (said.status, word in valid(said.json, "error")["error"]) == (status, True), said.body


def test_an_operator_steps_in(site: Site) -> None:
    said = site.post("force-open", TOKEN, circuit=CLOSED, reason="drill", actor="ann", ttl=60)
    assert said.status == 200
    (done,) = valid(said.json, "done")["done"]
    assert done == {
        "circuit": CLOSED, "before": "closed", "after": "forced_open", "changed": True,
        "error": None,
    }  # fmt: skip
    found = site.get(f"/circuits/{CLOSED}")
    assert found["health"]["state"] == "forced_open"
    assert found["history"][0]["detail"]["actor"] == "ann"
    assert found["history"][0]["detail"]["reason"] == "drill"
    said = site.post("reset", TOKEN, circuit=CLOSED)
    assert said.json["done"][0]["after"] == "closed"
    assert site.get("/timeline")["transitions"][0]["circuit"] == CLOSED
    assert site.get("/timeline")["transitions"][0]["cause"] == "reset"


def test_events_come(site: Site) -> None:
    with site.events() as events:
        kind, whole = next(events)
        assert kind == "fleet"
        valid(whole, "fleet_event")
        assert whole["admin"] is True
        assert {tile["name"]: tile["state"] for tile in whole["tiles"]} == {
            OPEN: "open", CLOSED: "closed", "api_v1.http": "closed",
        }  # fmt: skip
        assert whole["timeline"][-1]["cause"] == "created"
        site.post("force-closed", TOKEN, circuit=CLOSED, reason="drill")
        change = first(events, "transition", circuit=CLOSED)
        assert valid(change, "transition")["to"] == "forced_closed"
        changed = first(events, "tiles")
        assert valid(changed, "tiles_event")["gone"] == []
        assert {tile["name"]: tile["state"] for tile in changed["tiles"]}[CLOSED] == (
            "forced_closed"
        )
        site.post("reset", TOKEN, circuit=CLOSED)
        first(events, "transition", to="closed")
    with site.events() as events:
        again = first(events, "fleet")
        assert again["timeline"][0]["to"] == "closed"
