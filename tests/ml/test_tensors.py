"""Trees of tensors as headers and bytes: what comes back is what went in; nothing else passes."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, namedtuple
from typing import Any

import numpy
import pytest
import torch

from distributed_breaker.clients.ml_tensors import _TORCH_DTYPES, decode, encode, size_of

Pair = namedtuple("Pair", "x y")


def there_and_back(tree: Any) -> Any:
    header, parts = encode(tree)
    data = b"".join(parts)
    assert size_of(parts) == len(data)
    return decode(json.loads(json.dumps(header)), data)


@pytest.mark.parametrize("name", _TORCH_DTYPES)
def test_every_type_of_torch(name: str) -> None:
    dtype = getattr(torch, name)
    size = 12 * dtype.itemsize
    bits = torch.arange(size, dtype=torch.uint8)
    tensor = (bits % 2 if dtype is torch.bool else bits).view(dtype).reshape(3, 4)
    back = there_and_back(tensor)
    assert back.dtype is dtype
    assert back.shape == (3, 4)
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    assert back.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.5),
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.int16),
        torch.arange(12).reshape(3, 4).t(),
        torch.arange(12)[1::3],
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,  # its bit for negation is set
        torch.ones(3).expand(2, 3),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True) * 2,
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_tensors_of_every_form(tensor: torch.Tensor) -> None:
    back = there_and_back(tensor)
    assert type(back) is torch.Tensor
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    assert not back.requires_grad
    back += 1  # it is the caller's own


@pytest.mark.parametrize("name", ["<f4", ">f4", "<f2", "|b1", "|u1", "<i8", "<c16"])
def test_arrays_of_numbers(name: str) -> None:
    array = numpy.arange(6).astype(name).reshape(2, 3)
    for each in (array, array.T, array[:, ::2], array[:0], array[1, 1, ...]):
        back = there_and_back(each)
        assert back.dtype == each.dtype
        assert back.shape == each.shape
        assert numpy.array_equal(back, each)
        assert back.flags.owndata
        assert back.flags.writeable
    scalar = there_and_back(array[1, 1])
    assert type(scalar) is type(array[1, 1])
    assert scalar == array[1, 1]


def test_trees() -> None:
    tree = {
        "a": [1, 2.5, None, True, "text\n\ud800", b"", b"\0\xff"],
        7: (torch.ones(2), {"deep": [(), [], {}, [torch.zeros(1, 3)]]}),
        "": 10**30,
    }
    back = there_and_back(tree)
    assert list(back) == list(tree)
    assert back["a"] == tree["a"]
    assert [type(each) for each in back["a"]] == [type(each) for each in tree["a"]]
    assert back[7][1]["deep"][:3] == [(), [], {}]
    assert torch.equal(back[7][0], torch.ones(2))
    assert torch.equal(back[7][1]["deep"][3][0], torch.zeros(1, 3))
    assert back[""] == 10**30
    assert math.isnan(there_and_back(math.nan))
    assert there_and_back(-math.inf) == -math.inf


def test_the_bytes_are_the_tensors_own_and_keep_them() -> None:
    tensor = torch.zeros(4)
    header, (part,) = encode(tensor)
    tensor[2] = 1
    assert torch.equal(decode(header, part), torch.tensor([0.0, 0, 1, 0]))
    header, (part,) = encode(torch.arange(1000.0))  # which nothing else holds
    assert torch.equal(decode(header, part), torch.arange(1000.0))


def endless() -> list[Any]:
    tree: list[Any] = []
    tree.append(tree)
    return tree


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": [1, {2}]}, r"a set at \['a'\]\[1\] cannot be sent"),
        (object(), "a object cannot be sent"),
        (Pair(1, 2), "a Pair cannot be sent"),
        (OrderedDict(a=1), "OrderedDict"),
        (3 + 4j, "complex"),
        ({1.5: 2}, "the key 1.5 is neither text nor an integer"),
        ([{True: 2}], r"the key True at \[0\]"),
        (endless(), "more than 64 containers"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.empty(2, dtype=torch.uint4), "uint4"),
        (numpy.array(["a"]), "<U1 cannot be sent: no numbers"),
        (numpy.array([object()]), "object cannot be sent: no numbers"),
        (numpy.ma.masked_array([1], [True]), "MaskedArray"),
        (numpy.datetime64(0, "s"), "datetime64"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_everything_else_is_refused(tree: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        encode(tree)


@pytest.mark.parametrize(
    "header",
    [
        ["torch", "float32", [3]],  # more than there is
        ["torch", "float32", [1]],  # less than there is
        ["torch", "float32", [-2]],
        ["torch", "float32", [2.0]],
        ["torch", "float32", [True, 2]],
        ["torch", "float32", ["2"]],
        ["torch", "float32", [1] * 65 + [2]],
        ["torch", "float32", 2],
        ["torch", "float32"],
        ["torch", "Tensor", [2]],
        ["torch", "qint8", [8]],
        ["torch", ["float32"], [2]],
        ["list", [["torch", "float32", [2]], ["torch", "float32", [0, 2**62]]]],
        ["list", [["torch", "float32", [2]], ["torch", "float32", [2**40, 0, 2**40]]]],
        ["torch", "float32", [2**63]],
        ["torch", "float32", [2**32, 2**32]],
        ["numpy", "object", [1]],
        ["numpy", "|O8", [1]],
        ["numpy", "<f5", [1]],
        ["numpy", "<f4\n", [2]],
        ["numpy", "<f4", [1] * 100],
        ["scalar", "<f4", [3]],
        ["bytes", -1],
        ["bytes", 9],
        ["bytes", 8.0],
        ["list", 5],
        ["dict", ["a"], []],
        ["dict", [], [1]],
        ["dict", [[1]], [1]],
        ["dict", [None], [1]],
        ["set", [1]],
        [],
        {},
        {"list": []},
        ["list", [0] * 100_000],
    ],
    ids=lambda header: str(header)[:40],
)
def test_no_header_is_trusted(header: Any) -> None:
    with pytest.raises(ValueError, match=r"no |asked for|belong|more than|argument"):
        decode(header, b"\0" * 8)


def test_a_deep_header_is_refused() -> None:
    header: Any = 1
    for _ in range(65):
        header = ["list", [header]]
    with pytest.raises(ValueError, match="no part of a header"):
        decode(header, b"")
    assert decode(header[1][0], b"")
