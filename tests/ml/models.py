"""Models for the tests: small real ones, and one that does what a test wants."""

from __future__ import annotations

import threading
from typing import Any

import torch

SIZE, CLASSES = 4, 3


def linear(seed: int = 0) -> torch.nn.Module:
    """A model of one layer: 4 numbers in, 3 out."""
    # Not by the seed of all: other threads that make models draw from it, too.
    own = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(SIZE, CLASSES)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=own))
    return layer.eval()


def factory() -> torch.nn.Module:
    return torch.nn.Linear(SIZE, CLASSES)


def row(value: float = 1.0) -> torch.Tensor:
    """An input of one row."""
    return torch.full((1, SIZE), value)


class Steered(torch.nn.Module):
    """Doubles its input, and hangs, fails or runs out of memory when it is told to.

    ``seen`` has the number of rows of each call, and ``values`` the first number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.values: list[float] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.fails: BaseException | None = None
        self.fails_at: float | None = None
        self.most_rows = 1_000
        self.gives: Any = None

    def forward(self, given: torch.Tensor) -> Any:
        self.entered.release()  # before it is seen: who waits for that finds this done
        self.values.append(given.flatten()[0].item())
        self.seen.append(len(given))
        assert self.gate.wait(60)
        if self.fails is not None:
            raise self.fails
        if self.fails_at is not None and bool((given == self.fails_at).any()):
            raise ValueError("one of them is at fault")
        if len(given) > self.most_rows:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 1 bytes"
            )
        return given * 2 if self.gives is None else self.gives

    def holds(self) -> None:
        """Hang from the next call on."""
        self.gate.clear()
        while self.entered.acquire(blocking=False):
            pass

    def wait_entered(self) -> None:
        """Wait until a call is inside."""
        assert self.entered.acquire(timeout=30)


class OfAll(torch.nn.Module):
    """A model whose output for an input depends on what else is in the batch."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given - given.mean(0, keepdim=True)
