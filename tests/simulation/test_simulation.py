"""Seeded runs of simulated fleets; ``python -m tests.simulation`` runs more of them.

What a run is, and what is judged in it, stands in ``world.py`` and ``oracle.py``.
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.simulation.plan import FAULTS, draw
from tests.simulation.planted import PLANTED, SCRIPT, Planted
from tests.simulation.runner import Tally, on_script, try_seeds
from tests.simulation.shrink import describe, shortened
from tests.simulation.world import Failure, World, run

SEEDS = 25  # in one test
ROOT = Path(__file__).parents[2]

# What must have come to pass in a few hundred seeds, or they prove little.
MET = (
    *FAULTS, "call", "probe", "two probes at once", "local probe", "settle again", "evidence",
    "mirror closed to open", "mirror open to half_open", "mirror half_open to open",
    "mirror half_open to closed", "mirror half_open to half_open", "mirror open to closed",
    "mirror forced_open to half_open", "mirror closed to forced_open",
)  # fmt: skip


def check(tally: Tally, seeds: int) -> None:
    assert not tally.failure, tally.failure
    assert tally.seeds == seeds


@pytest.mark.parametrize("first", range(0, 8 * SEEDS, SEEDS))
def test_every_rule_holds_on_the_model(first: int) -> None:
    check(try_seeds(range(first, first + SEEDS)), SEEDS)


@pytest.mark.parametrize("first", [100_000, 200_000])
def test_every_rule_holds_on_the_script(server: Server, client: redis.Redis, first: int) -> None:
    """And the model's twin on a real server answers every step alike."""
    seeds = SEEDS // 3
    check(try_seeds(range(first, first + seeds), on_script(client)), seeds)


def test_what_must_be_met_is_met() -> None:
    """Plans alone tell which faults are drawn; a few runs tell what comes of them."""
    drawn: Counter[str] = Counter()
    for seed in range(10 * SEEDS):
        drawn.update(event.what for event in draw(seed).events)
    assert all(drawn[fault] >= 10 for fault in FAULTS), drawn
    seen: Counter[str] = Counter()
    for seed in range(10**6, 10**6 + 400):
        seen += run(draw(seed)).oracle.seen
        if all(seen[what] for what in MET):
            return
    pytest.fail(f"never met: {[what for what in MET if not seen[what]]}")


def test_a_seed_is_always_the_same_run() -> None:
    """Whenever garbage is collected: what a crashed process left half done ends with it."""

    def trace(seed: int) -> tuple[int, Counter[str], object]:
        world = run(draw(seed))
        return world.timeline.steps, world.oracle.seen, world.server.header("a")

    usual = gc.get_threshold()
    seldom = [trace(seed) for seed in range(5)]
    gc.set_threshold(5, 2, 2)
    try:
        often = [trace(seed) for seed in range(5)]
    finally:
        gc.set_threshold(*usual)
    assert seldom == often
    assert len({steps for steps, _, _ in seldom}) == 5


# ---------------------------------------------------------------------------- failures


def test_a_failing_seed_is_shortened_and_can_be_seen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invented rule that one kind of event breaks: in the end, that event alone is left."""
    plan = next(
        plan
        for plan in map(draw, range(1_000))
        if any(e.what == "flush" and "on" not in e.more for e in plan.events)
    )
    flush = World.do_flush

    def forbidden(world: World, event: object) -> None:
        flush(world, event)  # type: ignore[arg-type]
        raise AssertionError("X1: nobody flushes here")

    monkeypatch.setattr(World, "do_flush", forbidden)
    with pytest.raises(Failure, match=f"seed {plan.seed}, at .* ms: X1: nobody") as caught:
        run(plan)
    short = shortened(caught.value, run)
    assert [event.what for event in short.plan.events] == ["flush"]
    number = short.plan.events[0].number
    assert f"--seed {plan.seed} --events {number}" in describe(short)
    with pytest.raises(Failure, match="X1"):
        run(draw(plan.seed).only([number]))


def test_a_defect_that_the_library_logs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("distributed_breaker.session.Session._take_reply", defect)
    with pytest.raises(Failure, match="ZeroDivisionError"):
        run(draw(0))


# ---------------------------------------------------------------------------- planted errors

# Those that are found within a few seeds; `python -m tests.simulation.planted` looks for all.
QUICK = [planted for planted in (*PLANTED, *SCRIPT) if planted.quick]


@pytest.mark.parametrize("planted", [*PLANTED, *SCRIPT], ids=lambda planted: planted.what)
def test_what_is_planted_can_still_be_planted(planted: Planted) -> None:
    assert planted.plant()


@pytest.mark.slow
@pytest.mark.parametrize("planted", QUICK, ids=lambda planted: planted.what)
def test_a_planted_error_is_found(planted: Planted, tmp_path: Path) -> None:
    done = planted.look_for(tmp_path, seeds=40)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "python -m tests.simulation --seed" in done.stdout
