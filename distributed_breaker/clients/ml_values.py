"""What goes into a model and what may come out: conversions, and checks of outputs.

A PyTorch model takes tensors.  NumPy arrays and lists of numbers are made tensors first, and the
output has the kind of the input then: an array for an array, a list for a list.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

Back = Callable[[Any], Any] | None
"""Makes an output what the caller expects; None: it is that already."""


class InvalidInput(ValueError):
    """The input is the caller's mistake; the circuit counts nothing."""


class InvalidPrediction(ValueError):
    """The model's output is not one; the circuit counts a failure."""


def to_tensors(inputs: Any) -> tuple[Any, Back]:
    """An input for a PyTorch model, and the way back for its output.

    Args:
        inputs: a tensor, an array, a number or nested lists of numbers; or a dictionary, list or
            tuple of tensors and arrays, as the model takes it.

    Raises:
        InvalidInput: it cannot be made tensors.
    """
    import torch

    if isinstance(inputs, torch.Tensor):
        return inputs, None
    numpy = sys.modules.get("numpy")
    try:
        if numpy is not None and isinstance(inputs, numpy.ndarray | numpy.generic):
            return _of_array(torch, numpy, inputs), _to_array
        if isinstance(inputs, dict):
            return {name: to_tensors(each)[0] for name, each in inputs.items()}, None
        if _holds_tensors(torch, numpy, inputs):
            return type(inputs)(to_tensors(each)[0] for each in inputs), None
        if isinstance(inputs, str | bytes) or inputs is None:
            raise TypeError
        return torch.tensor(inputs), _to_list
    except InvalidInput:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"a model cannot take {type(inputs).__name__}: give it a tensor, an array or nested "
            "lists of numbers, all of one length"
        ) from error


def _of_array(torch: Any, numpy: Any, array: Any) -> Any:
    array = numpy.asarray(array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = numpy.array(array)  # torch warns of, or refuses, what it cannot share
    tensor = torch.from_numpy(array)
    # NumPy computes in double precision unless told otherwise, models in torch's default.
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _holds_tensors(torch: Any, numpy: Any, inputs: Any) -> bool:
    kinds = (torch.Tensor,) if numpy is None else (torch.Tensor, numpy.ndarray)
    return isinstance(inputs, list | tuple) and any(isinstance(each, kinds) for each in inputs)


def each_tensor(output: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested dictionaries, lists and tuples with other tensors."""
    if isinstance(output, dict):
        return {name: each_tensor(each, change) for name, each in output.items()}
    if isinstance(output, list | tuple):
        parts = [each_tensor(each, change) for each in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    torch = sys.modules.get("torch")
    return change(output) if torch is not None and isinstance(output, torch.Tensor) else output


def _to_array(output: Any) -> Any:
    return each_tensor(output, lambda tensor: tensor.numpy())


def _to_list(output: Any) -> Any:
    return each_tensor(output, lambda tensor: tensor.tolist())


def tensors_of(tree: Any) -> list[Any]:
    """All tensors in nested dictionaries, lists and tuples."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [tensor for each in tree for tensor in tensors_of(each)]
    return []


def finite(tree: Any) -> bool:
    """Whether no number in it is NaN or infinite."""
    if isinstance(tree, float):
        return math.isfinite(tree)
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(tree, torch.Tensor):
        if not (tree.is_floating_point() or tree.is_complex()):
            return True
        # A sum is finite only if all are; it may overflow though they are, so then each is asked.
        return math.isfinite(abs(tree.sum().item())) or bool(torch.isfinite(tree).all())
    if numpy is not None and isinstance(tree, numpy.ndarray | numpy.generic):
        return tree.dtype.kind not in "fc" or bool(numpy.isfinite(tree).all())
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return all(finite(each) for each in tree)
    return True


def check_shape(output: Any, wanted: Sequence[int | None]) -> None:
    """Look at the shape of the (first) tensor of an output.

    Args:
        wanted: the sizes of its dimensions; None: any.

    Raises:
        InvalidPrediction: it is another one, or there is no tensor.
    """
    tensors = tensors_of(output)
    if not tensors:
        raise InvalidPrediction(f"the model has given {type(output).__name__}, and no tensor")
    shape = tuple(tensors[0].shape)
    fits = len(shape) == len(wanted)
    if not fits or any(w not in (None, n) for w, n in zip(wanted, shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in wanted)
        raise InvalidPrediction(f"the output has the shape {shape}, and not ({sizes})")


def confidence(output: Any) -> float:
    """How sure a classifier is: the least of its rows' greatest shares.

    Shares are taken as they are; other numbers go through a softmax first.
    """
    torch = sys.modules["torch"]
    scores = tensors_of(output)[0].float()
    rows = scores.reshape(1, -1) if scores.dim() < 2 else scores.reshape(-1, scores.shape[-1])
    sums = rows.sum(-1)
    if bool((rows < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        rows = rows.softmax(-1)
    return float(rows.max(-1).values.min())


class QualityWindow:
    """Whether too many of the last answers were given with too little confidence.

    Args:
        answers: how many are looked at; before there are so many, nothing is said.
        least: the confidence that an answer should have.
        rate: the share of weak ones from which on each further one counts.
    """

    def __init__(self, answers: int, least: float, rate: float) -> None:
        self.numbers = answers, least, rate
        self.least = least
        self.rate = rate
        self._weak: deque[bool] = deque(maxlen=answers)

    def poor(self, sure: float) -> bool:
        """Add an answer; whether it is a weak one among too many."""
        weak = not sure >= self.least  # NaN is weak, too
        self._weak.append(weak)
        return weak and len(self._weak) == self._weak.maxlen and self.share >= self.rate

    @property
    def share(self) -> float:
        """Of weak answers among the last."""
        seen = list(self._weak)
        return sum(seen) / len(seen) if seen else 0.0
