"""A stub that speaks just enough of the protocol to play a server, and a store on it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from distributed_breaker import Policy
from distributed_breaker.errors import StoreDown, StoreError
from distributed_breaker.model import Reply, Step
from distributed_breaker.store import RedisStore

HEADER = "1 1764000012000 1a2b3c4d open 1764000012000 60613 0 0 - 2 run"
ANSWER = (HEADER, "1764000012345", "60268", "closed", "run", "ok", "0", "", "")
REPLY = Reply(HEADER, 1764000012345, 60268, "closed", "run", "ok", 0, "", "")
OK = b"+OK\r\n"
NUMBERS = Policy().numbers


def array(*texts: str) -> bytes:
    return b"*%d\r\n" % len(texts) + b"".join(map(bulk, texts))


def bulk(text: str) -> bytes:
    data = text.encode()
    return b"$%d\r\n%s\r\n" % (len(data), data)


def packed(value: object) -> bytes:
    """Lists, numbers and texts."""
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(packed, value))
    return b":%d\r\n" % value if isinstance(value, int) else bulk(str(value))


def error(text: str) -> bytes:
    return f"-{text}\r\n".encode()


def hello(version: str, server: str = "redis") -> bytes:
    return array("server", server, "version", version, "proto", "2", "mode", "standalone")


Answer = Callable[[list[str]], bytes | None]


class Stub:
    """Answers each command with what ``answer`` makes of it: None is silence, empty hangs up."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.answers: dict[str, bytes | Answer | None] = {"HELLO": hello("7.4.2"), "SELECT": OK}
        self.greeting = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def seen(self, *names: str) -> list[str]:
        """The names of the commands that came, or those among them that are asked for."""
        return [c[0] for c in self.commands if not names or c[0] in names]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            connection.sendall(self.greeting)
            stream = connection.makefile("rb")
            while line := stream.readline():
                command = []
                for _ in range(int(line[1:])):
                    size = int(stream.readline()[1:])
                    command.append(stream.read(size + 2)[:-2].decode())
                self.commands.append(command)
                answer = self.answers.get(command[0], error("ERR unknown command"))
                said = answer(command) if callable(answer) else answer
                if said == b"":
                    return
                if said is not None:
                    connection.sendall(said)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)


def sync(nonce: str = "00000001", **more: Any) -> Step:
    return Step("report", nonce, NUMBERS, reporter="me", **more)


def run_one(store: RedisStore) -> Reply | StoreError:
    (reply,) = store.run([("b", sync())])
    return reply


def down(function: Callable[[], object]) -> StoreDown:
    with pytest.raises(StoreDown) as caught:
        function()
    return caught.value
