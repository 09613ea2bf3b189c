"""Slots are handed on in order, and none is lost, whatever becomes of those who wait."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distributed_breaker.compose import Bulkhead, BulkheadFull, deadline
from tests.unit.clock import wait_until


def test_those_who_wait_get_their_turn_in_order() -> None:
    bulkhead = Bulkhead(1, queue=2, max_wait=60.0)
    order: list[int] = []

    def enter(i: int) -> None:
        with bulkhead.slot():
            order.append(i)

    with ThreadPoolExecutor(2) as pool:
        with bulkhead.slot():
            first = pool.submit(enter, 1)
            wait_until(lambda: len(bulkhead._waiting) == 1)
            second = pool.submit(enter, 2)
            wait_until(lambda: len(bulkhead._waiting) == 2)
            with pytest.raises(BulkheadFull, match="2 more may wait"):
                enter(3)
        first.result(10)
        second.result(10)
    assert order == [1, 2]
    assert (bulkhead.in_use, len(bulkhead._waiting)) == (0, 0)


def test_who_has_waited_too_long_is_refused() -> None:
    bulkhead = Bulkhead(1, queue=1, max_wait=0.01)
    with bulkhead.slot(), pytest.raises(BulkheadFull, match="in time"), bulkhead.slot():
        pass
    patient = Bulkhead(1, queue=1, max_wait=60.0)
    with deadline(0.01), patient.slot(), pytest.raises(BulkheadFull), patient.slot():
        pass
    for left in (bulkhead, patient):
        assert (left.in_use, len(left._waiting)) == (0, 0)


def test_tasks_and_threads_share_the_slots() -> None:
    bulkhead = Bulkhead(1, queue=2, max_wait=60.0)
    has_it, may_go = threading.Event(), threading.Event()

    def in_a_thread() -> None:
        with bulkhead.slot():
            has_it.set()
            may_go.wait(10)

    async def several() -> None:
        thread = threading.Thread(target=in_a_thread)
        async with bulkhead.slot():
            task = asyncio.ensure_future(bulkhead.slot().__aenter__())
            await asyncio.sleep(0)
            assert len(bulkhead._waiting) == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(bulkhead._waiting) == 0
            thread.start()
        assert await asyncio.to_thread(has_it.wait, 10)
        bulkhead.max_wait = 0.01
        with pytest.raises(BulkheadFull):
            async with bulkhead.slot():
                pass
        may_go.set()
        await asyncio.to_thread(thread.join, 10)

    asyncio.run(several())


def test_a_slot_that_came_at_the_last_moment_is_given_back() -> None:
    async def cancelled_as_it_comes() -> None:
        first = bulkhead.slot()
        await first.__aenter__()
        task = asyncio.ensure_future(bulkhead.slot().__aenter__())
        await asyncio.sleep(0)
        await first.__aexit__(None, None, None)  # hands the slot on
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    bulkhead = Bulkhead(1, queue=2, max_wait=60.0)
    asyncio.run(cancelled_as_it_comes())
    assert bulkhead.in_use == 0


def test_a_slot_given_back_just_before_somebody_waits_is_not_overlooked() -> None:
    bulkhead = Bulkhead(1, queue=1)
    assert bulkhead.queue_up(bulkhead.free).done()
    assert bulkhead.in_use == 1


def test_never_more_than_the_limit_and_nothing_is_lost() -> None:
    bulkhead = Bulkhead(3, queue=1_000, max_wait=60.0)
    inside = 0
    most = 0
    lock = threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        for _ in range(200):
            with bulkhead.slot():
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8), timeout=60))
    assert most <= 3
    assert (bulkhead.in_use, len(bulkhead._waiting)) == (0, 0)


def test_a_child_has_all_slots_and_gives_none_of_its_parents_back() -> None:
    bulkhead = Bulkhead(2)
    with bulkhead.slot():
        bulkhead.forked()
        assert bulkhead.in_use == 0
    assert (bulkhead.in_use, len(bulkhead.free)) == (0, 2)


@pytest.mark.parametrize("bad", [{"limit": 0}, {"queue": -1}, {"max_wait": -0.1}])
def test_numbers_that_cannot_be(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Bulkhead(**{"limit": 1, **bad})
