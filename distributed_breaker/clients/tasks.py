"""Background tasks that are not lost while Celery's broker is away: they wait in an outbox on disk.

Every task has its id from the start, so a worker can tell one that it gets twice: what was handed
over, but not noted before this process died, is handed over again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..fallback.outbox import Entry, JsonValue, Outbox, OutboxError, Parked
from ..policy import Outcome, Policy
from ..process import follow_process
from ..sections import Cache
from .cache_base import cache_outbox
from .client import Client
from .waiting import Waiting


class TaskQueue:
    """Hands tasks to Celery when its broker answers, and afterwards when not.

    Args:
        app: the Celery application.
        breaker: the circuit of its broker.
        outbox: where tasks wait; they have the topic ``<circuit>`` there.
    """

    def __init__(self, app: Any, breaker: CircuitBreaker, outbox: Outbox) -> None:
        self._app = app
        self._breaker = breaker
        self._queue = Waiting(outbox, breaker.name, breaker, self._deliver)
        follow_process(self)

    def enqueue(
        self,
        task: Any,
        args: Sequence[JsonValue] = (),
        kwargs: Mapping[str, JsonValue] | None = None,
        **options: JsonValue,
    ) -> str:
        """Have a task done.

        Args:
            task: a Celery task, or its name.
            args, kwargs: its arguments, which JSON must give back unchanged.
            options: Celery's, such as ``queue``, ``countdown`` or ``priority``.

        Returns:
            The task's id.  With a ``countdown``, its time begins when the broker has it.

        Raises:
            OutboxError: the broker is away, and the task cannot be kept either.
            TypeError, ValueError: an argument cannot be kept, or the options are of no use.
        """
        name = task if isinstance(task, str) else task.name
        task_id = str(uuid.uuid4())
        words: dict[str, Any] = {
            "id": task_id, "args": list(args), "kwargs": dict(kwargs or {}), "options": options,
        }  # fmt: skip
        try:
            # What came first goes first: while some wait, the others wait behind them.
            if not (self._queue.possible and self._some_wait()):
                self._hand_over(name, words)
                return task_id
        except CircuitBreakerOpenException:
            pass
        except Exception as error:
            if self._breaker.policy.outcome_of(error) is not Outcome.FAILURE:
                raise
        self._queue.add_many([(name, words, "")])
        return task_id

    @property
    def outbox(self) -> Outbox:
        """Where tasks wait."""
        return self._queue.outbox

    def waiting(self) -> int:
        """How many tasks wait for the broker."""
        return self._queue.count()

    def problems(self) -> list[str]:
        """What is wrong with the tasks that wait, in sentences."""
        return self._queue.problems("tasks")

    def close(self) -> None:
        """Stop handing over; what waits stays on disk.  Safe to call twice."""
        self._queue.close()

    def forked(self) -> None:
        """A child hands over by itself."""
        self._queue.forked()

    def _hand_over(self, name: str, words: Mapping[str, Any]) -> None:
        with self._breaker.guard(), self._app.producer_or_acquire() as producer:
            # Left to itself, it would try to connect again for seconds while the caller waits.
            producer.connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            self._app.send_task(
                name, words["args"], words["kwargs"], task_id=words["id"], retry=False,
                producer=producer, **words["options"],
            )  # fmt: skip

    def _deliver(self, entry: Entry) -> None:
        try:
            self._hand_over(entry.kind, entry.payload)  # type: ignore[arg-type]
        except CircuitBreakerOpenException:
            raise
        except Exception as error:
            if self._breaker.policy.outcome_of(error) is Outcome.FAILURE:
                # The broker is away, which is held against no task, however long it lasts.
                name = self._breaker.name
                raise CircuitBreakerOpenException(name, reason="it has just failed") from error
            raise Parked(f"{type(error).__name__}: {error}") from error

    def _some_wait(self) -> bool:
        try:
            return self._queue.count() > 0
        except OutboxError:
            return False


class TaskClient(Client):
    """A service's task queue: policy and folder are those of its cache."""

    section: Cache

    def _begin(self) -> None:
        beside = Path(cache_outbox(self.name, self.section).path)
        outbox = Outbox(beside.with_name("tasks.db"))
        self.queue = TaskQueue(self.explicit["app"], self.breaker, outbox)

    @staticmethod
    def policy(policy: Policy) -> Policy:
        """What says that the broker is away; what a task is made of says nothing of it."""
        from kombu.exceptions import OperationalError

        return replace(policy, record=(OperationalError, OSError))

    def problems(self) -> list[str]:
        """What is wrong with the tasks that wait."""
        return self.queue.problems()

    def stats(self) -> dict[str, Any]:
        """What waits on this host."""
        return {"outbox": self.queue.outbox.stats()}

    def close(self) -> None:
        """Stop handing over; what waits stays on disk."""
        self.queue.close()
