"""Long random lives of one circuit, in both twins at once, on every kind of server.

The explorations of ``test_exhaustive.py`` are complete but small.  Here many reporters, clocks,
policies and losses of the store come together.  Hypothesis chooses the steps, and shortens what
fails; more lives, whose steps are drawn from fixed seeds, see to it that every legal move and every
verdict occurs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing

import fakeredis
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.equivalence.twins import Living
from tests.equivalence.walks import POLICIES, WANTED, walk, wander

pytestmark = pytest.mark.timeout(600)


def walk_on(client: redis.Redis, namespace: str, lives: int, steps: int) -> None:
    """Walk on one server: hypothesis first, then the fixed lives, and see what was visited."""
    number = iter(range(1_000_000))
    machine = walk(lambda: Living(client, f"{namespace}-{next(number)}"))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=lives,
            stateful_step_count=40,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    by_hypothesis = len(machine.visited)
    assert by_hypothesis > len(WANTED) // 3
    for seed in range(3 * lives):
        # Some more lives for what has not been seen yet; usually none are needed.
        if seed < lives or WANTED - set(machine.visited):
            one = machine()
            one.choose(POLICIES[seed % len(POLICIES)])
            wander(one, random.Random(seed), steps, crowded=seed % 8 == 7)
            one.teardown()
    assert set(machine.visited) <= WANTED
    assert WANTED - set(machine.visited) == set()


@pytest.fixture
def fake() -> Iterator[redis.Redis]:
    """The script under fakeredis: no evidence for a real server, but it needs none."""
    with closing(fakeredis.FakeRedis(decode_responses=True)) as it:
        yield it


def test_walks_on_fakeredis(fake: redis.Redis) -> None:
    """Model and script stay equal on fakeredis, and keep all rules, step after step."""
    walk_on(fake, "walk", lives=5, steps=300)


def test_walks_on_servers(client: redis.Redis, namespace: str) -> None:
    """The same on every real server, with longer lives."""
    walk_on(client, namespace, lives=12, steps=300)
