"""Programs under test: servers and scripts of real processes, and what they leave behind.

A program has a folder with its log, the ledger that its processes write, and a process group that
ends with the test, whatever happens to the test's process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from distributed_breaker import model
from distributed_breaker.store import key_of
from tests.fleet.process import BOUND, ROOT, until, whole_lines

AUDIT = 10.0  # s in which a living process reports what it has recorded; usually 2

# A process with nothing to do but to read process groups from a pipe, and to kill those that are
# left when the pipe ends: the death of the test's own process must not leave servers behind, and
# a parent-death signal would only end the first process of each.
_WARDEN = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    sign, group = line[0], int(line[1:])
    groups.add(group) if sign == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


class Warden:
    """Kills the programs that are left when the test process ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WARDEN],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def tell(self, sign: str, group: int) -> None:
        """``+``: this group is to be watched; ``-``: no longer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{sign}{group}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(BOUND)


class Program:
    """One program: its first process, those that it starts, its log and its ledger.

    Args:
        warden: sees to its end.
        folder: of this test alone.
        arguments: of the Python interpreter.
        store: the URL that its breakers use.
        namespace: of this test alone.
        more: further variables of its environment.
    """

    def __init__(
        self,
        warden: Warden,
        folder: Path,
        arguments: Sequence[str],
        store: str,
        namespace: str,
        **more: str,
    ) -> None:
        self._warden = warden
        self._log = folder / "log"
        self._ledger = folder / "ledger"
        self.namespace = namespace
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "STORE": store,
            "NAMESPACE": namespace,
            "LEDGER": str(self._ledger),
            **more,
        }
        # Whatever pytest-cov and the like would start in a subprocess, they would start in ours.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._process.pid
        warden.tell("+", self.pid)

    # ------------------------------------------------------------------ its life

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the first process alone."""
        self._process.send_signal(number)

    def wait(self, bound: float = BOUND) -> int:
        """Wait for its end by itself, with all its processes, and return the exit status."""
        try:
            until(lambda: not self.running, "the end of the program", bound)
            until(lambda: not self._group_lives(), "the end of all its processes")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None
        return self._process.wait()

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        """For the end of a test, whatever has become of the program."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._warden.tell("-", self.pid)

    # ------------------------------------------------------------------ what it leaves behind

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def noted(self, event: str, **wanted: Any) -> list[dict[str, Any]]:
        """What the processes have noted, in this order."""
        return [
            line
            for line in whole_lines(self._ledger)
            if line["event"] == event and all(line.get(k) == v for k, v in wanted.items())
        ]

    def stored(self, client: redis.Redis, circuit: str) -> model.Circuit:
        """The circuit as the store holds it."""
        fields: Any = client.hgetall(key_of(self.namespace, circuit))
        stored = model.load(fields)
        assert stored is not None, "the store does not hold the circuit"
        return stored

    def totals(self, client: redis.Redis, circuit: str) -> dict[str, int]:
        """The totals as the store holds them."""
        return dict(zip(model.TOTALS, self.stored(client, circuit).totals, strict=True))

    def transitions(self, client: redis.Redis, circuit: str) -> list[str]:
        """The states that the store has logged, oldest first."""
        entries: Any = client.xrange(key_of(self.namespace, circuit) + ":log")
        return [fields["new"] for _, fields in entries]

    def audit(self, client: redis.Redis, *circuits: str) -> None:
        """What must hold once all processes that made calls have ended in order, or report soon.

        Every call that was let through was counted, or counted as dropped, once; no signal handler
        of the application was replaced; nothing went wrong inside the library.
        """
        for circuit in circuits:
            noted = Counter(call["outcome"] for call in self.noted("call", circuit=circuit))

            def counted(circuit: str = circuit) -> int:
                totals = self.totals(client, circuit)
                return totals["calls"] + totals["dropped"]

            until(
                lambda noted=noted, counted=counted: counted() >= noted.total(),
                f"all of {circuit}: {noted}, {self.totals(client, circuit)}\n{self.log()}",
                AUDIT,
            )
            assert counted() == noted.total(), (self.totals(client, circuit), noted, self.log())
            assert self.totals(client, circuit)["failures"] <= noted["failure"]
        self.audit_log()

    def audit_log(self) -> None:
        assert not self.noted("handlers"), "a signal handler was replaced"
        assert "Traceback" not in self.log(), self.log()


def connections_of(pid: int, server: str) -> set[str]:
    """The kernel's names of a process's connections to a server (its URL, with a port)."""
    port = int(server.rpartition(":")[2].partition("/")[0])
    remote = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    ours = {f"socket:[{row[9]}]" for row in rows if row[2] == remote and row[3] == "01"}
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(descriptor))
    return ours & held
