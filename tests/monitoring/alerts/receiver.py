"""A real receiver of webhooks, which a test lets fail, hang, die and come back."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """Keeps what is posted to it.

    Attributes:
        got: the bodies that were taken, in their order.
        headers: of each.
        status: how it answers; None: not before ``hanging`` is set.
        asked: how often it was.
    """

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status: int | None = 200
        self.hanging = threading.Event()
        self.asked = 0
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/hook/secret-path?key=secret-key"

    def start(self) -> None:
        """Listen; again at the same port."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.asked += 1
                status = receiver.status
                if status is None:
                    receiver.hanging.wait(30)
                    return
                if status < 300:
                    receiver.got.append(body)
                    receiver.headers.append({**dict(self.headers), "path": self.path})
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        serve = lambda server: server.serve_forever(poll_interval=0.01)  # noqa: E731
        threading.Thread(target=serve, args=(self._server,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self.hanging.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def of(self, kind: str, event: str = "firing") -> list[dict[str, Any]]:
        """The alerts of one kind that were taken."""
        return [got for got in list(self.got) if (got["kind"], got["event"]) == (kind, event)]
