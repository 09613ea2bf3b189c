"""What a type checker makes of a pipeline: no test, but ``make check`` reads it."""

from __future__ import annotations

from typing import assert_type

from distributed_breaker import CircuitBreaker
from distributed_breaker.compose import Pipeline


def plain(breaker: CircuitBreaker) -> None:
    pipeline = Pipeline(breaker, timeout=1.0)
    assert_type(pipeline.call(int, "1"), int)

    @pipeline
    def double(x: int, *, times: int = 2) -> str:
        return str(x * times)

    assert_type(double(1, times=3), str)
    double("1")  # type: ignore[arg-type]


def with_a_fallback(breaker: CircuitBreaker) -> None:
    pipeline = Pipeline(breaker, fallback=lambda error: None)
    assert_type(pipeline.call(int, "1"), int | None)


async def awaited(breaker: CircuitBreaker) -> None:
    async def kept(error: Exception) -> bytes:
        return b""

    async def fetch(url: str) -> str:
        return url

    pipeline = Pipeline(breaker, fallback=kept)
    assert_type(await pipeline.call_async(fetch, "x"), str | bytes)
    assert_type(await pipeline(fetch)("x"), str | bytes)
