"""Made-up fleets: more circuits, and worse news, than real ones give within a test.

This serves what the monitoring endpoints serve, by a server of the standard library, from memory.
"""

from __future__ import annotations

import contextlib
import json
import mimetypes
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[2] / "distributed_breaker" / "monitoring" / "dashboard"
PREFIX = "/behind/a/proxy/circuit-breakers"
TOKEN = "correct horse"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ERROR = {"error": "OperationalError", "message": "could not connect to server", "host": "web-3"}
Tile = dict[str, Any]


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def tile(name: str, state: str = "closed", **other: Any) -> Tile:
    """A tile that is plausible for its state; the same one for the same name."""
    dice = random.Random(name)
    now = time.time()
    calm = state in ("closed", "disabled", "forced_closed")
    pace = dice.choice([0.2, 4, 30, 180, 1500])
    calls = [max(0.0, pace * dice.gauss(1, 0.2)) for _ in range(60)]
    bad = [(dice.random() < 0.06) * 0.03 if calm or i < 48 else 0.9 for i in range(60)]
    p50 = dice.choice([0.0008, 0.004, 0.012, 0.08, 0.4])
    values = {
        "name": name,
        "service": name.partition(".")[0],
        "kind": name.split(".")[1] if "." in name else "",
        "status": "healthy" if calm else "unhealthy",
        "state": state,
        "shared_state": state,
        "source": "override" if state.startswith("forced") else "shared",
        "since": iso(now - (dice.uniform(3600, 400_000) if calm else dice.uniform(3, 50))),
        "next_attempt_time": iso(now + dice.uniform(20, 100)) if state == "open" else None,
        "ends_at": None,
        "cause": {"open": "run", "half_open": "due", "closed": "recovered"}.get(state, state),
        "failure_rate": 0.004 if calm else 0.62,
        "calls": 240,
        "slow": 3,
        "rate": calls[-1],
        "rejected_rate": 0 if calm else calls[-1],
        "p50": p50,
        "p95": p50 * 3.1,
        "p99": p50 * 7.7,
        "fallback_requests": 0 if calm else 312,
        "total_requests": 120_000,
        "rejected_requests": 0 if calm else 480,
        "trips": 1,
        "probes": {"out": int(state == "half_open"), "successes": 1, "needed": 3},
        "reporters": 4,
        "suspects": [],
        "policy_mismatch": False,
        "enabled": state != "disabled",
        "spark": calls,
        "spark_bad": bad,
    }
    return {**values, **other}


def transition(circuit: str, old: str, new: str, cause: str, at: float, **other: Any) -> Tile:
    values = {
        "circuit": circuit,
        "time": iso(at),
        "from": old,
        "to": new,
        "cause": cause,
        "generation": int(at * 1000),
        "window": {"calls": 42, "failures": 26, "slow": 3, "failure_rate": 26 / 42},
        "run": 5,
        "reporters": 3,
        "detail": {**ERROR, "reporter": "a3f09c"} if new == "open" else {},
    }
    return {**values, **other}


class MadeUp:
    """A fleet in memory and its server; ``change`` and ``transit`` are seen by every open page."""

    def __init__(self) -> None:
        self.tiles: dict[str, Tile] = {}
        self.timeline: list[Tile] = []
        self.processes: list[Tile] = []
        self.store: dict[str, Any] = {"reachable": True, "problem": None}
        self.admin = True
        self.short = False  # each stream ends after its first event
        self.answer: tuple[int, dict[str, Any], dict[str, str]] | None = None  # to the next POST
        self.posts: list[tuple[str, dict[str, Any], str]] = []
        self.paths: list[str] = []
        self._listeners: list[queue.SimpleQueue[bytes | None]] = []
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    # -------------------------------------------------------------- the fleet

    def overall(self) -> str:
        states = {tile["state"] for tile in self.tiles.values() if tile["enabled"]}
        if states & {"open", "forced_open"}:
            return "unhealthy"
        return "degraded" if states - {"closed"} or not self.store["reachable"] else "healthy"

    def whole(self) -> dict[str, Any]:
        return {
            **self._head(),
            "admin": self.admin,
            "environment": "production",
            "namespace": "nightscan",
            "tiles": list(self.tiles.values()),
            "timeline": self.timeline[:200],
        }

    def _head(self) -> dict[str, Any]:
        return {"at": iso(time.time()), "store": self.store, "overall_status": self.overall()}

    def change(self, *tiles: Tile, gone: tuple[str, ...] = ()) -> None:
        self.tiles.update({tile["name"]: tile for tile in tiles})
        for name in gone:
            del self.tiles[name]
        self.say("tiles", {**self._head(), "tiles": tiles, "gone": gone})

    def transit(self, circuit: str, new: str, cause: str, **other: Any) -> None:
        old = self.tiles[circuit]["state"]
        entry = transition(circuit, old, new, cause, time.time(), **other)
        self.timeline.insert(0, entry)
        self.say("transition", entry)
        self.change(tile(circuit, new, cause=cause, since=entry["time"]))

    def say(self, event: str, data: Any) -> None:
        message = f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
        for listener in list(self._listeners):
            listener.put(message)

    def circuit(self, name: str) -> dict[str, Any] | None:
        if name not in self.tiles:
            return None
        shown = self.tiles[name]
        history = [entry for entry in self.timeline if entry["circuit"] == name]
        last = next((entry for entry in history if entry["to"] == "open"), None)
        health = {
            **shown,
            "configured": True,
            "called": True,
            "attempt": 1,
            "detail": history[0]["detail"] if history else {},
            "window": {"calls": 42, "failures": 26, "slow": 3, "failure_rate": 26 / 42},
            "run": 0 if shown["state"] == "closed" else 5,
            "reporters": [
                {"id": f"a3f09c{i}", "bad": i, "run": i, "last": shown["since"]} for i in range(3)
            ],
            "last_trip": last,
            "mirror_age": 0.4,
        }
        counts = "total successful failed ignored rejected slow late dropped fallback".split()
        metrics = {f"{count}_requests": 100 * i for i, count in enumerate(counts)}
        metrics |= {"probes": 4, "trips": 2, "failure_rate": 0.12, "average_response_time": 0.02}
        metrics |= {f"{q}_response_time": shown[q] for q in ("p50", "p95", "p99")}
        metrics |= {"last_failure_time": shown["since"], "last_success_time": shown["since"]}
        policy = {"failure_threshold": 5, "failure_rate": 0.5, "window": 60.0, "quorum": 2}
        policy |= {"open_interval": 60.0, "success_threshold": 3, "permit_lease": 30.0}
        return {
            "name": name,
            "health": health,
            "metrics": metrics,
            "policy": policy,
            "history": history[:50],
        }

    # -------------------------------------------------------------- the server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}{PREFIX}/"

    def start(self) -> None:
        """Serve, on the same port as before if there was one."""
        fleet = self

        class Handler(_Handler):
            made_up = fleet

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End the server and every stream."""
        server, self._server = self._server, None
        if server is None:
            return
        for listener in list(self._listeners):
            listener.put(None)
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    made_up: MadeUp

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.made_up.paths.append(self.path)
        if not path.startswith(PREFIX + "/"):
            return self._json(404, {"error": "nothing here"})
        place = path.removeprefix(PREFIX + "/")
        if place == "":
            return self._file("index.html")
        if place.startswith("assets/"):
            return self._file(place.removeprefix("assets/"))
        if place == "events":
            return self._events()
        if place == "processes":
            return self._json(200, {"processes": self.made_up.processes})
        if place.startswith("circuits/"):
            name = urllib.parse.unquote(place.removeprefix("circuits/"))
            found = self.made_up.circuit(name)
            return self._json(200 if found else 404, found or {"error": f"no circuit {name}"})
        return self._json(404, {"error": "nothing here"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        verb = self.path.rpartition("/")[2]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.made_up.posts.append((verb, body, token))
        if self.made_up.answer:
            status, document, headers = self.made_up.answer
            return self._json(status, document, headers)
        if token != TOKEN:
            return self._json(401, {"error": "wrong token"})
        state = {"force-open": "forced_open", "force-closed": "forced_closed"}.get(verb, "closed")
        circuit = body["circuit"]
        before = self.made_up.tiles[circuit]["state"]
        cause = state if state.startswith("forced") else "reset"
        detail = {"actor": body["actor"], "reason": body["reason"]}
        self.made_up.transit(circuit, state, cause, detail=detail)
        done = {"circuit": circuit, "before": before, "after": state, "changed": True}
        return self._json(200, {"done": [{**done, "error": None}]})

    def _file(self, name: str) -> None:
        content = (PAGES / name).read_bytes()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._send(200, content, {"Content-Type": kind, "Content-Security-Policy": CSP})

    def _json(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(document).encode()
        self._send(status, content, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _events(self) -> None:
        listener: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        listeners = self.made_up._listeners
        listeners.append(listener)
        try:
            self.wfile.write(f"event: fleet\ndata: {json.dumps(self.made_up.whole())}\n\n".encode())
            while not self.made_up.short and (message := listener.get()) is not None:
                self.wfile.write(message)
        except OSError:
            pass  # The page has gone.
        finally:
            listeners.remove(listener)


@contextlib.contextmanager
def serving(*tiles: Tile) -> Iterator[MadeUp]:
    """A fleet with these circuits, served until the block ends."""
    fleet = MadeUp()
    fleet.tiles = {tile["name"]: tile for tile in tiles}
    fleet.start()
    try:
        yield fleet
    finally:
        fleet.stop()
