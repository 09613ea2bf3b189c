"""The endpoints as a server of their own, out of the standard library: ``breakers serve``.

It is meant for a few people and their tools, and keeps itself from harm: so many connections and no
more, and only so much time for a request to arrive.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import threading
import time
from collections.abc import Collection
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from .endpoints import PREFIX, Endpoints
from .wsgi import Application

CONNECTIONS = 200  # that are served at once
ARRIVAL = 10.0  # s in which a whole request must be there
SENDING = 10.0  # s in which a client must take what is sent
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
HEALTH = frozenset({"health", "live", "ready"})
METRICS = frozenset({"metrics"})

log = logging.getLogger("distributed_breaker")


class Server:
    """Listens at one port, from a thread of its own.

    Args:
        endpoints: what answers; they are closed with it.
        host, port: where to listen; port 0 takes a free one.
        prefix: below which the paths are.
        only: the first parts of the paths that are answered; None: all.

    Raises:
        OSError: it can't listen there.
        ValueError: the prefix is none.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        prefix: str = PREFIX,
        only: Collection[str] | None = None,
    ) -> None:
        self.endpoints = endpoints
        app = Application(endpoints, prefix, only)
        self._server = _Listening((host, port), host)
        self._server.set_app(app)
        self.host, self.port = host, self._server.server_port
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}{prefix}/"
        self._thread = threading.Thread(target=self._serve, name="breakers-serve", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Answer nothing more, and end all streams."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self.endpoints.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listening(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], host: str) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        # Without looking up the host's name, which may take long.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            request.settimeout(0.1)
            with contextlib.suppress(OSError):
                request.sendall(BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away when they like; that is no news, and no traceback."""
        log.debug("a connection of the monitoring has ended", exc_info=True)


class _Connection(WSGIRequestHandler):
    server_version, sys_version = "distributed_breaker", ""
    protocol_version = "HTTP/1.0"  # One request for each connection.

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Arriving(self.connection))

    def handle(self) -> None:
        """One request."""
        self.raw_requestline = self.rfile.readline(65_537)
        if len(self.raw_requestline) > 65_536:
            self.requestline = self.request_version = self.command = ""
            self.send_error(414)
            return
        if not self.parse_request():
            return
        read: Any = self.rfile
        write: Any = self.wfile
        handler = _Answering(read, write, self.get_stderr(), self.get_environ())
        handler.request_handler = self  # type: ignore[attr-defined]
        handler.run(self.server.get_app())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("monitoring: " + format, *args)


class _Answering(ServerHandler):
    server_software = "distributed_breaker"
    wsgi_multiprocess = False

    def log_exception(self, exc_info: Any) -> None:
        log.debug("an answer of the monitoring was not taken", exc_info=exc_info)


class _Arriving(io.RawIOBase):
    """What a client sends, for as long as a request may take to arrive, however it trickles."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ends = time.monotonic() + ARRIVAL
        connection.settimeout(SENDING)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request has not arrived in time")
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(SENDING)
