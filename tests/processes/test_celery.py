"""Celery: worker processes that skip atexit, threads, greenlets; recycling; warm shutdown."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from scripts.servers import Server
from tests.fleet.process import until
from tests.processes.conftest import Start
from tests.processes.launch import Program, connections_of

pytestmark = pytest.mark.servers("valkey")

# A process of billiard's pool waits at its end until the main process has taken its last answers:
# 300 times 0.1 s at most, and that long if the main process has ceased to read them.  It happens in
# about one shutdown of 200 on a busy machine, before any hook of ours is called.
SHUTDOWN = 90.0  # s


class Crew:
    """A Celery worker with its pool, and the queue from which it takes commands."""

    def __init__(self, start: Start, broker: str, namespace: str, *options: str, **more: str):
        self._queue = namespace
        self._app = Celery(broker=broker)
        self.program: Program = start(
            "-m", "celery", "--app", "tests.processes.apps.tasks", "worker", "--queues", namespace,
            "--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO",
            *options, BROKER=broker, **more,
        )  # fmt: skip
        self._sent = 0

    def close(self) -> None:
        self._app.close()

    def post(self, command: str, **options: Any) -> None:
        """Queue a command for any process."""
        self._app.send_task("command", (command, options), queue=self._queue)
        self._sent += 1

    def answers(self) -> list[dict[str, Any]]:
        """Wait until all commands have been answered, and return the answers."""
        found: list[dict[str, Any]] = []

        def all_answered() -> bool:
            assert self.program.running, self.program.log()
            found[:] = self.program.noted("answer")
            return len(found) >= self._sent

        until(all_answered, "the answers")
        return [answer["said"] for answer in found]

    def until_seen(
        self, processes: int, condition: Any, command: str = "look", **options: Any
    ) -> None:
        """Repeat a command until this many processes have answered as wanted."""

        def seen() -> bool:
            for _ in range(2 * processes):
                self.post(command, **options)
            return len({said["pid"] for said in self.answers() if condition(said)}) >= processes

        until(seen, f"{processes} processes answer\n{self.program.log()}")


@pytest.fixture
def crew(
    start: Start, server: Server, namespace: str, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """Make a crew whose broker is a server that it shares with others, and not the store."""
    made: list[Crew] = []
    broker = server.url.replace("unix://", "redis+socket://")

    def make(*options: str, **more: str) -> Crew:
        made.append(Crew(start, broker, namespace, *options, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


POOLS = {
    "prefork": ("--pool", "prefork", "--concurrency", "2"),
    "threads": ("--pool", "threads", "--concurrency", "4"),
    "gevent": ("--pool", "gevent", "--concurrency", "4"),
}


@pytest.mark.parametrize("pool", POOLS)
def test_the_life_of_a_worker(
    crew: Any, store: Server, client: redis.Redis, tmp_path: Path, pool: str
) -> None:
    """Its processes share a circuit, and end in order while outcomes and a probe are pending."""
    count = 2 if pool == "prefork" else 1
    preloaded = {"PRELOADED": "yes"} if pool == "prefork" else {}
    it = crew(*POOLS[pool], **preloaded)
    it.until_seen(count, lambda said: said.get("admitted") == 5, "act", count=5)
    it.until_seen(count, lambda said: said.get("shared") == "closed")

    looks = {said["pid"]: said for said in it.answers() if "reporter" in said}
    assert len({look["reporter"] for look in looks.values()}) == count
    connections = [connections_of(pid, store.url) for pid in {it.program.pid, *looks}]
    assert len(set().union(*connections)) == sum(map(len, connections)) == 2 * len(connections)

    for _ in range(10):
        it.post("act", circuit="payments", count=2, outcome="failure")
    if count == 1:
        it.answers()  # A single reporter trips only itself unless a second one agrees.
    it.until_seen(count, lambda said: said.get("rejected"), "act", circuit="payments", count=1)

    it.post("act", circuit="probed", count=3, outcome="failure")
    it.answers()
    gate = tmp_path / "gate"
    until(lambda: probing(it, str(gate)), "a probe")
    for _ in range(4):
        it.post("act", count=20)
    until(lambda: len(it.program.noted("answer")) >= it._sent - 1, "all but the probe")
    it.program.signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in it.program.log(), "it knows")
    gate.touch()
    assert it.program.wait(SHUTDOWN) == 0
    it.program.audit(client, "counted", "payments", "probed")
    assert it.program.transitions(client, "probed")[-1] == "closed"


def probing(it: Crew, gate: str) -> bool:
    """Whether some process holds the probe's permit, until the gate is there."""
    it.post("hold", circuit="probed", gate=gate)
    until(
        lambda: it.program.noted("held", probe=True) or len(it.program.noted("answer")) >= it._sent,
        "an answer",
    )
    return bool(it.program.noted("held", probe=True))


def test_processes_that_are_recycled_lose_nothing(crew: Any, client: redis.Redis) -> None:
    it = crew(*POOLS["prefork"], "--max-tasks-per-child", "3")
    for _ in range(24):
        it.post("act", count=3)
    it.answers()
    assert len({said["pid"] for said in it.answers()}) >= 8
    it.program.audit(client, "counted")
    it.program.signal(signal.SIGTERM)
    it.program.wait(SHUTDOWN)
    it.program.audit(client, "counted")


@pytest.mark.parametrize("pool", POOLS)
def test_it_ends_soon_though_the_store_is_away(crew: Any, store: Server, pool: str) -> None:
    it = crew(*POOLS[pool])
    it.until_seen(1, lambda said: said.get("shared") == "closed")
    store.pause() if pool == "threads" else store.kill()
    for _ in range(4):
        it.post("act", count=2, outcome="failure")
    it.answers()
    it.program.signal(signal.SIGTERM)
    assert it.program.wait(SHUTDOWN) == 0
    it.program.audit_log()
