"""A store that is not there, or does not answer: every way works, and operators are told."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
    StoreUnavailable,
)
from tests.unit.clock import (
    BRITTLE,
    STURDY,
    Boom,
    boom,
    fail,
    open_and_refused,
    succeed,
    wait_until,
)
from tests.unit.ways import Way, every_way


@pytest.fixture
def absent(tmp_path: Path) -> Iterator[CircuitBreakerRegistry]:
    """A registry whose server is not there."""
    registry = CircuitBreakerRegistry.from_url(f"unix://{tmp_path}/absent.sock")
    yield registry
    registry.close()


@every_way
def test_without_a_store_every_way_works(absent: CircuitBreakerRegistry, way: Way) -> None:
    breaker = absent.breaker("b", Policy(failure_threshold=2, open_interval=3600.0))
    assert way(breaker, lambda: "fine") == "fine"
    for _ in range(2):
        with pytest.raises(Boom):
            way(breaker, boom)
    assert breaker.state == "open"
    with pytest.raises(CircuitBreakerOpenException) as caught:
        way(breaker, boom)
    assert (caught.value.state, caught.value.source) == ("open", "shadow")
    assert 0 < caught.value.retry_after <= 3600.0 * 1.1


def test_without_a_store_the_snapshot_is_our_own(absent: CircuitBreakerRegistry) -> None:
    breaker = absent.breaker("b", STURDY)
    succeed(breaker, 3)
    fail(breaker, 2)
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.source) == ("closed", "shadow")
    assert snapshot.shared_state is None
    assert snapshot.fleet is False
    assert snapshot.window == (5, 2, 0)
    assert snapshot.mirror_age is not None
    local = snapshot.local
    assert local["recorded"] == 5
    assert local["recorded"] == local["flushed"] + local["dropped"] + local["pending"]


OPERATIONS: dict[str, Callable[[CircuitBreaker], Any]] = {
    "force_open": lambda breaker: breaker.force_open(actor="me"),
    "force_closed": lambda breaker: breaker.force_closed(actor="me"),
    "release": lambda breaker: breaker.release(actor="me"),
    "reset": lambda breaker: breaker.reset(actor="me"),
    "force_open_async": lambda breaker: asyncio.run(breaker.force_open_async(actor="me")),
    "force_closed_async": lambda breaker: asyncio.run(breaker.force_closed_async(actor="me")),
    "release_async": lambda breaker: asyncio.run(breaker.release_async(actor="me")),
    "reset_async": lambda breaker: asyncio.run(breaker.reset_async(actor="me")),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sick", [False, True])
def test_without_a_store_operators_change_nothing(
    absent: CircuitBreakerRegistry, name: str, sick: bool
) -> None:
    breaker = absent.breaker("b", Policy(failure_threshold=1, open_interval=3600.0))
    if sick:
        fail(breaker)
    before = breaker.state
    with pytest.raises(StoreUnavailable):
        OPERATIONS[name](breaker)
    assert breaker.state == before == ("open" if sick else "closed")


def test_without_a_store_the_registry_says_so(absent: CircuitBreakerRegistry) -> None:
    succeed(absent.breaker("b"))
    with pytest.raises(StoreUnavailable):
        absent.flush()
    with pytest.raises(StoreUnavailable):
        absent.snapshot()
    with pytest.raises(StoreUnavailable):
        asyncio.run(absent.flush_async())
    with pytest.raises(StoreUnavailable):
        asyncio.run(absent.snapshot_async())


def test_without_a_store_nothing_is_logged_per_call(
    absent: CircuitBreakerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    breaker = absent.breaker("b", Policy(failure_threshold=3, open_interval=3600.0))
    fail(breaker, 3)
    for _ in range(50):
        open_and_refused(breaker)
    with pytest.raises(StoreUnavailable):
        absent.flush()
    assert len(caplog.records) <= 2
    assert not any(record.exc_info for record in caplog.records)


def test_closed_without_a_store_guards_go_on(absent: CircuitBreakerRegistry) -> None:
    breaker = absent.breaker("b", Policy(failure_threshold=1, open_interval=3600.0))
    succeed(breaker)
    absent.close()
    absent.close()
    threads = threading.active_count()
    fail(breaker)
    open_and_refused(breaker)
    other = absent.breaker("other", BRITTLE)
    succeed(other)
    assert other.state == "closed"
    with pytest.raises(StoreUnavailable):
        breaker.reset()
    with pytest.raises(StoreUnavailable):
        absent.flush()
    assert threading.active_count() == threads
    for account in (breaker.conservation(), other.conservation()):
        assert account["recorded"] == (account["flushed"] + account["dropped"] + account["pending"])


def test_closed_before_its_first_call(absent: CircuitBreakerRegistry) -> None:
    breaker = absent.breaker("b", Policy(failure_threshold=1, open_interval=3600.0))
    absent.close()
    succeed(breaker)
    fail(breaker)
    open_and_refused(breaker)


def ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("circuit-breaker")}


def test_the_links_threads_end_with_close(absent: CircuitBreakerRegistry) -> None:
    before = ours()
    succeed(absent.breaker("b"))
    started = ours() - before
    assert started
    assert all(thread.daemon for thread in started)
    absent.close()
    wait_until(lambda: not started & ours())


def test_close_ends_the_listeners_thread(registry: CircuitBreakerRegistry) -> None:
    before = ours()
    breaker = registry.breaker("b", BRITTLE)
    heard: list[object] = []
    breaker.on_transition(heard.append)
    fail(breaker)
    started = ours() - before
    assert len(started) == 1
    registry.close()
    assert len(heard) == 1, "what had happened before is still told"
    wait_until(lambda: not started & ours())


def test_after_close_no_thread_is_started(
    registry: CircuitBreakerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker = registry.breaker("b", BRITTLE)
    breaker.on_transition(lambda _: None)
    registry.close()
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread"))
    fail(breaker)
    open_and_refused(breaker)
    breaker.reset()
    succeed(breaker)


@pytest.fixture
def silent() -> Iterator[CircuitBreakerRegistry]:
    """A registry whose server takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        registry = CircuitBreakerRegistry.from_url(f"redis://127.0.0.1:{port}/0")
        yield registry
        registry.close()


async def test_a_first_call_waits_without_blocking_the_event_loop(
    silent: CircuitBreakerRegistry,
) -> None:
    """It is bounded, other tasks go on meanwhile, and nobody waits a second time."""
    breaker = silent.breaker("b", STURDY)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def fine() -> str:
        return "fine"

    counting = asyncio.create_task(count())
    assert await breaker.call_async(fine) == "fine"
    assert turns > 10
    turns = 0
    assert await silent.breaker("other").call_async(fine) == "fine"
    assert turns == 0, "it did wait again"
    counting.cancel()
