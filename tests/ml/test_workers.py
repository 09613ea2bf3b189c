"""The client's model in a process of its own, and in one for all of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distributed_breaker.clients import ml_engine
from distributed_breaker.clients.ml import InferenceTimeout, MlClient
from distributed_breaker.clients.ml_request import Request
from tests.ml.conftest import Start
from tests.ml.models import Steered
from tests.ml.process_models import Net
from tests.unit.clock import wait_until

NET = "tests.ml.process_models:Net"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "net.pt"
    torch.save(Net().state_dict(), file)
    return file


@pytest.fixture
def client(
    start: Start, file: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlClient]:
    monkeypatch.setattr(ml_engine, "LOOK_EVERY", 0.02)
    client = start(
        {"fallback_model": Steered()}, worker=request.param, model_path=str(file),
        model_factory=NET, cache_predictions=False, timeout=0.5, success_threshold=1,
        warmup_shape=[1, 2],
    )  # fmt: skip
    wait_until(lambda: client.model.engine.ready, 60)
    yield client
    client.close()


@pytest.mark.parametrize("client", ["process", "host"], indirect=True)
def test_a_hanging_model_is_killed_and_others_answer_meanwhile(client: MlClient) -> None:
    found = client.predict_with_info([[1.0, 2.0]])
    assert (found.value, found.source) == ([[1.0, 2.0]], "model")
    assert found.version == client.stats()["model"]["version"]
    before = client.stats()["model"]["pid"]
    request = Request({"do": "hang"}, 0.2)  # what callers give is made tensors
    with contextlib.suppress(InferenceTimeout):  # that the caller's own clock has raised
        client.model.queue.ask([request])
        assert isinstance(request.error, InferenceTimeout)
    stats = client.stats()["model"]
    assert stats["stuck_threads"] == 0, "no thread is left behind"
    again = client.predict_with_info(torch.ones(1, 2), timeout=60)
    assert again.source == "model"
    assert client.stats()["model"]["pid"] != before


@pytest.mark.parametrize("client", ["process"], indirect=True)
def test_it_is_reloaded_and_falls_back(client: MlClient, file: Path) -> None:
    batch = client.predict_batch([torch.full((1, 2), float(i)) for i in range(4)])
    assert [int(each[0, 0]) for each in batch] == [0, 1, 2, 3]
    net = Net()
    net.weight.data += 5
    new = file.with_suffix(".new")
    torch.save(net.state_dict(), new)
    version = client.stats()["model"]["version"]
    new.rename(file)
    wait_until(lambda: client.stats()["model"]["version"] not in ("", version), 60)
    assert torch.equal(client.predict(torch.ones(1, 2)), torch.full((1, 2), 6.0))
    client.breaker.force_open()
    assert client.predict_with_info(torch.ones(1, 2)).source == "lightweight"


def test_an_object_cannot_run_in_another_process(start: Start, file: Path) -> None:
    with pytest.raises(ValueError, match="needs a model_path"):
        start({"model": Net()}, worker="process")
    with pytest.raises(ValueError, match="cannot be imported"):
        start({"factory": lambda: Net()}, worker="process", model_path=str(file))
