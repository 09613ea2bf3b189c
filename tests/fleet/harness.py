"""A fleet of real processes that share circuits, commanded over sockets.

    fleet.start(8, policy={"failure_threshold": 5})
    fleet[0].do("fail", count=2)
    fleet.until_all("open")

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import redis

from distributed_breaker import model
from distributed_breaker.store import key_of
from scripts.servers import Server

BOUND = 30.0  # s for anything that a healthy system does in a fraction of one
ROOT = Path(__file__).parents[2]
CIRCUIT = "payments"

# Only the run trips, nothing is left to chance, and nothing ends by itself while a test looks.
POLICY: dict[str, Any] = {
    "failure_threshold": 5,
    "failure_rate": None,
    "open_interval": 60.0,
    "jitter": 0.0,
    "success_threshold": 3,
    "quorum": 2,
}

# Where no fault of the store is what a test is about, a busy machine must not look like one.
PATIENT = {"READ_TIMEOUT": 10.0, "CONNECT_TIMEOUT": 10.0, "FIRST_ANSWER": 10.0}

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


class Fleet:
    """The processes of one test, which share one server and namespace.

    Args:
        nursery: makes the processes.
        url: the store.
        namespace: of this test alone.
        folder: of this test alone.
    """

    def __init__(self, nursery: Nursery, url: str, namespace: str, folder: Path) -> None:
        self._nursery = nursery
        self.url = url
        self.namespace = namespace
        self._noted = folder / "calls"
        self.processes: list[Process] = []
        self.adjust: dict[str, float] = {}

    def __getitem__(self, index: int) -> Process:
        return self.processes[index]

    def __iter__(self) -> Iterator[Process]:
        return iter(self.processes)

    def start(
        self,
        count: int,
        policy: dict[str, Any] | None = None,
        *,
        circuit: str = CIRCUIT,
        url: str = "",
        blank: bool = False,
        synced: bool = True,
        **adjust: float,
    ) -> list[Process]:
        """Start processes, each with a registry and a breaker.

        Args:
            count: how many.
            policy: what is different from ``POLICY``; None: no policy is given at all.
            circuit: the breaker's name.
            url: for processes that reach the store by another way than the others.
            blank: without a registry; ``open`` makes it later.
            synced: return only when each has heard from the store.
            adjust: other values for the library's constants, beside those in ``self.adjust``.
        """
        made = self._nursery.make(count)
        self.processes += made
        self.do("adjust", made, **{**self.adjust, **adjust})
        if not blank:
            self.open(made, policy, circuit=circuit, url=url)
            if synced:
                until(lambda: all(p.do("look")["shared"] for p in made), "all have heard the store")
        return made

    def open(
        self,
        processes: Iterable[Process],
        policy: dict[str, Any] | None = None,
        *,
        circuit: str = CIRCUIT,
        url: str = "",
        first: str = "",
        **arguments: Any,
    ) -> list[Any]:
        """Make the registry and the first breaker of blank processes.

        ``first`` is a command that each process carries out right afterwards, before it can have
        heard from the store; its answers are returned.
        """
        given = None if policy is None else POLICY | policy
        chosen = list(processes)
        for process in chosen:
            process.post("open", url=url or self.url, namespace=self.namespace, circuit=circuit,
                         policy=given, calls=str(self._noted))  # fmt: skip
            if first:
                process.post(first, **arguments)
        for process in chosen:
            process.answer()
        return [process.answer() for process in chosen] if first else []

    def do(
        self, command: str, processes: Iterable[Process] | None = None, **arguments: Any
    ) -> list[Any]:
        """Have all processes carry out a command at the same time."""
        chosen = self.processes if processes is None else list(processes)
        for process in chosen:
            process.post(command, **arguments)
        return [process.answer() for process in chosen]

    def end(self) -> None:
        for process in self.processes:
            process.end()

    # ------------------------------------------------------------------ looking

    def calls(self, event: str = "", **wanted: Any) -> list[dict[str, Any]]:
        """What protected calls have noted, in this order: ``enter``, ``leave``, …"""
        if not self._noted.exists():
            return []
        lines = map(json.loads, self._noted.read_text().splitlines())
        return [
            line
            for line in lines
            if (not event or line["event"] == event)
            and all(line.get(name) == value for name, value in wanted.items())
        ]

    def states(self, processes: Iterable[Process] | None = None) -> list[str]:
        """What each process does now."""
        return [look["state"] for look in self.do("look", processes)]

    def until_all(self, state: str, processes: Iterable[Process] | None = None) -> None:
        """Wait until all processes are in this state, by the fleet's word."""
        chosen = self.processes if processes is None else list(processes)

        def agreed() -> bool:
            looks = self.do("look", chosen)
            return all((look["state"], look["shared"]) == (state, state) for look in looks)

        until(agreed, f"all processes are {state}")

    def until_agreed(self, client: redis.Redis, circuit: str = CIRCUIT) -> None:
        """L4: wait until all mirrors hold the store's generation, and nobody is degraded."""

        def agreed() -> bool:
            stored = self.found(client, circuit)
            if stored is None:
                return False
            looks = self.do("look", circuit=circuit)
            truth = [stored.v, stored.nonce]
            return all(look["generation"] == truth and not look["degraded"] for look in looks)

        until(agreed, "all mirrors agree with the store")

    def found(self, client: redis.Redis, circuit: str = CIRCUIT) -> model.Circuit | None:
        """The circuit as the store holds it, None when it has none."""
        fields: Any = client.hgetall(key_of(self.namespace, circuit))
        return model.load(fields)

    def stored(self, client: redis.Redis, circuit: str = CIRCUIT) -> model.Circuit:
        """The circuit as the store holds it."""
        found = self.found(client, circuit)
        assert found is not None, "the store does not hold the circuit"
        return found

    def totals(self, client: redis.Redis, circuit: str = CIRCUIT) -> dict[str, int]:
        """The totals as the store holds them."""
        stored = self.stored(client, circuit)
        return dict(zip(model.TOTALS, stored.totals, strict=True))

    def log(self, client: redis.Redis, circuit: str = CIRCUIT) -> list[dict[str, str]]:
        """The transitions that the store has logged, oldest first."""
        entries: Any = client.xrange(key_of(self.namespace, circuit) + ":log")
        return [fields for _, fields in entries]

    def trip(self, client: redis.Redis, circuit: str = CIRCUIT) -> None:
        """Let the first two processes see enough failures, and wait until all know it."""
        policy = self.stored(client, circuit).policy
        assert policy is not None
        self.do("fail", self.processes[:2], count=policy.failure_threshold, circuit=circuit)
        self.until_all("open")


def most_at_once(calls: Iterable[dict[str, Any]]) -> int:
    """How many calls were under way at the same time at most.

    A call is noted after it was let in and before its end is told, so this is never too much.
    """
    present = most = 0
    for call in sorted(calls, key=lambda call: call["at"]):
        if call["event"] == "enter":
            present += 1
            most = max(most, present)
        elif call["event"] == "leave":
            present -= 1
    return most


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[redis.Redis]:
    """A client for looking at the store from outside."""
    with contextlib.closing(server.client(decode_responses=True)) as client:
        yield client
