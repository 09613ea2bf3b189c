"""A web server under test, asked over a unix socket; a command is told to one worker or to any."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.fleet.process import BOUND, until
from tests.processes.launch import Program


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: Path) -> None:
        super().__init__("localhost", timeout=BOUND)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._address))


class Site:
    """What answers at the socket of one program.

    Args:
        program: whose log tells what is wrong.
        address: of the socket.
    """

    def __init__(self, program: Program, address: Path) -> None:
        self.program = program
        self._address = address

    def ask(self, command: str, **options: Any) -> dict[str, Any]:
        """Have a command carried out by whichever worker gets it."""
        connection = _Connection(self._address)
        try:
            connection.request("GET", f"/{command}?{urlencode(options)}")
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        assert response.status == 200, (body, self.program.log())
        said: dict[str, Any] = json.loads(body)
        return said

    def tell(self, pid: int, command: str, **options: Any) -> dict[str, Any]:
        """Have it carried out by one worker.  Which one accepts a connection is chance."""

        def told() -> dict[str, Any] | None:
            said = self.ask(command, pid=pid, **options)
            return said if said["done"] else None

        return until(told, f"worker {pid} answers") or {}

    def workers(self, count: int, gone: set[int] = frozenset()) -> list[int]:  # type: ignore[assignment]
        """The process ids of this many workers, once they answer, without those that must go."""
        seen: set[int] = set()

        def all_seen() -> bool:
            try:
                seen.add(self.ask("look")["pid"])
            except (OSError, http.client.HTTPException):
                assert self.program.running, self.program.log()
            return len(seen - gone) >= count

        until(all_seen, f"{count} workers answer")
        return sorted(seen - gone)

    def begin(self, command: str, **options: Any) -> threading.Thread:
        """Ask in the background, for what takes long; ends with the answer."""
        thread = threading.Thread(target=self.ask, args=(command,), kwargs=options)
        thread.start()
        return thread
