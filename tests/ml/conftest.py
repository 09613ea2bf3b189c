"""Clients of models, whose circuits are each client's own, and files of small models."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_breaker.clients.ml import MlClient
from distributed_breaker.services import Services
from tests.unit.clock import wait_until

Start = Callable[..., MlClient]

# No failure opens the circuit, and nothing else on this host puts calls off, unless a test says
# otherwise.
PATIENT = {
    "failure_threshold": 1_000, "failure_rate": None, "jitter": 0.0,
    "max_cpu_usage": 100.0, "max_memory_usage": 100.0,
}  # fmt: skip
# The first failure opens it, and nothing but a test or a health check closes it.
BRITTLE = {"failure_threshold": 1, "timeout": 60.0, "success_threshold": 1}


@pytest.fixture
def start(tmp_path: Path, namespace: str) -> Iterator[Start]:
    """``start(options, **section)``: a client as another process would have it."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(
            options: dict[str, Any] | None = None, store: str = "memory://", **section: Any
        ) -> MlClient:
            nonlocal count
            count += 1
            file = tmp_path / f"{count}.json"
            settings = {"redis_url": store, "namespace": namespace}
            services = {"api": {"ml": PATIENT | section}}
            file.write_text(json.dumps({"settings": settings, "services": services}))
            made = Services(file, environ={})
            stack.callback(made.close)
            client = made.client("ml", "api", **(options or {}))
            assert isinstance(client, MlClient)
            if client.section.warmup_on_start:
                engine = client.model.engine
                wait_until(lambda: engine.ready or engine.problem)
            return client

        yield start


WEIGHTS = {"0.weight", "0.bias", "2.weight", "2.bias"}


def network() -> torch.nn.Sequential:
    """What the weights in the files belong to."""
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


PARTS = (torch.nn.Sequential, torch.nn.Linear, torch.nn.ReLU)
SAMPLE = torch.tensor([[1.0, -2.0, 3.0, 0.5]])


@pytest.fixture(scope="session")
def net() -> torch.nn.Sequential:
    torch.manual_seed(7)
    return network().eval()


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory, net: torch.nn.Sequential) -> Path:
    """A folder with the same model in each format; don't change what lies there."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    weights = net.state_dict()
    torch.save(weights, folder / "weights.pth")
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "model_state_dict": weights}, folder / "checkpoint.pth")
    torch.save(net, folder / "module.pt")
    save_file(weights, folder / "weights.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(net, SAMPLE), folder / "script.pt")
    torch.export.save(torch.export.export(net, (SAMPLE,)), folder / "program.pt2")
    return folder
