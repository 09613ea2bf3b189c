"""The guide's lines on models, with its import path and its Celery worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from circuit_breaker_config import get_ml_circuit_breaker, initialize_circuit_breakers
from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.services import shut_down
from scripts.servers import Server
from tests.ml.conftest import PATIENT
from tests.ml.models import linear, row
from tests.unit.clock import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The weights of a model, whose module the configuration names."""
    file = tmp_path / "model.pth"
    torch.save(linear().state_dict(), file)
    return file


def written(tmp_path: Path, url: str, namespace: str) -> Path:
    file = tmp_path / "breakers.json"
    settings = {"redis_url": url, "namespace": namespace}
    ml = PATIENT | {"model_factory": "tests.ml.models:factory"}
    services = {name: {"ml": ml} for name in ("api_v1", "celery_workers")}
    file.write_text(json.dumps({"settings": settings, "services": services}))
    return file


def test_the_guides_lines(model: Path, tmp_path: Path, namespace: str) -> None:
    initialize_circuit_breakers(written(tmp_path, "memory://", namespace), environ={})
    try:
        ml_circuit = get_ml_circuit_breaker("api_v1", model_path=str(model))
        audio_data = row()
        result = ml_circuit.predict(audio_data)
        with torch.no_grad():
            assert torch.allclose(result, linear()(audio_data))
        assert get_ml_circuit_breaker("api_v1") is ml_circuit
        assert ml_circuit.stats()["model"]["kind"] == "weights"
    finally:
        shut_down()


@pytest.fixture
def worker(
    server: Server, namespace: str, model: Path, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    environ = {
        **os.environ,
        "BROKER": broker(server),
        "CIRCUIT_BREAKER_CONFIG": str(written(tmp_path, server.url, namespace)),
        "MODEL_PATH": str(model),
        "PYTHONPATH": str(ROOT),
    }
    command = "-m celery -A tests.ml.celery_app worker -P prefork -c 2 --without-gossip "
    command += "--without-mingle --without-heartbeat -l ERROR"
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command.split()], cwd=ROOT, env=environ, text=True, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)


def broker(server: Server) -> str:
    """Celery's way to write the address of a Unix socket."""
    return server.url.replace("unix://", "redis+socket://")


@pytest.mark.servers("valkey")
@pytest.mark.usefixtures("worker")
def test_the_guides_celery_task(
    server: Server, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER", broker(server))
    from tests.ml.celery_app import celery, process_prediction

    celery.conf.update(broker_url=broker(server), result_backend=broker(server))
    audio = tmp_path / "audio.json"
    audio.write_text("[[1.0, 1.0, 1.0, 1.0]]")
    with torch.no_grad():
        right = linear()(row()).tolist()
    try:
        for result in [process_prediction.delay(str(audio)) for _ in range(4)]:
            got = result.get(timeout=60)
            assert torch.allclose(torch.tensor(got), torch.tensor(right)), got
        registry = CircuitBreakerRegistry.from_url(server.url, namespace)
        with registry:
            registry.breaker("celery_workers.ml").force_open()
        other = tmp_path / "other.json"
        other.write_text("[[2.0, 1.0, 1.0, 1.0]]")
        answer = {"status": "queued", "reason": "ml_service_unavailable"}
        assert process_prediction.delay(str(other)).get(timeout=60) == answer
        with contextlib.closing(server.client()) as client:

            def retried() -> bool:
                results = [client.get(key) for key in client.scan_iter("celery-task-meta-*")]
                return any(json.loads(each or "{}").get("result") == str(other) for each in results)

            wait_until(retried)
    finally:
        celery.close()
