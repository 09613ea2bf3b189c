"""Other circuit breakers, which keep their state in memory: what a call costs where nothing is
shared.  They are optional, and imported by name so that nothing here depends on them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import Any

from .report import version
from .timing import REJECTED, Case
from .work import Boom, boom, work, work_async, work_generator

def missing() -> list[str]:
    """What to print about the peers that are not there."""
    return [
        f"{name} is left out: it is not installed; it comes with the extra [bench]"
        for name in ("circuitbreaker", "pybreaker")
        if importlib.util.find_spec(name) is None
    ]


def peer_cases() -> list[Case]:
    """Calls through the peers' breakers, in the forms that each of them has."""
    cases: list[Case] = []
    if importlib.util.find_spec("circuitbreaker") is not None:
        cases += _circuitbreaker()
    if importlib.util.find_spec("pybreaker") is not None:
        cases += _pybreaker()
    return cases


def _circuitbreaker() -> list[Case]:
    module: Any = importlib.import_module("circuitbreaker")
    name = f"circuitbreaker {version('circuitbreaker')}"
    breaker = module.CircuitBreaker(name="closed")
    broken = module.CircuitBreaker(name="open", failure_threshold=1, recovery_timeout=3600)
    _open(broken, Boom)
    names = {"f": work, "breaker": breaker, "guarded": breaker(work)}
    refused = {"refused": broken(work), "Refusal": module.CircuitBreakerError}
    return [
        Case(f"closed: {name}, decorator", "guarded()", names, "bare"),
        Case(f"closed: {name}, call", "breaker.call(f)", names, "bare"),
        Case(f"closed: {name}, with", "with breaker:\n    f()", names, "bare"),
        Case(
            f"closed: {name}, async decorator",
            "await guarded()",
            {"guarded": breaker(work_async)},
            "bare coroutine",
        ),
        Case(
            f"closed: {name}, generator",
            "for _ in guarded():\n    pass",
            {"guarded": breaker(work_generator)},
            "bare generator",
        ),
        Case(f"rejected: {name}, decorator", REJECTED.format("refused()"), refused, "bare raise"),
    ]


def _pybreaker() -> list[Case]:
    module: Any = importlib.import_module("pybreaker")
    name = f"pybreaker {version('pybreaker')}"
    breaker = module.CircuitBreaker()
    broken = module.CircuitBreaker(fail_max=1, reset_timeout=3600)
    _open(broken, module.CircuitBreakerError)
    names = {"f": work, "breaker": breaker, "guarded": breaker(work)}
    refused = {"refused": broken(work), "Refusal": module.CircuitBreakerError}
    return [
        Case(f"closed: {name}, decorator", "guarded()", names, "bare"),
        Case(f"closed: {name}, call", "breaker.call(f)", names, "bare"),
        Case(f"closed: {name}, with", "with breaker.calling():\n    f()", names, "bare"),
        Case(f"rejected: {name}, decorator", REJECTED.format("refused()"), refused, "bare raise"),
    ]


def _open(breaker: Any, *signs: type[Exception]) -> None:
    with contextlib.suppress(*signs):
        breaker.call(boom)
