"""From a run that fails to the shortest one that fails alike, by leaving out events."""

from __future__ import annotations

from collections.abc import Callable

from tests.simulation.plan import Event, Plan
from tests.simulation.world import Failure

MOST_RUNS = 250

Run = Callable[[Plan], object]


def shortened(failure: Failure, run: Run, most_runs: int = MOST_RUNS) -> Failure:
    """The failure of a plan from which no single event can be left out any more (or nearly so,
    after ``most_runs`` runs).

    Whole stretches are left out first, then smaller ones.  A run counts as failing alike when the
    same rule is broken.
    """
    size = max(1, len(failure.plan.events) // 2)
    runs = 0
    while runs < most_runs:
        events = failure.plan.events
        shorter = None
        for start in range(0, len(events), size):
            runs += 1
            shorter = _fails_alike(failure, events[:start] + events[start + size :], run)
            if shorter is not None or runs >= most_runs:
                break
        if shorter is not None:
            failure = shorter
            size = max(1, min(size, len(failure.plan.events) // 2))
        elif size == 1:
            break
        else:
            size //= 2
    return failure


def _fails_alike(failure: Failure, events: tuple[Event, ...], run: Run) -> Failure | None:
    try:
        run(failure.plan.only(event.number for event in events))
    except Failure as other:
        return other if other.rule == failure.rule else None
    return None


def describe(failure: Failure) -> str:
    """What failed, the events that were needed for it, and the command that shows it again."""
    plan = failure.plan
    numbers = ",".join(str(event.number) for event in plan.events)
    events = "\n".join(map(str, plan.events)) or "(no event is needed)"
    return (
        f"{failure}\n{len(plan.events)} events, {plan.processes} processes at first, {plan.policy}"
        f"\n{events}\n\nTo see it again:\n\n"
        f"    python -m tests.simulation --seed {plan.seed} --events {numbers or 'none'}"
    )
