"""What a Celery task does when a circuit refuses its work, as a worker runs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from celery.exceptions import Reject, Retry
from celery.result import EagerResult
from kombu import Exchange, Queue

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
)
from distributed_breaker.integrations.celery import SINCE, BreakerTask, guard_queues
from distributed_breaker.services import UnknownService, initialize, shut_down
from tests.unit.clock import BRITTLE, FakeClock

QUEUE = "predictions"


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_create_missing_queues = True
    yield app
    with app.connection_for_write() as connection:
        for queue in (QUEUE, "other"):
            connection.default_channel.queue_purge(queue)
    app.close()


@pytest.fixture
def breaker(clock: FakeClock) -> Iterator[CircuitBreaker]:
    with CircuitBreakerRegistry.from_url("memory://", clock=clock) as registry:
        yield registry.breaker("model", BRITTLE)


def opened(breaker: CircuitBreaker) -> CircuitBreaker:
    """For a minute from now on."""
    with breaker.guard() as call:
        call.failure()
    return breaker


def task_of(app: Celery, breaker: CircuitBreaker, name: str = "predict", **options: Any) -> Any:
    """A task that calls through the breaker."""

    @app.task(base=BreakerTask, name=name, **options)
    def predict(number: int) -> int:
        return breaker.call(lambda: number)

    return predict


def run(app: Celery, task: Any, *, queue: str = QUEUE, **request: Any) -> tuple[str, Any]:
    """Run it as a worker does; its state, and its result or error."""
    about = {
        "id": "1", "called_directly": False, "retries": 0,
        "delivery_info": {"exchange": "", "routing_key": queue}, **request,
    }  # fmt: skip
    tracer = build_tracer(task.name, task, app=app)
    traced = tracer("1", (7,), {}, about)
    state = traced.info.state if traced.info else "SUCCESS"
    return state, traced.info.retval if traced.info else traced.retval


def sent_back(app: Celery, queue: str = QUEUE) -> list[dict[str, Any]]:
    """The headers of the messages in a queue."""
    found = []
    with app.connection_for_read() as connection:
        while message := connection.default_channel.basic_get(queue, no_ack=True):
            found.append(message.headers)
    return found


def wait_of(headers: dict[str, Any]) -> float:
    return datetime.fromisoformat(headers["eta"]).timestamp() - time.time()


@pytest.mark.parametrize("retries", [0, 3])
def test_a_refused_task_goes_back_and_loses_no_retry(
    app: Celery, breaker: CircuitBreaker, retries: int
) -> None:
    task = task_of(app, opened(breaker), max_retries=3)
    state, retry = run(app, task, retries=retries, headers={"tenant": "one"})
    assert state == "RETRY"
    assert isinstance(retry, Retry)
    (headers,) = sent_back(app)
    assert (headers["id"], headers["task"]) == ("1", "predict")
    assert headers["retries"] == retries
    assert headers["tenant"] == "one"
    assert 60 - 5 < wait_of(headers) < 60 * 1.25 + 1
    assert abs(headers[SINCE] - time.time()) < 30


def test_the_waits_differ(app: Celery, breaker: CircuitBreaker) -> None:
    task = task_of(app, opened(breaker))
    for _ in range(20):
        run(app, task)
    waits = [wait_of(headers) for headers in sent_back(app)]
    assert max(waits) - min(waits) > 1


def test_a_wait_has_bounds(app: Celery, breaker: CircuitBreaker) -> None:
    """One that the circuit does not know, and one that a message should not be held for."""
    task = task_of(app, breaker, refusal_jitter=0.0, refusal_longest_delay=20.0)
    breaker.force_open()
    run(app, task)
    breaker.reset()
    opened(breaker)
    run(app, task)
    unknown, bounded = map(wait_of, sent_back(app))
    assert 5 < unknown < 11
    assert 15 < bounded < 21


def test_it_does_not_wait_for_ever(app: Celery, breaker: CircuitBreaker) -> None:
    """Its age counts from the first refusal, which the message carries."""
    task = task_of(app, opened(breaker), refusal_max_age=100.0)
    state, _ = run(app, task, headers={SINCE: time.time() - 90})
    assert state == "RETRY"
    (headers,) = sent_back(app)
    assert headers[SINCE] < time.time() - 80
    state, error = run(app, task, headers={SINCE: time.time() - 101})
    assert (state, type(error)) == ("FAILURE", CircuitBreakerOpenException)
    assert sent_back(app) == []
    eternal = task_of(app, breaker, "eternal", refusal_max_age=None)
    assert run(app, eternal, headers={SINCE: 0})[0] == "RETRY"


@pytest.mark.parametrize("since", ["yesterday", None, 1e12, []])
def test_an_age_that_cannot_be_one_begins_anew(
    app: Celery, breaker: CircuitBreaker, since: Any
) -> None:
    assert run(app, task_of(app, opened(breaker)), headers={SINCE: since})[0] == "RETRY"
    (headers,) = sent_back(app)
    assert abs(headers[SINCE] - time.time()) < 30


@pytest.mark.parametrize("way", ["autoretry", "retry"])
def test_celerys_own_retries_use_up_none_either(
    app: Celery, breaker: CircuitBreaker, way: str
) -> None:
    opened(breaker)
    if way == "autoretry":
        task = task_of(app, breaker, autoretry_for=(Exception,), max_retries=2)
    else:

        @app.task(base=BreakerTask, name="predict", bind=True, max_retries=0)
        def task(self: Any, number: int) -> int:
            try:
                return breaker.call(lambda: number)
            except CircuitBreakerOpenException as refusal:
                raise self.retry(exc=refusal) from None

    assert run(app, task, retries=2 if way == "autoretry" else 0)[0] == "RETRY"
    (headers,) = sent_back(app)
    assert headers["retries"] == (2 if way == "autoretry" else 0)
    # They still are used up by the task's own errors.
    old = {SINCE: time.time() - 1e6}
    assert run(app, task, headers=old)[0] == "FAILURE"


def test_other_errors_and_results_are_untouched(app: Celery, breaker: CircuitBreaker) -> None:
    assert run(app, task_of(app, breaker)) == ("SUCCESS", 7)

    @app.task(base=BreakerTask, name="boom")
    def boom(number: int) -> None:
        raise OSError("the model is gone")

    state, error = run(app, boom)
    assert (state, type(error)) == ("FAILURE", OSError)
    assert sent_back(app) == []


def test_called_directly_or_eagerly_it_raises(app: Celery, breaker: CircuitBreaker) -> None:
    task = task_of(app, opened(breaker))
    with pytest.raises(CircuitBreakerOpenException):
        task(7)
    result: EagerResult = task.apply((7,))
    assert isinstance(result.result, CircuitBreakerOpenException)


@pytest.mark.parametrize("late", [False, True])
def test_a_task_that_cannot_be_sent_back_is_not_lost(
    app: Celery, breaker: CircuitBreaker, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker keeps what it has not been told is done; else the refusal is the task's error."""

    def away(*_: Any, **__: Any) -> None:
        raise OSError("the broker is away")

    task = task_of(app, opened(breaker), acks_late=late)
    monkeypatch.setattr(app.amqp, "send_task_message", away)
    monkeypatch.setattr(type(app.amqp), "send_task_message", away, raising=False)
    state, error = run(app, task)
    if late:
        assert isinstance(error, Reject)
        assert error.requeue
    else:
        assert (state, type(error)) == ("FAILURE", CircuitBreakerOpenException)


def test_a_task_of_a_guarded_queue_does_not_begin(app: Celery, breaker: CircuitBreaker) -> None:
    app.conf.task_queues = [
        Queue(QUEUE, Exchange("models", type="direct"), routing_key="model.predict"),
        Queue("other"),
    ]
    guard_queues(app, {QUEUE: opened(breaker)})
    began: list[int] = []

    @app.task(base=BreakerTask, name="predict")
    def predict(number: int) -> None:
        began.append(number)

    named = {"exchange": "models", "routing_key": "model.predict"}
    assert run(app, predict)[0] == "RETRY"
    assert run(app, predict, delivery_info=named)[0] == "RETRY"
    assert began == []
    assert run(app, predict, queue="other")[0] == "SUCCESS"
    assert run(app, predict, delivery_info={**named, "routing_key": QUEUE})[0] == "SUCCESS"
    assert run(app, predict, delivery_info=None)[0] == "SUCCESS"
    breaker.reset()
    assert run(app, predict)[0] == "SUCCESS"


def test_a_circuit_may_be_named_as_the_file_names_it(app: Celery, tmp_path: Any) -> None:
    """With the file's policy, so that the client that is made of it later has the same circuit."""
    settings = {"redis_url": "memory://", "default_failure_threshold": 7}
    services = {"celery_workers": {"cache": {}}}
    overrides = {"settings": settings, "services": services}
    file = tmp_path / "breakers.json"
    file.write_text("{}")
    services_in_force = initialize(file, environ={}, overrides=overrides)
    try:
        guard_queues(app, {QUEUE: "celery_workers.cache", "other": "celery_workers.ml"})
        services_in_force.circuit("celery_workers.cache").force_open()
        task = task_of(app, services_in_force.registry.breaker("another"))
        assert run(app, task)[0] == "RETRY"
        client = services_in_force.client("cache", "celery_workers")
        assert client.breaker is services_in_force.circuit("celery_workers.cache")
        assert client.breaker.policy.failure_threshold == 7
        state, error = run(app, task, queue="other")
        assert (state, type(error)) == ("FAILURE", UnknownService)
        assert "celery_workers.cache" in str(error)
    finally:
        shut_down()


@pytest.mark.parametrize(
    ("queues", "words"),
    [
        ({"": "model"}, "named by a text"),
        ({3: "model"}, "named by a text"),
        ({QUEUE: "no such {name}"}, "no such"),
        ({QUEUE: None}, "can't be guarded by None"),
    ],
)
def test_what_cannot_be_guarded_is_refused_in_words(app: Celery, queues: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        guard_queues(app, queues)
