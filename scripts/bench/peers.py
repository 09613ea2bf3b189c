"""Other circuit breakers, which keep their state in memory: what a call costs where nothing is
shared.  They are optional, and imported by name so that nothing here depends on them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable
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


def closed_peers() -> list[Case]:
    """Closed calls through the peers' breakers, in the forms that each of them has."""
    return _present(_circuitbreaker_closed, _pybreaker_closed)


def rejected_peers() -> list[Case]:
    """Rejections by the peers' breakers."""
    return _present(_circuitbreaker_rejected, _pybreaker_rejected)


def _present(*peers: Callable[[], list[Case]]) -> list[Case]:
    cases: list[Case] = []
    for peer in peers:
        with contextlib.suppress(ModuleNotFoundError):
            cases += peer()
    return cases


def _circuitbreaker_closed() -> list[Case]:
    module: Any = importlib.import_module("circuitbreaker")
    title = f"closed: circuitbreaker {version('circuitbreaker')}"
    breaker = module.CircuitBreaker(name="closed")
    names = {"f": work, "breaker": breaker, "guarded": breaker(work)}
    names |= {"guarded_async": breaker(work_async), "guarded_generator": breaker(work_generator)}
    generator = "for _ in guarded_generator():\n    pass"
    return [
        Case(f"{title}, decorator", "guarded()", names, "bare"),
        Case(f"{title}, call", "breaker.call(f)", names, "bare"),
        Case(f"{title}, with", "with breaker:\n    f()", names, "bare"),
        Case(f"{title}, async decorator", "await guarded_async()", names, "bare coroutine"),
        Case(f"{title}, generator", generator, names, "bare generator"),
    ]


def _pybreaker_closed() -> list[Case]:
    module: Any = importlib.import_module("pybreaker")
    title = f"closed: pybreaker {version('pybreaker')}"
    breaker = module.CircuitBreaker()
    names = {"f": work, "breaker": breaker, "guarded": breaker(work)}
    return [
        Case(f"{title}, decorator", "guarded()", names, "bare"),
        Case(f"{title}, call", "breaker.call(f)", names, "bare"),
        Case(f"{title}, with", "with breaker.calling():\n    f()", names, "bare"),
    ]


def _circuitbreaker_rejected() -> list[Case]:
    module: Any = importlib.import_module("circuitbreaker")
    breaker = module.CircuitBreaker(name="open", failure_threshold=1, recovery_timeout=3600)
    with contextlib.suppress(Boom):
        breaker.call(boom)
    names = {"refused": breaker(work), "Refusal": module.CircuitBreakerError}
    title = f"rejected: circuitbreaker {version('circuitbreaker')}, decorator"
    return [Case(title, REJECTED.format("refused()"), names, "bare raise")]


def _pybreaker_rejected() -> list[Case]:
    module: Any = importlib.import_module("pybreaker")
    breaker = module.CircuitBreaker(fail_max=1, reset_timeout=3600)
    with contextlib.suppress(module.CircuitBreakerError):
        breaker.call(boom)
    names = {"refused": breaker(work), "Refusal": module.CircuitBreakerError}
    title = f"rejected: pybreaker {version('pybreaker')}, decorator"
    return [Case(title, REJECTED.format("refused()"), names, "bare raise")]
