"""One real process of a test's fleet, as the test sees it, and where such processes come from.

``worker.py`` is the other side; its ``do_…`` methods are the commands.  Nothing here waits without
a bound, and nothing sleeps to wait: ``until`` looks again and again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

BOUND = 30.0  # s for anything that a healthy system does in a fraction of one
ROOT = Path(__file__).parents[2]

T = TypeVar("T")


class WorkerError(AssertionError):
    """A process has died, does not answer, or raised; its traceback is the message."""


def until(condition: Callable[[], T], what: str = "", bound: float = BOUND) -> T:
    """Wait until the condition is true, and return what it returned."""
    deadline = time.monotonic() + bound
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {bound} s in vain: {what or condition}")
        time.sleep(0.005)
    return value


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines that processes have written to a file; one that is being written waits."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Process:
    """One process of the fleet, as the test sees it."""

    def __init__(self, connection: socket.socket, nursery: Nursery) -> None:
        self._connection = connection
        self._connection.settimeout(BOUND)
        self._received = b""
        self._nursery = nursery
        hello = self._receive()
        self.ticket: str = hello["ticket"]
        self.pid: int = hello["pid"]

    def __repr__(self) -> str:
        return f"<process {self.pid}>"

    def do(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out and return its answer."""
        self.post(command, **arguments)
        return self.answer()

    def post(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting; ``answer`` must follow."""
        line = json.dumps({"command": command, **arguments}).encode() + b"\n"
        try:
            self._connection.sendall(line)
        except OSError as error:
            raise WorkerError(f"{self} is not there: {error}") from None

    def answer(self) -> Any:
        """The answer to the oldest command that was posted."""
        said = self._receive()
        if "error" in said:
            raise WorkerError(f"in {self}: {said['error']}")
        return said["answer"]

    def fork(self, count: int = 1, how: str = "os") -> list[Process]:
        """Fork; the children are processes of their own.  ``how``: ``os``, ``multiprocessing``."""
        tickets = [uuid.uuid4().hex for _ in range(count)]
        self.post("fork", tickets=tickets, how=how)
        children = self._nursery.arrivals(tickets)
        self.answer()
        return children

    def fail_until_refused(self, **more: Any) -> int:
        """Make calls that fail, until one is refused, and return how many were let in.

        Those that come while the link's thread takes in outcomes of the same circuit are left to
        it, so a few more than the threshold may be.
        """
        for admitted in range(200):
            if self.do("fail", **more)["rejected"]:
                return admitted
        raise AssertionError(f"{self} goes on calling")

    def exit(self, how: str = "normal") -> None:
        """End as a program ends, and return when it has: ``normal``, ``sys.exit``, ``error``."""
        self.post("exit", how=how)
        self.wait_gone()
        self._connection.close()

    def kill(self) -> None:
        """SIGKILL; returns when the process has gone."""
        self._signal(signal.SIGKILL)
        self.wait_gone()
        self._connection.close()

    def freeze(self) -> None:
        """SIGSTOP; returns when it has taken effect."""
        self._signal(signal.SIGSTOP)
        until(lambda: self._kernel_state() in "TtZX", f"{self} stops")

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def wait_gone(self) -> None:
        """Return when the process has ended."""
        until(lambda: self._kernel_state() in "ZX", f"{self} ends")

    def end(self) -> None:
        """For the end of a test, whatever has become of the process."""
        self._connection.close()
        self._signal(signal.SIGKILL)

    def _kernel_state(self) -> str:
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return "X"
        return stat.rpartition(")")[2].split()[0]

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            try:
                part = self._connection.recv(1 << 16)
            except OSError as error:
                raise WorkerError(f"{self} does not answer: {error}") from None
            if not part:
                raise WorkerError(f"{self} has gone")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said


class Nursery:
    """Where processes come from: forked from one that has imported everything and has no thread."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="dbk-")
        address = os.path.join(self._folder, "s")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._listener.settimeout(BOUND)
        command = [sys.executable, "-m", "tests.fleet.worker", address]
        self._started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
        (self._template,) = self.arrivals(["template"])

    def make(self, count: int) -> list[Process]:
        """Make processes; each is as fresh as one that has just been started."""
        return self._template.fork(count)

    def arrivals(self, tickets: Sequence[str]) -> list[Process]:
        """Wait for the processes that hold these tickets."""
        arrived: dict[str, Process] = {}
        while len(arrived) < len(tickets):
            process = Process(self._listener.accept()[0], self)
            assert process.ticket in tickets, "a stranger"
            arrived[process.ticket] = process
        return [arrived[ticket] for ticket in tickets]

    def close(self) -> None:
        self._template.end()
        self._started.wait()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
