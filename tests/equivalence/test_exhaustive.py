"""The twins are equal in every state that small policies can reach, under every operation.

What is explored is written in ``small.py`` and ``alphabet.py``, how, in ``exploration.py``; what
must be equal, in ``twins.py``; what must hold besides, in ``invariants.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

from distributed_breaker.model import Stepped
from tests.equivalence.exploration import Exploration, Place
from tests.equivalence.invariants import LEGAL, VERDICTS, Seen, check_step
from tests.equivalence.small import SMALL, Small
from tests.equivalence.twins import Case, Script, differences

# On a machine with nothing else to do the longest takes 15 seconds.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
every_policy = pytest.mark.parametrize("small", SMALL, ids=[s.name for s in SMALL])


# The server is given only every third step, beside the whole corpus; the rules are kept in all.
THINNED = 3


class Visits:
    """Counts the moves and the verdicts of a stream of steps, and checks the rules on each."""

    def __init__(self) -> None:
        self.moves: Counter[tuple[str, str, str]] = Counter()
        self.verdicts: Counter[tuple[str, str, str]] = Counter()

    def watch(self, steps: Exploration) -> Iterator[tuple[Case, Stepped]]:
        """Pass the steps on."""
        for case, stepped in steps:
            circuit = Place(case.before, case.now).circuit()
            check_step(Seen.of(circuit, case.step, case.now, stepped))
            self.moves.update((e.cause, e.old, e.new) for e in stepped.events)
            self.verdicts[(case.step.op, stepped.reply.verdict, stepped.reply.old)] += 1
            yield case, stepped


@pytest.mark.servers("valkey")
@every_policy
def test_model_and_script_take_every_step_alike(small: Small, script: Script) -> None:
    """Reply, hash, log, expiry and push are equal for every third operation in all states, and
    every step keeps the rules S1 to S12 and S15; every legal move and every verdict occurs."""
    exploration, visits = Exploration(small), Visits()
    for difference in differences(script, islice(visits.watch(exploration), 0, None, THINNED)):
        pytest.fail(f"{small.name}: {difference}")
    assert len(exploration.states) >= small.states
    asleep = set() if small.numbers.failure_rate else {"rate"}
    asleep |= set() if "S" in small.kinds else {"slow"}
    moves = {(cause, *move) for cause, legal in LEGAL.items() for move in legal}
    assert set(visits.moves) <= moves
    assert {cause for cause, *_ in moves - set(visits.moves)} <= asleep
    verdicts = {(*key, old) for key, states in VERDICTS.items() for old in states}
    assert set(visits.verdicts) == verdicts


@pytest.mark.servers("redis8", "redis")
@every_policy
def test_other_servers_take_the_steps_alike(small: Small, script: Script) -> None:
    """The same on the other kinds of server, with every twelfth step."""
    for difference in differences(script, islice(Exploration(small), 0, None, 12)):
        pytest.fail(f"{small.name}: {difference}")


@every_policy
def test_circuits_of_one_shape_behave_alike(small: Small) -> None:
    """The states are counted as ``shape`` sees them.  That leaves none out, for two circuits of
    one shape answer alike and have successors of the same shapes."""
    exploration = Exploration(small)
    for _ in exploration:
        pass
    assert len(exploration.others) > len(exploration.states) // 3
    for form, other in exploration.others.items():
        mine = exploration.states[form]
        assert exploration.outcomes(mine) == exploration.outcomes(other), (mine, other)
