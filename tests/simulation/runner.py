"""Many seeds, on the model or on the script of a real server, on all cores."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing import get_context

import redis

from scripts.servers import Server
from tests.simulation.plan import Plan, draw
from tests.simulation.server import Scripted
from tests.simulation.shrink import MOST_RUNS, describe, shortened
from tests.simulation.world import Failure, World, run

BATCH = 20  # seeds that one worker is given at once
Runner = Callable[[Plan], World]


@dataclass
class Tally:
    """What many runs have come to."""

    seeds: int = 0
    steps: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    failure: str = ""

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.steps += other.steps
        self.seen += other.seen
        self.failure = self.failure or other.failure


def on_script(client: redis.Redis) -> Runner:
    """Runs in which every step is carried out by the script and by the model, and compared."""

    def carry_out(plan: Plan) -> World:
        namespace = f"sim-{uuid.uuid4().hex[:12]}"
        return run(plan, lambda circuit: Scripted(client, f"{namespace}-{circuit}"))

    return carry_out


def try_seeds(seeds: Iterable[int], carry_out: Runner = run, shorten: int = MOST_RUNS) -> Tally:
    """Run the seeds up to the first that fails, which is then shortened in so many runs."""
    tally = Tally()
    for seed in seeds:
        try:
            world = carry_out(draw(seed))
        except Failure as failure:
            tally.failure = describe(shortened(failure, carry_out, shorten))
            break
        tally.seeds += 1
        tally.steps += world.timeline.steps
        tally.seen += world.oracle.seen
    return tally


@contextlib.contextmanager
def runner_on(kind: str) -> Iterator[Runner]:
    """The runner for a kind of server; none: the model."""
    if not kind:
        yield run
        return
    with Server.start(kind) as server, closing(server.client(decode_responses=True)) as client:
        yield on_script(client)


def _batch(seeds: list[int], kind: str, shorten: int) -> Tally:
    with runner_on(kind) as carry_out:
        return try_seeds(seeds, carry_out, shorten)


def soak(
    *, first: int, seconds: float, most: int, jobs: int, kind: str, shorten: int = MOST_RUNS
) -> Tally:
    """Run seeds from ``first`` on, on ``jobs`` cores, until the time is over, ``most`` are done, or
    one fails."""
    end = time.monotonic() + seconds
    tally = Tally()
    seeds = count(first)
    left = most
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = []
        while True:
            # A few ahead keep all busy; one job has none, for a failure would have to wait for it.
            ahead = jobs + jobs // 2
            while left > 0 and len(running) < ahead and time.monotonic() < end:
                batch = list(islice(seeds, min(BATCH, left)))
                left -= len(batch)
                running.append(pool.submit(_batch, batch, kind, shorten))
            if not running:
                return tally
            tally.add(running.pop(0).result())
            if tally.failure:
                for future in running:
                    future.cancel()
                return tally
