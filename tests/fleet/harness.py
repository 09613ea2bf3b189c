"""A fleet of real processes that share circuits, commanded over sockets.

    fleet.start(8, policy={"failure_threshold": 5})
    fleet[0].do("fail", count=2)
    fleet.until_all("open")

The processes are those of ``process.py``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import redis

from distributed_breaker import model
from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.fleet.process import BOUND, Nursery, Process, WorkerError, until, whole_lines

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
                # A push alone does not do: the first call would still wait for the first answer.
                until(lambda: all(p.do("look")["synced"] for p in made), "all have heard the store")
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
        answers: list[Any] = []
        problems: list[WorkerError] = []
        for process in chosen:  # Each answer is fetched, whatever another process has to say.
            try:
                answers.append(process.answer())
            except WorkerError as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return answers

    def end(self) -> None:
        for process in self.processes:
            process.end()

    # ------------------------------------------------------------------ looking

    def calls(self, event: str = "", **wanted: Any) -> list[dict[str, Any]]:
        """What protected calls have noted, in this order: ``enter``, ``leave``, …"""
        return [
            line
            for line in whole_lines(self._noted)
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
            try:
                stored = self.found(client, circuit)
            except redis.RedisError:  # It may only just be coming back.
                return False
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

    def audit(
        self,
        client: redis.Redis,
        circuit: str = CIRCUIT,
        *,
        kept: bool = True,
        errors: tuple[str, ...] = (),
    ) -> dict[str, int]:
        """What must hold of all processes after any fault, when it is over.

        C4: each outcome of each call that was let through is acknowledged, or counted as dropped.
        S10: the store has counted what was acknowledged, and nothing twice.  C5: no traceback was
        logged, and no error but those that begin with one of ``errors``.

        Args:
            client: looks at the store.
            circuit: which circuit.
            kept: the store has lost nothing that it had counted.
            errors: what may have been logged.

        Returns the sums over all processes.
        """
        with contextlib.suppress(WorkerError):  # It only makes the waiting shorter.
            self.do("flush")
        sums: Counter[str] = Counter()
        for process in self:
            said = self.account(process, circuit)
            assert said["recorded"] == len(self._let_in(process, circuit))
            sums.update(said)
            for line in process.do("logs"):
                assert "Traceback" not in line["text"], line["text"]
                assert line["level"] != "ERROR" or line["text"].startswith(errors), line["text"]
        if kept:
            counted = self.totals(client, circuit)["calls"]
            assert sums["flushed"] <= counted <= sums["recorded"]
        return dict(sums)

    def account(self, process: Process, circuit: str = CIRCUIT) -> dict[str, int]:
        """The account of a process that has nothing left to send."""

        def account() -> dict[str, int]:
            said: dict[str, int] = process.do("conservation", circuit=circuit)
            assert said["recorded"] == said["flushed"] + said["dropped"] + said["pending"]
            return said

        until(lambda: account()["pending"] == 0, "all is acknowledged or lost")
        return account()

    def _let_in(self, process: Process, circuit: str) -> list[dict[str, Any]]:
        calls = self.calls(pid=process.pid, circuit=circuit)
        return [call for call in calls if call["event"] in ("enter", "call")]

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
    options = {"decode_responses": True, "socket_timeout": BOUND}
    with contextlib.closing(server.client(**options)) as client:
        yield client
