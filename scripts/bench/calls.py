"""What a guarded call costs beside a bare one, closed and rejected, in each form."""

from __future__ import annotations

import uuid

from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from distributed_breaker.linked import FULL
from scripts.servers import Server

from .peers import missing, peer_cases
from .report import Row, Setting, Table
from .timing import REJECTED, Case, Cost, measure
from .work import Boom, boom, trip, work, work_async, work_async_generator, work_generator

# A full tally is drained by the call that fills it: each sample holds two drains, no more or less.
CALLS = 2 * (FULL + 1)
ROUNDS, QUICK_ROUNDS = 40, 8

LASTING = Policy(failure_threshold=1, quorum=1, open_interval=86_400.0)

TARGETS = {
    "closed: decorator": "≤ 0.5, goal 0.35",
    "closed: decorator, no durations": "goal 0.2",
    "closed: call": "≤ 0.5, goal 0.35",
    "closed: call, no durations": "goal 0.2",
    "closed: guard()": "goal 0.6",
    "closed: with breaker": "goal 1.2",
    "closed: async decorator": "goal 0.5",
    "closed: call_async": "goal 0.5",
}
BEYOND_A_RAISE = "≤ 2"
REJECTION = "goal 1"


def run(setting: Setting) -> Table:
    """Time all forms on a shared circuit whose server and link run."""
    with Server.start(setting.server) as server:
        namespace = f"bench-{uuid.uuid4().hex[:8]}"
        with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
            cases = bare_cases() + closed_cases(registry) + rejected_cases(registry)
            cases += peer_cases()
            rounds = QUICK_ROUNDS if setting.quick else ROUNDS
            costs = measure(cases, rounds=rounds, calls=CALLS)
            if any(snapshot.fleet is False for snapshot in registry.snapshot().values()):
                raise RuntimeError("the circuits were not shared while they were timed")
    return table(cases, costs, rounds)


def table(cases: list[Case], costs: dict[str, Cost], rounds: int) -> Table:
    """Closed calls by what they add; rejections by what they add to a raise, and in all."""
    result = Table(
        f"Calls: µs added to the same call without a breaker ({rounds} rounds of {CALLS:,} calls)",
        ("min", "median"),
        remarks=missing(),
    )
    for case in cases:
        cost = costs[case.name]
        if not case.bare:
            result.rows.append(Row(case.name, _figures(cost.least, cost.median), note="in all"))
            continue
        figures = _figures(cost.added_least, cost.added_median)
        target, note = TARGETS.get(case.name, ""), ""
        if case.bare == "bare raise":
            target, note = BEYOND_A_RAISE, f"{cost.least:.2f} with raise and catch, {REJECTION}"
        result.rows.append(Row(case.name, figures, target, note))
    return result


def _figures(least: float, median: float) -> tuple[str, str]:
    return f"{least:.3f}", f"{median:.3f}"


def bare_cases() -> list[Case]:
    return [
        Case("bare", "f()", {"f": work}),
        Case("bare coroutine", "await f()", {"f": work_async}),
        Case("bare generator", "for _ in f():\n    pass", {"f": work_generator}),
        Case("bare async generator", "async for _ in f():\n    pass", {"f": work_async_generator}),
        Case("bare raise", REJECTED.format("f()"), {"f": boom, "Refusal": Boom}),
    ]


def closed_cases(registry: CircuitBreakerRegistry) -> list[Case]:
    measured = registry.breaker("closed", Policy())
    unmeasured = registry.breaker("closed-unmeasured", Policy(measure=False))
    judged = registry.breaker("closed-judged", Policy(slow_call_duration=60.0))
    for breaker in (measured, unmeasured, judged):
        breaker.call(work)  # waits for the first answer of the store
    slow = {"guarded": judged(work)}
    return [
        *_forms(measured, ""),
        Case("closed: decorator, slow-call rule", "guarded()", slow, "bare"),
        *_forms(unmeasured, ", no durations"),
    ]


def _forms(breaker: CircuitBreaker, suffix: str) -> list[Case]:
    names: dict[str, object] = {"breaker": breaker, "f": work, "guarded": breaker(work)}
    awaited = names | {"f": work_async, "guarded": breaker(work_async)}
    generator = {"guarded": breaker(work_generator)}
    async_generator = {"guarded": breaker(work_async_generator)}
    forms: list[tuple[str, str, dict[str, object], str]] = [
        ("decorator", "guarded()", names, "bare"),
        ("call", "breaker.call(f)", names, "bare"),
        ("guard()", "with breaker.guard():\n    f()", names, "bare"),
        ("with breaker", "with breaker:\n    f()", names, "bare"),
        ("two steps", "permit = breaker.acquire()\nf()\npermit.success()", names, "bare"),
        ("async decorator", "await guarded()", awaited, "bare coroutine"),
        ("call_async", "await breaker.call_async(f)", awaited, "bare coroutine"),
        ("async guard()", "async with breaker.guard():\n    await f()", awaited, "bare coroutine"),
        ("generator", "for _ in guarded():\n    pass", generator, "bare generator"),
        (
            "async generator",
            "async for _ in guarded():\n    pass",
            async_generator,
            "bare async generator",
        ),
    ]
    return [Case(f"closed: {form}{suffix}", *rest) for form, *rest in forms]


def rejected_cases(registry: CircuitBreakerRegistry) -> list[Case]:
    breaker = registry.breaker("open", LASTING)
    trip(breaker)
    names = {"Refusal": CircuitBreakerOpenException, "breaker": breaker, "f": work}
    names |= {"refused": breaker(work), "refused_async": breaker(work_async)}
    forms = {
        "decorator": "refused()",
        "call": "breaker.call(f)",
        "guard()": "with breaker.guard():\n        f()",
        "with breaker": "with breaker:\n        f()",
        "async decorator": "await refused_async()",
    }
    return [
        Case(f"rejected: {form}", REJECTED.format(statement), names, "bare raise")
        for form, statement in forms.items()
    ]
