"""Celery: tasks that wait instead of failing, and workers that leave a broken queue alone.

``BreakerTask`` sends a refused task back to its queue.  ``guard_queues`` lets workers stop
consuming a queue whose circuit is open; what they have fetched already is sent back by the task.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from celery import Celery, Task, bootsteps, signals
from celery.exceptions import Reject, Retry
from celery.utils.dispatch import Signal
from celery.worker import state

from ..admission import wait
from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..policy import State, check_circuit
from ..registry import CircuitBreakerRegistry

LOOK_EVERY = 0.5  # s between looks at the circuits, beside what transitions say at once
SINCE = "breaker_refused_since"  # a message's header: seconds since 1970

# Sent in a worker's main process, with the consumer as sender, and ``queue`` and ``circuit``.
queue_paused = Signal(name="queue_paused", providing_args={"queue", "circuit"})
queue_resumed = Signal(name="queue_resumed", providing_args={"queue", "circuit"})

log = logging.getLogger("distributed_breaker")


class BreakerTask(Task):  # type: ignore[misc]
    """A task that is sent back to its queue when a circuit refuses its work.

    That uses up none of its ``max_retries``, and happens again until it is ``refusal_max_age`` old:
    then the refusal is its error.  Use it as ``base`` of a task, or as ``task_cls`` of an app.
    A task of a guarded queue does not even begin while the queue's circuit is open.  Called
    directly, or eagerly, it raises the refusal.
    """

    abstract = True
    # Seconds until the next try when the circuit does not know.
    refusal_delay = 10.0
    # Seconds; what waits longer than Redis's visibility_timeout (3600) would be delivered twice.
    refusal_longest_delay = 600.0
    # What is added to a delay at random, as a share of it.
    refusal_jitter = 0.25
    # Seconds from the first refusal on; None: for ever.
    refusal_max_age: float | None = 86_400.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's way to run a task."""
        if not self._can_wait():
            return super().__call__(*args, **kwargs)
        try:
            guards = _guards.get(self.app)
            breaker = guards and guards.of_message(self.app, self.request.delivery_info)
            if breaker and _refusing(breaker):
                breaker.acquire().ignore()
            return self.run(*args, **kwargs)
        except CircuitBreakerOpenException as refusal:
            self._send_back(refusal)

    def retry(self, *args: Any, exc: Any = None, throw: bool = True, **options: Any) -> Any:
        """See Celery's; with a refusal as ``exc``, as ``autoretry_for`` gives it, the circuit says
        when, and no retry is used up."""
        if isinstance(exc, CircuitBreakerOpenException) and throw and self._can_wait():
            self._send_back(exc)
        return super().retry(*args, exc=exc, throw=throw, **options)

    def _can_wait(self) -> bool:
        return not (self.request.called_directly or self.request.is_eager)

    def _send_back(self, refusal: CircuitBreakerOpenException) -> NoReturn:
        request, now = self.request, time.time()
        headers = dict(request.headers or {})
        since = headers.get(SINCE)
        if not isinstance(since, int | float) or since > now:
            since = now
        if self.refusal_max_age is not None and now - since >= self.refusal_max_age:
            raise refusal
        delay = min(refusal.retry_after or self.refusal_delay, self.refusal_longest_delay)
        delay *= 1 + random.random() * self.refusal_jitter
        # What Celery's retry does, but for counting.
        again = self.signature_from_request(
            request, countdown=delay, headers={**headers, SINCE: since}
        )
        try:
            again.apply_async()
        except Exception as error:
            if self.acks_late:
                raise Reject(error, requeue=True) from error
            raise refusal from error
        raise Retry(exc=refusal, when=delay, sig=again)


def guard_queues(
    app: Celery,
    queues: Mapping[str, CircuitBreaker | str],
    registry: CircuitBreakerRegistry | None = None,
) -> None:
    """Let this application's workers consume a queue only while its circuit lets calls through.

    A circuit that may be probed gets one message at a time.  Queues that a worker does not consume
    are none of its business.

    Args:
        app: the application, before its worker starts.
        queues: the circuit of each queue, or its name.
        registry: where names are looked up, when the worker starts; None: in the configuration
            file.

    Raises:
        TypeError, ValueError: a queue or a circuit cannot be one.
    """
    for queue, circuit in queues.items():
        if not isinstance(queue, str) or not queue:
            raise TypeError(f"a queue is named by a text, not by {queue!r}")
        if isinstance(circuit, str):
            check_circuit(circuit)
        elif not isinstance(circuit, CircuitBreaker):
            raise TypeError(
                f"queue {queue!r} can't be guarded by {circuit!r}: give a circuit breaker, or the "
                f"name of a circuit"
            )
    _guards[app] = _Guards(dict(queues), registry)
    app.steps["consumer"].add(QueueGuard)


class _Guards:
    """Which circuit guards which queue of an application."""

    def __init__(
        self, queues: Mapping[str, CircuitBreaker | str], registry: CircuitBreakerRegistry | None
    ) -> None:
        self.queues = queues
        self._registry = registry

    def breaker(self, queue: str) -> CircuitBreaker:
        circuit = self.queues[queue]
        if isinstance(circuit, CircuitBreaker):
            return circuit
        if self._registry is not None:
            return self._registry.breaker(circuit)
        # The file needs packages that not everybody has.
        from ..services import current

        return current().circuit(circuit)

    def queue_of(self, app: Celery, delivery: Mapping[str, Any] | None) -> str | None:
        """The guarded queue that a message came from."""
        sent = delivery or {}
        exchange, key = sent.get("exchange") or "", sent.get("routing_key")
        for name in self.queues:
            queue = app.amqp.queues.get(name)
            # By its name: the default exchange, and what nobody has declared.
            by_name = not exchange or queue is None
            if key == name if by_name else (exchange, key) == _address(queue):
                return name
        return None

    def of_message(self, app: Celery, delivery: Mapping[str, Any] | None) -> CircuitBreaker | None:
        """The circuit of the queue that a message came from."""
        queue = self.queue_of(app, delivery)
        return None if queue is None else self.breaker(queue)


def _refusing(breaker: CircuitBreaker) -> bool:
    """Whether it refuses now.  Once per process this waits until the store has said what it knows,
    or is given up: as long as the first call would."""
    if not breaker.first_answer.done():
        breaker.snapshot()  # which starts the link in a forked child
        wait(breaker.first_answer, False)
    return breaker.refusing


def _address(queue: Any) -> tuple[str, str]:
    return queue.exchange.name, queue.routing_key


_guards: WeakKeyDictionary[Celery, _Guards] = WeakKeyDictionary()


class QueueGuard(bootsteps.StartStopStep):  # type: ignore[misc]
    """The part of a worker that stops consuming queues, and begins again.

    It works in the worker's main process, whose event loop carries everything out.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._guards = _guards[consumer.app]
        self._paused: set[str] = set()
        self._single: set[str] = set()  # paused when the next message has come
        self._probes: dict[str, Any] = {}  # the message that came last
        self._breakers: dict[str, CircuitBreaker] = {}
        self._timer: Any = None
        super().__init__(consumer, **options)

    def start(self, consumer: Any) -> None:
        """At the start, and after each loss of the broker, before anything is consumed."""
        if not self._breakers:
            self._begin(consumer)
        self._look(consumer)
        self._timer = consumer.timer.call_repeatedly(
            LOOK_EVERY, consumer.call_soon, (self._look, consumer)
        )

    def stop(self, consumer: Any) -> None:
        """At the end, and when the broker is lost."""
        if self._timer is not None:
            consumer.timer.cancel(self._timer)
            self._timer = None

    def _begin(self, consumer: Any) -> None:
        pid = os.getpid()

        def look_soon(_: object) -> None:
            # A pool process that was forked later has this listener, too, and no event loop.
            if os.getpid() == pid:
                consumer.call_soon(self._look, consumer)

        for queue in self._guards.queues.keys() & consumer.app.amqp.queues.consume_from.keys():
            breaker = self._breakers[queue] = self._guards.breaker(queue)
            breaker.on_transition(look_soon)
        signals.task_received.connect(self._received, sender=consumer)

    def _look(self, consumer: Any) -> None:
        if consumer.task_consumer is None or consumer.connection is None:
            return  # the broker is lost; start() follows
        for queue, breaker in self._breakers.items():
            if _refusing(breaker):
                if queue not in self._paused:
                    self._pause(consumer, queue)
                elif queue in self._single:
                    self._single.remove(queue)
                    consumer.cancel_task_queue(queue)
            elif queue in self._paused:
                if breaker.state in (State.CLOSED, State.FORCED_CLOSED):
                    self._resume(consumer, queue)
                elif queue not in self._single and not self._probing(queue):
                    # Tasks that are refused beside a probe would be sent back, and fetched again.
                    self._single.add(queue)
                    consumer.add_task_queue(queue)

    def _probing(self, queue: str) -> bool:
        return self._probes.get(queue) in state.reserved_requests

    def _pause(self, consumer: Any, queue: str) -> None:
        self._paused.add(queue)
        consumer.cancel_task_queue(queue)
        self._tell(queue_paused, consumer, queue, "is not consumed while circuit %s is open")

    def _resume(self, consumer: Any, queue: str) -> None:
        self._paused.remove(queue)
        self._single.discard(queue)
        self._probes.pop(queue, None)
        consumer.add_task_queue(queue)
        self._tell(queue_resumed, consumer, queue, "is consumed again: circuit %s is closed")

    def _tell(self, signal: Any, consumer: Any, queue: str, words: str) -> None:
        circuit = self._breakers[queue].name
        log.warning(f"queue %s {words}", queue, circuit)
        signal.send(sender=consumer, queue=queue, circuit=circuit)

    def _received(self, sender: Any, request: Any, **_: Any) -> None:
        queue = self._guards.queue_of(sender.app, request.delivery_info)
        if queue in self._single:
            self._single.remove(queue)
            self._probes[queue] = request
            sender.cancel_task_queue(queue)
