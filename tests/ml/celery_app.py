"""The guide's Celery example, as a worker loads it."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery

from circuit_breaker_config import CircuitBreakerOpenException, get_ml_circuit_breaker

celery = Celery("guide", broker=os.environ["BROKER"], backend=os.environ["BROKER"])


def load_audio(file_path: str) -> Any:
    with open(file_path) as file:
        return json.load(file)


@celery.task
def queue_for_retry(file_path: str) -> str:
    return file_path


@celery.task
def process_prediction(file_path: str) -> Any:
    ml_circuit = get_ml_circuit_breaker("celery_workers")

    try:
        result = ml_circuit.predict(load_audio(file_path))
        return result  # noqa: RET504 - the guide's line
    except CircuitBreakerOpenException:
        # Queue for later processing
        queue_for_retry.delay(file_path)
        return {"status": "queued", "reason": "ml_service_unavailable"}
