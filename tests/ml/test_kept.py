"""Predictions that are kept, models that change, and what a process's life means for them."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.clients import ml_engine
from distributed_breaker.clients.ml import MlClient
from distributed_breaker.clients.ml_models import model_of
from distributed_breaker.clients.ml_readings import Usage
from distributed_breaker.clients.ml_resources import SHARED
from distributed_breaker.clients.ml_stored import Predictions
from distributed_breaker.sections import Ml
from distributed_breaker.services import Services
from scripts.servers import Server
from tests.ml.conftest import BRITTLE, PATIENT, Start
from tests.ml.models import Steered, factory, linear, row
from tests.unit.clock import wait_until


class TestPredictions:
    @pytest.fixture
    def kept(self) -> Predictions:
        return Predictions(Ml())

    def test_an_input_is_told_by_type_shape_bytes_and_model(self, kept: Predictions) -> None:
        ones = torch.ones(2, 3)
        inputs = [
            ones, torch.ones(3, 2), torch.ones(6), ones.double(), torch.ones(2, 3, dtype=torch.int),
            torch.zeros(2, 3), {"a": ones}, {"b": ones}, [ones], (ones,), [ones, ones],
            torch.ones(4, 3)[::2] * 1, "1", 1, True, 1.0, None, [1, 1], ["1", 1],
        ]  # fmt: skip
        keys = [kept.key(version, each) for each in inputs for version in ("a", "b")]
        assert None not in keys
        # The strided one has the same numbers as the first, and 1 and True are told apart.
        assert len(set(keys)) == len(keys) - 2
        assert kept.key("a", torch.ones(4, 3)[::2]) == kept.key("a", ones)

    def test_each_time_it_is_the_callers_own(self, kept: Predictions) -> None:
        kept.put("key", torch.zeros(3))
        first = kept.get("key")
        assert first is not None
        first.value.fill_(9)
        again = kept.get("key")
        assert again is not None
        assert torch.equal(again.value, torch.zeros(3))

    def test_what_cannot_be_told_is_not_kept(self, kept: Predictions) -> None:
        assert kept.key("a", object()) is None
        kept.put("key", object())
        assert kept.get("key") is None
        assert kept.stats()["uncachable"] == 2

    def test_bounds(self) -> None:
        kept = Predictions(Ml(prediction_cache_size=3))
        for i in range(5):
            kept.put(str(i), torch.ones(1))
        assert [kept.get(str(i)) is None for i in range(5)] == [True, True, False, False, False]
        kept = Predictions(Ml(prediction_cache_bytes=20_000))
        for i in range(50):
            kept.put(str(i), torch.ones(100))
        assert 0 < kept.stats()["bytes"] <= 20_000

    def test_life(self) -> None:
        kept = Predictions(Ml(prediction_cache_ttl=1e-6, prediction_stale_ttl=0.0))
        kept.put("key", 1)
        wait_until(lambda: kept.get("key", stale=True) is None)

    @pytest.mark.parametrize(
        "value", [torch.randn(2, 3), np.arange(3), {"a": (torch.ones(1), "text", None)}, [1.5, "x"]]
    )
    def test_any_output(self, kept: Predictions, value: Any) -> None:
        kept.put("key", value)
        found = kept.get("key")
        assert found is not None
        assert repr(found.value) == repr(value)

    def test_none_is_kept_if_not_wanted(self, start: Start) -> None:
        model = Steered()
        client = start({"model": model}, cache_predictions=False, max_batch_size=1)
        client.predict(row())
        client.predict(row())
        assert model.seen == [1, 1]
        assert client.stats()["predictions"] is None

    @pytest.mark.servers("valkey")
    def test_those_of_other_processes(self, server: Server, namespace: str, tmp_path: Path) -> None:
        file = tmp_path / "breakers.json"
        settings = {"redis_url": server.url, "namespace": namespace}
        cache = {"redis_url": server.url, "disk_cache_dir": str(tmp_path / "disk")}
        ml = PATIENT | {"share_predictions": True, "max_batch_size": 1}
        file.write_text(
            json.dumps({"settings": settings, "services": {"api": {"ml": ml, "cache": cache}}})
        )
        models, clients, made = [Steered(), Steered()], [], []
        for model in models:
            services = Services(file, environ={})
            made.append(services)
            shared = services.client("cache", "api")
            clients.append(services.client("ml", "api", model=model, version="v1", shared=shared))
        try:
            one, two = clients
            assert isinstance(one, MlClient)
            assert isinstance(two, MlClient)
            right = one.predict(row())
            found = two.predict_with_info(row())
            assert found.source == "cache"
            assert torch.equal(found.value, right)
            assert found.age > 0
            assert models[1].seen == []
            server_key = next(iter(server.client().scan_iter("*prediction:*")))
            server.client().set(server_key, '"not ours"')
            two._stored.clear()  # type: ignore[union-attr]
            assert two.predict_with_info(row()).source == "model"
        finally:
            for services in made:
                services.close()


class TestChange:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The files are looked at more often than once a second."""
        monkeypatch.setattr(ml_engine, "LOOK_EVERY", 0.02)

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "model.pt"
        torch.save(linear(0).state_dict(), file)
        return file

    def replace(self, file: Path, content: bytes | None = None, seed: int = 1) -> None:
        new = file.with_suffix(".new")
        if content is None:
            torch.save(linear(seed).state_dict(), new)
        else:
            new.write_bytes(content)
        os.replace(new, file)

    def test_a_replaced_file_is_loaded_under_load(self, start: Start, file: Path) -> None:
        client = start({"factory": factory}, model_path=str(file), cache_predictions=False)
        with torch.no_grad():
            rights = [linear(seed)(row()) for seed in (0, 1)]
        wrong: list[Any] = []
        seen: set[int] = set()
        done = threading.Event()

        def call() -> None:
            while not done.is_set():
                got = client.predict_with_info(row())
                which = [i for i, right in enumerate(rights) if torch.allclose(got.value, right)]
                if got.source != "model" or len(which) != 1:
                    wrong.append(got)
                seen.update(which)

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: seen == {0})
            self.replace(file)
            wait_until(lambda: seen == {0, 1})
        finally:
            done.set()
            for thread in threads:
                thread.join(30)
        assert wrong == []
        assert client.stats()["model"]["reloads"] == 1
        assert client.stats()["model"]["warmed"], "with a real input, before it served"

    def test_a_broken_one_changes_nothing_but_is_told(self, start: Start, file: Path) -> None:
        client = start({"factory": factory}, model_path=str(file))
        right = client.predict(row())
        version = client.stats()["model"]["version"]
        self.replace(file, b"no model at all")
        wait_until(lambda: client.problems())
        found = client.predict_with_info(row())
        assert torch.equal(found.value, right)
        assert (found.version, found.source) == (version, "cache")
        assert client.predict_with_info(row(2.0)).source == "model"
        self.replace(file)
        wait_until(lambda: not client.problems())
        assert client.predict_with_info(row()).source == "model", "another model, another answer"

    def test_it_is_not_looked_at_if_not_wanted(self, start: Start, file: Path) -> None:
        client = start({"factory": factory}, model_path=str(file), reload_on_change=False)
        assert client.model._watch._look() == (None, None)

    def test_another_path_from_the_getter(self, start: Start, file: Path, tmp_path: Path) -> None:
        client = start({"factory": factory}, model_path=str(file), cache_predictions=False)
        other = tmp_path / "other.pt"
        torch.save(linear(3).state_dict(), other)
        client.use(model_path=str(other))
        with torch.no_grad():
            right = linear(3)(row())
        wait_until(lambda: torch.allclose(client.predict(row()), right))

    def test_what_changes_while_it_is_loaded_is_loaded_afterwards(self) -> None:
        seen: list[int] = []
        first, go_on = threading.Event(), threading.Event()

        def load() -> Any:
            seen.append(len(seen))
            first.set()
            assert go_on.wait(30)
            return model_of(lambda given: given, version=f"v{len(seen)}")

        engine = ml_engine.ThreadEngine("api.ml", load)
        engine.start()
        assert first.wait(30)
        engine.start()
        engine.reload()
        engine.reload()
        go_on.set()
        wait_until(lambda: engine.version == "v2")
        wait_until(lambda: not engine._loading)
        assert seen == [0, 1]

    def test_the_inputs_to_try_it_on(self, start: Start, file: Path, tmp_path: Path) -> None:
        sample = tmp_path / "sample.json"
        sample.write_text("[[1.0, 2.0, 3.0, 4.0]]")
        for section in ({"warmup_input": str(sample)}, {"warmup_shape": [1, 4]}):
            client = start({"factory": factory}, model_path=str(file), **section)
            assert client.stats()["model"]["warmed"]
        client = start({"factory": factory}, model_path=str(file), warmup_shape=[1, 5])
        assert not client.model.engine.ready
        assert "when it is tried" in client.problems()[0]
        client = start({"factory": factory}, model_path=str(file))
        assert not client.stats()["model"]["warmed"]
        client.predict(row())
        assert client.stats()["model"]["warmed"]

    def test_a_module_of_classes_that_the_file_allows(
        self, start: Start, tmp_path: Path, file: Path
    ) -> None:
        whole = tmp_path / "whole.pt"
        torch.save(linear(5), whole)
        assert "safe_globals" in start(model_path=str(whole)).problems()[0]
        linear_class = "torch.nn.modules.linear:Linear"
        client = start(model_path=str(whole), safe_globals=[linear_class])
        with torch.no_grad():
            assert torch.allclose(client.predict(row()), linear(5)(row()))
        # The lighter model's factory is its own.
        client = start(
            model_path=str(whole), fallback_model_path=str(file),
            fallback_model_factory="tests.ml.models:factory",
        )  # fmt: skip
        found = client.predict_with_info(row())
        assert found.source == "lightweight"
        with torch.no_grad():
            assert torch.allclose(found.value, linear(0)(row()))

    def test_a_changed_section_is_gone_by(self, start: Start, file: Path) -> None:
        options = {"factory": factory, "fallback_model": linear(1)}
        client = start(options, model_path=str(file), minimum_confidence=0.5)
        client.predict(row())
        window, lighter = client._window, client.lighter
        assert lighter is not None

        def configure(**keys: Any) -> None:
            client.configure(client.section.model_copy(update=keys))

        configure(queue_timeout=7.0, max_batch_size=3)
        assert client.model.queue.bounds[1:3] == (7.0, 3)
        assert client._window is window, "what it has seen stays"
        configure(minimum_confidence=0.6)
        assert client._window is not window
        configure(health_check_interval=7.0)
        assert client.breaker.check._interval == 7_000  # type: ignore[union-attr]
        configure(worker="process")
        assert "worker has changed in the file: restart this process" in client.problems()
        configure(worker="thread")
        configure(model_device="nonsense")
        wait_until(lambda: any("'nonsense'" in problem for problem in client.problems()))
        assert client.predict_with_info(row(3.0)).source == "model", "the one before goes on"

    def test_a_getter_says_the_same_again(self, start: Start, file: Path) -> None:
        client = start({"factory": factory, "default": torch.zeros(2)}, model_path=str(file))
        again = "".join(list(str(file)))
        client.use(model_path=again, default=client.explicit["default"])
        assert client.model.engine.reloads == 0
        client.use(default=torch.ones(2))
        client.model.engine.loaded = None
        client.model.engine.problem = "gone"
        client.model.engine._again_at = float("inf")
        assert torch.equal(client.predict(row()), torch.ones(2))

    def test_a_device_that_there_is_not(self, start: Start, file: Path) -> None:
        client = start({"factory": factory}, model_path=str(file), model_device="nonsense")
        assert "'nonsense'" in client.problems()[0]
        client = start({"factory": factory}, model_path=str(file), model_device="cpu")
        assert client.stats()["model"]["device"] == "cpu"

    def test_too_large_a_model(self, start: Start, tmp_path: Path) -> None:
        file = tmp_path / "large.pt"
        torch.save(torch.nn.Linear(1000, 300).state_dict(), file)
        client = start(
            {"factory": lambda: torch.nn.Linear(1000, 300)}, model_path=str(file),
            max_model_memory_mb=1,
        )  # fmt: skip
        assert "max_model_memory_mb" in client.problems()[0]


class TestHealth:
    @pytest.mark.servers("valkey")
    def test_an_open_circuit_recovers_without_traffic(self, start: Start, server: Server) -> None:
        model = Steered()
        section = BRITTLE | {"timeout": 0.2, "quorum": 1, "cache_predictions": False}
        client = start({"model": model}, server.url, **section)
        client.predict(row())
        wait_until(lambda: client.breaker.check.passed)  # type: ignore[union-attr]
        model.fails = RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            client.predict(row())
        assert client.breaker.state == "open"
        model.fails = None
        wait_until(lambda: client.breaker.state == "closed")
        assert client.problems() == []

    def test_it_is_asked_again_after_its_interval(self, start: Start) -> None:
        check = start({"model": linear()}, health_check_interval=7.0).breaker.check
        assert check is not None
        check.passed, check._began = True, 1_000
        assert [check.due(now) for now in (7_999, 8_000)] == [False, True]

    def test_nothing_is_known_to_try(self, start: Start) -> None:
        client = start({"model": linear()})
        with pytest.raises(Exception, match="no input to be tried on"):
            client._well()
        assert client.problems() == []

    def test_a_check_that_fails_is_a_problem(self, start: Start) -> None:
        model = Steered()
        client = start({"model": model}, cache_predictions=False)
        client.predict(row())
        model.gives = torch.tensor([float("nan")])
        with pytest.raises(ValueError, match="NaN"):
            client._well()
        assert "the health check has not passed" in client.problems()

    @pytest.mark.parametrize(
        ("usage", "key"),
        [({"cpu": 95.0}, "max_cpu_usage"), ({"memory": 90.0}, "max_memory_usage"),
         ({"gpu_memory": 95.0}, "max_gpu_memory_usage")],
    )  # fmt: skip
    def test_resources_put_calls_off(self, start: Start, usage: dict[str, float], key: str) -> None:
        limits = {"max_cpu_usage": 90.0, "max_memory_usage": 85.0, "max_gpu_memory_usage": 90.0}
        client = start({"model": linear()}, queue_timeout=0.05, **limits)
        SHARED.pretend(Usage(**usage))
        try:
            with pytest.raises(CircuitBreakerOpenException, match=key) as refused:
                client.predict(row())
            assert refused.value.retry_after > 0
            assert any(key in problem for problem in client.problems())
            lighter = start(
                {"model": linear(), "fallback_model": linear()}, queue_timeout=0.05, **limits
            )
            found = lighter.predict_with_info(row(), default=0)
            assert found.source == "default", "a lighter model would want the same"
        finally:
            SHARED.pretend(None)
        assert client.breaker.snapshot().totals.get("failures", 0) == 0
        resources = client.stats()["resources"]
        assert resources.keys() >= {"cpu_percent", "memory_percent", "gpu_memory_percent"}


class TestProcess:
    def test_a_forks_child_predicts_too(self, start: Start) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 3)).eval()
        client = start({"model": model})
        given = torch.randn(64, 512)
        right = client.predict(given)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                got = client.predict(given + 0.0, timeout=20, default=None)
                kept = client.predict_with_info(given).source
                client._stored.clear()  # type: ignore[union-attr]
                again = client.predict_with_info(given, timeout=20)
                fine = torch.allclose(again.value, right, atol=1e-5) and again.source == "model"
                code = 0 if fine and kept == "cache" and got is not None else 2
            finally:
                os._exit(code)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        assert torch.allclose(client.predict(given + 1.0), model(given + 1.0), atol=1e-5)
