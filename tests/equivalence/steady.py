"""Reports on a closed circuit that trip nothing: what the script's shortcut is for, and its bounds.

Each case comes with whether the shortcut takes it.  Taken or left, the answer is the model's; but
what is left although it might be taken costs the server several times as much, and nobody would
see it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import redis

from distributed_breaker import model
from distributed_breaker.model import NOTHING, Circuit, Known, Reporter, Run
from distributed_breaker.shadow import MAX_COUNT
from tests.equivalence.extremes import HUGE, MINUTE, case, circuit, counted
from tests.equivalence.small import NOON, SECOND, numbers
from tests.equivalence.twins import Case, Script

RULES = numbers(
    failure_threshold=5, failure_rate=5_000, window=MINUTE, minimum_calls=10, slow_call_rate=4_000
)
PATIENT = RULES._replace(failure_threshold=10**6, failure_rate=0, slow_call_rate=10_000)
OWN, OTHERS = Reporter("me", NOON - 9, 2, 1, 1), [Reporter("a", NOON - 3, 4, 3, 1)]


class Bound(NamedTuple):
    """A case, whether the shortcut takes it, whether the script refuses it as malformed, and if
    its circuit is damaged, which the twins need not read in the same way."""

    case: Case
    taken: bool
    refused: bool = False
    damaged: bool = False

    @property
    def for_twins(self) -> bool:
        return not (self.refused or self.damaged)


def bounds() -> Iterator[Bound]:
    """All cases."""
    yield from everyday()
    yield from headers()
    yield from arguments()
    yield from moments()
    yield from reporters()
    yield from crowds()
    yield from rules()
    yield from near()
    yield from batches()
    yield from damage()


def wrongly_taken(client: redis.Redis, namespace: str, text: str) -> str:
    """The first case that a script's shortcut takes and should leave, or the reverse."""
    shortcut, machine, _ = text.partition("local answer = steady()")
    assert machine, "the script has no shortcut"
    # Without the machine behind it, it answers what it takes.
    some = list(bounds())
    alone = Script(client, namespace, shortcut + "return steady() and 'taken' or 'left'")
    with closing(alone):
        answers = alone.answers([bound.case for bound in some])
    for bound, answer in zip(some, answers, strict=True):
        if "".join(answer.reply) != ("taken" if bound.taken else "left"):
            return f"{bound}: {answer.reply}"
    return ""


def quiet(**fields: Any) -> Circuit:
    """A circuit that has seen a few failures, of this reporter and of others."""
    usual: dict[str, Any] = {
        "policy": RULES, "run": 2, "attempt": 2, "duration": 5_000, "since": NOON - 10 * SECOND,
        "reporters": [replace(OTHERS[0]), replace(OWN), Reporter("you", NOON, 0, 2, 0)],
        "totals": [1_000 + i for i in range(len(model.TOTALS))],
    }  # fmt: skip
    c = circuit(**usual | fields)
    if c.run == 0:  # then nobody has a part in it
        for r in c.reporters:
            r.run = 0
    if "ring" not in fields:
        c.ring[0], c.ring[3], c.ring[11] = [20, 2, 1], [7, 1, 0], [100, 3, 9]
    return c


def report(c: Circuit, taken: bool = True, now: int = NOON, **more: Any) -> Bound:
    """A report by a process that knows the circuit."""
    known = Known(c.v, c.nonce, "closed", 0, c.attempt)
    usual: dict[str, Any] = {"known": known, "reporter": "me", "batch": (Run("s"),)}
    return Bound(case(c, "report", now, **usual | more), taken)


def refused(c: Circuit, **more: Any) -> Bound:
    """The same with a malformed argument."""
    return report(c, False, **more)._replace(refused=True)


def everyday() -> Iterator[Bound]:
    """What processes say all the time."""
    for c in (quiet(), quiet(run=0), quiet(ring=circuit().ring), quiet(duration=0, attempt=0)):
        yield report(c, batch=())
        yield report(c, batch=(), deltas=(("rejected", 4), ("b3", 1)))
        for kind, count in product("sSfFiI", (1, 2)):
            yield report(c, batch=(Run(kind, count),), detail="x y")
        yield report(
            c, batch=(Run("s", 120),), deltas=(("b0", 119), ("b15", 1), ("duration_us", 7))
        )
        yield report(c, batch=(Run("f"), Run("s", 3), Run("F"), Run("i", 2), Run("I"), Run("S")))
    for name in model.TOTALS:
        if counted(name):
            yield report(quiet(), batch=(), deltas=((name, 3),))
    many = quiet(totals=[HUGE + i for i in range(len(model.TOTALS))], n=HUGE)
    yield report(many, batch=(Run("F"), Run("s", 7)), deltas=(("duration_us", HUGE),))


def headers() -> Iterator[Bound]:
    """The header must be plain, and what the client knows."""
    c = quiet()
    yield report(quiet(fresh=True), False)
    yield report(replace(c, successes=1), False)
    yield report(replace(c, since=NOON))
    yield report(replace(c, since=NOON + 1), False)
    for state in sorted(model.STATES - {"closed"}):
        yield report(replace(c, state=state), False)
    mine = Known(c.v, c.nonce, "closed", 0, c.attempt)
    yield report(c, False, known=NOTHING)
    yield report(c, False, known=mine._replace(v=c.v - 1))
    yield report(c, False, known=mine._replace(nonce="0000000d"))
    yield report(c, False, known=mine._replace(state="half_open"))
    yield report(c, False, known=mine._replace(remaining=1))
    yield report(c, False, known=mine._replace(attempt=1))
    yield report(c, False, era=(c.v - 1, c.nonce))
    yield report(c, False, era=(c.v, "0000000d"))
    for reason in ("recovered", "reset"):
        yield report(replace(c, reason=f"{reason} 5 x"))


def arguments() -> Iterator[Bound]:
    """What is not as it should be is for the machine to refuse."""
    c = quiet()
    yield report(c, policy=RULES, offer=True)
    yield report(c, False, policy=RULES._replace(version=9))
    yield report(c, False, policy=RULES._replace(version=9), offer=True)
    yield report(replace(c, policy=None), False)
    for nonce in ("0123456", "012345678", "0123456g", "x123456"):
        yield refused(c, nonce=nonce)
    yield report(c, nonce="0123abCD")
    yield report(c, detail="x" * 400)
    yield refused(c, detail="x" * 401)
    yield report(quiet(reporters=[Reporter("x" * 24, NOON)]), reporter="x" * 24)
    yield refused(quiet(reporters=[Reporter("x" * 25, NOON)]), reporter="x" * 25)
    yield refused(c, reporter="")
    yield refused(c, reporter="a:1")
    for name in ("calls", "late", "b16", "b00", "b01", "b", "b1x", "b123", "x", "duration", "us"):
        yield refused(c, deltas=((name, 1),))
    yield report(c, deltas=(("b9", 0), ("b10", 10**15 - 1)))
    yield report(c, deltas=(("b9", 1),) * len(model.TOTALS))
    yield refused(c, deltas=(("b9", 1),) * (len(model.TOTALS) + 1))
    yield report(c, False, deltas=(("b0", 10**15),))
    yield report(c, deltas=(("b0", HUGE * 8 + 1), ("b1", 10)))


def moments() -> Iterator[Bound]:
    """Nothing moves on, and nothing expires."""
    width, half = MINUTE // model.BUCKETS, MINUTE // 2
    for passed, taken in ((width - 1, True), (width, False), (-1, False)):
        yield report(quiet(touched=NOON - MINUTE, since=NOON - MINUTE), taken, NOON + passed)
    yield report(quiet(head=NOON // width + 1), False)
    yield report(quiet(half=NOON // half - 1), False)
    yield report(quiet(half=NOON // half + 1), False)
    for touched, taken in (
        *((NOON, True), (NOON + 1, False)),
        *((NOON - model.HOUR + 1, True), (NOON - model.HOUR, False)),
    ):
        yield report(quiet(touched=touched), taken)
    for window in (1, 2, 11, 12, 23, 24):
        yield report(quiet(policy=PATIENT._replace(window=window)))
    for late, taken in ((10**13, True), (10**14 - 1, True), (10**14, False)):
        c = quiet(head=late // width, half=late // half, touched=late)
        yield report(c, taken, late)


def reporters() -> Iterator[Bound]:
    """The reporter stands first, in the middle, last, alone, beside names like its own, or not."""
    one = Reporter("b", NOON, 3, 2, 1)
    for who, taken in (("a", True), ("ab", True), ("b", True), ("ba", True), ("bab", False)):
        for order in (("a", "ab", "b", "ba"), ("ba", "b", "ab", "a")):
            c = quiet(reporters=[replace(one, id=name) for name in order])
            for batch in ((Run("s"),), (Run("f"),), (Run("f"), Run("s"), Run("f", 2)), (Run("i"),)):
                yield report(c, taken, reporter=who, batch=batch)
    yield report(quiet(reporters=[one]), reporter="b")
    yield report(quiet(reporters=[]), False)
    yield report(quiet(reporters=[replace(one, id="7")]), False, reporter="b")
    yield report(quiet(reporters=[replace(one, id="a-b")]), reporter="a-b")
    yield report(quiet(reporters=[replace(one, last=5)]), reporter="b")
    for order in ((OWN, Reporter("*", 0, 1, 0, 0)), (Reporter("*", 0, 1, 0, 0), OWN)):
        yield report(quiet(reporters=[replace(r) for r in order]), False)


def crowds() -> Iterator[Bound]:
    """Who has only good outcomes needs no place in a table full of active reporters."""
    for window in (MINUTE, 3 * MINUTE):
        patient = PATIENT._replace(window=window)
        last = NOON - max(model.ACTIVE, window)
        for number, oldest, taken in ((8, last, True), (8, last - 1, False), (7, last, False)):
            full = [Reporter(f"r{i}", NOON, i, 1, 0) for i in range(number)]
            full[number // 2].last = oldest
            for run in (0, 3):
                full[1].run = run
                c = quiet(policy=patient, run=run, reporters=[replace(r) for r in full])
                yield report(c, taken)
                yield report(c, taken, batch=(Run("s", 3), Run("i", 2)))
                yield report(c, taken, batch=(Run("i"),))
                yield report(c, False, batch=(Run("s"), Run("S")))
                yield report(c, reporter="r0", batch=(Run("s"), Run("f")))
            # The machine, too, sees who has a place, and gives none: the window moves on here.
            later = NOON + window // model.BUCKETS
            for who, on in product(("r0", "me"), (0, 1)):
                full[number // 2].last = oldest + (later - NOON) * on
                c = quiet(policy=patient, reporters=[replace(r) for r in full])
                yield report(c, False, later, reporter=who)
            rest = [*(replace(r) for r in full), Reporter("*", 0, 1, 0, 0)]
            yield report(quiet(policy=patient, reporters=rest), False)


def rules() -> Iterator[Bound]:
    """One outcome less than any rule asks for, and as many: then the quorum has a word, too."""
    for run, kind, count in product((0, 1, 3, 4), "fSI", (1, 2, 4, 5)):
        policy = PATIENT._replace(failure_threshold=5)
        yield report(quiet(run=run, policy=policy), run + count < 5, batch=(Run(kind, count),))
    yield report(quiet(run=4), batch=(Run("s"), Run("f", 4)))
    for slow, calls, bad, added in product((0, 1), (8, 9, 10, 19, 20), (4, 5, 9, 10), (1, 2, 5)):
        rule = {"slow_call_rate" if slow else "failure_rate": 5_000}
        c = quiet(policy=PATIENT._replace(minimum_calls=10, **rule), ring=circuit().ring)
        c.ring[0] = [calls, bad * (1 - slow), bad * slow]
        # A call that is not bad by the rule lowers its rate; it counts with ten calls.
        few = calls + added < 10
        diluted = few or bad * 10_000 < 5_000 * max(10, calls + 1)
        yield report(c, diluted, batch=(Run("s", added),))
        yield report(c, diluted, batch=(Run("f" if slow else "S", added),))
        raised = few or (bad + added) * 10_000 < 5_000 * (calls + added)
        yield report(c, raised, batch=(Run("S" if slow else "f", added),))
        yield report(c, raised, batch=(Run("I" if slow else "F", added),))


def near() -> Iterator[Bound]:
    """A share that is as near to its rate as it can be, on either side."""
    rule = PATIENT._replace(minimum_calls=1, failure_rate=1)
    one_in_all = quiet(policy=rule, run=0, ring=circuit().ring)
    yield report(one_in_all)
    yield report(one_in_all, False, batch=(Run("f"),))
    for slow, (rate, calls, bad) in product((0, 1), ((5_001, 19, 10), (5_000, 10_000, 5_000))):
        name = "slow_call_rate" if slow else "failure_rate"
        rule = PATIENT._replace(minimum_calls=10, **{name: rate})
        c = quiet(policy=rule, ring=circuit().ring)
        c.ring[0] = [calls, bad * (1 - slow), bad * slow]
        yield report(c)


def batches() -> Iterator[Bound]:
    """Batches as long and runs as great as they may be, and what is not a plain run."""
    c = quiet(policy=PATIENT, run=0)
    c.ring[0], c.ring[3], c.ring[11] = [5, 0, 0], [0, 0, 0], [10**6, 0, 0]
    yield report(c, batch=(Run("s", MAX_COUNT), Run("i", MAX_COUNT)))
    yield refused(c, batch=(Run("s", MAX_COUNT + 1),))
    yield refused(c, batch=(Run("s", 0),))
    yield report(c, batch=(Run("s"),) * model.MAX_TOKENS)
    yield refused(c, batch=(Run("s"),) * (model.MAX_TOKENS + 1))
    yield report(c, batch=(Run("f", model.MAX_BAD - 1), Run("I"), Run("s", 2_000)))
    yield refused(c, batch=(Run("f", model.MAX_BAD), Run("I")))
    for run in (Run("f", 1, 0, 5), Run("s", 1, 0, 0), Run("f", 1, 7), Run("i", 1, 7)):
        yield report(c, False, batch=(Run("s"), run))
    yield refused(c, batch=(Run("s"), Run("x")))


def damage() -> Iterator[Bound]:
    """Fields that are absent, short or written by another hand."""
    whole = report(quiet(), batch=(Run("f"),), deltas=(("b0", 1),)).case
    fields = dict(whole.before or {})
    for name in ("h", "w", "r", "p", "t", "e"):
        rest = {field: text for field, text in fields.items() if field != name}
        yield Bound(whole._replace(before=rest), False)
        only_counted = report(quiet(), batch=(), deltas=(("b0", 1),)).case
        yield Bound(only_counted._replace(before=rest), False)
    for name, text in (
        ("w", f"{quiet().head} 1"),
        ("t", fields["t"].rpartition(" ")[0]),
        ("t", fields["t"] + " 5"),
        ("h", fields["h"] + " more"),
        ("h", fields["h"].rpartition(" ")[0]),
        ("r", fields["r"].split(" ")[0]),
    ):
        yield Bound(whole._replace(before={**fields, name: text}), False)
    share = fields["r"].partition(" me:")[2].partition(" ")[0]
    torn = {**fields, "r": fields["r"].replace(share, "x")}
    yield Bound(whole._replace(before=torn), False, damaged=True)
    for name in ("h", "w", "r", "t"):
        for text in (
            f"x{fields[name]}",
            f"1{fields[name]}x",
            f" {fields[name]}",
            f"-{fields[name]}",
        ):
            yield Bound(whole._replace(before={**fields, name: text}), False, damaged=True)


def at_random(number: int, seed: int) -> Iterator[Case]:
    """Reports near the rules' bounds, in batches of all kinds."""
    draw = random.Random(seed)
    for _ in range(number):
        policy = PATIENT._replace(
            failure_threshold=draw.choice([3, 9, 10**6]),
            failure_rate=draw.choice([0, 1_000, 5_000, 10_000]),
            slow_call_rate=draw.choice([1_000, 5_000, 10_000]),
            minimum_calls=draw.choice([1, 10, 40]),
            quorum=draw.choice([1, 2]),
        )
        c = quiet(policy=policy, run=draw.choice([0, 1, 4]))
        for bucket in (c.ring[0], c.ring[3], c.ring[11]):
            bucket[0] = draw.choice([0, 1, 9, 30])
            bucket[1:] = [draw.randint(0, bucket[0] // 4) for _ in range(2)]
        lengths = draw.choice([(1,), (1, 1, 2), (1, 5, 40)])
        runs = [
            Run(draw.choice("sssfSFiI"), draw.choice(lengths)) for _ in range(draw.randint(1, 6))
        ]
        yield report(c, reporter=draw.choice(["a", "me", "you"]), batch=tuple(runs)).case
