"""A Celery application: each task is a command."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from tests.processes.apps.usage import carry_out, note, use_before_forks

app = Celery("tasks", broker=os.environ["BROKER"], broker_connection_retry_on_startup=True)
# A worker takes no more than it works on, so that every worker gets some.
app.conf.update(worker_prefetch_multiplier=1, task_ignore_result=True)

if "PRELOADED" in os.environ:
    use_before_forks()


@app.task(name="command")
def command(command: str, options: dict[str, Any]) -> None:
    """Carry it out, and note the answer."""
    note("answer", command=command, said=carry_out(command, options))
