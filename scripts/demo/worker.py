"""One process of the fleet: calls the upstream through the circuit, and reports what it sees.

Run as ``python -m scripts.demo.worker STORE_URL UPSTREAM_PORT``.  Its reports are lines of
JSON on standard output, and it ends when its input does.  Times are seconds of CLOCK_MONOTONIC,
which all processes of one machine share.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import sys
import threading
import time

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Transition,
)

from .rules import CALL_TIMEOUT, CALLS_PER_SECOND, CIRCUIT, NAMESPACE, POLICY
from .upstream import PROBE_HEADER

TALLY_EVERY = 0.05  # s
LOOK_EVERY = 0.1  # s


class UpstreamError(Exception):
    """The upstream answered with an error."""


class Reports:
    """Lines to the parent, from several threads."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._lock = threading.Lock()

    def send(self, kind: str, **fields: object) -> None:
        """Write one line; several threads may do so at once."""
        line = json.dumps({"kind": kind, "at": time.monotonic(), **fields}) + "\n"
        with self._lock:
            try:
                sys.stdout.write(line)
                sys.stdout.flush()
            except OSError:
                self.stopping.set()  # The parent is gone.

    def end_with_input(self) -> None:
        """Wait until the parent hangs up, or is gone."""
        # Not sys.stdin: its lock, held by a daemon thread, would disturb the interpreter's end.
        while os.read(0, 1024):
            pass
        self.stopping.set()


class LogReports(logging.Handler):
    """Sends what the library logs to the parent, which shows it when something goes wrong."""

    def __init__(self, reports: Reports) -> None:
        super().__init__(logging.WARNING)
        self._reports = reports

    def emit(self, record: logging.LogRecord) -> None:
        self._reports.send("log", text=self.format(record))


class Caller:
    """Calls the upstream over one connection and counts what comes of it."""

    def __init__(self, breaker: CircuitBreaker, port: int) -> None:
        self._breaker = breaker
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_TIMEOUT)
        self.calls = self.failed = self.refused = self.probes = 0
        self.delays = 0.0  # s that the breaker has added to all attempts
        self.longest = 0.0  # s that it has added to one of them since the last report

    def attempt(self) -> None:
        """One call, unless the circuit refuses it."""
        came = began = ended = time.perf_counter()
        try:
            with self._breaker.guard() as permit:
                self.calls += 1
                self.probes += permit.is_probe
                began = time.perf_counter()
                try:
                    self._pay(permit.is_probe)
                finally:
                    ended = time.perf_counter()
        except CircuitBreakerOpenException:
            self.refused += 1
        except (UpstreamError, OSError, http.client.HTTPException):
            self.failed += 1
        delay = time.perf_counter() - came - (ended - began)
        self.delays += delay
        self.longest = max(self.longest, delay)

    def _pay(self, probe: bool) -> None:
        connection = self._connection
        try:
            connection.request("GET", "/pay", headers={PROBE_HEADER: "yes"} if probe else {})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()  # The next call opens it again.
            raise
        if answer.status != 200:
            raise UpstreamError(f"HTTP {answer.status}")

    def report(self, reports: Reports) -> None:
        """Send the counters."""
        reports.send(
            "tally",
            calls=self.calls,
            failed=self.failed,
            refused=self.refused,
            probes=self.probes,
            delays=self.delays,
            longest=self.longest,
        )
        self.longest = 0.0


def call_steadily(caller: Caller, reports: Reports) -> None:
    """Attempt a call at regular times; a call that takes long delays the next, and adds none."""
    choose = random.Random()
    due = reported = time.monotonic()
    while not reports.stopping.is_set():
        caller.attempt()
        now = time.monotonic()
        if now - reported >= TALLY_EVERY:
            caller.report(reports)
            reported = now
        due = max(now, due + choose.uniform(0.5, 1.5) / CALLS_PER_SECOND)
        reports.stopping.wait(due - now)


def look_steadily(breaker: CircuitBreaker, reports: Reports) -> None:
    """Report what the breaker says of itself, from a thread that no call waits for."""
    while not reports.stopping.wait(LOOK_EVERY):
        asked = time.monotonic()
        seen = breaker.snapshot()
        trip = seen.last_trip
        reports.send(
            "look",
            asked=asked,
            state=seen.state,
            source=seen.source,
            generation=seen.generation,
            retry_after=seen.retry_after,
            trip=trip and {"cause": trip.cause, "run": trip.run, "reporters": trip.reporters},
        )


def main() -> None:
    store_url, port = sys.argv[1], int(sys.argv[2])
    reports = Reports()
    logging.getLogger("distributed_breaker").addHandler(LogReports(reports))
    threading.Thread(target=reports.end_with_input, daemon=True).start()
    registry = CircuitBreakerRegistry.from_url(store_url, namespace=NAMESPACE)
    breaker = registry.breaker(CIRCUIT, POLICY)

    def changed(change: Transition) -> None:
        fields = ("old", "new", "source", "cause", "generation")
        reports.send("change", **{name: getattr(change, name) for name in fields})

    breaker.on_transition(changed)
    looking = threading.Thread(target=look_steadily, args=(breaker, reports))
    looking.start()
    caller = Caller(breaker, port)
    try:
        call_steadily(caller, reports)
    finally:
        reports.stopping.set()
        looking.join()
    registry.close()
    caller.report(reports)


if __name__ == "__main__":
    main()
