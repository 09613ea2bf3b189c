"""A flaky HTTP service: ``GET /pay`` does as the mode says, ``POST /mode/NAME`` changes that.

Run as ``python -m scripts.demo.upstream``.  Prints its port, and ends when its input does.
``GET /counts`` tells how many calls arrived in which mode, apart from probes, which say so in a
header.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODES = {"ok": (200, 0.004), "broken": (500, 0.004), "slow": (200, 1.5)}  # status, seconds
PROBE_HEADER = "X-Probe"


class Upstream(ThreadingHTTPServer):
    """The service and what it has counted."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._lock = threading.Lock()
        self._mode = "ok"
        self._arrived: Counter[str] = Counter()
        self._probing = 0
        self._most_probing = 0

    def switch(self, mode: str) -> None:
        """Change the mode, for calls that arrive from now on."""
        with self._lock:
            self._mode = mode
            self._most_probing = self._probing

    def arrive(self, probe: bool) -> tuple[int, float]:
        """Count a call; returns the status that it gets, and after how many seconds."""
        with self._lock:
            self._arrived[f"{self._mode} {'probe' if probe else 'call'}"] += 1
            self._probing += probe
            self._most_probing = max(self._most_probing, self._probing)
            return MODES[self._mode]

    def leave(self, probe: bool) -> None:
        """A call is about to be answered."""
        with self._lock:
            self._probing -= probe

    def counts(self) -> dict[str, object]:
        """Calls by mode and kind, and the most probes at a time since the mode changed."""
        with self._lock:
            return {
                "mode": self._mode,
                "arrived": dict(self._arrived),
                "most_probing": self._most_probing,
            }


class Handler(BaseHTTPRequestHandler):
    """One connection, kept alive."""

    server: Upstream
    protocol_version = "HTTP/1.1"
    # Header and body leave in one packet.  In two, the second would wait for the first one's
    # acknowledgement, which the client delays by 40 ms.
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/counts":
            self._answer(200, self.server.counts())
        elif self.path == "/pay":
            self._pay()
        else:
            self._answer(404, {"error": "there are /pay, /counts and POST /mode/NAME"})

    def do_POST(self) -> None:
        mode = self.path.removeprefix("/mode/")
        if mode in MODES:
            self.server.switch(mode)
            self._answer(200, self.server.counts())
        else:
            self._answer(404, {"error": f"the modes are {', '.join(MODES)}"})

    def _pay(self) -> None:
        probe = PROBE_HEADER in self.headers
        status, seconds = self.server.arrive(probe)
        try:
            time.sleep(seconds)
        finally:
            # Before the answer leaves: whoever gets it may send the next probe at once.
            self.server.leave(probe)
        self._answer(status, {"paid": status == 200})

    def _answer(self, status: int, body: dict[str, object]) -> None:
        content = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads a log here."""


def main() -> None:
    """Serve until the parent hangs up, or is gone."""
    with Upstream() as upstream:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        print(json.dumps({"port": upstream.server_port}), flush=True)
        while os.read(0, 1024):
            pass
        upstream.shutdown()


if __name__ == "__main__":
    main()
