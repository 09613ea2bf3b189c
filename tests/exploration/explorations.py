"""The explorations: each lets one or two things go wrong, as far as all states can be gone through.

Together they hold what two processes, two tokens and one store can come to.  ``ORDINARY`` is what
every test run goes through, ``LARGER`` what ``python -m tests.exploration --larger`` does.  Behind
each stands what must have come up in it: an exploration that ends early, or in which nothing goes
wrong any more, must fail.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from tests.exploration.bounds import Bounds
from tests.exploration.peace import Peace
from tests.exploration.search import Found, search
from tests.exploration.world import State, World

EVERY = 10  # one state of so many is judged by what follows it: that takes far longer than a move


class Exploration(NamedTuple):
    """Bounds, and what must come up within them."""

    bounds: Bounds
    situations: tuple[str, ...]

    def search(self) -> Found:
        """Go through all states, and play a sample of them to their end in peace."""
        world = World(self.bounds)
        return search(world, peace=Sample(Peace(world)))


class Sample:
    """Judges one state of so many, the first one too."""

    def __init__(self, peace: Peace) -> None:
        self.peace = peace
        self.seen = 0

    def __call__(self, s: State) -> str:
        self.seen += 1
        return self.peace(s) if self.seen % EVERY == 1 else ""


ORDINARY = (
    Exploration(
        Bounds("delays", 5, least=80_000, kinds="sf"),
        (
            "a grant is dead on arrival",
            "a settle comes late",
            "recovered",
            "probe",
            "acquire: deny",
            "cancel: ok",
            "cancel: noop",
            "a request was delayed",
        ),
    ),
    Exploration(
        Bounds("two permits", 3, least=26_000, permits=2, kinds="sf"),
        ("two permits are out", "two probes run", "a settle comes late"),
    ),
    Exploration(
        Bounds("cancelled probes", 4, least=12_000, kinds="si", room=3, pushes=False),
        ("recovered", "settle: ok", "cancel: ok"),
    ),
    Exploration(
        Bounds("duplicates", 3, least=37_000, duplicates=1),
        tuple(f"a doubled {what} is carried out" for what in ("acquire", "settle", "cancel")),
    ),
    Exploration(
        Bounds(
            "repeated settles",
            3,
            least=118_000,
            permits=2,
            repeats=1,
            duplicates=1,
            room=3,
            duplicated=("settle", "cancel"),
            pushes=False,
        ),
        ("a settle comes again", "nobody knows whether a settle counted", "two probes run"),
    ),
    Exploration(
        Bounds("crash", 4, least=114_000, threshold=1, crashes=1, room=3, pushes=False),
        ("a process dies with a lease out", "a request outlives its process"),
    ),
    Exploration(
        Bounds("failover", 3, least=126_000, failover=True, room=3),
        (
            "failover while half_open",
            "failover while closed",
            "restored",
            "two probes run",
            "a late settle is reported",
        ),
    ),
    Exploration(
        Bounds(
            "failover of a trip",
            3,
            least=84_000,
            start="closed",
            threshold=1,
            reports=1,
            failover=True,
            room=3,
            pushes=False,
        ),
        ("failover while open", "failover while half_open", "restored", "run"),
    ),
    Exploration(
        Bounds("store emptied, with a newcomer", 1, least=22_000, emptied=True, crashes=1),
        ("emptied while open", "created", "restored", "a mirror guards its state"),
    ),
    Exploration(
        Bounds("store emptied", 3, least=36_000, emptied=True, pushes=False),
        ("emptied while half_open", "emptied while closed", "a late settle is reported"),
    ),
    Exploration(
        Bounds(
            "late reports", 4, least=16_000, start="closed", threshold=1, reports=1, pushes=False
        ),
        ("run", "recovered", "acquire: go"),
    ),
    Exploration(
        Bounds(
            "operator",
            2,
            least=38_000,
            room=3,
            pushes=False,
            operator=("reset", "forced_open", "forced_closed", "release"),
        ),
        ("reset", "forced_open", "forced_closed", "release: noop", "expired"),
    ),
    Exploration(
        Bounds(
            "crash and failover",
            1,
            least=68_000,
            room=3,
            repeats=1,
            crashes=1,
            failover=True,
            pushes=False,
        ),
        (
            "a process dies with a lease out",
            "failover while half_open",
            "a settle comes again",
            "two probes run",
        ),
    ),
)


def larger(e: Exploration) -> Exploration:
    """A tick more."""
    b = e.bounds
    return e._replace(bounds=replace(b, horizon=b.horizon + 1))


LARGER = tuple(map(larger, ORDINARY))
