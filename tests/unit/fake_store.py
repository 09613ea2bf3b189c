"""A store in this process: the model in place of the script, for any number of registries.

It answers like a server, and fails like one when a test says so.  What a real server does is
tested on real servers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy, model
from distributed_breaker.errors import StoreDown, StoreError
from distributed_breaker.model import Reply, Step
from tests.unit.clock import FakeClock, fail, refused, wait_until


class Server:
    """What all processes share."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.circuits: dict[str, model.Circuit] = {}
        self.logs: dict[str, list[dict[str, str]]] = {}
        self.names: set[str] = set()
        self.subscriptions: list[FakeSubscription] = []
        self.lock = threading.Lock()
        self.commands = 0
        self.operations: list[str] = []

    def step(self, name: str, step: Step) -> Reply:
        self.operations.append(step.op)
        done = model.step(self.circuits.get(name), step, self.clock.ms)
        self.circuits[name] = done.circuit
        for event in done.events:
            entry = {
                "at": str(self.clock.ms), "from": event.old, "to": event.new, "v": str(event.v),
                "cause": event.cause, "evidence": event.evidence, "detail": event.detail,
            }  # fmt: skip
            self.logs.setdefault(name, []).insert(0, entry)
        if done.events:
            for subscription in self.subscriptions:
                subscription.pushes.put(f"{name} {model.dump_header(done.circuit)}")
        return done.reply


class FakeSubscription:
    refused = ""

    def __init__(self) -> None:
        self.pushes: queue.Queue[str | None] = queue.Queue()

    def get(self, timeout: float) -> str | None:
        try:
            push = self.pushes.get(timeout=timeout)
        except queue.Empty:
            return None
        if push is None:
            raise StoreDown("CONNECTION", "closed")
        return push

    def ping(self) -> None:
        pass

    def wake(self) -> None:
        self.pushes.put(None)

    def close(self) -> None:
        pass


class FakeStore:
    """One process's connection; ``failing`` is raised instead of an answer.

    With ``lose_replies`` the steps are carried out, and only their answers never come.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.failing: StoreDown | None = None
        self.fail_next: StoreDown | None = None  # only the next batch of steps
        self.lose_replies = False
        self.before_acquire: Callable[[], None] = lambda: None

    def _ask(self, failing: StoreDown | None = None) -> None:
        self.server.commands += 1
        if failing or self.failing:
            raise failing or self.failing  # type: ignore[misc]

    def run(self, steps: Sequence[tuple[str, Step]]) -> list[Reply | StoreError]:
        if any(step.op == "acquire" for _, step in steps):
            self.before_acquire()
        failing, self.fail_next = self.fail_next or self.failing, None
        if not (failing and self.lose_replies):
            self._ask(failing)
        with self.server.lock:
            replies: list[Reply | StoreError] = [self.server.step(*step) for step in steps]
        if failing is not None:
            raise failing
        return replies

    def poll(self, circuits: Sequence[str]) -> tuple[int, list[str | None]]:
        self._ask()
        with self.server.lock:
            found = [self.server.circuits.get(name) for name in circuits]
            return self.server.clock.ms, [c and model.dump_header(c) for c in found]  # type: ignore[misc]

    def read(self, circuits: Sequence[str]) -> tuple[int, list[dict[str, str] | StoreError]]:
        self._ask()
        with self.server.lock:
            found = [self.server.circuits.get(name) for name in circuits]
            return self.server.clock.ms, [model.dump(c) if c else {} for c in found]

    def log(self, circuit: str, count: int = 50) -> list[dict[str, str]]:
        self._ask()
        return self.server.logs.get(circuit, [])[:count]

    def remember(self, circuits: Sequence[str]) -> None:
        self._ask()
        self.server.names.update(circuits)

    def names(self) -> list[str]:
        self._ask()
        return sorted(self.server.names)

    def subscribe(self) -> FakeSubscription:
        self._ask()
        subscription = FakeSubscription()
        self.server.subscriptions.append(subscription)
        return subscription

    def close(self) -> None:
        pass

    def forked(self) -> None:
        pass


TIMEOUT = StoreDown("TIMEOUT", "no answer")
GONE = StoreDown("CONNECTION", "refused")


class Process:
    def __init__(self, fake_server: Server, clock: FakeClock) -> None:
        self.store = FakeStore(fake_server)
        self.registry = CircuitBreakerRegistry(self.store, "test", clock)  # type: ignore[arg-type]

    def breaker(self, policy: Policy | None = None, name: str = "b") -> CircuitBreaker:
        return self.registry.breaker(name, policy)

    def synced(self, policy: Policy | None = None, name: str = "b") -> CircuitBreaker:
        """A breaker that has heard of the store."""
        breaker = self.breaker(policy, name)
        breaker.first_answer.result(10)
        return breaker


def accounts(breaker: CircuitBreaker) -> dict[str, int]:
    account = breaker.conservation()
    assert account["recorded"] == account["flushed"] + account["dropped"] + account["pending"]
    return account


def make_shared_due(breaker: CircuitBreaker, clock: FakeClock) -> None:
    fail(breaker)
    wait_until(lambda: breaker.snapshot().shared_state == "open" and refused(breaker))
    clock.advance(60.0)
