"""What a guarded call costs beside a bare one, closed and rejected, in each form."""

from __future__ import annotations

import statistics
import time
import uuid

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from distributed_breaker.linked import FULL
from scripts.servers import Server

from .peers import closed_peers, missing, rejected_peers
from .report import Row, Setting, Table
from .timing import REJECTED, Case, Cost, measure
from .work import Boom, boom, trip, work, work_async, work_async_generator, work_generator

# A full tally is drained by the call that fills it: each sample holds two drains, no more or less.
CALLS = 2 * (FULL + 1)
ROUNDS, QUICK_ROUNDS = 40, 5

LASTING = Policy(failure_threshold=1, quorum=1, open_interval=86_400.0)

TARGETS = {
    "closed: decorator": "≤ 0.5, goal 0.35",
    "closed: call": "≤ 0.5, goal 0.35",
    "closed: guard()": "goal 0.6",
    "closed: with breaker": "goal 1.2",
    "closed: async decorator": "goal 0.5",
    "closed: call_async": "goal 0.5",
    "closed: decorator, no durations": "goal 0.2",
    "closed: call, no durations": "goal 0.2",
    "rejected: decorator": "≤ 2, in all goal 1",
    "rejected: call": "≤ 2, in all goal 1",
}

# How a call is written, and what it is compared with.
CLOSED = {
    "decorator": ("guarded()", "bare"),
    "call": ("breaker.call(f)", "bare"),
    "guard()": ("with breaker.guard():\n    f()", "bare"),
    "with breaker": ("with breaker:\n    f()", "bare"),
    "two steps": ("permit = breaker.acquire()\nf()\npermit.success()", "bare"),
    "async decorator": ("await guarded_async()", "bare coroutine"),
    "call_async": ("await breaker.call_async(f_async)", "bare coroutine"),
    "async guard()": ("async with breaker.guard():\n    await f_async()", "bare coroutine"),
    "generator": ("for _ in guarded_generator():\n    pass", "bare generator"),
    "async generator": (
        "async for _ in guarded_async_generator():\n    pass",
        "bare async generator",
    ),
}
REFUSED = {
    "decorator": "guarded()",
    "call": "breaker.call(f)",
    "guard()": "with breaker.guard():\n        f()",
    "with breaker": "with breaker:\n        f()",
    "async decorator": "await guarded_async()",
}


def run(setting: Setting) -> Table:
    """Time all forms on shared circuits whose server and link run."""
    rounds = QUICK_ROUNDS if setting.quick else ROUNDS
    with Server.start(setting.server) as server:
        namespace = f"bench-{uuid.uuid4().hex[:8]}"
        with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
            cases = [
                *bare_cases(),
                *measured_cases(registry),
                *closed_peers(),
                *unmeasured_cases(registry),
                *rejected_cases(registry),
                *rejected_peers(),
            ]
            costs = measure(cases, rounds=rounds, calls=CALLS)
            drained = draining(admitting(registry, "drained", Policy()), rounds)
            if not all(snapshot.fleet for snapshot in registry.snapshot().values()):
                raise RuntimeError("the circuits were not shared while they were timed")
    return Table(
        f"Calls: µs added to the same call without a breaker ({rounds} rounds of {CALLS:,} calls)",
        ("min", "median"),
        [*(_row(case, costs[case.name]) for case in cases), drained],
        missing(),
    )


def _row(case: Case, cost: Cost) -> Row:
    """Closed calls by what they add; rejections by what they add to a raise, and in all."""
    figures = (f"{cost.added_least:.3f}", f"{cost.added_median:.3f}")
    if not case.bare:
        figures = (f"{cost.least:.3f}", f"{cost.median:.3f}")
    note = f"in all {cost.least:.3f}, with raise and catch" if case.bare == "bare raise" else ""
    return Row(case.name, figures, TARGETS.get(case.name, ""), note if case.bare else "in all")


def draining(breaker: CircuitBreaker, rounds: int) -> Row:
    """What it takes to drain a tally, for each call in it.

    The figures of closed calls contain it, since calls without a pause drain their own tallies.
    """
    guarded = breaker(work)
    samples = []
    for _ in range(rounds):
        breaker.drain()
        for _ in range(FULL):
            guarded()
        start = time.perf_counter()
        breaker.drain()
        samples.append((time.perf_counter() - start) / FULL * 1e6)
    figures = (f"{min(samples):.3f}", f"{statistics.median(samples):.3f}")
    return Row("draining a tally, per call", figures, "goal 0.15", "contained in closed calls")


def bare_cases() -> list[Case]:
    return [
        Case("bare", "f()", {"f": work}),
        Case("bare coroutine", "await f()", {"f": work_async}),
        Case("bare generator", "for _ in f():\n    pass", {"f": work_generator}),
        Case("bare async generator", "async for _ in f():\n    pass", {"f": work_async_generator}),
        Case("bare raise", REJECTED.format("f()"), {"f": boom, "Refusal": Boom}),
    ]


def measured_cases(registry: CircuitBreakerRegistry) -> list[Case]:
    judged = admitting(registry, "judged", Policy(slow_call_duration=60.0))
    names = {"guarded": judged(work)}
    return [
        *_forms(admitting(registry, "closed", Policy()), ""),
        Case("closed: decorator, slow-call rule", "guarded()", names, "bare"),
    ]


def unmeasured_cases(registry: CircuitBreakerRegistry) -> list[Case]:
    return _forms(admitting(registry, "unmeasured", Policy(measure=False)), ", no durations")


def admitting(registry: CircuitBreakerRegistry, name: str, policy: Policy) -> CircuitBreaker:
    """A breaker that has had the first answer of the store."""
    breaker = registry.breaker(name, policy)
    breaker.call(work)
    return breaker


def _forms(breaker: CircuitBreaker, suffix: str) -> list[Case]:
    names = names_of(breaker)
    return [
        Case(f"closed: {form}{suffix}", statement, names, bare)
        for form, (statement, bare) in CLOSED.items()
    ]


def rejected_cases(registry: CircuitBreakerRegistry) -> list[Case]:
    breaker = registry.breaker("open", LASTING)
    trip(breaker)
    names = names_of(breaker) | {"Refusal": CircuitBreakerOpenException}
    return [
        Case(f"rejected: {form}", REJECTED.format(statement), names, "bare raise")
        for form, statement in REFUSED.items()
    ]


def names_of(breaker: CircuitBreaker) -> dict[str, object]:
    """What the statements above are written with."""
    return {
        "breaker": breaker,
        "f": work,
        "f_async": work_async,
        "guarded": breaker(work),
        "guarded_async": breaker(work_async),
        "guarded_generator": breaker(work_generator),
        "guarded_async_generator": breaker(work_async_generator),
    }
