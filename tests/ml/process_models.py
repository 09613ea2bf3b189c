"""Models for the tests of workers: well ones, and such that hang, crash and leak when told to."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Any

import torch

LEAKED: list[Any] = []


class Net(torch.nn.Module):
    """Adds a weight to each tensor of a tree; or does what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, given: Any) -> Any:
        if isinstance(given, dict) and "do" in given:
            return getattr(self, given["do"])(*given.get("with", ()))
        return self.added(given)

    def added(self, tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: self.added(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.added(value) for value in tree)
        if isinstance(tree, torch.Tensor):
            return (tree + self.weight).to(tree.dtype)
        return tree

    def sleep(self, seconds: float) -> float:
        """Long, and Python goes on."""
        time.sleep(seconds)
        return seconds

    def hang(self) -> None:
        """For ever, in a library that holds Python's lock."""
        ctypes.PyDLL(None).pause()

    def abort(self) -> None:
        os.abort()

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, words: str) -> None:
        raise ValueError(words)

    def devour(self) -> Any:
        """More memory than there is."""
        return torch.empty(2**50)

    def memory_error(self) -> None:
        raise MemoryError

    def leak(self, size: int) -> int:
        LEAKED.append(bytearray(os.urandom(1)) * size)
        return os.getpid()

    def pid(self) -> int:
        return os.getpid()

    def strange(self) -> Any:
        return {"a": [object()]}
