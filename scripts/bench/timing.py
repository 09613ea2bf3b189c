"""Times short statements the way ``timeit`` does, but many of them in turn.

Each statement is compiled into a loop of its own, so that the interpreter can specialise it as it
would in a user's code.  All statements are timed once per round, in interleaved rounds, so that a
slow spell of the machine hits all of them.  The minimum tells what the code costs, the median what
this machine made of it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LOOP = """
{prefix}def run(times, clock):
    start = clock()
    for _ in times:
{body}
    return clock() - start
"""

# A rejection with all that comes with it: the call, raise and catch.
REJECTED = "try:\n    {}\nexcept Refusal:\n    pass"


@dataclass(frozen=True)
class Case:
    """A statement, the names that it uses, and what it is compared with.

    ``bare`` is the name of another case, whose time is subtracted: the same call without a
    breaker.  A bare case has none.
    """

    name: str
    statement: str
    names: Mapping[str, object]
    bare: str = ""

    @property
    def asynchronous(self) -> bool:
        return "await " in self.statement or "async " in self.statement

    def loop(self) -> Callable[..., Any]:
        """The function that runs the statement once for each of ``times``."""
        prefix = "async " if self.asynchronous else ""
        body = textwrap.indent(self.statement, " " * 8)
        namespace = dict(self.names)
        exec(_LOOP.format(prefix=prefix, body=body), namespace)
        run: Callable[..., Any] = namespace["run"]  # type: ignore[assignment]
        return run


@dataclass(frozen=True)
class Cost:
    """What a statement took, and what that adds to its bare case: µs, minimum and median."""

    least: float
    median: float
    added_least: float
    added_median: float


def measure(cases: Sequence[Case], *, rounds: int, calls: int) -> dict[str, Cost]:
    """Time ``calls`` runs of every case in each of ``rounds`` rounds."""
    loops = [(case, case.loop()) for case in cases]
    samples: dict[str, list[float]] = {case.name: [] for case in cases}
    with asyncio.Runner() as runner:
        for number in range(rounds + 1):
            for case, loop in loops:
                gc.collect(1)  # Nobody pays for what the case before has left behind.
                spent = loop(itertools.repeat(None, calls), time.perf_counter)
                took = runner.run(spent) if case.asynchronous else spent
                if number > 0:  # The first round lets the interpreter specialise its code.
                    samples[case.name].append(took / calls * 1e6)
    return {case.name: _cost(case, samples) for case in cases}


def _cost(case: Case, samples: Mapping[str, list[float]]) -> Cost:
    least, median = min(samples[case.name]), statistics.median(samples[case.name])
    if not case.bare:
        return Cost(least, median, 0.0, 0.0)
    bare = samples[case.bare]
    return Cost(least, median, least - min(bare), median - statistics.median(bare))
