"""What the model client costs: beside calling a model directly, and what batches bring."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distributed_breaker.clients.ml import MlClient
from distributed_breaker.services import Services

from .figures import Row, Spread, Topic
from .setting import Setting
from .timing import Case, measure

CALLERS = 32
ASKING = 300  # calls in a round
TOGETHER = 40  # calls of each caller in a round
METHOD = (
    "PyTorch on the CPU with one thread. What a `predict` adds is its time less that of calling "
    "the same module under `torch.no_grad()`, round by round; nothing else waits for the model, "
    "and no prediction is kept unless that is said. For batches, 32 threads or coroutines each ask "
    "for one prediction after another, of a module with 1.6 million weights; one by one means "
    "`max_batch_size` 1."
)


def run(setting: Setting) -> Topic:
    """Measure all of it, in this process."""
    count = setting.count(5, 60)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack:
            return Topic(
                "ml", "The model client", METHOD, [*_calls(stack, count), *_batches(stack, setting)]
            )
    finally:
        torch.set_num_threads(before)


def _calls(stack: contextlib.ExitStack, count: int) -> Iterator[Row]:
    model = _mlp(64, 32)
    given = torch.randn(1, 64)
    plain = _client(stack, model, cache_predictions=False)
    kept = _client(stack, model)

    def direct() -> Any:
        with torch.no_grad():
            return model(given)

    sample = torch.randn(1, 256)  # 1 kB
    kept_model = _client(stack, _mlp(256, 32))
    kept_model.predict(sample)
    inputs = iter(torch.randn(ASKING * (count + 20), 1, 64))
    cases = [
        Case("direct", "direct()", {"direct": direct}, ASKING),
        Case("predict", "predict(given)", {"predict": plain.predict, "given": given}, ASKING),
        Case("new", "predict(next(inputs))", {"predict": kept.predict, "inputs": inputs}, ASKING),
        Case("kept", "predict(sample)", {"predict": kept_model.predict, "sample": sample}, ASKING),
    ]
    samples = measure(cases, count, asyncio.run)
    base = samples["direct"]
    yield Row("a bare call of a small module", "µs", Spread.of(base))
    for name, words, target in (
        ("predict", "`predict` adds to it", "≤ 30"),
        ("new", "the same, and the prediction is kept", ""),
    ):
        added = (own - bare for own, bare in zip(samples[name], base, strict=True))
        yield Row(words, "µs", Spread.of(added), target=target)
    yield Row(
        "a prediction that was kept, input of 1 kB", "µs", Spread.of(samples["kept"]), target="≤ 20"
    )


def _batches(stack: contextlib.ExitStack, setting: Setting) -> Iterator[Row]:
    model = _mlp(512, 1024)
    for who, ask in (("threads", _of_threads), ("coroutines", _of_coroutines)):
        rates = []
        for size in (1, 32):
            client = _client(stack, model, cache_predictions=False, max_batch_size=size)
            client.predict(torch.randn(1, 512))
            rates.append([ask(client) for _ in range(setting.count(3, 9))])
        for words, rate in zip(("one by one", "in batches"), rates, strict=True):
            yield Row(f"32 {who}, {words}", "predictions/s", Spread.of(rate))
        ratios = [b / a for a, b in zip(*rates, strict=True)]
        words = f"batches bring 32 {who}"
        yield Row(words, "times as many", Spread.of(ratios), target="≥ 3")


def _of_threads(client: MlClient) -> float:
    """Predictions per second of all callers together."""
    start = threading.Barrier(CALLERS + 1)

    def call() -> None:
        given = torch.randn(1, 512)
        start.wait()
        for _ in range(TOGETHER):
            client.predict(given)

    threads = [threading.Thread(target=call) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return CALLERS * TOGETHER / (time.perf_counter() - began)


def _of_coroutines(client: MlClient) -> float:
    """The same on an event loop."""

    async def call() -> None:
        given = torch.randn(1, 512)
        for _ in range(TOGETHER):
            await client.predict_async(given)

    async def all_of_them() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(CALLERS)))
        return CALLERS * TOGETHER / (time.perf_counter() - began)

    return asyncio.run(all_of_them())


def _mlp(size: int, width: int) -> torch.nn.Module:
    layers = [torch.nn.Linear(size, width), torch.nn.ReLU(), torch.nn.Linear(width, width)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(width, 10)).eval()


def _client(stack: contextlib.ExitStack, model: Callable[..., Any], **section: Any) -> MlClient:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    file = folder / "breakers.json"
    ml = {"max_cpu_usage": 100.0, "max_memory_usage": 100.0, **section}
    content = {"settings": {"redis_url": "memory://"}, "services": {"api": {"ml": ml}}}
    file.write_text(json.dumps(content), encoding="utf-8")
    services = Services(file, environ={})
    stack.callback(services.close)
    client = services.client("ml", "api", model=model)
    assert isinstance(client, MlClient)
    return client
