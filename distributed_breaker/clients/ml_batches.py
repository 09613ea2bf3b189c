"""Which inputs a model takes together: told by trying, so that nobody has to declare it.

Inputs are joined along their first dimension (a model whose inputs have a batch dimension), or laid
upon each other (one that also takes single samples).  Either is done only where the model has been
seen to give an input the same output alone and beside another one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

MOST_SHAPES = 64  # numbers of dimensions and structures that are told apart
TOLERANCE = 1e-4  # by which an output beside another input may differ, relative to its largest …
EPSILONS = 8  # … or by so many times what its type can tell apart

Kind = tuple[Any, ...]
"""Inputs of one kind can be joined."""

Run = Callable[[Any], Any]


class Joins:
    """What is known of one model.

    Args:
        version: which one.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        # By the tensors' numbers of dimensions: "cat", "stack", or "" for neither.
        self._how: dict[Kind, str] = {}
        self._plain: set[type] = set()  # types of single tensors

    def kind(self, inputs: Any) -> Kind | None:
        """What an input has in common with those that it can be joined with; None: with none."""
        if not self._how:
            return None
        kind = type(inputs)
        if kind in self._plain:  # the most frequent case
            how = self._how.get((kind, inputs.dim()))
            return (how, inputs.dtype, inputs.shape[how == "cat" :]) if how else None
        tensors = _tensors(inputs)
        how = self._how.get(_form(inputs, tensors)) if tensors else None
        if not how:
            return None
        skip = 1 if how == "cat" else 0
        return how, *_names(inputs), *((t.dtype, t.shape[skip:]) for t in tensors or ())

    def unknown(self, inputs: Any) -> bool:
        """Whether it is not known yet, and can be found out."""
        kind = type(inputs)
        if kind in self._plain:  # the most frequent case, and asked for each run
            return (kind, inputs.dim()) not in self._how and len(self._how) < MOST_SHAPES
        tensors = _tensors(inputs)
        if not tensors or len(self._how) >= MOST_SHAPES:
            return False
        if isinstance(inputs, sys.modules["torch"].Tensor):
            self._plain.add(kind)
        return _form(inputs, tensors) not in self._how

    def learn(self, run: Run, inputs: Any) -> None:
        """Find out whether inputs such as this one can be joined; runs the model a few times."""
        tensors = _tensors(inputs) or []
        form = _form(inputs, tensors)
        self._how[form] = ""  # also if trying does not end well
        ways = ("cat", "stack")
        self._how[form] = next((how for how in ways if _same(run, inputs, tensors, how)), "")

    def run(self, run: Run, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of some inputs of one kind, each as if it had been alone."""
        kind = self.kind(inputs[0])
        assert kind is not None
        joined, rows = _joined(inputs, kind[0])
        return _split(run(joined), rows, kind[0])


def _tensors(inputs: Any) -> list[Any] | None:
    """The tensors of an input: one, or a flat dictionary, list or tuple of them; else None."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(inputs, torch.Tensor):
        return [inputs] if inputs.layout is torch.strided else None
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if not isinstance(inputs, list | tuple) or not inputs:
        return None
    return list(inputs) if all(isinstance(each, torch.Tensor) for each in inputs) else None


def _names(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, dict) else ()


def _form(inputs: Any, tensors: list[Any]) -> Kind:
    return type(inputs), *_names(inputs), *(tensor.dim() for tensor in tensors)


def _like(inputs: Any, tensors: list[Any]) -> Any:
    """The same structure with other tensors."""
    if isinstance(inputs, dict):
        return dict(zip(inputs, tensors, strict=True))
    return type(inputs)(tensors) if isinstance(inputs, list | tuple) else tensors[0]


def _joined(inputs: Sequence[Any], how: str) -> tuple[Any, list[int]]:
    """All in one, and how many rows each takes."""
    torch = sys.modules["torch"]
    if isinstance(inputs[0], torch.Tensor):
        if how == "stack":
            return torch.stack(list(inputs)), [1] * len(inputs)
        return torch.cat(list(inputs)), [len(each) for each in inputs]
    columns = list(zip(*(_tensors(each) or () for each in inputs), strict=True))
    if how == "stack":
        return _like(inputs[0], [torch.stack(column) for column in columns]), [1] * len(inputs)
    rows = [len(tensor) for tensor in columns[0]]
    return _like(inputs[0], [torch.cat(column) for column in columns]), rows


def _split(output: Any, rows: list[int], how: str) -> list[Any]:
    """The output of each: of every tensor in it, its own rows."""
    if isinstance(output, dict):
        parts = {name: _split(each, rows, how) for name, each in output.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(rows))]
    if isinstance(output, list | tuple):
        columns = [_split(each, rows, how) for each in output]
        together = list(zip(*columns, strict=True)) or [()] * len(rows)
        return [_like_sequence(output, list(each)) for each in together]
    torch = sys.modules["torch"]
    if not isinstance(output, torch.Tensor) or not output.dim() or len(output) != sum(rows):
        raise TypeError("the output has no row for each input")
    # Each caller gets memory of its own: what one writes into its answer is nobody else's.
    if how == "stack":
        return [row.clone() for row in output.unbind()]
    return [part.clone() for part in output.split(rows)]


def _like_sequence(output: Any, parts: list[Any]) -> Any:
    named = hasattr(output, "_fields")
    return type(output)(*parts) if named else type(output)(parts)


def _same(run: Run, inputs: Any, tensors: list[Any], how: str) -> bool:
    """Whether the model gives an input the same output alone and with another before or after it.

    The other one is the input backwards, so that a model that looks at all of a batch together
    (normalises it, say) is found out.
    """
    torch = sys.modules["torch"]
    if how == "cat" and any(not t.dim() or len(t) != len(tensors[0]) for t in tensors):
        return False
    if any(not t.numel() for t in tensors):
        return False
    other = _like(inputs, [_backwards(tensor) for tensor in tensors])
    try:
        alone = run(inputs)
        for pair, mine in (([inputs, other], 0), ([other, inputs, other], 1)):
            joined, rows = _joined(pair, how)
            if not _close(torch, _split(run(joined), rows, how)[mine], alone):
                return False
    except Exception:
        return False  # it does not take them so
    return True


def _backwards(tensor: Any) -> Any:
    flat = tensor.flatten().flip(0).reshape(tensor.shape)
    return flat * 0.5 if tensor.is_floating_point() else flat


def _close(torch: Any, one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(torch, one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_close(torch, a, b) for a, b in pairs)
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return bool(torch.equal(one, other))
    if not bool(torch.isfinite(other).all()):
        return False
    size = float(other.detach().abs().max()) if other.numel() else 0.0
    tolerance = max(TOLERANCE, EPSILONS * torch.finfo(one.dtype).eps)
    return bool(torch.allclose(one, other, rtol=tolerance, atol=tolerance * size))
