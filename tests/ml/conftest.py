"""Files of small models of PyTorch's, made once for all tests of a worker."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

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
