"""The store of an exploration: the real model, one step at a time, judged and remembered.

A stored circuit is kept as the texts that decide what it does next; totals, windows and texts for
people are left out, as one failure trips here.  Beside it goes what a history of the store has
counted, which no store knows: which outcomes, and which tokens brought the circuit to where it is.
A failover takes that back together with the circuit, but remembers what was lost.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from distributed_breaker import model
from distributed_breaker.model import Reply, Step, Stepped
from distributed_breaker.policy import Numbers
from tests.equivalence.invariants import Seen, check_step
from tests.exploration.bounds import ms


class Stored(NamedTuple):
    """A circuit, or none where ``header`` is empty, with what has been counted in its history."""

    header: str = ""
    slots: str = ""
    counted: tuple[str, ...] = ()  # outcomes: a probe's by its token
    succeeded: tuple[str, ...] = ()  # tokens, in the present generation
    lost: tuple[int, str] = (0, "-")  # the generation that a failover took back

    @property
    def generation(self) -> tuple[int, str]:
        """What mirrors call this state."""
        if not self.header:
            return 0, "-"
        _, v, nonce, _ = self.header.split(" ", 3)
        return int(v), nonce

    @property
    def state(self) -> str:
        """Closed, open, …; empty where there is no circuit."""
        return self.header.split(" ")[3] if self.header else ""


class Effect(NamedTuple):
    """What a step did: the circuit after it, the answer, the rules it broke, and what is of note.

    ``stored.header`` is pushed if it ``moved``.
    """

    stored: Stored
    reply: Reply
    moved: bool
    broken: tuple[str, ...]
    notes: tuple[str, ...]


class Store:
    """Carries out steps.  ``machine`` is the model, or a copy of it with an error planted."""

    def __init__(self, numbers: Numbers, machine: ModuleType = model) -> None:
        self.numbers = numbers
        self.machine: Any = machine

    def circuit(self, stored: Stored) -> Any:
        """The circuit, unpacked anew."""
        fields = {
            "h": stored.header,
            "s": stored.slots,
            "p": self.numbers.text(),
            "x": stored.header.rsplit(" ", 1)[-1],
        }
        return self.machine.load(fields if stored.header else {})

    def execute(self, stored: Stored, step: Step, tick: int) -> Effect:
        """Carry out one step."""
        now = ms(tick)
        before, circuit = self.circuit(stored), self.circuit(stored)
        stepped = self.machine.step(circuit, step, now)
        broken = []
        texts = self.machine.dump(stepped.circuit)
        try:
            check_step(self._seen(before, step, now, stepped))
        except AssertionError as error:
            broken.append(str(error).split("\n", 1)[0])
        after = self._counted(stored, step, stepped, broken)
        after = after._replace(header=texts["h"], slots=texts["s"])
        notes = [f"{step.op}: {stepped.reply.verdict}", *(e.cause for e in stepped.events)]
        if len(stepped.circuit.slots) > 1:
            notes.append("two permits are out")
        return Effect(after, stepped.reply, bool(stepped.events), tuple(broken), tuple(notes))

    def _seen(self, before: Any, step: Step, now: int, stepped: Stepped) -> Seen:
        """The step, with circuits of the real model's own types: the rules compare with it."""
        old = None if before is None else model.load(self.machine.dump(before))
        new = model.load(self.machine.dump(stepped.circuit))
        assert new is not None
        return Seen(old, step, now, stepped.reply, new, stepped.events)

    def _counted(self, stored: Stored, step: Step, stepped: Stepped, broken: list[str]) -> Stored:
        """What this history has counted now; and S2, S6 and S10 over the whole of it."""
        counted, succeeded = stored.counted, stored.succeeded
        causes = [e.cause for e in stepped.events]
        if any((e.v, step.nonce) == stored.lost for e in stepped.events):
            broken.append("S2: a generation that was lost came again")
        settled = step.op == "settle" and stepped.reply.verdict == "ok"
        if settled or step.batch:
            if step.token in counted:
                broken.append(f"S10: the outcome of {step.token} is counted twice")
            counted = tuple(sorted({*counted, step.token}))
        if settled and step.kind == "s":
            if step.token in succeeded:
                broken.append(f"S6: the token {step.token} counts twice")
            succeeded = tuple(sorted({*succeeded, step.token}))
        if "recovered" in causes and len(succeeded) < self.numbers.success_threshold:
            broken.append(f"S6: closed by {len(succeeded)} tokens of this generation")
        if causes:
            succeeded = ()
        return stored._replace(counted=counted, succeeded=succeeded)
