"""Rules taken away, one at a time: in the model by an edit of its text, in processes by name.

Each comes with bounds within which the same search finds what it leads to, and with the rules of
which it must break one first; so it is what the fleet suffers that is found, rather than that a
step is not as it should be, wherever there is such a thing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from distributed_breaker import model
from tests.equivalence.planted import Edit
from tests.exploration.bounds import Bounds


class Removal(NamedTuple):
    """A rule that is taken away, and what must be found then."""

    what: str
    found: tuple[str, ...]  # how the message of the broken rule begins
    bounds: Bounds
    without: str = ""
    edit: Edit | None = None
    peace: bool = False  # whether it is a rule of liveness that finds it

    def machine(self) -> ModuleType:
        """The model, without the rule if it is one of the model's."""
        if self.edit is None:
            return model
        source = Path(str(model.__file__)).read_text(encoding="utf-8")
        return load(self.edit.plant(source))


def load(source: str) -> ModuleType:
    """The model with another text, as a module of its own that nobody else can import."""
    wrong = ModuleType("distributed_breaker.model_without_a_rule")
    wrong.__package__ = "distributed_breaker"
    # Dataclasses look up the module in which they are made.
    sys.modules[wrong.__name__] = wrong
    try:
        exec(compile(source, wrong.__name__, "exec"), wrong.__dict__)
    finally:
        del sys.modules[wrong.__name__]
    return wrong


REMOVALS = (
    Removal("R1: a late grant is used", ("C2",), Bounds("R1", 4, pushes=False), without="R1"),
    Removal("R6: a call outlasts its lease", ("C2",), Bounds("R6", 4, pushes=False), without="R6"),
    Removal(
        "R5: stale to a repeated settle is taken for the first one's",
        ("S10",),
        Bounds("R5", 3, repeats=1),
        without="R5",
    ),
    Removal(
        "R12: a newcomer's blank circuit is believed",
        ("R12",),
        Bounds("R12", 1, acquires=0, emptied=True, crashes=1),
        without="R12",
    ),
    Removal(
        "C1: an older header is taken for news",
        ("C1",),
        Bounds("C1", 2, acquires=1),
        without="C1",
    ),
    Removal(
        "the fence of settle: a token of another generation counts",
        ("S5: counted for another",),
        Bounds(
            "fence of settle",
            2,
            threshold=1,
            room=3,
            pushes=False,
            failover=True,
            duplicates=1,
            duplicated=("acquire",),
        ),
        edit=Edit(
            "settle looks at no generation",
            'if (c.v, c.nonce) != x.step.era or c.state != "half_open" or not mine:',
            'if c.state != "half_open" or not mine:',
        ),
    ),
    Removal(
        "the fence of report: an outcome from before the trip counts",
        ("S9: tripped",),
        Bounds("fence of report", 4, start="closed", reports=1, threshold=1, pushes=False),
        edit=Edit(
            "report looks at no generation",
            'current = (c.v, c.nonce) == x.step.era and c.state in ("closed", "forced_closed")',
            'current = c.state in ("closed", "forced_closed")',
        ),
    ),
    Removal(
        "the ratchet: a store that lost writes is right",
        ("L4",),
        Bounds("ratchet", 1, start="closed", reports=1, acquires=0, failover=True),
        edit=Edit("no ratchet", "    if known.v > c.v:\n", "    if False:\n"),
        peace=True,
    ),
    Removal(
        "v is a plain counter: it begins anew, and mirrors hear nothing of what happens",
        ("L4",),
        Bounds("counter", 0, acquires=0, emptied=True, past=1000),
        edit=Edit("v counts", "c.v = max(x.now, c.v + 1, x.step.known.v + 1)", "c.v = c.v + 1"),
        peace=True,
    ),
    Removal(
        "what is made anew is not fresh: a newcomer closes an open circuit for all",
        ("R12",),
        Bounds("not fresh", 1, acquires=0, emptied=True, crashes=1),
        edit=Edit(
            "created, but not fresh",
            '"closed", "created", 0)\n        c.fresh = True',
            '"closed", "created", 0)\n        c.fresh = False',
        ),
    ),
    Removal(
        "acquire is not idempotent: a token gets two permits",
        ("S3: a token has two slots",),
        Bounds("idempotence", 2, permits=2, duplicates=1, duplicated=("acquire",)),
        edit=Edit(
            "acquire forgets its token",
            "        if slot.token == x.step.token:\n            return",
            "        if False:\n            return",
        ),
    ),
    Removal(
        "the fence of tokens: whoever comes late settles somebody else's permit",
        ("S5: counted without a permit",),
        Bounds("fence of tokens", 5, pushes=False, repeats=1, room=3),
        edit=Edit("anybody settles", '!= "half_open" or not mine:', '!= "half_open":'),
    ),
    Removal(
        "leases never end: a dead prober wedges the circuit",
        ("L5",),
        Bounds("no lease", 2, crashes=1, pushes=False),
        edit=Edit("a lease is for ever", "        if lease > 0:\n", "        if True:\n"),
        peace=True,
    ),
    Removal(
        "the open interval: permits are given before it is over",
        ("S7: a grant before its time",),
        Bounds("no interval", 2, kinds="f", pushes=False),
        edit=Edit(
            "granted while open",
            'if c.state == "forced_open" or left > 0:',
            'if c.state == "forced_open":',
        ),
    ),
)
