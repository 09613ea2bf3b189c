"""A slow way to a server: everything arrives, each direction some time later.

It stands between one process and its server, so that what is slow can get well again without a
word to either.  Bytes keep their order and nothing is read into them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable

CHUNK = 65_536


class Delay:
    """Listens on a unix socket (``url``) and passes on to the server at ``path``, also a socket.

    ``seconds`` is the delay of a round trip; it may be changed at any time.
    """

    def __init__(self, path: str, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._path = path
        self._folder = tempfile.mkdtemp(prefix="dbk-")
        address = os.path.join(self._folder, "s")
        self.url = f"unix://{address}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections, and accept no more."""
        for connection in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # It is closed.
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._open += [client, server]
                try:
                    server.connect(self._path)
                except OSError:
                    client.close()
                    continue
                self._carry(client, server)
                self._carry(server, client)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        """Read in one thread and write in another, or a delay would hold up what comes next."""
        waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def read() -> None:
            data = b"x"
            while data:
                try:
                    data = source.recv(CHUNK)
                except OSError:
                    data = b""
                waiting.put((time.monotonic() + self.seconds / 2, data))

        def write() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, data = waiting.get()
                    time.sleep(max(0.0, due - time.monotonic()))
                    if not data:
                        break
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)

        work: tuple[Callable[[], None], ...] = (read, write)
        for function in work:
            threading.Thread(target=function, daemon=True).start()
