"""The processes of the demo, as their parent sees them: it starts them and hears their reports."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .rules import WORKERS

ROOT = Path(__file__).parents[2]
BOUND = 15.0  # s; far more than anything here takes on a machine whose cores are all busy
ENDING = 5.0  # s that a process has to end by itself
GLANCE = 0.1  # s between looks when nothing is reported


class ActFailed(Exception):
    """Something did not happen as it must."""


class Tally(NamedTuple):
    """What a worker has counted, or what all have: ``calls`` are those that were admitted."""

    calls: int = 0
    failed: int = 0
    refused: int = 0
    probes: int = 0
    delays: float = 0.0  # s that the breaker has added to all attempts

    def since(self, earlier: Tally) -> Tally:
        return Tally(
            self.calls - earlier.calls,
            self.failed - earlier.failed,
            self.refused - earlier.refused,
            self.probes - earlier.probes,
            self.delays - earlier.delays,
        )


class Look(NamedTuple):
    """What a worker's breaker said of itself.  It was asked, and had answered, at these times."""

    asked: float
    at: float
    state: str
    source: str
    generation: int
    retry_after: float
    trip: dict[str, Any] | None


class Change(NamedTuple):
    """A transition, and when a worker's listener heard of it."""

    worker: int
    at: float
    old: str
    new: str
    source: str
    cause: str
    generation: int


class Child:
    """A process that writes lines of JSON and ends when its input does."""

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        self.name = name
        self.gone = False  # its output has ended
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"scripts.demo.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            # In a session of its own it does not get the Ctrl-C meant for the parent.
            start_new_session=True,
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # A process that is killed may leave half a line.
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:].strip()

    def why_gone(self) -> str:
        """How it ended; empty while it runs."""
        code = self.process.poll()
        return "" if code is None else f"{self.name} ended with code {code} {self.last_words()}"

    def hang_up(self) -> None:
        """Let it end; ``end`` waits for that."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def end(self) -> str:
        """Wait for its end, or make one.  Returns what was wrong with how it ended.

        Safe to call twice; the second time nothing was wrong.
        """
        if self._errors.closed:
            return ""
        self.hang_up()
        try:
            wrong = self.why_gone() if self.process.wait(ENDING) else ""
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            wrong = f"{self.name} did not end within {ENDING:g} s"
        self._errors.close()
        return wrong


class Upstream(Child):
    """The parent's handle on the upstream."""

    def __init__(self) -> None:
        super().__init__("the upstream", "upstream")
        first = next(self.lines(), None)
        if first is None:
            raise ActFailed(f"the upstream did not start: {self.end()}")
        self.port: int = first["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def switch(self, mode: str) -> float:
        """Break or mend it; returns a time just before that happened."""
        before = time.monotonic()
        self._ask("POST", f"/mode/{mode}")
        return before

    def arrived(self, what: str) -> int:
        """How many have arrived of, say, ``broken call`` or ``ok probe``."""
        count: int = self._ask("GET", "/counts")["arrived"].get(what, 0)
        return count

    def all_arrived(self) -> int:
        return sum(self._ask("GET", "/counts")["arrived"].values())

    def most_probing(self) -> int:
        """The most probes that were here at one time since the mode changed."""
        count: int = self._ask("GET", "/counts")["most_probing"]
        return count

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer


class Worker(Child):
    """The parent's handle on a worker, with what that has reported."""

    def __init__(self, number: int, store_url: str, port: int) -> None:
        super().__init__(f"worker {number}", "worker", store_url, str(port))
        self.number = number
        self.tally = Tally()
        self.marked = Tally()  # as it was when the counting began
        self.longest = 0.0  # s that the breaker has added to one attempt since then
        self.look: Look | None = None
        self.changes: list[Change] = []
        self.told = 0  # how many of them ``Fleet.news`` has returned
        self.log: list[str] = []

    def hear(self, report: dict[str, Any]) -> None:
        """Take in one line of the worker's reports."""
        kind, at = report.pop("kind"), report.pop("at")
        if kind == "tally":
            self.longest = max(self.longest, report.pop("longest"))
            self.tally = Tally(**report)
        elif kind == "look":
            self.look = Look(at=at, **report)
        elif kind == "change":
            self.changes.append(Change(self.number, at, **report))
        else:
            self.log.append(report["text"])

    def counted(self) -> Tally:
        """What it has counted since the mark."""
        return self.tally.since(self.marked)

    def changes_since(self, when: float) -> list[Change]:
        return [change for change in self.changes if change.at >= when]


class Fleet:
    """All workers, and the upstream that they call.  ``redraw`` is called while somebody waits."""

    def __init__(self, store_url: str, upstream: Upstream, redraw: Callable[[Fleet], None]) -> None:
        self.workers: list[Worker] = []
        self._upstream = upstream
        self._redraw = redraw
        self._news = threading.Condition()
        for number in range(1, WORKERS + 1):
            worker = Worker(number, store_url, upstream.port)
            self.workers.append(worker)
            threading.Thread(target=self._hear, args=(worker,), daemon=True).start()

    def _hear(self, worker: Worker) -> None:
        for report in worker.lines():
            with self._news:
                worker.hear(report)
                self._news.notify_all()
        with self._news:
            worker.gone = True
            self._news.notify_all()

    def mark(self) -> float:
        """Count from here.  Returns the time."""
        with self._news:
            for worker in self.workers:
                worker.marked, worker.longest = worker.tally, 0.0
        return time.monotonic()

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until it is so.  Raises ActFailed when it isn't in time, or a process is gone."""
        deadline = time.monotonic() + BOUND
        while True:
            with self._news:
                if condition():
                    return
                for child in (self._upstream, *self.workers):
                    if child.why_gone():
                        raise ActFailed(child.why_gone())
                self._news.wait(GLANCE)
            if time.monotonic() > deadline:
                raise ActFailed(f"this did not happen within {BOUND:g} s: {what}")
            self._redraw(self)

    def idle(self) -> None:
        """Pass a moment, with the table kept up to date."""
        with self._news:
            self._news.wait(GLANCE)
        self._redraw(self)

    def wait_for_each(self, what: str, condition: Callable[[Worker], bool]) -> None:
        self.wait(what, lambda: all(map(condition, self.workers)))

    def wait_for_looks(self, what: str, since: float, condition: Callable[[Look], bool]) -> None:
        """Wait until each breaker says so, in a look that was begun after ``since``."""
        self.wait_for_each(
            what, lambda w: w.look is not None and w.look.asked >= since and condition(w.look)
        )

    def total(self) -> Tally:
        """What all have counted since the mark."""
        with self._news:
            each = [w.counted() for w in self.workers]
        return Tally(*map(sum, zip(*each, strict=True)))

    def changes(self, since: float, new: str = "") -> list[Change]:
        """Transitions, to the state ``new``, in the order in which they were seen."""
        with self._news:
            changes = [c for w in self.workers for c in w.changes_since(since)]
        return sorted((c for c in changes if new in ("", c.new)), key=lambda c: c.at)

    def news(self) -> list[Change]:
        """Transitions that this method has not returned before."""
        with self._news:
            news = [change for w in self.workers for change in w.changes[w.told :]]
            for worker in self.workers:
                worker.told = len(worker.changes)
        return sorted(news, key=lambda change: change.at)

    def generation(self) -> int:
        """The newest shared generation that a worker has looked at."""
        with self._news:
            return max((w.look.generation for w in self.workers if w.look), default=0)

    def longest(self) -> float:
        """The longest time (s) that the breaker has added to one attempt since the mark."""
        with self._news:
            return max(w.longest for w in self.workers)

    def logged(self) -> Sequence[str]:
        """What the library has logged in the workers, for people who look for a fault."""
        with self._news:
            return [f"{w.name}: {text}" for w in self.workers for text in w.log]

    def end(self) -> list[str]:
        """End all workers.  Returns what was wrong with how they ended."""
        for worker in self.workers:
            worker.hang_up()
        return [wrong for wrong in (worker.end() for worker in self.workers) if wrong]
