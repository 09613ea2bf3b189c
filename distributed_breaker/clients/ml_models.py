"""From a file, or an object, to a model that can be called."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from io import BufferedReader
from typing import Any, NamedTuple

from .ml_files import TORN, ModelProblem, brief, kind_of, need_torch, opened, read
from .ml_modules import (
    Factory,
    bytes_of,
    device_of,
    filled,
    hash_of_weights,
    in_eval_mode,
    is_module,
    module_of_program,
    moved,
    named,
    on,
    tensors_of,
)

__all__ = [
    "Loaded",
    "ModelProblem",
    "load_input",
    "load_model",
    "model_of",
    "quantized",
    "stamp_of",
]

Stamp = tuple[int, int, int]

TRIES = 3  # to read a file that is written meanwhile
MOST_INPUT = 256 * 2**20  # bytes of a file with a sample input
MIB = 2**20


class _Terms(NamedTuple):
    """What a model's file is loaded under, see ``load_model``."""

    where: str
    device: str
    factory: Factory | None
    safe_globals: tuple[Any, ...]
    most_bytes: int | None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is ready.

    Attributes:
        call: gives the prediction for one input; no gradients are kept.  A model of PyTorch's on
            another device than the CPU gets the tensors of its input moved there, and those of its
            output back.
        version: changes with the model's content; the same in every process.  An object without a
            content that could be read has one of its own in each process.
        kind: ``"weights"``, ``"module"``, ``"torchscript"``, ``"export"``, ``"quantized"`` or
            ``"callable"``.
        path: its file.
        bytes: that its parameters and buffers take.
        device: where they are.
        seconds: that loading took.
        torch: whether it is PyTorch's.
        stamp: of the file as it was read, see ``stamp_of``.
        module: PyTorch's object behind ``call``.
    """

    call: Callable[[Any], Any]
    version: str
    kind: str
    path: str | None
    bytes: int
    device: str
    seconds: float
    torch: bool
    stamp: Stamp | None = None
    module: Any = field(default=None, repr=False)


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    factory: Factory | None = None,
    safe_globals: Iterable[Any] = (),
    most_bytes: int | None = None,
) -> Loaded:
    """A model out of a file, whose format is told from its content; see ``ml_files`` for trust.

    Args:
        path: of torch.save (weights, or a whole module), TorchScript, torch.export or safetensors.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …; ``"auto"``: CUDA if there is any, else the
            CPU.
        factory: makes the module that the weights of the file belong to: a function without
            arguments, or its place as ``"package.module:function"``.  With it, the file must hold
            weights and nothing else.
        safe_globals: classes and functions that a pickle may use, or their places as texts; all
            that a whole module is of.
        most_bytes: that the model may take.

    Raises:
        ModelProblem: it cannot be had.
    """
    where, began = os.fspath(path), time.monotonic()
    allowed = tuple(named(each, where) for each in safe_globals)
    terms = _Terms(where, device_of(device, where), factory, allowed, most_bytes)
    for _ in range(TRIES):
        with opened(where) as file:
            problem = None
            stamp = _stamp(os.fstat(file.fileno()))
            try:
                kind, version, module = _loaded(file, stamp[1], terms)
            except ModelProblem as error:
                problem = error
            except Exception as error:
                problem = ModelProblem(where, f"cannot be read ({brief(error)})", TORN)
                problem.__cause__ = error
            if _stamp(os.fstat(file.fileno())) == stamp:
                break
    else:
        raise ModelProblem(
            where,
            "changes while it is read",
            "write it under another name in the same folder, then rename it",
        )
    if problem is not None:
        raise problem
    took = time.monotonic() - began
    return _ready(module, version, kind, where, terms.device, took, stamp)


def stamp_of(path: str | os.PathLike[str]) -> Stamp | None:
    """What changes when the file does; None: there is none."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _loaded(file: BufferedReader, size: int, terms: _Terms) -> tuple[str, str, Any]:
    """Kind, version and module."""
    where, factory = terms.where, terms.factory
    kind, held = kind_of(file, where, size)
    # Before it takes that memory.  A program's code is no part of the model, but small.
    _fits(where, held, terms.most_bytes)
    if factory is not None and kind in ("torchscript", "export"):
        raise ModelProblem(where, _NOT_WEIGHTS.format("program"), "leave the factory out")
    version = _hash_of(file)
    content = read(file, kind, where, terms.device, terms.safe_globals)
    if kind == "export":
        module = module_of_program(content, where, terms.device)
    elif kind == "torchscript":
        module = content.eval()
    elif is_module(content):
        if factory is not None:
            raise ModelProblem(where, _NOT_WEIGHTS.format("whole module"), "leave the factory out")
        kind, module = "module", content.eval()
    else:
        kind, module = "weights", filled(where, factory, content)
    _fits(where, bytes_of(module), terms.most_bytes)
    if kind in ("module", "weights"):
        module = on(module, where, terms.device)
    return kind, version, module


_NOT_WEIGHTS = "holds a {}, and with a factory it must hold weights"


def _hash_of(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _fits(where: str, needed: int, most: int | None) -> None:
    if most is not None and needed > most:
        raise ModelProblem(
            where,
            f"takes {needed / MIB:.4g} MiB, and may take {most / MIB:.4g} MiB",
            "allow more (max_model_memory_mb), or name a smaller one",
        )


def _ready(
    module: Any,
    version: str,
    kind: str,
    path: str | None,
    device: str,
    seconds: float,
    stamp: Stamp | None = None,
) -> Loaded:
    torch = need_torch(kind)

    def call(given: Any) -> Any:
        # Not inference_mode: what comes out of it cannot be changed in place by the caller.
        with torch.no_grad():
            return module(given)

    def call_there(given: Any) -> Any:
        # The way back waits until the output has been computed, so that time and errors of the
        # model are those of this call.
        with torch.no_grad():
            return moved(module(moved(given, device)), "cpu")

    on_cpu = device == "cpu"
    return Loaded(
        call if on_cpu else call_there,
        version, kind, path, bytes_of(module), device, seconds, True, stamp, module,
    )  # fmt: skip


# ---------------------------------------------------------------------------- objects


def model_of(obj: Any, *, device: str = "auto", version: str | None = None) -> Loaded:
    """A model out of an object: a torch.nn.Module, or anything that can be called with an input.

    A module is put into eval() mode, and moved to ``device``; ``"auto"`` leaves it where it is.

    Args:
        version: what stored predictions of it are known by.  Without one, those of a module are
            known by its weights, those of anything else only in this process.

    Raises:
        ModelProblem: it is neither.
    """
    began, where = time.monotonic(), f"{type(obj).__name__} object"
    if isinstance(obj, type):
        raise ModelProblem(obj.__qualname__, "is a class", "give an object of it")
    if not callable(obj):
        raise ModelProblem(where, "cannot be called", "give a torch.nn.Module or a function")
    if not is_module(obj):
        if inspect.iscoroutinefunction(obj):
            raise ModelProblem(where, "is a coroutine function", "give a function that waits")
        took = time.monotonic() - began
        return Loaded(
            obj, version or uuid.uuid4().hex[:16], "callable", None, 0, "cpu", took, False
        )
    if device == "auto":
        device = next((str(each.device) for each in tensors_of(obj)), "cpu")
    device = device_of(device, where)
    kind = in_eval_mode(obj)
    module = on(obj, where, device)
    version = version or hash_of_weights(module)
    return _ready(module, version, kind, None, device, time.monotonic() - began)


def quantized(loaded: Loaded) -> Loaded:
    """A lighter model on the CPU, whose Linear, LSTM, GRU … layers compute with 8 bits.

    Raises:
        ModelProblem: it is no module of PyTorch's, or has no such layer.
    """
    where, began = loaded.path or f"{loaded.kind} object", time.monotonic()
    remedy = "name the file of a lighter model (fallback_model_path)"
    if loaded.kind not in ("weights", "module"):
        raise ModelProblem(where, f"is a {loaded.kind}, and cannot be quantized", remedy)
    try:
        from torch.ao.quantization import quantize_dynamic
        from torch.nn import Sequential

        # Deprecated since 2.10, and there still.
        for text in (r"torch\.ao\.quantization is deprecated", r"torch\.quantize_per_tensor"):
            warnings.filterwarnings("ignore", text)
        before = {type(part) for part in loaded.module.modules()}
        # Layers are exchanged within what they are part of, and the model may be but one layer.
        whole = Sequential(copy.deepcopy(loaded.module).cpu())
        module = quantize_dynamic(whole, inplace=True)[0]
    except Exception as error:
        raise ModelProblem(where, f"cannot be quantized ({brief(error)})", remedy) from error
    if {type(part) for part in module.modules()} <= before:
        raise ModelProblem(where, "has no layer that could be quantized", remedy)
    took = time.monotonic() - began
    return replace(
        _ready(module, f"{loaded.version}-int8", "quantized", loaded.path, "cpu", took),
        stamp=loaded.stamp,
    )


# ---------------------------------------------------------------------------- inputs


def load_input(path: str | os.PathLike[str], *, tensors: bool = True) -> Any:
    """A sample input out of a file: .json (nested lists), .pt, .pth, .npy or .safetensors.

    Args:
        tensors: give tensors of PyTorch's; otherwise what .json and .npy hold by themselves.

    Raises:
        ModelProblem: it cannot be had.
    """
    where = os.fspath(path)
    with opened(where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_INPUT:
            raise ModelProblem(where, f"has {size} bytes, too many for an input", "name another")
        try:
            return _input(file, where, tensors)
        except ModelProblem:
            raise
        except Exception as error:
            raise ModelProblem(
                where, f"holds no input ({brief(error)})", "write it again"
            ) from error


def _input(file: BufferedReader, where: str, tensors: bool) -> Any:
    suffix = os.path.splitext(where)[1]
    if suffix == ".json":
        given = json.loads(file.read())
        return _as_tensors(given, where) if tensors else given
    if suffix == ".npy":
        import numpy

        given = numpy.load(file, allow_pickle=False)
        return need_torch(where).from_numpy(given) if tensors else given
    if suffix in (".pt", ".pth"):
        need_torch(where)
        return read(file, kind_of(file, where, os.fstat(file.fileno()).st_size).name, where, "cpu")
    if suffix == ".safetensors":
        need_torch(where)
        held = read(file, "safetensors", where, "cpu")
        return next(iter(held.values())) if len(held) == 1 else held
    raise ModelProblem(
        where, f"ends in {suffix!r}", "give a .json, .pt, .pth, .npy or .safetensors"
    )


def _as_tensors(given: Any, where: str) -> Any:
    if isinstance(given, dict):
        return {key: _as_tensors(value, where) for key, value in given.items()}
    return need_torch(where).tensor(given)
