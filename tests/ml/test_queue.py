"""Calls that wait, are run together, and are refused when there is no room for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.clients.ml import InferenceTimeout, MlClient, ModelOverloaded
from distributed_breaker.clients.ml_batches import Joins
from tests.ml.conftest import Start
from tests.ml.models import OfAll, Steered, linear, row
from tests.unit.clock import wait_until

PLAIN: dict[str, Any] = {"cache_predictions": False}


@pytest.fixture
def model() -> Steered:
    return Steered()


@pytest.fixture
def client(start: Start, model: Steered) -> MlClient:
    """A client that knows already that inputs can be joined."""
    client = start({"model": model}, **PLAIN)
    client.predict(row())
    wait_until(lambda: model.seen == [1, 1, 2, 3])
    model.seen.clear()
    return client


class Callers:
    """Threads that each wait for one prediction."""

    def __init__(self, client: MlClient) -> None:
        self.client = client
        self._pool = ThreadPoolExecutor(40)

    def ask(self, value: float, **options: Any) -> Future[Any]:
        """Ask for one more, and come back when it waits."""
        before = self.client.model.queue.length
        asked = self._pool.submit(self.client.predict, row(value), **options)
        wait_until(lambda: self.client.model.queue.length == before + 1 or asked.done())
        return asked

    def busy(self, model: Steered) -> Future[Any]:
        """Have one call hold the model."""
        model.holds()
        asked = self._pool.submit(self.client.predict, row(0.0))
        model.wait_entered()
        return asked

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def callers(client: MlClient, model: Steered) -> Any:
    callers = Callers(client)
    yield callers
    model.gate.set()
    callers.close()


class TestTogether:
    def test_those_that_wait_are_run_at_once(self, callers: Callers, model: Steered) -> None:
        first = callers.busy(model)
        rest = [callers.ask(float(i)) for i in range(1, 9)]
        model.gate.set()
        assert torch.equal(first.result(30), row(0.0))
        for i, asked in enumerate(rest, 1):
            assert torch.equal(asked.result(30), row(2.0 * i)), "each its own"
        assert model.seen == [1, 8]
        stats = callers.client.stats()["model"]
        assert (stats["runs"], stats["inputs"], stats["most_in_a_run"]) == (3, 10, 8)

    def test_no_more_than_a_batch(self, callers: Callers, model: Steered) -> None:
        client = callers.client
        client.configure(client.section.model_copy(update={"max_batch_size": 4}))
        callers.busy(model)
        rest = [callers.ask(float(i)) for i in range(10)]
        model.gate.set()
        assert [int(asked.result(30)[0, 0]) for asked in rest] == [2 * i for i in range(10)]
        assert model.seen == [1, 4, 4, 2]

    async def test_coroutines_too(self, client: MlClient, model: Steered) -> None:
        model.holds()
        first = asyncio.create_task(client.predict_async(row(0.0)))
        await asyncio.to_thread(model.wait_entered)
        rest = [asyncio.create_task(client.predict_async(row(float(i)))) for i in range(5)]
        while client.model.queue.length < 5:
            await asyncio.sleep(0)
        model.gate.set()
        assert [int(got[0, 0]) for got in await asyncio.gather(*rest)] == [0, 2, 4, 6, 8]
        await first
        assert model.seen == [1, 5]

    def test_only_what_is_alike(self, callers: Callers, model: Steered) -> None:
        callers.busy(model)
        pool, client = callers._pool, callers.client
        kinds = [row(1.0), row(2.0), torch.ones(1, 7), row(3.0), row(1.0).double()]
        asked = []
        for given in kinds:
            waiting = client.model.queue.length
            asked.append(pool.submit(client.predict, given))
            wait_until(lambda waiting=waiting: client.model.queue.length == waiting + 1)
        model.gate.set()
        for given, got in zip(kinds, asked, strict=True):
            assert torch.equal(got.result(30), given * 2)
        assert model.seen == [1, 2, 1, 1, 1]

    def test_one_at_fault_fails_alone(self, callers: Callers, model: Steered) -> None:
        callers.busy(model)
        model.fails_at = 3.0
        rest = [callers.ask(float(i)) for i in range(1, 6)]
        model.gate.set()
        for i, asked in enumerate(rest, 1):
            if i == 3:
                with pytest.raises(ValueError, match="at fault"):
                    asked.result(30)
            else:
                assert int(asked.result(30)[0, 0]) == 2 * i

    def test_nan_of_one_is_nobody_elses(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, **PLAIN)
        client.predict(row())
        wait_until(lambda: model.seen == [1, 1, 2, 3])
        model.gives = torch.tensor([[1.0] * 4, [float("nan")] * 4, [3.0] * 4])
        found = client.predict_batch_with_info([row(), row(2.0), row(3.0)], default="none")
        assert model.seen[4:] == [3]
        assert [info.source for info in found] == ["model", "default", "model"]

    def test_a_batch_of_a_model_that_has_changed_is_thrown_away(
        self, callers: Callers, model: Steered
    ) -> None:
        engine = callers.client.model.engine
        callers.busy(model)
        rest = [callers.ask(float(i)) for i in range(1, 4)]
        run = engine.run

        def changing(inputs: Any, seconds: float) -> Any:
            output = run(inputs, seconds)
            if len(inputs) == 3:
                engine.version = "another"
                return output + 100
            return output

        engine.run = changing
        model.gate.set()
        assert [int(asked.result(30)[0, 0]) for asked in rest] == [2, 4, 6]
        assert model.seen == [1, 3, 1, 1, 1]

    def test_a_bounded_wait_for_others(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, batch_wait=30.0 / 10, max_batch_size=2, **PLAIN)
        client.predict(row())
        wait_until(lambda: model.seen == [1, 1, 2, 3])
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(client.predict, [row(1.0), row(2.0)]))
        assert [int(each[0, 0]) for each in got] == [2, 4]
        assert model.seen[4:] == [2], "the second one was waited for, and no longer"

    def test_memory_runs_out(self, callers: Callers, model: Steered) -> None:
        callers.busy(model)
        model.most_rows = 3
        rest = [callers.ask(float(i)) for i in range(16)]
        model.gate.set()
        assert [int(asked.result(30)[0, 0]) for asked in rest] == [2 * i for i in range(16)]
        queue = callers.client.model.queue
        assert queue.room == 2
        assert callers.client.breaker.snapshot().totals.get("failures", 0) == 0
        model.most_rows = 100
        for _ in range(3):
            assert len(callers.client.predict_batch([row(float(i)) for i in range(256)])) == 256
        assert queue.room == 32, "and it grows back"

    def test_down_to_one(self, client: MlClient, model: Steered) -> None:
        model.most_rows = 0
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            client.predict_batch([row(), row(2.0), row(3.0), row(4.0)])
        assert client.model.queue.room == 1
        assert client.breaker.snapshot().totals["failures"] == 1


class TestWhatCanBeJoined:
    """Found out by trying."""

    @staticmethod
    def how(model: Callable[[Any], Any], given: Any) -> str:
        joins = Joins("")
        assert joins.unknown(given)
        joins.learn(model, given)
        assert not joins.unknown(given)
        kind = joins.kind(given)
        return "" if kind is None else str(kind[0])

    def test_rows(self) -> None:
        assert self.how(linear(), row()) == "cat"

    def test_samples_without_a_batch_dimension(self) -> None:
        assert self.how(linear(), torch.ones(4)) == "stack"
        joins, model = Joins(""), linear()
        joins.learn(model, torch.ones(4))
        inputs = [torch.full((4,), float(i)) for i in range(3)]
        for given, got in zip(inputs, joins.run(model, inputs), strict=True):
            assert torch.allclose(got, model(given))

    def test_not_what_looks_at_all_of_a_batch(self) -> None:
        assert self.how(OfAll(), torch.arange(6.0).reshape(1, 6)) == ""
        assert self.how(lambda x: x / x.sum(), torch.ones(2, 3)) == ""
        assert self.how(lambda x: x.flip(0), torch.arange(4.0)) == ""

    def test_not_what_fails_or_has_no_tensors(self) -> None:
        def one_row(given: torch.Tensor) -> torch.Tensor:
            assert len(given) == 1
            return given

        assert self.how(one_row, torch.ones(1, 3)) == ""
        assert not Joins("").unknown("text")
        assert not Joins("").unknown([1.0, 2.0])

    def test_trees(self) -> None:
        def model(given: dict[str, torch.Tensor]) -> Any:
            return {"sum": given["a"] + given["b"], "both": (given["a"], given["b"])}

        given = {"a": torch.ones(1, 3), "b": torch.full((1, 3), 2.0)}
        joins = Joins("")
        joins.learn(model, given)
        other = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
        one, two = joins.run(model, [given, other])
        assert torch.equal(one["sum"], torch.full((1, 3), 3.0))
        assert torch.equal(two["both"][1], torch.zeros(2, 3))

    def test_whole_numbers(self) -> None:
        embedding = torch.nn.Embedding(10, 4)
        assert self.how(embedding, torch.tensor([[1, 2, 3]])) == "cat"

    def test_half_precision(self) -> None:
        model = linear().to(torch.bfloat16)
        assert self.how(model, torch.randn(1, 4).to(torch.bfloat16)) == "cat"

    def test_a_model_that_hangs_while_it_is_tried(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, inference_timeout=0.1, **PLAIN)

        class Second(Steered):
            def forward(self, given: torch.Tensor) -> Any:
                if len(self.seen) == 2:
                    self.holds()
                return super().forward(given)

        second = Second()
        client.use(model=second)
        wait_until(lambda: client.model.engine.reloads == 1)
        assert torch.equal(client.predict(row()), row(2.0))
        second.wait_entered()
        with pytest.raises((InferenceTimeout, ModelOverloaded)):
            client.predict(row())
        wait_until(lambda: client.stats()["model"]["stuck_threads"] > 0)
        second.gate.set()
        second.holds = lambda: None  # type: ignore[method-assign]
        assert torch.equal(client.predict(row(), timeout=30), row(2.0))


class TestRoom:
    def test_a_full_queue_refuses(self, callers: Callers, model: Steered) -> None:
        client = callers.client
        client.configure(client.section.model_copy(update={"max_queue_size": 2}))
        callers.busy(model)
        rest = [callers.ask(1.0), callers.ask(2.0)]
        with pytest.raises(ModelOverloaded, match="2 calls wait") as refused:
            client.predict(row())
        assert refused.value.retry_after > 0
        assert isinstance(refused.value, CircuitBreakerOpenException)
        assert client.predict(row(), default="busy") == "busy"
        model.gate.set()
        assert [int(asked.result(30)[0, 0]) for asked in rest] == [2, 4]
        totals = client.breaker.snapshot().totals
        assert (totals.get("failures", 0), client.breaker.state) == (0, "closed")
        assert client.stats()["model"]["rejected"] == 2

    def test_a_higher_priority_gets_the_room(self, callers: Callers, model: Steered) -> None:
        client = callers.client
        client.configure(
            client.section.model_copy(update={"max_queue_size": 2, "max_batch_size": 1})
        )
        callers.busy(model)
        low, mean = callers.ask(1.0), callers.ask(2.0, priority=1)
        urgent = callers._pool.submit(client.predict, row(3.0), priority=2)
        with pytest.raises(ModelOverloaded, match="higher priority"):
            low.result(30)
        model.gate.set()
        assert torch.equal(urgent.result(30), row(6.0))
        assert torch.equal(mean.result(30), row(4.0))
        assert model.values[-2:] == [3.0, 2.0]

    def test_waiting_has_a_bound(self, callers: Callers, model: Steered) -> None:
        client = callers.client
        callers.busy(model)
        callers.ask(0.0)
        client.configure(client.section.model_copy(update={"queue_timeout": 0.05}))
        with pytest.raises((ModelOverloaded, InferenceTimeout)):
            client.predict(row())
        assert client.model.queue.length == 1, "it waits no more"

    def test_behind_one_call_that_never_ends_it_is_the_model(
        self, callers: Callers, model: Steered
    ) -> None:
        client = callers.client
        callers.busy(model)
        with pytest.raises(InferenceTimeout):
            client.predict(row(), timeout=0.05)
        assert client.breaker.snapshot().totals["failures"] == 1

    def test_resources_are_wanting(self, client: MlClient, model: Steered) -> None:
        client._over = lambda: "memory is at 99 %, and may be at 85 %"  # type: ignore[method-assign]
        client.model._hold = client._over
        with pytest.raises(ModelOverloaded, match="memory is at 99 %"):
            client.predict(row(), timeout=0.1)
        assert model.seen == []
        assert client.stats()["model"]["put_off"]
        totals = client.breaker.snapshot().totals
        assert (totals.get("failures", 0), client.breaker.state) == (0, "closed")
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(client.predict(row(2.0))))
        thread.start()
        wait_until(lambda: client.model.queue.length == 1)
        client.model._hold = str
        thread.join(30)
        assert torch.equal(got[0], row(4.0)), "it was only put off"

    def test_a_caller_that_leaves_takes_its_place_along(
        self, callers: Callers, model: Steered
    ) -> None:
        async def leave() -> None:
            asked = asyncio.create_task(callers.client.predict_async(row(5.0)))
            while callers.client.model.queue.length < 1:
                await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

        callers.busy(model)
        asyncio.run(leave())
        assert callers.client.model.queue.length == 0
        model.gate.set()
        wait_until(lambda: callers.client.model.queue._run is None)
        assert model.seen == [1]
        totals = callers.client.breaker.snapshot().totals
        assert totals.get("failures", 0) == 0
        assert callers.client.stats()["model"]["stuck_threads"] == 0

    def test_closed(self, callers: Callers, model: Steered) -> None:
        callers.busy(model)
        waiting = callers.ask(1.0)
        callers.client.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(30)
        with pytest.raises(RuntimeError, match="closed"):
            callers.client.predict(row())
        callers.client.close()
