"""The order of a pipeline's parts, and what of them the circuit is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerOpenException, Policy
from distributed_breaker.compose import (
    Bulkhead,
    BulkheadFull,
    CallTimeout,
    DeadlineExceeded,
    Pipeline,
    Retry,
    RetryBudget,
    check,
    deadline,
    remaining,
)
from tests.unit.clock import Boom, FakeClock, boom

Ask = Callable[..., Any]

PICKY = Policy(failure_threshold=1_000, failure_rate=None, ignore=(LookupError,))


class Flaky:
    """Fails so many times, and then answers with what it is given."""

    def __init__(self, failures: int, error: type[Exception] = Boom) -> None:
        self.left = failures
        self.error = error
        self.calls = 0

    def __call__(self, value: str = "fine") -> str:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error("not yet")
        return value


def counts(breaker: CircuitBreaker) -> dict[str, int]:
    totals = breaker.snapshot().totals
    names = ("calls", "failures", "ignored", "rejected", "fallbacks")
    return {name: totals[name] for name in names if totals.get(name)}


def quick(attempts: int = 3, **options: Any) -> Retry:
    return Retry(attempts, **{"first_wait": 0.0, "budget": None, **options})


def trip(breaker: CircuitBreaker) -> None:
    breaker.acquire().failure(open_for=60.0)


async def hang() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------- nothing, and all


def test_a_pipeline_without_parts_is_its_circuit(ask: Ask, breaker: CircuitBreaker) -> None:
    pipeline = Pipeline(breaker)
    assert ask(pipeline, lambda x: x, "fine") == "fine"
    with pytest.raises(Boom):
        ask(pipeline, boom)
    assert counts(breaker) == {"calls": 2, "failures": 1}
    assert (pipeline._call, pipeline._call_async) == (breaker.call, breaker.call_async)


def test_decorated_functions_keep_what_they_are(breaker: CircuitBreaker) -> None:
    pipeline = Pipeline(breaker, retry=quick())

    @pipeline
    def greet(name: str, *, loud: bool = False) -> str:
        """Says hello."""
        return name.upper() if loud else name

    @pipeline
    async def greet_later(name: str) -> str:
        return name

    assert greet("you", loud=True) == "YOU"
    assert greet.__doc__ == "Says hello."
    assert asyncio.run(greet_later("you")) == "you"
    with pytest.raises(TypeError, match="generator"):

        @pipeline
        def many() -> Any:
            yield 1


def test_all_parts_together_in_the_documented_order(ask: Ask, brittle: CircuitBreaker) -> None:
    """Each attempt takes a slot and is an outcome; the fallback sees what ended the last."""
    seen: list[str] = []
    bulkhead = Bulkhead(1)

    def fails() -> NoReturn:
        left = remaining()
        assert left is not None
        assert left <= 2.0, "the timeout of one attempt"
        seen.append(f"attempt with {bulkhead.in_use} slot")
        raise Boom

    def instead(error: Exception) -> str:
        seen.append(f"fallback after {type(error).__name__} with {bulkhead.in_use} slots")
        return "kept"

    pipeline = Pipeline(
        brittle, timeout=2.0, deadline=9.0, retry=quick(5), bulkhead=bulkhead, fallback=instead
    )
    assert ask(pipeline, fails) == "kept"
    attempt = "attempt with 1 slot"
    assert seen == [attempt, attempt, "fallback after Boom with 0 slots"], "the circuit opened"
    assert brittle.state == "open"
    assert counts(brittle) == {"calls": 2, "failures": 2, "fallbacks": 1}
    assert ask(pipeline, fails) == "kept"
    assert seen[3:] == ["fallback after CircuitBreakerOpenException with 0 slots"]


# ---------------------------------------------------------------------------- retries


def test_what_the_circuit_counts_as_a_failure_is_tried_again(
    ask: Ask, breaker: CircuitBreaker
) -> None:
    flaky = Flaky(2)
    assert ask(Pipeline(breaker, retry=quick(3)), flaky, "fine") == "fine"
    assert counts(breaker) == {"calls": 3, "failures": 2}
    with pytest.raises(Boom):
        ask(Pipeline(breaker, retry=quick(3)), Flaky(9))
    assert counts(breaker)["calls"] == 6


def test_what_is_not_tried_again(ask: Ask, registry: Any) -> None:
    breaker = registry.breaker("picky", PICKY)
    for retry, error in ((quick(), LookupError), (quick(on=ConnectionError), Boom)):
        flaky = Flaky(9, error)
        with pytest.raises(error):
            ask(Pipeline(breaker, retry=retry), flaky)
        assert flaky.calls == 1
    trip(breaker)
    with pytest.raises(CircuitBreakerOpenException):
        ask(Pipeline(breaker, retry=quick()), Flaky(0))
    assert counts(breaker)["rejected"] == 1


def test_retries_stay_within_their_budget(ask: Ask, breaker: CircuitBreaker) -> None:
    budget = RetryBudget(0.05)
    flaky = Flaky(1_000)
    pipelines = [Pipeline(breaker, retry=quick(2, budget=budget)) for _ in range(2)]
    for i in range(100):
        with pytest.raises(Boom):
            ask(pipelines[i % 2], flaky)
    assert flaky.calls == 105, "what the first hundred earn was lent them"
    for i in range(40):
        with pytest.raises(Boom):
            ask(pipelines[i % 2], flaky)
    assert flaky.calls == 147
    budget.forked()
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]
    for _ in range(1_000):
        budget.called()
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False], "not saved up"


def test_a_wait_that_outlasts_the_deadline_is_not_begun(
    time: FakeClock, breaker: CircuitBreaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry = quick(9, first_wait=4.0, longest_wait=8.0)
    monkeypatch.setattr(retry, "_backoff", lambda attempt, first, most: first)
    flaky = Flaky(9)
    with pytest.raises(Boom):
        Pipeline(breaker, timeout=1.0, deadline=10.0, retry=retry).call(flaky)
    assert flaky.calls == 3, "at 0, 4 and 8 s"
    assert time() == 1_008.0


# ---------------------------------------------------------------------------- time


def test_a_coroutine_is_cancelled_when_its_time_is_over(breaker: CircuitBreaker) -> None:
    ended: list[BaseException] = []

    async def hangs() -> None:
        try:
            await hang()
        except BaseException as error:
            ended.append(error)
            raise

    with pytest.raises(CallTimeout, match=r"longer than 0\.01 s"):
        asyncio.run(Pipeline(breaker, timeout=0.01).call_async(hangs))
    assert isinstance(ended[0], asyncio.CancelledError)
    assert counts(breaker) == {"calls": 1, "failures": 1}


def test_its_own_timeouts_are_not_taken_for_ours(ask: Ask, breaker: CircuitBreaker) -> None:
    with pytest.raises(TimeoutError, match="mine") as caught:
        ask(Pipeline(breaker, timeout=9.0), Flaky(1, _Mine))
    assert type(caught.value) is _Mine
    assert counts(breaker) == {"calls": 1, "failures": 1}


class _Mine(TimeoutError):
    def __init__(self, _: str) -> None:
        super().__init__("mine")


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_result_that_comes_late_is_returned_and_counted_as_a_timeout(
    swallowed: bool, time: FakeClock, breaker: CircuitBreaker
) -> None:
    pipeline = Pipeline(breaker, timeout=2.0)

    def late() -> str:
        assert remaining() == 2.0
        time.advance(2.0)
        with pytest.raises(DeadlineExceeded):
            check()
        return "late"

    async def late_too() -> str:
        return late()

    result = asyncio.run(pipeline.call_async(late_too)) if swallowed else pipeline.call(late)
    assert result == "late"
    assert counts(breaker) == {"calls": 1, "failures": 1}
    breaker.acquire().failure(open_for=1.0)
    assert remaining() is None


def test_an_attempt_cut_short_by_the_callers_deadline_says_nothing_of_the_dependency(
    ask: Ask, time: FakeClock, breaker: CircuitBreaker
) -> None:
    def slow(error: Exception | None = None) -> str:
        time.advance(1.5)
        if error:
            raise error
        return "late"

    pipeline = Pipeline(breaker, timeout=2.0)
    with deadline(1.0):
        assert ask(pipeline, slow) == "late"
    with deadline(1.0), pytest.raises(Boom):
        ask(pipeline, slow, Boom())
    assert counts(breaker) == {"calls": 2, "ignored": 2}
    with deadline(1.0):
        time.advance(1.0)
        with pytest.raises(DeadlineExceeded):
            ask(pipeline, boom)
    assert counts(breaker)["calls"] == 2, "it was not called"
    with deadline(3.0), pytest.raises(Boom):
        ask(pipeline, slow, Boom())
    assert counts(breaker) == {"calls": 3, "failures": 1, "ignored": 2}


def test_a_coroutine_cut_short_raises_that_the_deadline_is_exceeded(
    breaker: CircuitBreaker,
) -> None:
    with deadline(0.01), pytest.raises(DeadlineExceeded):
        asyncio.run(Pipeline(breaker, timeout=9.0).call_async(hang))
    assert counts(breaker) == {"calls": 1, "ignored": 1}


def test_a_cancelled_call_is_ignored_and_leaves_no_deadline(breaker: CircuitBreaker) -> None:
    async def cancelled() -> None:
        task = asyncio.ensure_future(Pipeline(breaker, timeout=9.0).call_async(hang))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert remaining() is None

    asyncio.run(cancelled())
    assert counts(breaker) == {"calls": 1, "ignored": 1}


def test_deadlines_only_get_shorter(time: FakeClock) -> None:
    with deadline(5.0):
        with deadline(9.0):
            assert remaining() == 5.0
        with deadline(1.0):
            assert remaining() == 1.0
            time.advance(3.0)
            assert remaining() == 0.0
        check()
        assert remaining() == 2.0
    with pytest.raises(ValueError, match="seconds=-1"), deadline(-1):
        pass


@pytest.mark.parametrize(
    "times", [{"deadline": 5.0}, {"timeout": 5.0, "deadline": 5.0}, {"timeout": 0}, {"timeout": -1}]
)
def test_times_that_cannot_be(times: dict[str, float], breaker: CircuitBreaker) -> None:
    with pytest.raises(ValueError, match=next(reversed(times))):
        Pipeline(breaker, **times)


# ---------------------------------------------------------------------------- fallbacks


def test_a_fallback_answers_what_the_dependency_does_not(ask: Ask, registry: Any) -> None:
    breaker = registry.breaker("picky", PICKY)
    pipeline = Pipeline(breaker, fallback=lambda error: type(error).__name__)
    assert ask(pipeline, boom) == "Boom"
    with pytest.raises(LookupError):
        ask(pipeline, Flaky(1, LookupError))
    trip(breaker)
    assert ask(pipeline, boom) == "CircuitBreakerOpenException"
    assert counts(breaker)["fallbacks"] == 2


def test_a_fallback_that_fails_shows_both_errors(ask: Ask, breaker: CircuitBreaker) -> None:
    def broken(error: Exception) -> NoReturn:
        raise LookupError("nothing kept")

    with pytest.raises(LookupError) as caught:
        ask(Pipeline(breaker, fallback=broken), boom)
    assert isinstance(caught.value.__context__, Boom)
    assert "fallbacks" not in counts(breaker)


def test_a_fallback_may_be_awaited(breaker: CircuitBreaker) -> None:
    async def kept(error: Exception) -> str:
        await asyncio.sleep(0)
        return "kept"

    async def fails() -> NoReturn:
        raise Boom

    pipeline = Pipeline(breaker, fallback=kept)
    assert asyncio.run(pipeline.call_async(fails)) == "kept"
    with pytest.raises(TypeError, match="call_async"):
        pipeline.call(boom)
    assert counts(breaker)["calls"] == 1


# ---------------------------------------------------------------------------- bulkheads


def test_a_full_bulkhead_refuses_and_the_circuit_does_not_hear_of_it(
    ask: Ask, breaker: CircuitBreaker
) -> None:
    bulkhead = Bulkhead(1)
    pipeline = Pipeline(breaker, bulkhead=bulkhead, retry=quick())
    with bulkhead.slot(), pytest.raises(BulkheadFull, match="1 calls"):
        ask(pipeline, boom)
    assert counts(breaker) == {}
    kept = Pipeline(breaker, bulkhead=bulkhead, fallback=lambda error: type(error).__name__)
    with bulkhead.slot():
        assert ask(kept, boom) == "BulkheadFull"
    assert ask(pipeline, lambda: "fine") == "fine"


def test_no_slot_is_kept_while_a_retry_waits(
    ask: Ask, breaker: CircuitBreaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulkhead, retry = Bulkhead(1), quick(2)
    free: list[bool] = []

    def no_wait(attempt: int, first: float, most: float) -> float:
        free.append(not bulkhead.full)
        return 0.0

    monkeypatch.setattr(retry, "_backoff", no_wait)
    assert ask(Pipeline(breaker, bulkhead=bulkhead, retry=retry), Flaky(1)) == "fine"
    assert free == [True]


def test_nobody_waits_for_a_slot_of_an_open_circuit(ask: Ask, breaker: CircuitBreaker) -> None:
    bulkhead = Bulkhead(1, queue=9, max_wait=60.0)
    trip(breaker)
    with bulkhead.slot(), pytest.raises(CircuitBreakerOpenException):
        ask(Pipeline(breaker, bulkhead=bulkhead), boom)
    assert counts(breaker)["rejected"] == 1
