"""Models in processes of their own: answers in time, whatever the model does."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from distributed_breaker.clients import ml_crew
from distributed_breaker.clients.ml_channel import KEPT
from distributed_breaker.clients.ml_models import ModelProblem
from distributed_breaker.clients.ml_process import (
    InferenceTimeout,
    ModelSpec,
    ProcessEngine,
    RemoteError,
    WorkerDied,
)
from tests.ml.process_models import Net
from tests.unit.clock import wait_until

LONG = 60.0
MIB = 2**20


def save(path: Path, weight: float) -> str:
    """Put a model that adds ``weight`` there, at once."""
    net = Net()
    net.weight.data += weight
    torch.save(net.state_dict(), path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    return str(path)


def gone(pid: int) -> bool:
    """Whether a process runs no more; it may be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def running(engine: ProcessEngine) -> int:
    """Wait until a call would be run; the process that would run it."""
    assert engine.wait_ready(LONG), engine.problem
    assert engine.ready
    return int(engine.stats()["pid"])


def soon(condition: Callable[[], object]) -> None:
    """Poll for something that takes a while."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessEngine]:
    """One for all tests, which leave it with a worker that is well, perhaps another one."""
    path = save(tmp_path_factory.mktemp("model") / "net.pt", 1.0)
    engine = ProcessEngine(spec(path), most_bytes=100 * MIB)
    yield engine
    engine.close()


@pytest.fixture
def make() -> Iterator[Callable[..., ProcessEngine]]:
    """Make an engine that is closed after the test."""
    made = []

    def making(*args: Any, **options: Any) -> ProcessEngine:
        made.append(ProcessEngine(*args, **options))
        return made[-1]

    yield making
    for each in made:
        each.close()


def spec(path: str) -> ModelSpec:
    return ModelSpec(path, "cpu", "tests.ml.process_models:Net")


def test_answers_are_the_models(engine: ProcessEngine) -> None:
    pid = running(engine)
    tree = {
        "a": [torch.randn(3, 4), torch.arange(6).reshape(2, 3).t()],
        7: ("text", None, 2.5, True, torch.empty(0, 2), {"deep": torch.tensor(1.5)}),
    }
    answer, expected = engine.run(tree, LONG), Net().requires_grad_(False)
    expected.weight += engine.run(torch.zeros(1), LONG)
    for one, other in zip(_leaves(answer), _leaves(expected(tree)), strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert answer.keys() == tree.keys()
    assert type(answer[7]) is tuple
    array = engine.run(numpy.arange(3), LONG)
    assert array.tolist() == [0, 1, 2]
    assert engine.version
    assert engine.about["kind"] == "weights"
    assert engine.stats()["pid"] == pid != os.getpid()
    assert engine.stats()["rss"] > 10 * MIB


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for each in tree.values() for leaf in _leaves(each)]
    if isinstance(tree, list | tuple):
        return [leaf for each in tree for leaf in _leaves(each)]
    return [tree]


def test_answers_are_the_callers_own_at_every_size(engine: ProcessEngine) -> None:
    running(engine)
    answers, weight = [], engine.run(torch.zeros(1), LONG)
    # Small ones reuse the memory, larger ones get more, and the largest is not kept.
    for size in (10, 100_000, 20, 3_000_000, KEPT // 4, 10, KEPT // 4):
        answers.append(engine.run(torch.full((size,), float(len(answers))), LONG))
        answers[-1][0] = -1
    for index, answer in enumerate(answers):
        assert answer[0] == -1
        assert torch.all(answer[1:] == index + weight)


def test_an_error_of_the_model(engine: ProcessEngine) -> None:
    pid = running(engine)
    with pytest.raises(RemoteError, match="ValueError: no such thing") as caught:
        engine.run({"do": "fail", "with": ["no such thing\nand more"]}, LONG)
    assert (caught.value.kind, caught.value.message) == ("ValueError", "no such thing")
    assert not caught.value.out_of_memory
    for each in ("devour", "memory_error"):
        with pytest.raises(RemoteError) as caught:
            engine.run({"do": each}, LONG)
        assert caught.value.out_of_memory
    with pytest.raises(RemoteError, match=r"TypeError: a object at \['a'\]\[0\] cannot be sent"):
        engine.run({"do": "strange"}, LONG)
    assert engine.run({"do": "pid"}, LONG) == pid


def test_what_is_not_sent_costs_no_worker(engine: ProcessEngine) -> None:
    pid = running(engine)
    with pytest.raises(TypeError, match=r"a set at \['x'\] cannot be sent"):
        engine.run({"x": {1}}, LONG)
    with pytest.raises(InferenceTimeout):
        engine.run(1, 0.0)
    with pytest.raises(InferenceTimeout):
        engine.run(torch.ones(3), -1.0)
    assert engine.run({"do": "pid"}, LONG) == pid
    assert engine.stats()["killed"] == 0


def test_a_call_that_hangs_is_killed_and_the_next_one_works(engine: ProcessEngine) -> None:
    pids, before, crew = [running(engine)], engine.stats(), engine._own_crew()
    crew._with_spare = True
    crew.wake.set()
    soon(lambda: crew._next)
    with pytest.raises(InferenceTimeout, match=r"not answered within 0\.1 s"):
        engine.run({"do": "sleep", "with": [LONG]}, 0.1)
    # The spare one takes over at once; but there is only one.
    pids.append(engine.run({"do": "pid"}, LONG))
    crew._with_spare = False
    with pytest.raises(InferenceTimeout, match=r"not answered within 0\.2 s"):
        engine.run({"do": "hang"}, 0.2)
    with pytest.raises(ModelProblem, match="being loaded"):
        engine.run(1, LONG)
    assert not engine.ready
    pids.append(running(engine))
    assert engine.run({"do": "pid"}, LONG) == pids[-1]
    assert len(set(pids)) == 3
    wait_until(lambda: gone(pids[0]) and gone(pids[1]))
    assert engine.stats()["killed"] == before["killed"] + 2
    assert engine.stats()["restarts"] == before["restarts"] + 2


def test_a_call_that_ends_its_process(engine: ProcessEngine) -> None:
    running(engine)
    with pytest.raises(WorkerDied, match="killed, as when memory runs out") as caught:
        engine.run({"do": "kill"}, LONG)
    assert caught.value.out_of_memory
    # One that nobody calls is noticed, too.
    pid = running(engine)
    os.kill(pid, signal.SIGTERM)  # which does nothing
    assert engine.run({"do": "pid"}, LONG) == pid
    os.kill(pid, signal.SIGKILL)
    soon(lambda: engine.stats()["pid"] not in (pid, None))
    assert engine.run({"do": "pid"}, LONG) == engine.stats()["pid"]


def test_a_worker_that_leaks_is_replaced_without_a_gap(engine: ProcessEngine) -> None:
    pid, before = running(engine), engine.stats()
    assert engine.stats()["rss"] > 100 * MIB  # PyTorch's own is not the model's
    engine.run({"do": "leak", "with": [80 * MIB]}, LONG)
    engine.run(1, LONG)
    assert engine.run({"do": "pid"}, LONG) == pid
    assert not engine._own_crew().current.retires
    engine.run({"do": "leak", "with": [80 * MIB]}, LONG)
    engine.run(1, LONG)  # its answer says that it asks to be replaced
    soon(lambda: engine.run({"do": "pid"}, LONG) != pid)
    assert engine.stats()["replaced"] == before["replaced"] + 1
    assert engine.stats()["killed"] == before["killed"]
    wait_until(lambda: gone(pid))


def test_a_new_file_takes_over_without_a_gap(engine: ProcessEngine) -> None:
    running(engine)
    path, version, answers = Path(engine.model.path), engine.version, []

    def answer() -> float:
        answers.append(float(engine.run(torch.zeros(1), LONG)))
        return answers[-1]

    assert answer() == 1.0
    engine.sample = lambda: {"do": "pid"}  # the next worker answers it before it takes over
    path.write_bytes(b"broken")
    engine.reload()
    soon(lambda: answer() and engine.stats()["trouble"])
    assert "net.pt" in engine.stats()["trouble"]
    assert engine.ready
    save(path, 5.0)
    engine.reload()
    soon(lambda: answer() == 5.0)
    assert set(answers) == {1.0, 5.0}
    assert engine.version != version
    assert not engine.stats()["trouble"]
    save(path, 1.0)


def test_a_file_that_is_missing_is_looked_for_again_and_again(
    make: Callable[..., ProcessEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ml_crew, "FIRST_PAUSE", 0.01)
    path = tmp_path / "net.pt"
    engine = make(spec(str(path)))
    engine.start()
    wait_until(lambda: "cannot be found" in engine.problem)
    with pytest.raises(ModelProblem, match=r"net\.pt cannot be found: look at the path"):
        engine.run(1, LONG)
    assert not engine.wait_ready(LONG)
    save(path, 3.0)
    soon(lambda: engine.ready)
    assert engine.run(torch.zeros(1), LONG) == 3.0
    engine.close()
    engine.close()
    assert "not run any more" in engine.problem
    with pytest.raises(ModelProblem, match="not run any more"):
        engine.run(1, LONG)


def test_pauses_between_tries_grow(make: Callable[..., ProcessEngine], tmp_path: Path) -> None:
    crew = make(spec(str(tmp_path / "none.pt")))._own_crew()
    wait_until(lambda: crew._failures == 1)
    pauses = []
    for failures in (0, 1, 2, 5, 6, 40, 10_000):
        crew._failures = failures
        crew._load()
        pauses.append(round(crew._not_before - time.monotonic()))
    assert pauses == [1, 2, 4, 32, 60, 60, 60]


def test_an_engine_that_nobody_holds_goes(tmp_path: Path) -> None:
    engine = ProcessEngine(spec(save(tmp_path / "net.pt", 1.0)))
    engine.start()
    crew = engine._own_crew()
    wait_until(lambda: crew._loading)
    worker = crew._loading
    del engine
    gc.collect()
    wait_until(lambda: gone(worker.pid))
