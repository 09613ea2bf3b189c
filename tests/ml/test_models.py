"""From files of each format to models, and what is refused, on real files of PyTorch's."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_breaker.clients import ml_models
from distributed_breaker.clients.ml_models import (
    Loaded,
    ModelProblem,
    load_input,
    load_model,
    model_of,
    quantized,
    stamp_of,
)
from tests.ml.conftest import PARTS, SAMPLE, network

HERE = "tests.ml.conftest:network"
SIZE = (4 * 8 + 8 + 8 * 2 + 2) * 4  # bytes of its parameters


def refused(path: Path, **options: Any) -> ModelProblem:
    with pytest.raises(ModelProblem) as caught:
        load_model(path, **options)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    return caught.value


def answers_like(loaded: Loaded, net: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(loaded.call(SAMPLE), net(SAMPLE))


# ---------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("file", "kind", "options"),
    [
        ("weights.pth", "weights", {"factory": network}),
        ("weights.pth", "weights", {"factory": HERE}),
        ("legacy.pth", "weights", {"factory": network}),
        ("checkpoint.pth", "weights", {"factory": network}),
        ("weights.safetensors", "weights", {"factory": network}),
        ("module.pt", "module", {"safe_globals": PARTS}),
        ("script.pt", "torchscript", {}),
        ("program.pt2", "export", {}),
    ],
)
def test_each_format_gives_the_same_predictions(
    model_files: Path, net: torch.nn.Module, file: str, kind: str, options: dict[str, Any]
) -> None:
    loaded = load_model(model_files / file, **options)
    answers_like(loaded, net)
    assert not loaded.call(SAMPLE).requires_grad
    assert (loaded.kind, loaded.bytes, loaded.device) == (kind, SIZE, "cpu")
    assert loaded.stamp == stamp_of(model_files / file)
    assert loaded.torch
    assert loaded.path == str(model_files / file)


@pytest.mark.parametrize("file", ["weights.pth", "legacy.pth", "weights.safetensors", "script.pt"])
def test_the_content_tells_the_format_and_no_name_does(
    model_files: Path, net: torch.nn.Module, tmp_path: Path, file: str
) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes((model_files / file).read_bytes())
    answers_like(load_model(other, factory=None if "script" in file else network), net)


def test_what_behaves_differently_in_training_is_put_into_eval_mode(tmp_path: Path) -> None:
    def factory() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Dropout(0.99), torch.nn.BatchNorm1d(3))

    torch.save(factory(), tmp_path / "module.pt")
    torch.save(factory().state_dict(), tmp_path / "weights.pt")
    parts = [torch.nn.Sequential, torch.nn.Dropout, torch.nn.BatchNorm1d]
    given = torch.ones(5, 3)
    for loaded in (
        load_model(tmp_path / "module.pt", safe_globals=parts),
        load_model(tmp_path / "weights.pt", factory=factory),
        model_of(factory()),
    ):
        torch.testing.assert_close(loaded.call(given), given, rtol=0, atol=1e-4)


def test_a_prediction_may_be_changed_in_place(model_files: Path) -> None:
    found = load_model(model_files / "weights.pth", factory=network).call(SAMPLE)
    found += 1


def test_the_version_is_that_of_the_content(model_files: Path, tmp_path: Path) -> None:
    first = load_model(model_files / "weights.pth", factory=network)
    copy = tmp_path / "copy.pth"
    copy.write_bytes((model_files / "weights.pth").read_bytes())
    assert load_model(copy, factory=network).version == first.version
    torch.save(network().state_dict(), copy)
    assert load_model(copy, factory=network).version != first.version
    assert len(first.version) == 16


# ---------------------------------------------------------------------------- what does not run


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def _in_a_module(evil: Evil) -> Any:
    net = network()
    net.extra = evil
    return net


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [_in_a_module, lambda evil: {"0.weight": evil}])
def test_a_pickle_runs_no_code(
    tmp_path: Path, content: Callable[[Evil], Any], zipped: bool
) -> None:
    trace, file = tmp_path / "trace", tmp_path / "model.pth"
    torch.save(content(Evil(trace)), file, _use_new_zipfile_serialization=zipped)
    for options in ({}, {"factory": network}, {"safe_globals": PARTS}):
        problem = refused(file, **options)
        assert not trace.exists()
    if zipped:
        assert f"{os.mkdir.__module__}.mkdir" in problem.why
        assert "safe_globals" in problem.remedy


def test_a_refusal_names_every_class_that_is_not_allowed(model_files: Path) -> None:
    problem = refused(model_files / "module.pt")
    for part in PARTS:
        assert f"{part.__module__}.{part.__qualname__}" in problem.why
    assert "ReLU" not in refused(model_files / "module.pt", safe_globals=[torch.nn.ReLU]).why


def test_what_the_application_has_allowed_stays_allowed(model_files: Path) -> None:
    with torch.serialization.safe_globals([torch.nn.ReLU]):
        load_model(model_files / "module.pt", safe_globals=PARTS)
        allowed = torch.serialization.get_safe_globals()
        assert torch.nn.ReLU in allowed
        assert torch.nn.Linear not in allowed


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps(Evil(trace)))
    assert "pickle" in refused(file).why
    assert not trace.exists()


def _with_entry(source: Path, target: Path, entry: str, content: bytes) -> None:
    """A copy of an archive with another content of one entry, or one more."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name != entry:
                new.writestr(name, old.read(name))
        new.writestr(entry, content)


def test_no_pickle_in_a_program_runs(model_files: Path, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "evil.pt2"
    made = io.BytesIO()
    torch.save((Evil(trace),), made)
    evil, data = made.getvalue(), "program/data"
    weights, constants = f"{data}/weights/model", f"{data}/constants/model"
    config = b'{"config": {"x": {"path_name": "%s", "use_pickle": %s}}}'
    for entry, content, why in [
        (f"{data}/sample_inputs/model.pt", evil, "pickle"),
        (f"{weights}.pt", evil, "pickle"),
        (f"{weights}_weights_config.json", config % (b"weight_0", b"true"), "pickle"),
        (f"{constants}_constants_config.json", config % (b"opaque_obj_0", b"false"), "pickle"),
        (f"{data}/aotinductor/model/model.so", b"\x7fELF", "machine code"),
        ("version", b"8.1", "another archive"),
    ]:
        _with_entry(model_files / "program.pt2", file, entry, content)
        problem = refused(file)
        assert not trace.exists(), entry
        assert why in problem.why, entry


def test_no_pickle_in_torchscript_runs(model_files: Path, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "evil.pt"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        _with_entry(
            model_files / "script.pt", file, "script/data.pkl", pickle.dumps(Evil(trace), protocol)
        )
        refused(file)
        assert not trace.exists()


def test_a_program_is_not_read_where_weights_are_expected(
    model_files: Path, tmp_path: Path
) -> None:
    disguised = tmp_path / "model.pth"
    disguised.write_bytes((model_files / "program.pt2").read_bytes())
    assert ".pt2" in refused(disguised).remedy
    for file in ("program.pt2", "script.pt"):
        assert "weights" in refused(model_files / file, factory=network).why
    assert "weights" in refused(
        model_files / "module.pt", factory=network, safe_globals=PARTS
    ).why  # fmt: skip


# ---------------------------------------------------------------------------- broken files


def test_what_is_missing_or_empty_or_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.pth").why
    assert "no file" in refused(tmp_path).why
    os.mkfifo(tmp_path / "pipe")
    assert "no file" in refused(tmp_path / "pipe").why
    empty = tmp_path / "empty.pth"
    empty.touch()
    assert "empty" in refused(empty).why
    empty.write_bytes(b"<html>not found</html>")
    assert "format" in refused(empty).why
    empty.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refused(empty).remedy


@pytest.mark.parametrize(
    "file", ["weights.pth", "legacy.pth", "weights.safetensors", "script.pt", "program.pt2"]
)
def test_a_torn_file_is_a_problem(model_files: Path, tmp_path: Path, file: str) -> None:
    whole = (model_files / file).read_bytes()
    torn = tmp_path / file
    factory = None if file in ("script.pt", "program.pt2") else network
    for length in {1, 5, 20, len(whole) // 2, len(whole) - 1}:
        torn.write_bytes(whole[:length])
        refused(torn, factory=factory)


@pytest.mark.parametrize("file", ["weights.pth", "script.pt", "program.pt2"])
def test_a_file_that_is_overwritten_in_place_is_torn(
    model_files: Path, tmp_path: Path, file: str
) -> None:
    """Its directory, at the end, is still the old one's."""
    content = bytearray((model_files / file).read_bytes())
    with zipfile.ZipFile(model_files / file) as archive:
        name = next(one for one in archive.namelist() if one.endswith(("/data/0", "/weight_0")))
        weights = archive.read(name)
    at = content.index(weights)
    content[at : at + 8] = bytes(8)
    half = tmp_path / file
    half.write_bytes(content)
    factory = None if file in ("script.pt", "program.pt2") else network
    assert "torn" in refused(half, factory=factory).why


def test_a_file_that_is_replaced_while_it_is_read(
    model_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: torch.nn.Module
) -> None:
    file, whole = tmp_path / "model.pth", (model_files / "weights.pth").read_bytes()
    file.write_bytes(whole[:700])
    written = 0

    def reads(*args: Any) -> Any:
        nonlocal written
        written += 1
        if written < lasts:
            file.write_bytes(whole[: 700 + written])
        elif written == lasts:
            file.write_bytes(whole)
        return kind_of(*args)

    kind_of = ml_models.kind_of
    monkeypatch.setattr(ml_models, "kind_of", reads)
    lasts = ml_models.TRIES - 1
    answers_like(load_model(file, factory=network), net)
    written, lasts = 0, 1_000
    assert "changes" in refused(file, factory=network).why
    assert written == ml_models.TRIES


def test_a_stamp_changes_with_the_file(model_files: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    assert stamp_of(file) is None
    file.write_bytes(b"one")
    first = stamp_of(file)
    assert first == stamp_of(file)
    file.write_bytes(b"other")
    second = stamp_of(file)
    assert second != first
    (tmp_path / "new").write_bytes(b"other")
    os.utime(tmp_path / "new", ns=(second[0], second[0]))
    (tmp_path / "new").replace(file)
    assert stamp_of(file) != second


# ---------------------------------------------------------------------------- factories, bounds


def test_weights_need_their_factory(model_files: Path, tmp_path: Path) -> None:
    weights = model_files / "weights.pth"
    assert "factory" in refused(weights).remedy
    why = refused(weights, factory=lambda: torch.nn.Linear(4, 8)).why
    assert "bias, weight missing" in why
    assert "0.bias" in why
    assert "unexpected" in why
    wide = refused(weights, factory=lambda: torch.nn.Sequential(*network()[:2], *network()[:1]))
    assert "size mismatch for 2.weight" in wide.why
    assert "NoneType" in refused(weights, factory=lambda: None).why
    for wrong in ("json:absent", "no_such_module:f", "json", "json:dumps"):
        assert wrong in refused(weights, factory=wrong).why
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert "Tensor" in refused(tmp_path / "tensor.pt", factory=network).why


@pytest.mark.parametrize("file", ["weights.pth", "legacy.pth", "weights.safetensors", "script.pt"])
def test_a_model_that_is_too_large_is_refused_before_it_is_read(
    model_files: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(ml_models, "read", lambda *_: pytest.fail("it was read"))
    problem = refused(model_files / file, factory=network, most_bytes=SIZE - 1)
    assert f"{(SIZE - 1) / 2**20:.4g} MiB" in problem.why
    assert problem.why.count("MiB") == 2


def test_what_a_factory_adds_counts_too(model_files: Path) -> None:
    def factory() -> torch.nn.Module:
        net = network()
        net.register_buffer("extra", torch.zeros(10_000), persistent=False)
        return net

    refused(model_files / "weights.pth", factory=factory, most_bytes=39_000)
    loaded = load_model(model_files / "weights.pth", factory=factory, most_bytes=41_000)
    assert loaded.bytes == SIZE + 40_000


def test_parts_that_share_a_parameter_count_it_once() -> None:
    layer = torch.nn.Linear(4, 4)
    assert model_of(torch.nn.Sequential(layer, layer, torch.nn.ReLU())).bytes == 80


def test_modules_whose_weights_have_no_plain_memory() -> None:
    class Sparse(torch.nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("edges", torch.eye(3).to_sparse())

    for module in (Sparse(), torch.nn.LazyLinear(3)):
        loaded = model_of(module)
        assert loaded.call(torch.ones(2, 3)).shape == (2, 3)
        assert loaded.version != model_of(Sparse()).version


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu", ""])
def test_a_device_that_is_not_there(model_files: Path, device: str) -> None:
    problem = refused(model_files / "weights.pth", factory=network, device=device)
    assert repr(device) in problem.why
    assert "cpu" in problem.remedy


def test_a_library_that_is_missing_is_named(
    model_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    problem = refused(model_files / "weights.safetensors", factory=network)
    assert problem.remedy == "pip install safetensors"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "distributed-breaker[ml]" in refused(model_files / "weights.pth").remedy


# ---------------------------------------------------------------------------- objects


def test_a_module_is_known_by_its_weights(net: torch.nn.Module) -> None:
    first, again = model_of(net), model_of(net)
    assert first.version == again.version
    answers_like(first, net)
    assert model_of(network()).version != first.version
    assert model_of(net, version="7").version == "7"
    assert (first.kind, first.bytes, first.path) == ("module", SIZE, None)


def test_programs_as_objects(model_files: Path, net: torch.nn.Module) -> None:
    program = torch.export.load(model_files / "program.pt2").module()
    for kind, module in [
        ("export", program),
        ("torchscript", load_model(model_files / "script.pt").module),
    ]:
        loaded = model_of(module)
        answers_like(loaded, net)
        assert (loaded.kind, loaded.bytes) == (kind, SIZE)


def test_anything_that_can_be_called_is_a_model() -> None:
    loaded = model_of(len)
    assert loaded.call("abc") == 3
    assert (loaded.kind, loaded.torch, loaded.bytes) == ("callable", False, 0)
    assert loaded.version != model_of(len).version


def test_what_is_no_model() -> None:
    async def later(_: object) -> None: ...

    for wrong, why in [(7, "called"), (torch.nn.Identity, "class"), (later, "coroutine")]:
        with pytest.raises(ModelProblem, match=why):
            model_of(wrong)


def test_a_callable_needs_no_torch() -> None:
    program = (
        "import sys; from distributed_breaker.clients.ml_models import model_of; "
        "assert model_of(len).call('ab') == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_problem_survives_the_way_from_another_process() -> None:
    problem = pickle.loads(pickle.dumps(ModelProblem("m.pth", "is empty", "copy it")))
    assert str(problem) == "m.pth is empty: copy it"


def test_quantization_gives_a_lighter_model(model_files: Path, net: torch.nn.Module) -> None:
    loaded = load_model(model_files / "weights.pth", factory=network)
    light = quantized(loaded)
    torch.testing.assert_close(light.call(SAMPLE), net(SAMPLE).detach(), rtol=0.1, atol=0.1)
    assert 0 < light.bytes < loaded.bytes
    assert (light.kind, light.version) == ("quantized", f"{loaded.version}-int8")
    answers_like(loaded, net)


def test_a_model_of_one_layer_can_be_quantized() -> None:
    for layer, given in [
        (torch.nn.Linear(4, 4), SAMPLE),
        (torch.nn.LSTM(4, 4), SAMPLE[None]),
        (torch.nn.GRUCell(4, 4), SAMPLE),
    ]:
        loaded = model_of(layer)
        light = quantized(loaded)
        light.call(given)
        assert 0 < light.bytes < loaded.bytes


def test_what_cannot_be_quantized(model_files: Path) -> None:
    for loaded, why in [
        (load_model(model_files / "script.pt"), "torchscript"),
        (model_of(len), "callable"),
        (model_of(torch.nn.Conv1d(1, 1, 1)), "no layer"),
    ]:
        with pytest.raises(ModelProblem, match=why):
            quantized(loaded)


# ---------------------------------------------------------------------------- inputs


def test_sample_inputs(tmp_path: Path) -> None:
    import numpy
    from safetensors.torch import save_file

    (tmp_path / "a.json").write_text("[[1, 2.5]]")
    (tmp_path / "named.json").write_text('{"x": [1, 2]}')
    torch.save(torch.tensor([[1, 2.5]]), tmp_path / "a.pt")
    numpy.save(tmp_path / "a.npy", numpy.array([[1, 2.5]], dtype="float32"))
    save_file({"x": torch.tensor([[1, 2.5]])}, tmp_path / "a.safetensors")
    for file in ("a.json", "a.pt", "a.npy", "a.safetensors"):
        assert torch.equal(load_input(tmp_path / file), torch.tensor([[1, 2.5]])), file
    assert torch.equal(load_input(tmp_path / "named.json")["x"], torch.tensor([1, 2]))
    assert load_input(tmp_path / "a.json", tensors=False) == [[1, 2.5]]


def test_what_is_no_sample_input(tmp_path: Path) -> None:
    import numpy

    trace = tmp_path / "trace"
    torch.save(Evil(trace), tmp_path / "a.pt")
    numpy.save(tmp_path / "a.npy", numpy.array([Evil(trace)], dtype=object))
    (tmp_path / "a.json").write_text("[[1], [2, 3]]")
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    for file in ("a.pt", "a.npy", "a.json", "a.wav", "absent.json"):
        with pytest.raises(ModelProblem, match=file):
            load_input(tmp_path / file)
    assert not trace.exists()
