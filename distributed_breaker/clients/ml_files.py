"""What a model's file holds, told from its content, and read without running code out of it.

Pickles are read with ``weights_only`` and nothing else, so that they make tensors and the classes
that the caller has allowed.  Safetensors can hold nothing but tensors.  Two formats are programs,
so a file of theirs must be trusted as code is:

- TorchScript runs PyTorch's own operators, and no Python; they can do harm all the same.
- A torch.export archive becomes Python.  It is read only under a name that ends in ``.pt2``, so
  that nobody can put one where weights are expected; and not if it brings pickles of objects or
  machine code, which ``torch.export.load`` would run while it reads.

With a factory the file may only hold weights, and both are refused.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from ..process import OwnLock, follow_process

MOST_NAMED = 5  # missing keys, forbidden classes … in one message

_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
_INSIDE = ("state_dict", "model_state_dict")  # of a checkpoint that holds more than weights
TORN = "copy it again, whole: write it under another name in the same folder, then rename it"
_WEIGHTS = "save the model's state_dict() and give a factory that makes the model"


class ModelProblem(Exception):
    """The model cannot be had: it is missing, broken, not allowed, too large …

    Attributes:
        where: its file, or what was given instead of one.
        why: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, where: str, why: str, remedy: str) -> None:
        super().__init__(where, why, remedy)
        self.where, self.why, self.remedy = where, why, remedy

    def __str__(self) -> str:
        return f"{self.where} {self.why}: {self.remedy}"


class InferenceTimeout(TimeoutError):
    """The model has not answered in time."""


def need_torch(where: str) -> Any:
    """PyTorch, which is imported only when it is wanted.

    Raises:
        ModelProblem: it cannot be.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise ModelProblem(
            where,
            f"needs PyTorch, which cannot be imported ({brief(error)})",
            "pip install 'distributed-breaker[ml]'",
        ) from error
    return torch


def brief(error: BaseException) -> str:
    """What an error says, in a line."""
    # PyTorch leads up to what is wrong with a pickle by advising to read it without any safety.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return text.partition("\n")[0][:300] or type(error).__name__


def some(names: Iterable[str]) -> str:
    """A few of them in words."""
    every = sorted(names)
    more = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + more


def opened(where: str) -> io.BufferedReader:
    """The file of a model or an input, open for reading.

    Raises:
        ModelProblem: it cannot be opened.
    """
    try:
        # Opening a pipe would wait for somebody who writes into it.
        if not stat.S_ISREG(os.stat(where).st_mode):
            raise ModelProblem(where, "is no file", "name the model's file")
        return open(where, "rb")
    except OSError as error:
        raise ModelProblem(
            where,
            f"cannot be opened ({error.strerror})",
            "look at the path, and at the rights of this process",
        ) from error


class Kind(NamedTuple):
    """What a file is, told without reading it.

    Attributes:
        name: ``"torch"``, ``"torchscript"``, ``"export"``, ``"safetensors"`` or ``"legacy"``.
        bytes: that its content takes in memory, without what it is turned into.
    """

    name: str
    bytes: int


def kind_of(file: BinaryIO, where: str, size: int) -> Kind:
    """What an open file of ``size`` bytes is.

    Raises:
        ModelProblem: nothing that is known, or torn.
    """
    if not size:
        raise ModelProblem(where, "is empty", TORN)
    file.seek(0)
    head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(file, where)
    if head.startswith(_LEGACY):
        return Kind("legacy", size)
    if head[8:9] == b"{":
        return Kind("safetensors", size)
    if head.startswith(b"version https://git-lfs"):
        raise ModelProblem(where, "is only a pointer of Git LFS", "fetch it with `git lfs pull`")
    if head[:1] == b"\x80":
        raise ModelProblem(where, "is a plain pickle, which could run any code", _WEIGHTS)
    raise ModelProblem(
        where,
        f"is of no format that is known (it begins with {head[:8]!r})",
        "save it with torch.save, torch.export.save or safetensors",
    )


def _kind_of_zip(file: BinaryIO, where: str) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # a torn one raises whatever its bytes happen to mean
        raise ModelProblem(where, f"is torn ({brief(error)})", TORN) from error
    held = sum(entry.file_size for entry in entries)
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "archive_format" in names:
        return Kind("export", held)
    if "constants.pkl" in names:
        return Kind("torchscript", held)
    if "data.pkl" in names:
        return Kind("torch", held)
    if "serialized_exported_program.json" in {entry.filename for entry in entries}:
        raise ModelProblem(
            where,
            "is a torch.export archive of an old format, which is a pickle",
            "export it again with a newer PyTorch",
        )
    raise ModelProblem(where, "is a zip file without a model", "name the model's own file")


def _is_whole(file: BinaryIO, where: str) -> None:
    """Whether nothing has overwritten a part of it, which PyTorch itself does not look at."""
    with zipfile.ZipFile(file) as archive:
        sums = any(entry.CRC for entry in archive.infolist())  # PyTorch can leave them out
        broken = archive.testzip() if sums else None
    if broken is not None:
        raise ModelProblem(where, f"is torn (in {broken})", TORN)


def read(
    file: BinaryIO, kind: str, where: str, device: str, safe_globals: Iterable[Any] = ()
) -> Any:
    """What the file holds: a module, an ExportedProgram, or a mapping of names to tensors.

    Args:
        file: open for reading in binary.
        kind: see ``Kind``.
        where: the file's name, for messages.
        device: where a TorchScript program is to be; all else is read into the CPU's memory.
        safe_globals: classes and functions that a pickle may use beside PyTorch's tensors, as
            ``torch.serialization.safe_globals`` takes them.

    Raises:
        ModelProblem: it is torn, or not allowed.
        Exception: anything else; bytes that mean nothing make the readers raise whatever it be.
    """
    if kind in ("torch", "torchscript", "export"):
        _is_whole(file, where)
    file.seek(0)
    if kind == "torchscript":
        return _read_torchscript(file, device)
    if kind == "export":
        return _read_export(file, where)
    if kind == "safetensors":
        return _read_safetensors(file, where)
    return _read_torch(file, where, safe_globals)


def weights_in(content: Any) -> Mapping[str, Any] | None:
    """The state_dict that was read, or that lies in the checkpoint that was read."""
    if not isinstance(content, Mapping):
        return None
    for name in _INSIDE:
        if isinstance(content.get(name), Mapping):
            return weights_in(content[name])
    tensors = any(hasattr(value, "untyped_storage") for value in content.values())
    return content if tensors and all(isinstance(key, str) for key in content) else None


def _read_torchscript(file: BinaryIO, device: str) -> Any:
    import torch

    # PyTorch calls the format deprecated, which is no news to whoever has such a file.
    warnings.filterwarnings("ignore", r"`torch\.jit\.load` is", DeprecationWarning)
    return torch.jit.load(file, map_location=device)


def _read_safetensors(file: BinaryIO, where: str) -> Any:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ModelProblem(where, "is of safetensors", "pip install safetensors") from error
    # Not through a mapping of the file: if it shrank meanwhile, the process would be killed.
    return load(file.read())


# ---------------------------------------------------------------------------- pickles


class _Allowed:
    """PyTorch keeps what may be unpickled for all threads at once; one at a time changes it."""

    _lock = OwnLock()

    def __init__(self) -> None:
        follow_process(self)

    @contextmanager
    def these(self, wanted: list[Any]) -> Iterator[None]:
        import torch

        with self._lock:
            # What the application itself has allowed is not to be taken from it afterwards.
            known = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([one for one in wanted if one not in known]):
                yield

    def forked(self) -> None:
        vars(self).pop("_lock", None)

    def close(self) -> None:
        """Nothing is kept open."""


_allowed = _Allowed()


def _read_torch(file: BinaryIO, where: str, safe_globals: Iterable[Any]) -> Any:
    import torch

    wanted = list(safe_globals)
    for one in wanted:
        if not callable(one) and not isinstance(one, tuple):
            raise ModelProblem(
                where,
                f"cannot be read with {one!r} in safe_globals",
                "name classes and functions there, not texts",
            )
    if not wanted:
        return _unpickled(torch, file, where)
    with _allowed.these(wanted):
        return _unpickled(torch, file, where)


def _unpickled(torch: Any, file: BinaryIO, where: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        forbidden = _forbidden(torch, file, str(error))
        if not forbidden:
            raise
        raise ModelProblem(
            where,
            f"uses classes or functions that are not allowed: {some(forbidden)}",
            f"{_WEIGHTS}; or, if you trust the file and all of them, name them in safe_globals",
        ) from None


def _forbidden(torch: Any, file: BinaryIO, message: str) -> list[str]:
    """What a pickle uses and must not; empty if that is not what is wrong."""
    named = re.findall(r"GLOBAL ([\w.]+)", message)
    if not named:
        return []
    try:
        file.seek(0)
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or named
    except Exception:
        return named  # in the old format only the first one is known


# ---------------------------------------------------------------------------- torch.export


def _read_export(file: BinaryIO, where: str) -> Any:
    if not where.endswith(".pt2"):
        raise ModelProblem(
            where,
            "is a torch.export archive, which is a program, under the name of mere weights",
            "give it a name that ends in .pt2 if you trust it",
        )
    import torch
    import torch.export

    # One copy in memory is both examined and read, so nobody can change it in between.
    content = io.BytesIO(file.read())
    brings = _brings_code(torch, content)
    if brings:
        raise ModelProblem(
            where,
            f"brings {brings}, which could run any code while it is read",
            "export it with plain tensors only, and with example_inputs set to None",
        )
    content.seek(0)
    return torch.export.load(content)


def _brings_code(torch: Any, content: BinaryIO) -> str | None:
    """What in an archive would be unpickled freely, or is machine code."""
    from torch.export.pt2_archive import PT2ArchiveReader

    with zipfile.ZipFile(content) as archive:
        # An archive of the old format inside of this one would be read instead, by a pickle.
        if not all("/" in name for name in archive.namelist()):
            return "another archive"
    content.seek(0)
    reader = PT2ArchiveReader(content)
    for name in reader.get_file_names():
        if name.startswith("data/aotinductor/"):
            return "machine code"
        if name.endswith("_config.json") and name.startswith(("data/weights/", "data/constants/")):
            for entry in json.loads(reader.read_string(name))["config"].values():
                kind = entry["path_name"].partition("_")[0]
                if entry["use_pickle"] or kind not in ("weight", "tensor"):
                    return f"a pickle ({entry['path_name']})"
        elif name.endswith(".pt"):
            try:
                torch.load(io.BytesIO(reader.read_bytes(name)), weights_only=True)
            except Exception:
                return f"a pickle of objects ({name})"
    return None
