"""One process of a fleet with a model: prints what came of its calls, one a line asked.

A line is "well", "fails" or "gives NaN", which the model does from then on, "flush", or "predict".
"""

from __future__ import annotations

import sys

import torch

from distributed_breaker.clients.ml import MlClient
from distributed_breaker.errors import CircuitBreakerOpenException, StoreUnavailable
from distributed_breaker.services import Services
from tests.ml.models import Steered, row


def main() -> None:
    services, model = Services(sys.argv[1], environ={}), Steered()
    client = services.client("ml", "api", model=model)
    assert isinstance(client, MlClient)
    client.predict(row())
    print("ready", flush=True)
    for number, line in enumerate(map(str.strip, sys.stdin)):
        told = "done"
        if line == "predict":
            try:
                told = client.predict_with_info(row(float(number)), timeout=5).source
            except CircuitBreakerOpenException as refused:
                told = f"open {refused.retry_after:.0f}"
            except Exception as error:
                told = type(error).__name__
        elif line == "flush":
            try:
                services.registry.flush()
            except StoreUnavailable:
                told = "not yet"
        else:
            model.fails = RuntimeError("told to fail") if line == "fails" else None
            model.gives = torch.tensor([float("nan")]) if line == "gives NaN" else None
        print(told, flush=True)
    services.close()


if __name__ == "__main__":
    main()
