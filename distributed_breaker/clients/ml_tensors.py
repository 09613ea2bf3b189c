"""Trees of tensors and plain values as a JSON-able header and raw bytes, and back; no pickle.

A header holds the structure, with the type and shape of each tensor; the bytes of the tensors
follow one another in the order of the header, without gaps.  So there are no offsets that could be
wrong: what a header asks for either fills the bytes exactly or is refused.

Values are None, bool, int, float and str.  Trees are made of list, tuple, dict (keys: text and
integers), bytes, torch's tensors and numpy's arrays and scalars of numbers.  Anything else is
refused, subclasses of these included: it would come back as something else.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

MOST_NODES = 100_000  # of a tree that comes from elsewhere
DEEPEST = 64  # containers within one another

Part = memoryview | bytes
Where = tuple[Any, Any] | None
"""The place of a value: the place of its container and its key in there."""

_PLAIN = frozenset({type(None), bool, int, float, str})
_KEYS = frozenset({int, str})
_CONTAINERS: dict[Any, str] = {list: "list", tuple: "tuple"}
_TORCH_DTYPES = (
    "float32 float64 float16 bfloat16 uint8 int8 int16 int32 int64 bool complex64 complex128 "
    "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    "float8_e8m0fnu"
).split()
_NUMPY_DTYPE = re.compile(r"[<>|][biufc]\d{1,2}")


def encode(tree: Any) -> tuple[Any, list[Part]]:
    """Return a tree's header and the bytes of its tensors.

    The bytes are those of the tensors themselves wherever that is possible: they change when the
    tensors do.  A tensor on another device is copied to the CPU.

    Raises:
        TypeError: there is something in it that cannot be sent; the message names its place.
    """
    parts: list[Part] = []
    return _pack(tree, parts, None, DEEPEST), parts


def decode(header: Any, buffer: Any) -> Any:
    """Return the tree of a header; its tensors are copies of what is in the buffer, on the CPU.

    Args:
        header: as ``encode`` has made it, also after a way through JSON.  Nothing is taken for
            granted: it may come from an enemy.
        buffer: the parts, one after another; anything with the buffer protocol.

    Raises:
        ValueError: the header is none, or does not fit the bytes.
    """
    with memoryview(buffer) as view, view.cast("B") as flat:
        reader = _Reader(flat)
        tree = reader.unpack(header, DEEPEST)
        if reader.at != len(flat):
            raise ValueError(f"{len(flat) - reader.at} of {len(flat)} bytes belong to no tensor")
        return tree


def size_of(parts: Iterable[Part]) -> int:
    """How many bytes the parts hold."""
    return sum(map(len, parts))


def _pack(value: Any, parts: list[Part], where: Where, depth: int) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _pack_tensor(torch, value, parts, where)
    if not depth:
        raise TypeError(f"more than {DEEPEST} containers lie within one another{_place(where)}")
    if kind in _CONTAINERS:
        packed = [_pack(item, parts, (where, i), depth - 1) for i, item in enumerate(value)]
        return [_CONTAINERS[kind], packed]
    if kind is dict:
        for key in value:
            if type(key) not in _KEYS:
                raise TypeError(
                    f"the key {key!r}{_place(where)} is neither text nor an integer; rename it"
                )
        items = [_pack(item, parts, (where, key), depth - 1) for key, item in value.items()]
        return ["dict", list(value), items]
    if kind is bytes:
        parts.append(value)
        return ["bytes", len(value)]
    return _pack_array(value, parts, where)


def _pack_tensor(torch: Any, tensor: Any, parts: list[Part], where: Where) -> Any:
    name = _names(torch).get(tensor.dtype)
    dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
    if name is None or not dense:
        what = f"a {'' if dense else 'sparse, nested or meta '}tensor of {tensor.dtype}"
        raise TypeError(f"{what}{_place(where)} cannot be sent; make it a dense one of numbers")
    if tensor.device.type != "cpu":
        tensor = tensor.detach().cpu()
    if tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.nbytes:
        parts.append(_memory(tensor, where))
    return ["torch", name, list(tensor.shape)]


def _pack_array(value: Any, parts: list[Part], where: Where) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
        raise TypeError(
            f"a {type(value).__qualname__}{_place(where)} cannot be sent; use tensors, numbers, "
            "text, None, and lists, tuples and dicts of them"
        )
    array = numpy.asarray(value)
    if not _NUMPY_DTYPE.fullmatch(array.dtype.str):
        raise TypeError(f"an array of {array.dtype}{_place(where)} cannot be sent: no numbers")
    if array.nbytes:
        flat = numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
        parts.append(memoryview(flat))
    kind = "numpy" if type(value) is numpy.ndarray else "scalar"
    return [kind, array.dtype.str, list(array.shape)]


def _place(where: Where) -> str:
    keys = []
    while where is not None:
        where, key = where
        keys.append(f"[{key!r}]")
    return f" at {''.join(reversed(keys))}" if keys else ""


@functools.cache
def _dtypes(torch: Any) -> dict[str, Any]:
    """By name; an older torch lacks some."""
    return {name: getattr(torch, name) for name in _TORCH_DTYPES if hasattr(torch, name)}


@functools.cache
def _names(torch: Any) -> dict[Any, str]:
    return {dtype: name for name, dtype in _dtypes(torch).items()}


def _memory(tensor: Any, where: Where = None) -> memoryview:
    """The bytes of a contiguous tensor on the CPU.  torch itself offers them only by way of numpy,
    which need not be there and does not know all types."""
    address = tensor.data_ptr()
    if not address:
        raise TypeError(
            f"a {type(tensor).__qualname__} without memory{_place(where)} can't be sent"
        )
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(address)
    array.tensor = tensor  # which lives as long as its memory is used
    return memoryview(array).cast("B")


class _Reader:
    """Takes a tree's tensors out of bytes, one after another."""

    def __init__(self, flat: memoryview) -> None:
        self.at = 0
        self._flat = flat
        self._nodes = MOST_NODES

    def unpack(self, node: Any, depth: int) -> Any:
        self._nodes -= 1
        if not self._nodes:
            raise ValueError(f"a header of more than {MOST_NODES} values")
        if type(node) in _PLAIN:
            return node
        match node:
            case ["torch", str(name), list(shape)]:
                return self._tensor(name, shape)
            case [("numpy" | "scalar") as kind, str(name), list(shape)]:
                array = self._array(name, shape)
                return array if kind == "numpy" else array[()]
            case ["bytes", int(size)]:
                return bytes(self._take(size))
            case ["list", list(items)] if depth:
                return list(self._all(items, depth))
            case ["tuple", list(items)] if depth:
                return tuple(self._all(items, depth))
            case ["dict", list(keys), list(items)] if depth and _KEYS.issuperset(map(type, keys)):
                return dict(zip(keys, self._all(items, depth), strict=True))
        raise ValueError(f"no part of a header: {str(node)[:100]}")

    def _all(self, items: list[Any], depth: int) -> Iterator[Any]:
        return (self.unpack(item, depth - 1) for item in items)

    def _take(self, size: int) -> memoryview:
        if not 0 <= size <= len(self._flat) - self.at:
            raise ValueError(f"{size} bytes are asked for, and {len(self._flat) - self.at} left")
        self.at += size
        return self._flat[self.at - size : self.at]

    def _tensor(self, name: str, shape: list[Any]) -> Any:
        import torch

        dtype = _dtypes(torch).get(name)
        if dtype is None:
            raise ValueError(f"no type of torch {torch.__version__}'s: {name[:100]!r}")
        source = self._take(_bytes(shape, dtype.itemsize))
        tensor = torch.empty(shape, dtype=dtype)
        if source:
            _memory(tensor)[:] = source
        return tensor

    def _array(self, name: str, shape: list[Any]) -> Any:
        import numpy

        if not _NUMPY_DTYPE.fullmatch(name):
            raise ValueError(f"no type of numbers: {name[:100]!r}")
        try:
            dtype = numpy.dtype(name)
        except TypeError as error:
            raise ValueError(f"no type of numpy's: {name!r}") from error
        source = self._take(_bytes(shape, dtype.itemsize))
        array: Any = numpy.empty(shape, dtype)
        if source:
            memoryview(array.reshape(-1).view(numpy.uint8))[:] = source
        return array


def _bytes(shape: list[Any], itemsize: int) -> int:
    """How many bytes a tensor has; a dimension of 0 must not hide others that nothing holds."""
    size, volume = itemsize, itemsize
    for length in shape:
        if type(length) is not int or length < 0:
            raise ValueError(f"no length of a dimension: {str(length)[:100]}")
        size *= length
        volume *= max(length, 1)
    if len(shape) > DEEPEST or volume >= 2**62:
        raise ValueError(f"no shape of a tensor: {str(shape)[:100]}")
    return size
