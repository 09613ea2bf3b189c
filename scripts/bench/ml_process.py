"""What it costs to have a model in another process: a call there, less the same call here."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distributed_breaker.clients.ml_process import ModelSpec, ProcessEngine

SIZES = {"1 kB": 256, "10 MB": 2_500_000}  # numbers of 4 bytes
PLACE = "scripts.bench.ml_process:Echo"
CALLS = {"1 kB": 200, "10 MB": 5}  # in a round


class Echo(torch.nn.Module):  # type: ignore[misc]  # mypy does not look into torch
    """Gives back what it gets, with one multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, given: Any) -> Any:
        return given * self.weight


def overheads(shared: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds that a call takes longer than here, by the size of its input, round by round.

    Args:
        shared: in the host's worker, or in one of this process's own.
        rounds: in each, all sizes are measured, here and there.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = str(Path(folder) / "echo.pt")
        here: Any = Echo().eval()
        torch.save(here.state_dict(), path)
        spec = ModelSpec(path, "cpu", PLACE)
        engine = ProcessEngine(spec, shared=shared)
        try:
            if not engine.wait_ready(120):
                raise RuntimeError(engine.problem)
            return _measured(engine, here, rounds)
        finally:
            engine.close()


def _measured(engine: ProcessEngine, here: Any, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in SIZES}
    with torch.no_grad():
        for warm in (True, *[False] * rounds):
            for name, size in SIZES.items():
                given = torch.ones(size)
                there = _seconds(partial(engine.run, given, 60.0), CALLS[name])
                added = there - _seconds(partial(here, given), CALLS[name])
                if not warm:
                    found[name].append(added)
    return found


def _seconds(call: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def main(rounds: int) -> None:
    """Print the medians and the least of all rounds."""
    for shared in (False, True):
        for name, seconds in overheads(shared, rounds).items():
            median, least = statistics.median(seconds) * 1e6, min(seconds) * 1e6
            whose = "shared worker" if shared else "own worker"
            print(f"{whose}, {name}: {median:,.0f} µs added (at least {least:,.0f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 15)
