"""One process of a test's fleet: takes commands as JSON lines from a socket, and answers each.

``python -m tests.fleet.worker <address>`` starts the first process, which is never more than a
template: it imports everything, holds no registry, and ``fork`` makes the fleet's processes out of
it.  That costs some ms instead of the third of a second that each interpreter needs to start.
The same command forks a process that has a registry; that is how use after fork is tested.

Every method of ``Worker`` whose name begins with ``do_`` is a command; ``calls.py`` has those that
make calls.  A process ends with its
socket, so nothing outlives the test process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import time_machine

import distributed_breaker.admission as admission
import distributed_breaker.store as store
from distributed_breaker import CircuitBreakerRegistry, Policy
from tests.fleet.calls import BrokenError, Calls, ExcludedError

CONTENT = ("circuit", "old", "new", "source", "cause", "generation")


class Channel:
    """A connection to the test process."""

    def __init__(self, address: str, ticket: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self.send({"ticket": ticket, "pid": os.getpid()})

    def send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            os._exit(0)  # The test process has gone, or wants no more of us.
        command: dict[str, Any] = json.loads(line)
        return command

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Logs(logging.Handler):
    """All that is logged in this process, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[dict[str, str]] = []
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        line = {"level": record.levelname, "name": record.name, "text": self.format(record)}
        self.lines.append(line)


class Waits:
    """Counts how often, and how long (s), an admission has waited for the store."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        admission.wait = self._counted(admission.wait)

    def _counted(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            start = time.monotonic()
            try:
                return wait(*arguments)
            finally:
                self.spent.append(time.monotonic() - start)

        return counting


class Worker(Calls):
    """The other commands, and what they act on."""

    def __init__(self, address: str, ticket: str) -> None:
        self._address = address
        self._channel = Channel(address, ticket)
        self._logs = Logs()
        logging.getLogger().addHandler(self._logs)
        logging.getLogger().setLevel(logging.DEBUG)
        self._waits = Waits()
        self._travels: list[Any] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        """What a forked process does not take over from its parent."""
        self._logs.lines.clear()
        self._waits.spent.clear()
        self._begin_calls_anew()
        self._heard: list[dict[str, Any]] = []

    def serve(self) -> None:
        """Answer commands until one says ``exit``."""
        while True:
            command = self._channel.receive()
            name = command.pop("command")
            if name == "exit":
                self._exit(**command)
                return
            try:
                answer = {"answer": getattr(self, f"do_{name}")(**command)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            if answer.get("answer") is not FORKED:
                self._channel.send(answer)

    def _exit(self, how: str) -> None:
        if how == "sys.exit":
            sys.exit(3)
        if how == "error":
            # The traceback is the test's own doing, and nobody wants to read it.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            raise BrokenError("told to die of an error")

    # ------------------------------------------------------------------ processes

    def do_fork(self, tickets: list[str], how: str = "os") -> Any:
        """Fork once for each ticket.  The child goes on as a process of its own."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        for ticket in tickets:
            if how == "multiprocessing":
                context = multiprocessing.get_context("fork")
                context.Process(target=self._go_on_and_serve, args=(ticket,)).start()
            elif os.fork() == 0:
                self._go_on(ticket)
                return FORKED
        return None

    def _go_on(self, ticket: str) -> None:
        self._channel.close()
        self._begin_anew()
        self._channel = Channel(self._address, ticket)

    def _go_on_and_serve(self, ticket: str) -> None:
        self._go_on(ticket)
        self.serve()

    def do_without_threads(self, how: str) -> None:
        """No thread can be started (``refused``), started threads never run (``idle``), or only
        one can be started (``second``)."""

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        def idle(thread: threading.Thread) -> None:
            threading.Event().wait()

        def only_one(thread: threading.Thread) -> None:
            threading.Thread.start = refuse  # type: ignore[method-assign]
            START(thread)

        if how == "idle":
            threading.Thread.run = idle  # type: ignore[method-assign]
        else:
            kind = refuse if how == "refused" else only_one
            threading.Thread.start = kind  # type: ignore[method-assign]

    def do_adjust(self, **values: float) -> None:
        """Give other values to constants of the library: POLL (ms), READ_TIMEOUT (s), …"""
        for name, value in values.items():
            holders = [m for m in LIBRARY if hasattr(m, name)]
            assert holders, f"the library has no {name} any more"
            for module in holders:
                setattr(module, name, value)

    def do_with_threads(self) -> None:
        """Threads can be started again."""
        threading.Thread.start = START  # type: ignore[method-assign]
        threading.Thread.run = RUN  # type: ignore[method-assign]

    # ------------------------------------------------------------------ registries

    def do_open(
        self,
        url: str,
        namespace: str,
        circuit: str,
        policy: dict[str, Any] | None,
        calls: str,
    ) -> None:
        """Make a registry and its first breaker; ``calls`` is where calls are noted."""
        self._url, self._namespace = url, namespace
        self._file = os.open(calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.registry = CircuitBreakerRegistry.from_url(url, namespace)
        self._first = circuit
        self.do_breaker(circuit, policy)

    def do_breaker(self, circuit: str, policy: dict[str, Any] | None = None) -> None:
        """Make a further breaker."""
        made = None if policy is None else Policy(**policy, ignore=(ExcludedError,))
        self.registry.breaker(circuit, made).on_transition(self._hear)

    def _hear(self, change: Any) -> None:
        said = {name: str(getattr(change, name)) for name in CONTENT}
        self._heard.append(said | {"at": time.monotonic()})

    def do_bad_listener(self) -> None:
        """Add a listener that raises."""

        def listener(change: Any) -> None:
            raise BrokenError("a listener's own problem")

        self._breaker(None).on_transition(listener)

    def do_other_namespace(self, namespace: str) -> None:
        """Use the same store under another namespace from now on."""
        self.registry.close()
        self.registry = CircuitBreakerRegistry.from_url(self._url, namespace)
        self.do_breaker(self._first)

    def do_flush(self, timeout: float = 5.0) -> None:
        self.registry.flush(timeout)

    def do_close(self) -> None:
        self.registry.close()

    # ------------------------------------------------------------------ operators, health checks

    def do_operate(self, step: str, circuit: str | None = None, **more: Any) -> str:
        """An operator's step; says the name and message of what it raised, if anything."""
        try:
            getattr(self._breaker(circuit), step)(actor="test", **more)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def do_health_check(self, sick: str, circuit: str | None = None) -> None:
        """Give the breaker a health check that fails while the file ``sick`` exists."""

        def check() -> None:
            well = not os.path.exists(sick)
            self._note("check", circuit=circuit or self._first, well=well)
            if not well:
                raise BrokenError("still sick")

        self._breaker(circuit).health_check(check)

    # ------------------------------------------------------------------ looking

    def do_look(self, circuit: str | None = None) -> dict[str, Any]:
        """What this process knows and does, without asking the store."""
        breaker = self._breaker(circuit)
        state = str(breaker.state)
        header = breaker._shadow.header
        mine = self.registry._link
        return {
            "state": state,
            "source": breaker._decision.source,
            "shared": header.state if header else "",
            "synced": breaker._shadow.synced,
            "generation": [header.v, header.nonce] if header else [0, "-"],
            "degraded": breaker.degraded,
            "broken": breaker.broken,
            "down": mine.down if mine else "",
            "left": None if breaker._shadow.deadline is None
            else max(0, breaker._shadow.deadline - breaker._clock.ms()),
            "reporter": breaker._shadow.reporter,
            "threads": sorted(t.name for t in threading.enumerate()),
        }  # fmt: skip

    def do_snapshot(self, circuit: str | None = None) -> dict[str, Any]:
        """The public snapshot."""
        shot = self._breaker(circuit).snapshot()
        return {
            "state": str(shot.state),
            "shared_state": shot.shared_state and str(shot.shared_state),
            "source": shot.source,
            "generation": shot.generation,
            "retry_after": shot.retry_after,
            "opened_at": shot.opened_at,
            "attempt": shot.attempt,
            "totals": dict(shot.totals),
            "fleet": shot.fleet,
            "local": dict(shot.local),
        }

    def do_fleet_snapshot(self) -> dict[str, str]:
        """State of each circuit in the namespace, or what was raised."""
        try:
            return {name: str(shot.state) for name, shot in self.registry.snapshot().items()}
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}

    def do_say_all(self) -> str:
        """All that can be read in messages, tracebacks and representations."""
        breaker = self._breaker(None)
        attempts: list[Callable[[], object]] = [
            self.registry.snapshot, self.registry.flush, breaker.reset, breaker.release,
            breaker.force_open, breaker.acquire, breaker.snapshot,
        ]  # fmt: skip
        said = [repr(self.registry), repr(breaker), repr(breaker.snapshot())]
        for attempt in attempts:
            try:
                said.append(repr(attempt()))
            except Exception:
                said.append(traceback.format_exc())
        return "\n".join(said + [line["text"] for line in self._logs.lines])

    def do_conservation(self, circuit: str | None = None) -> dict[str, int]:
        """C4: recorded = flushed + dropped + pending."""
        return self._breaker(circuit).conservation()

    def do_transitions(self) -> list[dict[str, Any]]:
        """The transitions that a listener has heard, with the monotonic time of each."""
        return self._heard

    def do_logs(self) -> list[dict[str, str]]:
        """What was logged since the last time, beside the line of each transition."""
        lines, self._logs.lines = self._logs.lines, []
        return [line for line in lines if line["name"] != "distributed_breaker.transitions"]

    def do_waits(self) -> list[float]:
        """How long admissions have waited (s each) since the last time."""
        spent, self._waits.spent[:] = list(self._waits.spent), []
        return spent

    # ------------------------------------------------------------------ clocks

    def do_step_wall_clock(self, seconds: float) -> None:
        """Set this process's wall clock forward or back; its monotonic clock goes on."""
        before = time.monotonic(), time.time()
        self._travels.append(time_machine.travel(time.time() + seconds, tick=True))
        self._travels[-1].start()
        assert abs(time.time() - before[1] - seconds) < 5
        assert abs(time.monotonic() - before[0]) < 5

    def do_step_store_clock(self, milliseconds: int) -> None:
        """Make the store's time, as all our steps and polls see it, another one than the server's.

        Every process of the fleet must be told the same.
        """
        offset = milliseconds

        def encode(step: Any, channel: str, circuit: str, now: int | None = None) -> list[str]:
            at = time.time_ns() // 1_000_000 + offset if now is None else now
            return ENCODE(step, channel, circuit, at)

        store.encode = encode
        store._ms = lambda answer: MS(answer) + offset


FORKED = object()  # The child's first line has been its ticket, so the command has no answer.
LIBRARY = [m for name, m in sys.modules.items() if name.startswith("distributed_breaker.")]
START, RUN = threading.Thread.start, threading.Thread.run
ENCODE = store.encode
MS = store._ms


def main() -> None:
    # A Ctrl-C is meant for the test process; we end when it does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Worker(sys.argv[1], "template").serve()


if __name__ == "__main__":
    main()
