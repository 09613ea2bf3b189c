"""What a prediction is, where it comes from, and what the circuit counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.clients.ml import (
    InferenceTimeout,
    InvalidInput,
    InvalidPrediction,
    MlClient,
    ModelOverloaded,
    ModelProblem,
)
from tests.ml.conftest import BRITTLE, Start
from tests.ml.models import Steered, factory, linear, row
from tests.unit.clock import wait_until


def totals(client: MlClient) -> dict[str, int]:
    return dict(client.breaker.snapshot().totals)


@pytest.fixture
def model() -> Steered:
    return Steered()


@pytest.fixture
def client(start: Start, model: Steered) -> MlClient:
    return start({"model": model}, inference_timeout=5.0)


class TestAnswers:
    def test_a_tensor_gives_a_tensor(self, start: Start) -> None:
        model = linear()
        client = start({"model": model})
        found = client.predict_with_info(row())
        with torch.no_grad():
            assert torch.equal(found.value, model(row()))
        assert (found.source, found.age, found.reason) == ("model", 0.0, "")
        assert found.seconds > 0
        value = found.value
        assert not value.requires_grad
        value += 1  # it is the caller's own

    def test_an_array_gives_an_array(self, client: MlClient) -> None:
        given = np.ones((1, 4))[:, ::-1]
        got = client.predict(given)
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32, "in the precision of models"
        assert got.tolist() == [[2.0] * 4]
        assert isinstance(client.predict(np.float32(3).reshape(1, 1)), np.ndarray)

    def test_lists_give_lists(self, client: MlClient) -> None:
        assert client.predict([[1.0, 2.5]]) == [[2.0, 5.0]]

    def test_a_dictionary_of_arrays_is_one_of_tensors(self, start: Start) -> None:
        class Two(torch.nn.Module):
            def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
                return given["a"] + given["b"]

        client = start({"model": Two()})
        got = client.predict({"a": np.ones((1, 2), np.float32), "b": torch.ones(1, 2)})
        assert torch.equal(got, torch.full((1, 2), 2.0))

    def test_any_callable_takes_anything(self, start: Start) -> None:
        client = start({"model": str.upper})
        assert client.predict("a call") == "A CALL"
        assert client.predict_batch(["a", "b"]) == ["A", "B"]

    @pytest.mark.parametrize("given", ["text", None, [[1.0], [1.0, 2.0]], object()])
    def test_what_cannot_be_an_input_counts_nothing(self, client: MlClient, given: Any) -> None:
        with pytest.raises(InvalidInput, match="give it a tensor"):
            client.predict(given, default=0)
        assert totals(client)["calls"] == 0

    async def test_on_an_event_loop(self, client: MlClient) -> None:
        assert await client.predict_async([[1.0]]) == [[2.0]]
        assert (await client.predict_with_info_async([[1.0]])).source == "cache"
        assert await client.predict_batch_async([[[1.0]], [[3.0]]]) == [[[2.0]], [[6.0]]]
        infos = await client.predict_batch_with_info_async([[[1.0]], [[4.0]]])
        assert [info.source for info in infos] == ["cache", "model"]

    @pytest.mark.parametrize("timeout", [0, -1.0, math.nan, math.inf, "1", True])
    def test_a_timeout_is_a_positive_number(self, client: MlClient, timeout: Any) -> None:
        with pytest.raises((ValueError, TypeError), match="timeout"):
            client.predict(row(), timeout)

    def test_an_unknown_option_is_refused(self, start: Start) -> None:
        with pytest.raises(TypeError, match="unknown argument 'modle'"):
            start({"modle": linear()})


class TestOutcomes:
    def test_an_error_of_the_model_is_raised_and_counted(
        self, client: MlClient, model: Steered
    ) -> None:
        model.fails = RuntimeError("weights are gone")
        with pytest.raises(RuntimeError, match="weights are gone"):
            client.predict(row())
        assert totals(client)["failures"] == 1
        assert client.stats()["answers"]["failures"] == 1

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_nan_and_infinity_are_failures(
        self, client: MlClient, model: Steered, number: float
    ) -> None:
        model.gives = torch.tensor([[1.0, number]])
        with pytest.raises(InvalidPrediction, match="NaN or infinite"):
            client.predict(row())
        assert totals(client)["failures"] == 1
        assert client.stats()["predictions"]["items"] == 0, "it is not kept"

    def test_large_numbers_are_finite(self, client: MlClient, model: Steered) -> None:
        model.gives = torch.full((1, 8), 3e38)
        assert torch.equal(client.predict(row()), model.gives)

    def test_nan_in_the_input_is_the_callers(self, client: MlClient) -> None:
        with pytest.raises(InvalidInput, match="input has NaN"):
            client.predict(row(math.nan), default=0)
        assert totals(client)["failures"] == 0
        assert totals(client)["ignored"] == 1

    def test_they_can_be_allowed(self, start: Start, model: Steered) -> None:
        model.gives = torch.tensor([math.inf])
        assert start({"model": model}, allow_non_finite=True).predict(row()) == math.inf

    def test_a_wrong_shape_is_a_failure(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, output_shape=[None, 4])
        assert client.predict(torch.ones(7, 4)).shape == (7, 4)
        with pytest.raises(InvalidPrediction, match=r"\(1, 5\), and not \(any, 4\)"):
            client.predict(torch.ones(1, 5))
        assert totals(client)["failures"] == 1

    def test_the_users_check(self, start: Start, model: Steered) -> None:
        client = start({"model": model, "check": lambda output: float(output.max()) < 5})
        client.predict(row(1.0))
        with pytest.raises(InvalidPrediction, match="check"):
            client.predict(row(3.0))
        assert totals(client)["failures"] == 1

    def test_weak_answers_count_as_slow_calls_do(self, start: Start, model: Steered) -> None:
        client = start(
            {"model": model}, failure_threshold=3, timeout=60.0, minimum_confidence=0.9,
            confidence_window=4, low_confidence_rate=0.5, cache_predictions=False,
        )  # fmt: skip
        sure, weak = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
        for gives in (weak, weak, sure, weak):
            model.gives = gives
            client.predict(row())
        assert client.breaker.state == "closed"
        assert totals(client)["slow"] == 1, "only the one that made it too many of the last four"
        client.predict(row())
        client.predict(row())
        assert client.breaker.state == "open"
        assert client.stats()["weak_share"] == 0.75
        assert totals(client)["failures"] == 0

    def test_durations_are_the_models(self, client: MlClient, model: Steered) -> None:
        client.predict(row())
        snapshot = client.breaker.snapshot()
        assert 0 < snapshot.totals["duration_us"] < 30e6


class TestInstead:
    """What answers when the model does not, from the first time on."""

    def test_what_it_has_answered_before(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, prediction_cache_ttl=1e-6, default_prediction="default")
        first = client.predict(row())
        model.fails = RuntimeError("broken")
        found = client.predict_with_info(row())
        assert found.source == "stale"
        assert torch.equal(found.value, first)
        assert found.age > 0
        assert found.reason == "RuntimeError: broken"
        assert client.breaker.state == "closed"
        assert totals(client)["fallbacks"] == 1
        assert client.predict(row(2.0)) == "default", "nothing is kept of this one"

    def test_also_while_the_circuit_is_open(self, client: MlClient, model: Steered) -> None:
        client.predict(row())
        client.breaker.force_open()
        assert client.predict_with_info(row()).source == "cache"
        with pytest.raises(CircuitBreakerOpenException):
            client.predict(row(2.0))
        wait_until(lambda: model.seen == [1, 1, 2, 3])  # once, and to learn what can be joined

    def test_not_if_it_is_not_wanted(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, prediction_cache_ttl=1e-6, enable_cached_fallback=False)
        client.predict(row())
        model.fails = RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            client.predict(row())

    def test_the_lighter_model(self, start: Start, model: Steered) -> None:
        lighter = Steered()
        client = start({"model": model, "fallback_model": lighter})
        model.fails = RuntimeError("broken")
        found = client.predict_with_info([[1.0]])
        assert (found.source, found.value) == ("lightweight", [[2.0]])
        assert found.version == client.stats()["lighter_model"]["version"]
        lighter.fails = RuntimeError("also broken")
        with pytest.raises(RuntimeError, match=r"^broken$"):
            client.predict([[1.0]])
        assert client.stats()["answers"]["lightweight_failures"] == 1
        assert "RuntimeError in the lighter model" in client.problems()

    def test_not_if_it_is_switched_off(self, start: Start, model: Steered) -> None:
        options = {"model": model, "fallback_model": linear()}
        client = start(options, enable_lightweight_fallback=False, default_prediction=7)
        model.fails = RuntimeError("broken")
        assert client.predict(row()) == 7

    async def test_the_lighter_model_on_an_event_loop(self, start: Start, model: Steered) -> None:
        client = start({"model": model, "fallback_model": Steered()}, **BRITTLE)
        model.fails = RuntimeError("broken")
        for _ in range(2):  # while it is closed, and while it is open
            assert (await client.predict_with_info_async(row())).source == "lightweight"
        infos = await client.predict_batch_with_info_async([row(), row(2.0)])
        assert [info.source for info in infos] == ["lightweight"] * 2

    def test_a_quantized_one_is_made_when_asked_for(self, start: Start) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        fails = []

        def check(output: Any) -> bool:
            return not fails

        client = start({"model": model, "check": check}, quantize_fallback=True)
        right = client.predict(row())
        fails.append(True)
        wait_until(lambda: client.predict_with_info(row(2.0), default=0).source == "lightweight")
        found = client.predict_with_info(row(1.5))
        assert found.source == "lightweight"
        assert client.stats()["lighter_model"]["kind"] == "quantized"
        assert found.value.shape == right.shape

    @pytest.mark.parametrize("value", [0, None, False, []])
    def test_a_default_of_the_call(self, client: MlClient, model: Steered, value: Any) -> None:
        model.fails = RuntimeError("broken")
        found = client.predict_with_info(row(), default=value)
        assert found.value == value
        assert found.source == "default"

    def test_of_a_batch_each_its_own(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, cache_predictions=True, max_batch_size=8)
        client.predict(row(1.0))
        wait_until(lambda: len(model.seen) == 4)
        model.fails_at = 3.0
        model.seen.clear()
        infos = client.predict_batch_with_info(
            [row(1.0), row(2.0), row(3.0), row(4.0)], default="none"
        )
        assert [info.source for info in infos] == ["cache", "model", "default", "model"]
        assert torch.equal(infos[3].value, row(8.0))
        assert model.seen == [3, 1, 1, 1], "together, then each alone to find the one at fault"
        assert totals(client)["failures"] == 1
        with pytest.raises(ValueError, match="at fault"):
            client.predict_batch([row(3.0), row(5.0)])

    def test_open_and_nothing_else(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, **BRITTLE)
        model.fails = RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            client.predict(row())
        with pytest.raises(CircuitBreakerOpenException) as refused:
            client.predict(row())
        assert type(refused.value) is CircuitBreakerOpenException
        assert refused.value.circuit == "api.ml"
        assert model.seen == [1]


class TestTimeouts:
    def test_a_hanging_model_is_left_behind(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, inference_timeout=0.05, max_batch_size=1)
        model.holds()
        with pytest.raises(InferenceTimeout, match=r"api\.ml: the model has not answered within"):
            client.predict(row())
        assert totals(client)["failures"] == 1
        assert client.stats()["model"]["stuck_threads"] == 1
        assert "1 threads hang in the model" in client.problems()
        model.gate.set()
        assert torch.equal(client.predict(row(2.0), timeout=30), row(4.0)), "by another thread"
        wait_until(lambda: client.stats()["model"]["stuck_threads"] == 0)
        assert client.predict_with_info(row()).source == "model", "the late result was dropped"

    def test_only_so_many_threads_are_risked(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, inference_timeout=0.02, max_batch_size=1)
        model.holds()
        for _ in range(8):
            with pytest.raises(InferenceTimeout):
                client.predict(row())
        assert len(model.seen) == 4
        assert totals(client)["failures"] == 8
        model.gate.set()
        wait_until(lambda: client.stats()["model"]["stuck_threads"] == 0)
        assert torch.equal(client.predict(row(), timeout=30), row(2.0))

    def test_from_the_first_timeout_on_something_else_answers(
        self, start: Start, model: Steered
    ) -> None:
        client = start({"model": model, "fallback_model": Steered()}, inference_timeout=0.1)
        model.holds()
        found = client.predict_with_info(row())
        assert found.source == "lightweight"
        assert found.reason.startswith("InferenceTimeout")
        model.gate.set()

    async def test_on_an_event_loop(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, max_batch_size=1)
        model.holds()
        with pytest.raises(InferenceTimeout):
            await client.predict_async(row(), timeout=0.05)
        model.gate.set()
        assert torch.equal(await client.predict_async(row(), timeout=30), row(2.0))

    def test_of_a_batch(self, start: Start, model: Steered) -> None:
        client = start({"model": model}, batch_inference_timeout=0.1, max_batch_size=1)
        model.holds()
        with pytest.raises(InferenceTimeout):
            client.predict_batch([row(), row(2.0), row(3.0)])
        assert totals(client)["failures"] == 1, "it was one call"
        model.gate.set()


class TestModels:
    def test_a_missing_file_is_a_failure_and_the_lighter_model_answers(
        self, start: Start, tmp_path: Any
    ) -> None:
        file, lighter = tmp_path / "model.pt", tmp_path / "light.pt"
        torch.save(linear(1).state_dict(), lighter)
        client = start(
            model_path=str(file), fallback_model_path=str(lighter), **BRITTLE,
            model_factory="tests.ml.models:factory",
        )  # fmt: skip
        found = client.predict_with_info(row())
        assert found.source == "lightweight"
        assert found.reason.startswith("ModelProblem")
        assert client.breaker.state == "open"
        assert any(str(file) in problem for problem in client.problems())
        torch.save(linear(0).state_dict(), file)
        wait_until(lambda: client.model.engine.ready)
        client.breaker.reset()
        found = client.predict_with_info(row())
        assert found.source == "model"
        with torch.no_grad():
            assert torch.equal(found.value, linear(0)(row()))
        assert not any("model.pt" in problem for problem in client.problems())

    def test_a_broken_file_is_one_too(self, start: Start, tmp_path: Any) -> None:
        file = tmp_path / "model.pt"
        file.write_bytes(b"PK\x03\x04 torn")
        client = start({"factory": factory}, model_path=str(file), default_prediction="none")
        assert client.predict(row()) == "none"
        assert totals(client)["failures"] == 1

    def test_there_is_none_at_all(self, start: Start) -> None:
        with pytest.raises(ModelProblem, match="model_path"):
            start().predict(row())

    def test_calls_wait_while_it_is_loaded(self, start: Start, tmp_path: Any) -> None:
        file = tmp_path / "model.pt"
        torch.save(linear().state_dict(), file)
        client = start({"factory": factory}, model_path=str(file), warmup_on_start=False)
        assert not client.model.engine.ready
        assert client.predict_with_info(row()).source == "model"

    def test_but_not_for_ever(self, start: Start) -> None:
        client = start({"model": linear()}, warmup_on_start=False, queue_timeout=0.05)
        client.model.engine.start = lambda: None  # it takes very long
        with pytest.raises(ModelOverloaded, match="being loaded"):
            client.predict(row())
        assert totals(client)["failures"] == 0
        assert client.predict(row(), default=3) == 3
