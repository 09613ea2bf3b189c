"""The tests of equality find errors: every one that is planted into either twin.

The errors are listed in ``planted.py``.  They are looked for with the cases of ``corpus.py``, and
compared as everywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import redis

from distributed_breaker import model, store
from distributed_breaker.model import Stepped
from tests.equivalence.corpus import Steps, corpus
from tests.equivalence.exploration import Place
from tests.equivalence.invariants import CHECKS, Seen
from tests.equivalence.planted import MODEL, SCRIPT, Edit
from tests.equivalence.twins import Case, Script, differences, run_model

pytestmark = [pytest.mark.servers("valkey"), pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def steps() -> Steps:
    """The cases with which the errors are looked for."""
    return corpus()


def test_errors_planted_into_the_script_are_found(
    steps: Steps, client: redis.Redis, namespace: str
) -> None:
    """Each of the planted errors of the script makes at least one answer differ."""
    assert len(SCRIPT) >= 15
    missed = []
    for edit in SCRIPT:
        with closing(Script(client, namespace, edit.plant(store.script()))) as script:
            found = next(differences(script, steps), None)
        if found is None:
            missed.append(edit.what)
        else:
            # An error that only stops the script would prove nothing.
            assert not re.match("ERR|CBARG", found.got.reply[0]), (edit.what, found)
    assert missed == []


def planted_model(edit: Edit) -> ModuleType:
    """The model as a module of its own, with the error."""
    source = Path(str(model.__file__)).read_text(encoding="utf-8")
    wrong = ModuleType("distributed_breaker.model_with_an_error")
    wrong.__package__ = "distributed_breaker"
    sys.modules[wrong.__name__] = wrong
    exec(compile(edit.plant(source), wrong.__name__, "exec"), wrong.__dict__)
    return wrong


@pytest.fixture
def _no_traces() -> Iterator[None]:
    """Forget the modules with errors."""
    yield
    sys.modules.pop("distributed_breaker.model_with_an_error", None)


def wrong_steps(wrong: ModuleType, cases: Iterable[Case]) -> Iterator[tuple[Case, Stepped]]:
    """What the model with the error makes of the cases."""
    for case in cases:
        yield case, run_model(case, wrong)


@pytest.mark.usefixtures("_no_traces")
def test_errors_planted_into_the_model_are_found(steps: Steps, script: Script) -> None:
    """Each of the planted errors of the model makes at least one answer differ."""
    assert len(MODEL) >= 15
    missed = []
    for edit in MODEL:
        wrong = planted_model(edit)
        cases = (case for case, _ in steps)
        if next(differences(script, wrong_steps(wrong, cases)), None) is None:
            missed.append(edit.what)
    assert missed == []


RULES = {
    "a trip in forced_closed": "S1",
    "v forgets the client's": "S2",
    "one permit too many": "S3",
    "probes beyond need": "S4",
    "anybody may settle": "S5",
    "closes one too early": "S6",
    "granted while open": "S7",
    "a move keeps the run": "S8",
    "run: > for >=": "S9",
    "outcomes count twice": "S10",
    "other generations count": "S11",
    "remaining below nothing": "S12",
    "no cap on a share": "S15",
}


@pytest.mark.usefixtures("_no_traces")
@pytest.mark.parametrize("what", RULES)
def test_the_rules_find_errors_without_a_twin(what: str, steps: Steps) -> None:
    """An error of which both twins were guilty would still break a rule, and by its name."""
    (edit,) = (edit for edit in MODEL if edit.what == what)
    broken = set()
    for case, stepped in wrong_steps(planted_model(edit), (case for case, _ in steps)):
        seen = Seen.of(Place(case.before, case.now).circuit(), case.step, case.now, stepped)
        for check in CHECKS:
            try:
                check(seen)
            except AssertionError as error:
                broken.add(str(error).split(":", 1)[0])
        if RULES[what] in broken:
            return
    pytest.fail(f"{RULES[what]} was not broken, but {broken or 'nothing'}")
