"""Times short statements the way ``timeit`` does, but many of them in turn.

Each statement is compiled into a loop of its own, so that the interpreter can specialise it as it
would in a user's code.  All statements are timed once per round, in interleaved rounds, so that a
slow spell of the machine hits all of them, and what a call adds is taken round by round.
"""

from __future__ import annotations

import gc
import itertools
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
    """A statement, the names that it uses, and how often a round repeats it.

    A statement that asks a server takes a thousand times as long as one that doesn't, so it is
    repeated less often.
    """

    name: str
    statement: str
    names: Mapping[str, object]
    calls: int

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


def measure(
    cases: Sequence[Case], rounds: int, run: Callable[[Any], Any]
) -> dict[str, list[float]]:
    """Time every case in each of ``rounds`` rounds: case → µs for one call, round by round.

    ``run`` runs a coroutine in the event loop to which the cases' clients belong.
    """
    loops = [(case, case.loop()) for case in cases]
    samples: dict[str, list[float]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        for case, loop in loops:
            gc.collect(1)  # Nobody pays for what the case before has left behind.
            spent = loop(itertools.repeat(None, case.calls), time.perf_counter)
            took = run(spent) if case.asynchronous else spent
            if number > 0:  # The first round lets the interpreter specialise its code.
                samples[case.name].append(took / case.calls * 1e6)
    return samples
