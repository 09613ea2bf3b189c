"""Some thousand cases in which about everything happens: small enough to be gone through often.

They are those of ``extremes.py`` and ``steady.py``, and others that come out of the explorations
and of the random lives, thinned out to those that differ in what happens.  They are mixed, so that
few of them go a long way, those by hand among the first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice

from distributed_breaker import model
from distributed_breaker.model import Circuit, Step, Stepped
from tests.equivalence.exploration import Exploration, Place
from tests.equivalence.extremes import extremes
from tests.equivalence.small import SMALL
from tests.equivalence.steady import bounds
from tests.equivalence.twins import Case, run_model
from tests.equivalence.walks import lives

Steps = list[tuple[Case, Stepped]]


def kind_of(case: Case, stepped: Stepped) -> tuple[object, ...]:
    """What happens in a case, roughly."""
    step, reply = case.step, stepped.reply
    c = Place(case.before, case.now).circuit()
    found: tuple[object, ...] = ()
    if c is not None:
        era = step.era[0] - c.v, step.era[1] == c.nonce
        rest = [r.cur + r.prev + r.run for r in c.reporters if r.id == "*"]
        newcomer = all(r.id != step.reporter for r in c.reporters)
        near = tuple(when - case.now for when in deadlines(c, step) if abs(when - case.now) <= 1)
        found = (c.fresh, c.v > step.known.v, len(c.slots), near, tuple(rest), newcomer, c.run)
        found += (era, bool(step.deltas))
    return (
        *(step.op, step.kind, step.batch, step.open_for, step.known[2:]),
        *(step.offer, step.policy.version, reply.policy, reply.old, reply.verdict),
        *(tuple((e.cause, e.new) for e in stepped.events), stepped.expiry, *found),
    )


def deadlines(c: Circuit, step: Step) -> Iterator[int]:
    """When something runs out, so that a step a millisecond later may do something else."""
    yield from (c.since + c.duration, c.since + model.FRESH, c.touched + model.HOUR)
    yield from (slot.since + slot.lease for slot in c.slots)
    yield from (r.last + max(model.ACTIVE, step.policy.window) for r in c.reporters)


@cache
def corpus() -> Steps:
    """The cases with the model's results; always the same ones in the same order."""
    walked = ((case, run_model(case)) for case in lives(number=30, steps=300))
    explored = chain.from_iterable(islice(Exploration(small), 15_000) for small in SMALL)
    chosen: dict[tuple[object, ...], tuple[Case, Stepped]] = {}
    for case, stepped in chain(walked, explored):
        chosen.setdefault(kind_of(case, stepped), (case, stepped))
    steady = [bound.case for bound in bounds() if bound.for_twins]
    mixed, by_hand = list(chosen.values()), [(c, run_model(c)) for c in (*extremes(), *steady)]
    shuffle = random.Random(0).shuffle
    shuffle(mixed)
    shuffle(by_hand)
    return [*chain.from_iterable(zip(by_hand, mixed, strict=False)), *mixed[len(by_hand) :]]
