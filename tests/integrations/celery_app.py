"""A Celery application whose queue ``predictions`` is guarded by the circuit ``model``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery

from distributed_breaker import CircuitBreakerRegistry, Policy
from distributed_breaker.integrations import celery as ours
from distributed_breaker.integrations.celery import (
    BreakerTask,
    guard_queues,
    queue_paused,
    queue_resumed,
)

FOLDER = Path(os.environ["FOLDER"])
POLICY = Policy(
    failure_threshold=3, success_threshold=2, quorum=1, jitter=0.0,
    open_interval=float(os.environ.get("OPEN_INTERVAL", "3600")),
)  # fmt: skip

app = Celery("shop", broker=os.environ["BROKER"], task_cls=BreakerTask)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue="other",
    task_ignore_result=True,
    worker_prefetch_multiplier=4,
)
registry = CircuitBreakerRegistry.from_url(os.environ["STORE"], os.environ["NAMESPACE"])
model = registry.breaker("model", POLICY)
guard_queues(app, {"predictions": "model"}, registry)
ours.LOOK_EVERY = 0.05
BreakerTask.refusal_delay = 1.0
BreakerTask.refusal_longest_delay = 1.0


def note(*words: Any) -> None:
    """A line in the diary, whole, whichever process writes it."""
    with (FOLDER / "diary").open("a") as diary:
        diary.write(" ".join(map(str, words)) + "\n")


@queue_paused.connect(weak=False)
def paused(sender: Any, queue: str, circuit: str, **_: Any) -> None:
    note("paused", queue, circuit)


@queue_resumed.connect(weak=False)
def resumed(sender: Any, queue: str, circuit: str, **_: Any) -> None:
    note("resumed", queue, circuit)


@app.task(bind=True, name="predict", max_retries=0, acks_late=True)
def predict(self: Any, number: int) -> None:
    """Call the model, which fails while the file ``broken`` is there."""
    note("began", number)
    with model.guard():
        if (FOLDER / "hang").exists():
            note("hanging", number)
        while (FOLDER / "hang").exists():
            time.sleep(0.02)
        if (FOLDER / "broken").exists():
            note("failed", number)
            raise OSError("the model is gone")
    note("done", number, self.request.retries)


@app.task(name="hold")
def hold() -> None:
    """Keep a process busy until the file ``gate`` is there."""
    note("holding")
    for _ in range(2000):
        if (FOLDER / "gate").exists():
            return
        time.sleep(0.02)


@app.task(name="mail")
def mail(number: int) -> None:
    note("mailed", number)
