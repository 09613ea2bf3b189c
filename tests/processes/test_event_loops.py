"""Event loops and tasks that end while an admission waits for the store.

The lease of the permit outlasts the test, so a permit that is not given back leaves the circuit
half open, and nobody is let through again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    address,
    admission,
)
from scripts.servers import Server
from tests.fleet.process import until

pytestmark = pytest.mark.servers("valkey")

POLICY = Policy(
    failure_threshold=3, failure_rate=None, open_interval=0.05, success_threshold=1, jitter=0.0,
    permit_lease=3600.0, quorum=1,
)  # fmt: skip


@pytest.fixture
def store(own_server: Callable[..., Server]) -> Server:
    return own_server()


@pytest.fixture
def breaker(
    store: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CircuitBreaker]:
    """Its circuit is open, and due for a probe."""
    # A paused server is slow here, not gone.
    monkeypatch.setattr(address, "READ_TIMEOUT", 30.0)
    monkeypatch.setattr(admission, "FIRST_ANSWER", 30.0)
    with CircuitBreakerRegistry.from_url(store.url, namespace) as registry:
        breaker = registry.breaker("asked", POLICY)
        for _ in range(3):
            breaker.acquire().failure()
        registry.flush(10.0)
        until(lambda: breaker.own_view().decision.action == "ask", "it is due")
        yield breaker
        store.resume()


async def answer() -> int:
    return 42


def asking(breaker: CircuitBreaker) -> bool:
    """Whether the store has been asked for a permit, and has not answered."""
    return breaker._shadow.asking and not breaker._link._requests  # type: ignore[union-attr]


async def begun(breaker: CircuitBreaker) -> asyncio.Task[int]:
    """A task that waits for the store's answer."""
    task = asyncio.create_task(breaker.call_async(answer))
    while not asking(breaker):
        await asyncio.sleep(0.005)
    return task


def check_recovers(breaker: CircuitBreaker) -> None:
    def closed() -> bool:
        with contextlib.suppress(CircuitBreakerOpenException):
            breaker.call(int)
        return breaker.state == "closed"

    until(closed, "a permit is to be had")
    assert breaker.snapshot().totals["probes"] == 1
    account = breaker.conservation()
    assert account["dropped"] == 0
    assert account["recorded"] == account["flushed"] + account["pending"]


async def cancel(breaker: CircuitBreaker) -> None:
    task = await begun(breaker)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def time_out(breaker: CircuitBreaker) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await breaker.call_async(answer)


async def wait_for(breaker: CircuitBreaker) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(breaker.call_async(answer), 0.1)


async def fail_beside(breaker: CircuitBreaker) -> None:
    """Another task of its group fails."""

    async def fail() -> None:
        while not asking(breaker):
            await asyncio.sleep(0.005)
        raise ValueError

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(breaker.call_async(answer))
            group.create_task(fail())


async def end(breaker: CircuitBreaker) -> None:
    """The program ends: asyncio.run cancels what is left."""
    await begun(breaker)


@pytest.mark.parametrize("way", [cancel, time_out, wait_for, fail_beside, end])
def test_who_gives_up_while_the_store_is_asked_gives_the_permit_back(
    store: Server, breaker: CircuitBreaker, way: Callable[..., Coroutine[Any, Any, None]]
) -> None:
    store.pause()
    asyncio.run(way(breaker))
    store.resume()
    check_recovers(breaker)


def test_a_loop_that_is_closed_with_the_task_in_it(
    store: Server, breaker: CircuitBreaker, caplog: pytest.LogCaptureFixture
) -> None:
    store.pause()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begun(breaker))
    loop.close()
    store.resume()
    until(lambda: not breaker._shadow.asking, "the answer")

    def collected() -> bool:
        gc.collect()
        return any("destroyed" in record.getMessage() for record in caplog.records)

    until(collected, "asyncio's complaint")
    check_recovers(breaker)
    assert {record.name for record in caplog.records} == {"asyncio"}


async def test_a_task_cancelled_together_with_the_answer_is_cancelled() -> None:
    """On Python 3.11, asyncio.wait_for forgets it."""
    future: Future[str] = Future()
    task = asyncio.create_task(admission.wait_async(future, True))
    await asyncio.sleep(0)
    future.set_result("a permit")
    await asyncio.sleep(0)  # The loop has the answer, the task not yet.
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_first_call_that_is_cancelled_leaves_the_others_waiting(
    store: Server, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All wait for one first answer."""
    monkeypatch.setattr(address, "READ_TIMEOUT", 30.0)
    monkeypatch.setattr(admission, "FIRST_ANSWER", 30.0)

    async def calls(breaker: CircuitBreaker) -> list[Any]:
        tasks = [asyncio.create_task(breaker.call_async(answer)) for _ in range(4)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.wait(tasks[::2])
        assert not any(task.done() for task in tasks[1::2])
        store.resume()
        return await asyncio.gather(*tasks, return_exceptions=True)

    store.pause()
    with CircuitBreakerRegistry.from_url(store.url, namespace) as registry:
        said = asyncio.run(calls(registry.breaker("new")))
        assert [type(each) for each in said] == [asyncio.CancelledError, int] * 2
        assert registry.breaker("new").own_view().decision.source == "shared"
