"""A service with scripted misbehaviour: what it does is in the path of what it is asked."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Does = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: Service  # type: ignore[assignment]

    def do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.seen.append((self.command, self.path, dict(self.headers.items()), body))
            queue = self.server.scripts.get(path)
            does = (queue.pop(0) if len(queue) > 1 else queue[0]) if queue else answer(200)
        with contextlib.suppress(ConnectionError, TimeoutError):
            does(self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = do  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Service(ThreadingHTTPServer):
    """On a free port of this host; ``scripts[path]`` is what it does, the last one for ever."""

    daemon_threads = True

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            # The handshake is the handler's business, so that nobody waits for another's.
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
            self.scheme = "https"
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.scripts: dict[str, list[Does]] = {}
        self.lock = threading.Lock()
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> int:
        return sum(one[1].partition("?")[0] == path for one in self.seen)

    def handle_error(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def dripping() -> Iterator[int]:
    """The port of a listener that sends bytes of a record of TLS, which never becomes whole."""
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.sendall(b"\x16\x03\x03\x40\x00")
            while not ended.wait(0.02):
                connection.sendall(b"x")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)


def answer(status: int, body: object = None, **headers: str) -> Does:
    """A status, a body of JSON or bytes, and headers (``_`` for ``-``)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda h: h.reply(status, {"Content-Type": "application/json", **named}, data)


def drip(h: Handler) -> None:
    """Headers, and then a byte now and then, for ever."""
    h.send_response(200)
    h.send_header("Content-Length", "1000000")
    h.end_headers()
    while not h.server.ended.wait(0.02):
        h.wfile.write(b"x")


def drip_headers(h: Handler) -> None:
    """A header that never ends."""
    h.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not h.server.ended.wait(0.02):
        h.wfile.write(b"x")


def silent(h: Handler) -> None:
    """Nothing at all."""
    h.server.ended.wait(30)


def reset(h: Handler) -> None:
    """The connection is reset."""
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    h.connection.close()
    h.close_connection = True


def half(h: Handler) -> None:
    """Half of the body."""
    h.send_response(200)
    h.send_header("Content-Length", "100")
    h.end_headers()
    h.wfile.write(b"x" * 50)
    h.wfile.flush()
    h.connection.shutdown(socket.SHUT_RDWR)
    h.close_connection = True


def giant(h: Handler) -> None:
    """Chunks without an end."""
    h.send_response(200)
    h.send_header("Transfer-Encoding", "chunked")
    h.end_headers()
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    while not h.server.ended.is_set():
        h.wfile.write(piece)


def to(where: str) -> Does:
    """A redirect."""
    return answer(302, Location=where)
