"""Eight real processes among random faults, in rounds.

At the end of a round everything heals.  Then every process must have accounted for each outcome
(recorded = flushed + dropped, nothing pending), all mirrors must agree with the store, the circuit
must work, and no process may hold more file descriptors or much more memory than at first.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import redis

from scripts.servers import Server
from tests.faults.mischief import POLICY, Mischief, until_healed, until_it_works
from tests.faults.proxy import Proxy, proxy_before
from tests.fleet.harness import CIRCUIT, Fleet, Nursery, Process, WorkerError, client_of, until

PROCESSES = 8
STEPS = 60  # faults and other events in one round
MORE_DESCRIPTORS = 4  # a subscription that is being renewed may be there twice
MORE_MEMORY = 24  # MiB; the processes keep notes of their own


def descriptors(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def memory(process: Process) -> float:
    """Resident memory in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Soak:
    """One fleet, for as long as it holds."""

    def __init__(
        self, fleet: Fleet, server: Server, client: redis.Redis, proxy: Proxy, noted: Path
    ) -> None:
        self.fleet = fleet
        self.server = server
        self.client = client
        self.proxy = proxy
        self.noted = noted
        self.calls: Counter[int] = Counter()  # noted in earlier rounds, by process
        self.first: dict[int, tuple[int, float]] = {}  # descriptors and memory, by process
        self.grown = (0, 0.0)
        self.sums: Counter[str] = Counter()

    def round(self, seed: int) -> None:
        """Faults, healing, and everything that must hold afterwards."""
        missing = PROCESSES - len(self.fleet.processes)
        self.fleet.start(missing // 2, POLICY, url=self.proxy.url)
        self.fleet.start(missing - missing // 2, POLICY)
        self.fleet.do("hammer", threads=2, hold=0.002, pause=0.02)
        mischief = Mischief(seed, self.fleet, self.server, self.client, self.proxy)
        for _ in range(STEPS):
            mischief.step()
        mischief.end()
        self.fleet.do("rest")
        self._heal()
        self._account()
        self._measure()

    def _heal(self) -> None:
        until_healed(self.fleet, self.client)
        until(self._flushed, "all is reported")
        until_it_works(self.fleet)

    def _flushed(self) -> bool:
        try:
            self.fleet.do("flush")
        except WorkerError:
            return False
        return True

    def _account(self) -> None:
        """C4, against what the processes' calls have noted themselves."""
        let_in = Counter(c["pid"] for c in self.fleet.calls() if c["event"] in ("enter", "call"))
        self.sums = Counter()
        for process in self.fleet:
            said = self.fleet.account(process)
            self.calls[process.pid] += let_in[process.pid]
            noted = self.calls[process.pid]
            assert said["recorded"] == noted, f"{process} has made {noted} calls: {said}"
            self.sums.update(said)
            for line in process.do("logs"):
                assert "Traceback" not in line["text"], line["text"]
        os.truncate(self.noted, 0)

    def _measure(self) -> None:
        """Descriptors and memory, of processes that have lived through a round."""
        for process in self.fleet:
            now = descriptors(process), memory(process)
            begin = self.first.setdefault(process.pid, now)
            grown = now[0] - begin[0], now[1] - begin[1]
            self.grown = max(self.grown[0], grown[0]), max(self.grown[1], grown[1])
            assert grown[0] <= MORE_DESCRIPTORS, (
                f"{process}: from {begin} to {now} descriptors, MiB"
            )
            assert grown[1] <= MORE_MEMORY, f"{process}: from {begin} to {now} descriptors, MiB"


def drive(seed: int, seconds: float, kind: str) -> bool:
    """Rounds until the time is over; says what came of them, and whether all held."""
    begin = time.monotonic()
    rounds = 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dbk-")))
        server = stack.enter_context(Server.start(kind))
        client = stack.enter_context(client_of(server))
        proxy = stack.enter_context(proxy_before(server.url))
        nursery = Nursery()
        stack.callback(nursery.close)
        fleet = Fleet(nursery, server.url, "soak", folder)
        stack.callback(fleet.end)
        fleet.adjust = {"LONGEST_RETRY": 300}
        soak = Soak(fleet, server, client, proxy, folder / "calls")
        for round_ in itertools.count():
            try:
                soak.round(seed + round_)
            except Exception:
                print(f"\nFAILED in round {round_}, seed {seed + round_}\n{traceback.format_exc()}")
                print(f'Try: make soak ARGS="--only fleet --server {kind} --first {seed}"')
                return False
            rounds += 1
            if time.monotonic() - begin >= seconds:
                break
    spent = time.monotonic() - begin
    print(
        f"{PROCESSES} processes on {kind}, circuit {CIRCUIT}: {rounds} rounds of {STEPS} faults in "
        f"{spent:.0f} s; the last processes recorded {soak.sums['recorded']:,} outcomes = "
        f"{soak.sums['flushed']:,} flushed + {soak.sums['dropped']:,} dropped; at most "
        f"{soak.grown[0]} descriptors and {soak.grown[1]:.1f} MiB more than after the first round",
        flush=True,
    )
    return True
