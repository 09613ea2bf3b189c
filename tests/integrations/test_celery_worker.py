"""Real workers on a real broker stop consuming a queue whose circuit is open, and begin again.

What a task does when it is refused is shown here too, for what a worker had fetched already.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry
from scripts.servers import Server
from tests.unit.clock import wait_until

pytestmark = pytest.mark.servers("valkey")

ROOT = Path(__file__).parents[2]
BOUND = 30.0  # s


class Crew:
    """One worker, the queues that it serves, and the circuit that guards one of them."""

    def __init__(self, folder: Path, server: Server, breaker: CircuitBreaker, app: Celery) -> None:
        self.folder, self.model, self.app = folder, breaker, app
        self.broker: redis.Redis = server.client()

    def noted(self, *words: str) -> list[str]:
        """The lines of the diary that begin so."""
        try:
            lines = (self.folder / "diary").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if line.split()[: len(words)] == list(words)]

    def until(self, condition: Callable[[], object], what: str) -> None:
        try:
            wait_until(lambda: bool(condition()), BOUND)
        except AssertionError as error:
            log = (self.folder / "log").read_text()
            diary = "\n".join(self.noted())
            raise AssertionError(f"{what}: {error}\n{diary}\n{log}") from None

    def send(self, name: str, *numbers: int) -> None:
        queue = "predictions" if name == "predict" else "other"
        for number in numbers:
            self.app.send_task(name, () if name == "hold" else (number,), queue=queue)

    def waiting(self) -> int:
        """The messages that lie in the guarded queue."""
        return int(self.broker.llen("predictions"))  # type: ignore[arg-type]

    def serves_others(self, number: int, countdown: float = 0.0) -> None:
        self.app.send_task("mail", (number,), queue="other", countdown=countdown)
        self.until(lambda: self.noted("mailed", str(number)), "the other queue")


@pytest.fixture
def crew(server: Server, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    with contextlib.ExitStack() as stack:

        def start(pool: str, size: int = 1, on: Server | None = None, **more: str) -> Crew:
            """``on``: the broker's server; None: the one that holds the circuits."""
            broker = (on or server).url.replace("unix://", "redis+socket://")
            environ = {
                **os.environ, "BROKER": broker, "STORE": server.url, "NAMESPACE": namespace,
                "FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT), **more,
            }  # fmt: skip
            command = f"-m celery -A tests.integrations.celery_app worker -P {pool} -c {size} "
            command += "-Q predictions,other --without-gossip --without-mingle "
            command += "--without-heartbeat -l INFO"
            log = stack.enter_context((tmp_path / "log").open("w"))
            process = subprocess.Popen(
                [sys.executable, *command.split()], cwd=ROOT, env=environ, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            stack.callback(end, process)
            app = Celery(broker=broker, set_as_current=False)
            stack.callback(app.close)
            registry = stack.enter_context(CircuitBreakerRegistry.from_url(server.url, namespace))
            made = Crew(tmp_path, on or server, registry.breaker("model"), app)
            stack.callback(made.broker.close)
            made.serves_others(0)
            return made

        yield start


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_the_queue_of_an_open_circuit_is_left_alone(crew: Any, pool: str) -> None:
    """Other queues go on; what had been fetched goes back, and no retry is used up."""
    it: Crew = crew(pool)
    if pool != "solo":  # which fetches nothing while it works
        it.send("hold", 0)
        it.until(lambda: it.noted("holding"), "a busy process")
        it.send("predict", 1, 2)
        it.until(lambda: it.waiting() == 0, "two tasks are fetched")
    it.model.force_open()
    it.until(lambda: it.noted("paused", "predictions", "model"), "the pause")
    (it.folder / "gate").touch()
    it.send("predict", 3, 4)
    expected = 2 if pool == "solo" else 4
    it.until(lambda: it.waiting() == expected, "those that were fetched are back")
    it.serves_others(1)
    assert not it.noted("began")
    assert it.waiting() == expected

    it.model.release()
    it.until(lambda: len(it.noted("done")) == expected, "all of them")
    numbers = "34" if pool == "solo" else "1234"
    assert sorted(it.noted("done")) == [f"done {number} 0" for number in numbers]
    it.until(lambda: it.noted("resumed", "predictions", "model"), "the signal")
    assert len(it.noted("paused")) == len(it.noted("resumed")) == 1


def test_a_broken_worker_does_not_eat_the_queue(crew: Any) -> None:
    """The circuit trips by itself, takes probes one by one, and the rest is done afterwards."""
    it: Crew = crew("prefork", 4, OPEN_INTERVAL="0.3")
    (it.folder / "broken").touch()
    count = 60
    it.send("predict", *range(count))
    it.until(lambda: it.noted("paused"), "the pause")
    before = len(it.noted("failed"))
    it.until(lambda: len(it.noted("failed")) >= before + 2, "two probes")

    (it.folder / "hang").touch()
    (it.folder / "broken").unlink()
    done = len(it.noted("done"))
    it.until(lambda: it.noted("hanging"), "a probe that hangs")
    began = len(it.noted("began"))
    # In that time it could fetch some more, only to refuse them: Redis is asked once a second.
    it.serves_others(1, countdown=4.0)
    assert len(it.noted("began")) <= began + 1
    lost = len(it.noted("failed"))
    # Without further ado the worker would fetch 16 messages now, and refuse them.
    it.until(lambda: it.waiting() >= count - lost - 2, "the others wait in the queue")
    assert len(it.noted("done")) == done

    (it.folder / "hang").unlink()
    it.until(lambda: it.noted("resumed"), "the end of the pause")
    it.until(lambda: len(it.noted("done")) == count - lost, "all that did not fail")
    assert lost < 20
    assert {line.split()[2] for line in it.noted("done")} == {"0"}


def test_a_pause_outlasts_the_loss_of_the_broker(crew: Any, own_server: Any) -> None:
    broker: Server = own_server(tcp=True, args=["--appendonly", "yes", "--appendfsync", "always"])
    it: Crew = crew("solo", on=broker)
    it.model.force_open()
    it.until(lambda: it.noted("paused"), "the pause")
    it.serves_others(1)  # so the read that was under way is over: it would put a message back
    it.send("predict", 1, 2)
    broker.kill()
    broker.restart(empty=False)
    it.serves_others(2)
    assert it.waiting() == 2
    it.model.release()
    it.until(lambda: len(it.noted("done")) == 2, "both")
    assert len(it.noted("paused")) == 1
