"""What must make no difference: how a batch is cut, when it is, what things are called.

Each test changes a case in a way of which the outcome is known beforehand, in the model, for
thousands of cases out of random lives; and the script takes the changed cases as the model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm

import pytest

from distributed_breaker import model
from distributed_breaker.model import NOTHING, Circuit, Event, Run, Step, Stepped
from distributed_breaker.policy import Numbers
from tests.equivalence.exploration import Place
from tests.equivalence.trip_rule import one_by_one
from tests.equivalence.twins import Case, Fields, Script, differences, differing, run_model
from tests.equivalence.walks import REPORTERS, lives

pytestmark = pytest.mark.servers("valkey")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Thousands of steps on circuits in every state."""
    return lives(number=18, steps=300)


def equal_in_script(script: Script, changed: list[Case], most: int = 600) -> None:
    """The script takes the changed cases as the model does; some of them, evenly spread."""
    some = changed[:: max(1, len(changed) // most)]
    for difference in differences(script, ((case, None) for case in some)):
        pytest.fail(str(difference))


def circuit(case: Case) -> Circuit | None:
    return Place(case.before, case.now).circuit()


def without_n(c: Circuit) -> Circuit:
    """Two steps instead of one count twice, which means nothing but that something was written."""
    return replace(c, n=0)


# ---------------------------------------------------------------------------- batches


def halves(case: Case, at: int) -> tuple[Stepped, list[Event], Case]:
    """Carry out a report in two steps of the same moment, the batch cut after ``at`` outcomes."""
    single = one_by_one(case.step.batch)
    first = run_model(case._replace(step=replace(case.step, batch=single[:at])))
    rest = replace(case.step, batch=single[at:], known=NOTHING, offer=False, deltas=())
    second = Case(model.dump(first.circuit), rest, case.now)
    last = run_model(second)
    return last, [*first.events, *last.events], second


def test_a_batch_may_be_cut_anywhere(cases: list[Case], script: Script) -> None:
    """Two batches do what one does that holds the outcomes of both, wherever it is cut: the trip
    rule is judged after each outcome and not after each batch."""
    changed = []
    tripped = 0
    for case in cases:
        count = sum(run.count for run in case.step.batch)
        if case.step.op != "report" or count < 2:
            continue
        whole = run_model(case)
        tripped += any(e.cause in ("run", "rate", "slow") for e in whole.events)
        for at in range(1, count):
            last, events, second = halves(case, at)
            assert without_n(last.circuit) == without_n(whole.circuit), (case, at)
            assert events == whole.events, (case, at)
            changed.append(second)
    assert tripped > 50
    assert len(changed) > 2_000
    equal_in_script(script, changed)


def test_runs_are_only_a_shorter_way_to_write(cases: list[Case], script: Script) -> None:
    """``f3`` is ``f1 f1 f1``, although runs of good outcomes are judged only where it matters."""
    changed = []
    for case in cases:
        if any(run.count > 1 for run in case.step.batch):
            single = replace(case.step, batch=one_by_one(case.step.batch))
            changed.append(case._replace(step=single))
            assert run_model(changed[-1]) == run_model(case), case
    assert len(changed) > 200
    equal_in_script(script, changed)


# ---------------------------------------------------------------------------- times


def period(*policies: Numbers | None) -> int:
    """A time by which buckets and half-windows of all these policies move on as a whole."""
    widths = [(max(1, p.window // model.BUCKETS), max(1, p.window // 2)) for p in policies if p]
    return lcm(*(width for pair in widths for width in pair))


def shift_circuit(c: Circuit, ms: int) -> Circuit:
    """The same circuit ``ms`` later; a time of 0 means never, and stays."""
    assert c.policy is not None
    cause, moment, detail = c.reason.split(" ", 2)
    totals = list(c.totals)
    for name in ("last_success", "last_failure"):
        totals[model.INDEX[name]] += ms if totals[model.INDEX[name]] else 0
    return replace(
        c,
        v=c.v + ms,
        since=c.since + ms,
        head=c.head + ms // max(1, c.policy.window // model.BUCKETS),
        half=c.half + ms // max(1, c.policy.window // 2),
        reporters=[replace(r, last=r.last + ms if r.id != "*" else r.last) for r in c.reporters],
        slots=[replace(s, since=s.since + ms) for s in c.slots],
        touched=c.touched + ms if c.touched else 0,
        totals=totals,
        reason=f"{cause} {int(moment) + ms} {detail}",
    )


def shift_step(step: Step, ms: int) -> Step:
    known = step.known._replace(v=step.known.v + ms) if step.known.v else step.known
    era = (step.era[0] + ms, step.era[1]) if step.era[0] else step.era
    return replace(step, known=known, era=era)


def test_the_time_of_day_does_not_matter(cases: list[Case], script: Script) -> None:
    """Everything happens alike a whole number of buckets and half-windows later (S14: a step
    depends on its inputs and on now alone, and on now only through differences)."""
    changed = []
    for case in cases:
        before, stepped = circuit(case), run_model(case)
        if before is None or before.policy is None:
            continue
        after = stepped.circuit
        if after.policy is None or after.policy.window != before.policy.window:
            continue  # Buckets of another width do not begin at the same times.
        ms = 3 * period(before.policy, case.step.policy)
        fields = model.dump(shift_circuit(before, ms))
        changed.append(Case(fields, shift_step(case.step, ms), case.now + ms))
        later = run_model(changed[-1])
        assert later.circuit == shift_circuit(after, ms), case
        assert [replace(e, v=e.v - ms) for e in later.events] == stepped.events, case
        answer = (stepped.reply.remaining, *stepped.reply[3:])
        assert (later.reply.remaining, *later.reply[3:]) == answer, case
        assert later.expiry == stepped.expiry, case
    assert len(changed) > 3_000
    equal_in_script(script, changed)


# ---------------------------------------------------------------------------- names


def renamed(name: str) -> str:
    """Other names, in another order of the alphabet, of other lengths."""
    if name in ("*", "-", "none"):
        return name
    number = int(name[1:]) if name[1:].isdigit() else 0
    return f"{'zyx'[number % 3]}{name[::-1]}_{number % 7}"


def rename_circuit(c: Circuit) -> Circuit:
    return replace(
        c,
        reporters=[replace(r, id=renamed(r.id)) for r in c.reporters],
        slots=[replace(s, token=renamed(s.token)) for s in c.slots],
    )


def test_names_do_not_matter(cases: list[Case], script: Script) -> None:
    """Reporters and tokens may be called anything: nothing is decided by the order of names."""
    assert len({renamed(f"r{i}") for i in range(REPORTERS)}) == REPORTERS
    changed = []
    for case in cases:
        before, stepped = circuit(case), run_model(case)
        if before is None:
            continue
        other = replace(
            case.step, reporter=renamed(case.step.reporter), token=renamed(case.step.token)
        )
        changed.append(Case(model.dump(rename_circuit(before)), other, case.now))
        result = run_model(changed[-1])
        assert result.circuit == rename_circuit(stepped.circuit), case
        assert (result.reply, result.events) == (stepped.reply, stepped.events), case
    assert len(changed) > 3_000
    equal_in_script(script, changed)


def test_the_nonce_is_a_name_and_a_die(cases: list[Case], script: Script) -> None:
    """Another nonce names the new generation otherwise.  Its last four digits shorten a wait in
    half_open, its first four lengthen an open interval, and that is all."""
    changed = []
    for case in cases:
        other = replace(case.step, nonce=case.step.nonce[:4] + "c0de")
        changed.append(case._replace(step=other))
        one, two = run_model(case), run_model(changed[-1])
        assert replace(two.circuit, nonce=one.circuit.nonce) == one.circuit, case
        assert two.events == one.events
        alike = (one.reply.verdict, one.reply.remaining) == (two.reply.verdict, two.reply.remaining)
        assert alike, case
        if not (one.reply.verdict == "deny" and one.circuit.state == "half_open"):
            assert one.reply.value == two.reply.value, case
    equal_in_script(script, changed)


# ---------------------------------------------------------------------------- the hash


def odd_fields(fields: Fields) -> Iterator[Fields]:
    """The same circuit, stored in other ways."""
    yield dict(reversed(fields.items()))
    yield fields | {"z": "from a newer library"}
    yield fields | {"h": fields["h"] + " and more"}


@pytest.mark.servers("valkey", "redis8", "redis")
def test_order_and_unknown_parts_of_the_hash_do_not_matter(
    cases: list[Case], script: Script
) -> None:
    """Fields may stand in any order, and what a newer library has added is not stumbled over."""
    some = [case for case in cases[::25] if case.before is not None]
    plain = script.answers(some[:150])
    for number in range(3):
        odd = [
            case._replace(before=list(odd_fields(case.before))[number])
            for case in some[:150]
            if case.before is not None
        ]
        for case, mine, theirs in zip(odd, plain, script.answers(odd), strict=True):
            assert theirs.reply == mine.reply, case
            assert theirs.log == mine.log, case
            extra = {"z": "from a newer library"} if number == 1 else {}
            written = case.before if mine.fields == some[odd.index(case)].before else None
            assert theirs.fields == (written or mine.fields | extra), case


def test_absent_fields_are_empty(script: Script) -> None:
    """A hash that holds nothing but a header is a circuit without history, in both twins."""
    case = lives(number=1, steps=40)[-1]
    assert case.before is not None
    for gone in ("w", "r", "s", "p", "t", "x", "e", "wrsptxe"):
        fields = {name: text for name, text in case.before.items() if name not in gone}
        for batch in ((), (Run("f", 2),)):
            step = replace(case.step, op="report", reporter="a", batch=batch)
            equal_in_script(script, [Case(fields, step, case.now)])


def test_a_step_is_a_function_of_its_inputs(cases: list[Case], script: Script) -> None:
    """S14: the same step on the same circuit at the same time always does the same."""
    for case in cases:
        assert run_model(case) == run_model(case)
    some = cases[::20]
    for one, two in zip(script.answers(some), script.answers(some), strict=True):
        assert set(differing(one, two)) <= {"ttl", "log_ttl"}
