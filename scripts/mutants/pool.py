"""Judges in processes of their own: a mutant may hang or kill the one that judges it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from .judge import TEST_SECONDS, Expected, Judge, Verdict
from .mutant import Mutant

# Longer than a judge can take that is alive.
PATIENCE = 4 * TEST_SECONDS
Ask = Callable[[Judge, Mutant], Verdict]


class Pool:
    """As many judges as asked for. They share the corpus, which is made before they are."""

    def __init__(self, size: int, expected: Expected, ask: Ask) -> None:
        self._expected = expected
        self._ask = ask
        self._parent = os.getpid()
        self._fork = multiprocessing.get_context("fork")
        self._workers = [self._hire() for _ in range(size)]

    def judged(self, mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, Verdict]]:
        """Every mutant with its verdict, as they come."""
        waiting = list(reversed(mutants))
        busy: dict[Connection, tuple[Mutant, ForkProcess]] = {}
        while waiting or busy:
            idle = [worker for worker in self._workers if worker[0] not in busy]
            for connection, process in idle[: len(waiting)]:
                busy[connection] = waiting.pop(), process
                connection.send(busy[connection][0])
            ready = [c for c in wait(list(busy), PATIENCE) if isinstance(c, Connection)]
            for connection in ready or list(busy):
                mutant, process = busy.pop(connection)
                yield mutant, self._verdict(connection, process, bool(ready))

    def close(self) -> None:
        """Send all judges home."""
        for connection, _ in self._workers:
            with contextlib.suppress(OSError):
                connection.send(None)
        for _, process in self._workers:
            process.join(10)
            if process.is_alive():
                process.terminate()  # It cleans up after itself.
                process.join(10)
            process.kill()

    def _verdict(self, connection: Connection, process: ForkProcess, answered: bool) -> Verdict:
        try:
            if answered:
                verdict = connection.recv()
                if isinstance(verdict, str):
                    raise RuntimeError(verdict)
                assert isinstance(verdict, Verdict)
                return verdict
        except EOFError:
            pass
        # It died of the mutant, or sits in something that nothing interrupts.
        process.kill()
        process.join()
        self._workers = [w for w in self._workers if w[0] is not connection] + [self._hire()]
        return Verdict("hang", "the judge had to be replaced")

    def _hire(self) -> tuple[Connection, ForkProcess]:
        mine, its = self._fork.Pipe()
        process = self._fork.Process(target=self._work, args=(its, mine), daemon=True)
        process.start()
        its.close()
        return mine, process

    def _work(self, connection: Connection, parents: Connection) -> None:
        parents.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        with contextlib.closing(Judge(self._expected)) as judge:
            while (mutant := self._next(connection)) is not None:
                try:
                    connection.send(self._ask(judge, mutant))
                except Exception:
                    connection.send(traceback.format_exc())

    def _next(self, connection: Connection) -> Mutant | None:
        """The next mutant; None when there is none, or nobody any more who would send one."""
        while not connection.poll(5):
            if os.getppid() != self._parent:
                return None
        mutant: Mutant | None = connection.recv()
        return mutant
