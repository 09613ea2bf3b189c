"""PyTorch's modules: made by a factory, filled with weights, put on a device, measured."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from .ml_files import ModelProblem, brief, need_torch, some, weights_in
from .ml_values import each_tensor

Factory = Callable[[], Any] | str


def is_module(thing: Any) -> bool:
    """Whether it is a torch.nn.Module; nothing is before that has been imported."""
    return isinstance(thing, getattr(sys.modules.get("torch.nn"), "Module", ()))


def in_eval_mode(module: Any) -> str:
    """Put a module into eval() mode; the kind that it is of, see ``Loaded``."""
    try:
        module.eval()
    except NotImplementedError:
        return "export"  # its mode was settled when it was exported
    torch = sys.modules["torch"]
    return "torchscript" if isinstance(module, torch.jit.ScriptModule) else "module"


def named(place: Any, where: str) -> Any:
    """The class or function at a place such as ``"package.module:Class"``; what is no text is it
    already.

    Raises:
        ModelProblem: there is none.
    """
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        what = f"may use {place!r}, which cannot be had ({brief(error)})"
        raise ModelProblem(where, what, 'name it as "package.module:Class"') from error


def _made(where: str, factory: Factory) -> Any:
    """A new module, without weights."""
    who = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
    try:
        module = named(factory, where)()
    except Exception as error:
        raise ModelProblem(
            where,
            f"cannot be made by its factory {who} ({type(error).__name__}: {brief(error)})",
            'give a function without arguments, or "package.module:function"',
        ) from error
    if not is_module(module):
        raise ModelProblem(
            where,
            f"cannot be made by its factory {who}, which gives a {type(module).__name__}",
            "let it return a torch.nn.Module",
        )
    return module.eval()


def filled(where: str, factory: Factory | None, content: Any) -> Any:
    """The factory's module, with the weights of the file."""
    weights = weights_in(content)
    if weights is None:
        raise ModelProblem(
            where,
            f"holds a {type(content).__name__} instead of a model or weights",
            "save the model's state_dict()",
        )
    if factory is None:
        raise ModelProblem(
            where, "holds weights only", "give a factory that makes the module they belong to"
        )
    module = _made(where, factory)
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
        wrong = [f"{some(names)} {what}" for names, what in
                 ((missing, "missing"), (unexpected, "unexpected")) if names]  # fmt: skip
    except RuntimeError as error:
        wrong = [line.strip().rstrip(".") for line in str(error).splitlines()[1:4]]
    if wrong:
        raise ModelProblem(
            where,
            f"does not fit its factory's module ({'; '.join(wrong)})",
            "give the factory of this model, or name the right file",
        )
    return module


def device_of(device: str, where: str) -> str:
    """The full name of a device, on which something can be."""
    torch = need_torch(where)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # "meta" has no memory that a number could be read from
        return str(probe.device)
    except Exception as error:  # an AssertionError without CUDA, a RuntimeError otherwise
        there = ["cpu", *(f"cuda:{one}" for one in range(torch.cuda.device_count()))]
        raise ModelProblem(
            where,
            f"cannot be on the device {device!r} ({brief(error)})",
            f"choose among {', '.join(there)}, or auto",
        ) from error


def on(module: Any, where: str, device: str) -> Any:
    """The module, moved to a device."""
    try:
        return module.to(device)
    except Exception as error:
        raise ModelProblem(
            where,
            f"cannot be moved to the device {device} ({brief(error)})",
            "look whether its memory is full, or choose another one",
        ) from error


def module_of_program(program: Any, where: str, device: str) -> Any:
    """The module of a torch.export archive, whose graph names devices, too."""
    try:
        if {str(tensor.device) for tensor in program.state_dict.values()} - {device}:
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module()
    except Exception as error:
        raise ModelProblem(
            where, f"cannot be moved to the device {device} ({brief(error)})", "export it there"
        ) from error


def tensors_of(module: Any) -> Iterator[Any]:
    """Parameters, buffers, and the weights of quantized layers."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        # Quantized layers keep their weights packed, in no parameter.
        if type(part).__module__.startswith("torch.ao.nn.quantized."):
            if hasattr(part, "get_weight"):
                yield from part.get_weight().values()
            elif callable(getattr(part, "weight", None)):
                yield part.weight()


def bytes_of(module: Any) -> int:
    """What they take together; those that the first call will make take nothing yet."""
    lazy = sys.modules["torch.nn.parameter"].is_lazy
    return sum(each.numel() * each.element_size() for each in tensors_of(module) if not lazy(each))


def moved(given: Any, device: str) -> Any:
    """The same input or output with its tensors on another device."""
    return each_tensor(given, lambda tensor: tensor.to(device))


def hash_of_weights(module: Any) -> str:
    """A hash of a module's parts and weights; a random one if those cannot be read."""
    made = hashlib.blake2b(repr(module).encode(), digest_size=8)
    try:
        for name, value in module.state_dict().items():
            made.update(f"\0{name}\0".encode())
            if hasattr(value, "untyped_storage"):
                plain = value.detach().cpu().contiguous()
                made.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
                size = plain.numel() * plain.element_size()
                if size:
                    made.update((ctypes.c_char * size).from_address(plain.data_ptr()))
            else:
                made.update(repr(value).encode())
    except (RuntimeError, ValueError):  # tensors without plain memory
        return uuid.uuid4().hex[:16]
    return made.hexdigest()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting, be it the host's or a GPU's."""
    if isinstance(error, MemoryError) or getattr(error, "out_of_memory", False):
        return True
    # torch says it of a GPU by a type, and of the host by a RuntimeError with these words.
    text = str(error)[:300] if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
