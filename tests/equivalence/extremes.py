"""Cases by hand, for what neither the explorations nor the random lives come to.

Most begin with a hash that no life led to: numbers as great as they may be, policies at their
bounds, names and states together that never meet. The twins must agree on them too, for a hash may
come from an older library or from somebody's hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from distributed_breaker import model
from distributed_breaker.model import MAX_TIME, NOTHING, Circuit, Known, Reporter, Run, Slot, Step
from tests.equivalence.small import NOON, SECOND, numbers
from tests.equivalence.twins import Case

# More digits than Lua writes by itself, and sums of a few are still exact.
HUGE = 123_456_789_012_345
NONCE = "80008000"
MINUTE = 60 * SECOND
DAY = 24 * 60 * MINUTE
PLAIN = numbers(window=MINUTE, open_interval=MINUTE, permit_lease=MINUTE)


def extremes() -> list[Case]:
    """All of them."""
    return [
        *numbers_with_many_digits(),
        *absent_fields(),
        *odd_headers(),
        *short_windows(),
        *the_rest(),
        *rates(),
        *knowledge_of_nothing(),
        *unusual_states(),
        *waits_and_intervals(),
        *small_things(),
    ]


def circuit(**fields: Any) -> Circuit:
    """A closed circuit since a second ago, with a policy, as the operations find it."""
    usual: dict[str, Any] = {
        "v": NOON - SECOND,
        "nonce": "0000000c",
        "since": NOON - SECOND,
        "n": 7,
        "policy": PLAIN,
        "reason": f"reset {NOON - SECOND} by hand",
        "touched": NOON - SECOND,
    }
    c = Circuit(**usual | fields)
    assert c.policy is not None
    if "head" not in fields:
        c.head = NOON // max(1, c.policy.window // model.BUCKETS)
    if "half" not in fields:
        c.half = NOON // max(1, c.policy.window // 2)
    return c


def case(c: Circuit, op: str, now: int = NOON, /, **arguments: Any) -> Case:
    """One step on the circuit, of a client that holds its policy and knows its generation."""
    arguments = {"era": (c.v, c.nonce), "policy": c.policy or PLAIN, "nonce": NONCE} | arguments
    return Case(model.dump(c), Step(op, **arguments), now)


# ---------------------------------------------------------------------------- numbers


def numbers_with_many_digits() -> Iterator[Case]:
    """Every number of a hash with 15 digits, written again and looked at by every operation."""
    policy = PLAIN._replace(version=HUGE, window=1)
    for state in ("closed", "half_open", "forced_open"):
        c = circuit(state=state, policy=policy, v=HUGE, since=HUGE, duration=HUGE + 1)
        c.attempt, c.successes, c.n, c.touched = HUGE + 2, HUGE + 3, HUGE + 4, MAX_TIME
        c.head, c.half, c.run = MAX_TIME - 1, MAX_TIME - 1, HUGE + 5
        c.ring[0] = [4 * HUGE, 2 * HUGE, HUGE]
        c.ring[11] = [HUGE + 6, HUGE + 5, HUGE + 4]
        c.reporters = [Reporter("a", HUGE, HUGE + 7, HUGE + 8, HUGE + 9), Reporter("b", HUGE + 1)]
        c.slots = [Slot("t", HUGE, HUGE + 10)]
        c.totals = [HUGE + 20 + i for i in range(len(c.totals))]
        deltas = tuple((name, HUGE + i) for i, name in enumerate(model.TOTALS) if counted(name))
        for now in (MAX_TIME - 1, MAX_TIME):
            yield case(c, "report", now, deltas=deltas)
            yield case(c, "report", now, reporter="a", batch=(Run("F"), Run("s"), Run("I")))
            yield case(c, "override", now, kind="forced_closed", ttl=10**12)
            yield case(c, "settle", now, token="t", kind="f", open_for=10**12)
            for op in ("acquire", "cancel", "release", "reset"):
                yield case(c, op, now, token="t")
    offered = PLAIN._replace(version=HUGE + 1)
    yield case(circuit(), "report", offer=True, policy=offered)
    yield case(circuit(policy=offered), "report", policy=PLAIN)


def counted(name: str) -> bool:
    """Whether clients count this total."""
    return name in ("rejected", "dropped", "fallbacks", "duration_us") or name[1:].isdigit()


def absent_fields() -> Iterator[Case]:
    """A field that is absent is empty, and stays so where nothing is written to it."""
    c = circuit(run=1, reporters=[Reporter("a", NOON - 5, 1, 0, 1)], slots=[Slot("t", NOON, 9)])
    fields = model.dump(c)
    for gone in (*fields, "wrsptxe"):
        rest = {name: text for name, text in fields.items() if name not in gone}
        if gone == "h":
            rest = {}
        yield from (of._replace(before=rest or None) for of in some_steps(c))


def some_steps(c: Circuit) -> Iterator[Case]:
    """One of each operation, and a step that counts something and moves nothing."""
    yield case(c, "report", deltas=(("rejected", 1),))
    yield case(c, "report", reporter="a", batch=(Run("f"), Run("s", 2)))
    yield case(c, "settle", token="t", kind="s")
    yield case(c, "override", kind="forced_open", ttl=-1)
    for op in ("acquire", "cancel", "release", "reset"):
        yield case(c, op, token="t")


def odd_headers() -> Iterator[Case]:
    """Headers that are odd, but can be read."""
    c = circuit()
    fields = model.dump(c)
    for header in (
        "0 5 a closed 5 0 0 0 - 1 reset",
        "1 0 - closed 0 0 0 0 - 0 -",
        "1 5 a closed 5 0 0 0 f 1",
        "1 5 a closed 5 0 0 0 x 1 reset and more",
        "1 5 a closed 5 -1 0 0 - 1 reset",
        "1 5 a open 5 -1 0 0 - 1 run",
    ):
        odd = fields | {"h": header}
        yield from (of._replace(before=odd) for of in some_steps(c))
    for reason in ("", " ", f" {NOON} by hand", "reset"):
        odd = fields | {"x": reason}
        yield from (of._replace(before=odd) for of in some_steps(c))


# ---------------------------------------------------------------------------- windows and shares


def short_windows() -> Iterator[Case]:
    """Windows of so few ms that a bucket or a half-window would have none."""
    for window, passed in product((1, 2, 3, 12, 23, 24, 25), (0, 1, 2, 12)):
        policy = PLAIN._replace(window=window, minimum_calls=2, failure_rate=5_000)
        c = circuit(policy=policy, reporters=[Reporter("a", NOON, 2, 1, 1)], run=1)
        c.ring[0], c.ring[11] = [1, 1, 0], [1, 0, 0]
        yield case(c, "report", NOON + passed, reporter="a", batch=(Run("s"), Run("f")))


def the_rest() -> Iterator[Case]:
    """What stands under ``*``: it goes when it is empty, is nobody, and a move forgets it."""
    for state, shares, last, halves in product(
        ("closed", "half_open", "forced_closed"),
        ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)),
        (0, NOON - 1),
        (0, 1, 2),
    ):
        policy = PLAIN._replace(quorum=2, failure_threshold=2)
        c = circuit(state=state, policy=policy, run=1)
        c.reporters = [Reporter("*", last, *shares), Reporter("a", NOON - 1, 0, 0, 0)]
        now = NOON + halves * MINUTE // 2
        yield case(c, "report", now, reporter="a", batch=(Run("f"),))
        yield case(c, "report", now, reporter="a", batch=(Run("s"),))
        yield case(c, "override", now, kind="forced_open", ttl=-1)
        yield case(c, "settle", now, token="t", kind="f")
    # The ninth reporter pushes out the one with the smallest share.
    for shares in product(((3, 0, 0), (1, 2, 0), (0, 3, 1), (2, 0, 2), (0, 0, 3)), repeat=2):
        c = circuit()
        c.reporters = [Reporter(f"r{i}", NOON - i, 4, 4, 4) for i in range(6)]
        c.reporters += [Reporter(f"x{i}", NOON - 9 - i, *mine) for i, mine in enumerate(shares)]
        yield case(c, "report", reporter="new", batch=(Run("f"),))
        yield case(c, "report", reporter="new", batch=(Run("s"),))


def rates() -> Iterator[Case]:
    """Rates at their bounds, and what each of two reporters may contribute to them."""
    for rate, calls, bad in (
        *((1, 10_000, 1), (1, 9_999, 1), (1, 10_001, 1), (4_286, 7, 3), (4_285, 7, 3)),
        *((10_000, 2, 2), (10_000, 3, 2), (1, 1, 0), (10_000, 1, 0)),
    ):
        for slow in (False, True):
            rule = {"slow_call_rate" if slow else "failure_rate": rate}
            policy = PLAIN._replace(failure_threshold=10**6, minimum_calls=1, **rule)
            c = circuit(policy=policy)
            c.ring[0] = [calls - 1, 0 if slow else bad, bad if slow else 0]
            yield case(c, "report", reporter="a", batch=(Run("s"),))
    shares = ((0, 4), (1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (3, 3), (3, 4), (4, 4))
    for (rate, least), quorum, (mine, theirs) in product(
        ((2_500, 8), (2_500, 9), (5_000, 5), (3_333, 10), (6_667, 3), (6_667, 9), (1, 10)),
        (2, 3),
        shares,
    ):
        for threshold, old in product((3, 4, 50), (0, 2)):
            policy = PLAIN._replace(failure_threshold=threshold, quorum=quorum)
            c = circuit(policy=policy._replace(failure_rate=rate, minimum_calls=least))
            c.reporters = [Reporter("a", NOON, max(0, mine - old), old)]
            c.reporters += [Reporter("b", NOON, theirs), Reporter("c", NOON)]
            for failures in (least - 1, least):
                c.ring[0] = [failures, failures, 0]
                yield case(c, "report", reporter="a", batch=(Run("s"),))


# ---------------------------------------------------------------------------- knowledge and states


def knowledge_of_nothing() -> Iterator[Case]:
    """A client that knows no generation, or the first, says nothing; a smaller one does, while the
    circuit is fresh, even if it has the circuit's nonce."""
    c = circuit(fresh=True)
    for v, nonce in ((0, "-"), (1, "-"), (2, "x"), (c.v - 1, c.nonce), (c.v, c.nonce), (c.v, "x")):
        for state, left in (("forced_open", -1), ("open", MINUTE), ("half_open", 0), ("closed", 0)):
            known = Known(v, nonce, state, left, 1)
            yield case(c, "report", known=known)
            yield case(replace(c, fresh=False), "report", known=known)
            yield Case(None, Step("report", NONCE, PLAIN, known), NOON)
    latest = Known(MAX_TIME, "x", "open", MINUTE, 1)
    yield Case(None, Step("report", NONCE, PLAIN, latest), NOON)
    yield case(c, "report", known=latest)
    for now in (0, 1, 2, 3, 5):
        yield Case(None, Step("report", NONCE, PLAIN, NOTHING), now)
        yield Case(None, Step("acquire", NONCE, PLAIN, Known(1, "x", "open", 0, 0), token="t"), now)


def unusual_states() -> Iterator[Case]:
    """Permits outside half_open, timers in the future, durations that no move leaves behind."""
    for state, duration in product(sorted(model.STATES), (-1, 0, 1, MINUTE)):
        for since, touched in ((NOON - SECOND, NOON), (NOON + SECOND, NOON + 1), (NOON, 0)):
            c = circuit(state=state, duration=duration, since=since, touched=touched)
            c.slots = [Slot("t", since, MINUTE), Slot("u", NOON - MINUTE, MINUTE)]
            c.reporters = [Reporter("a", since)]
            yield from some_steps(c)
            yield case(c, "cancel", token="nobody")
            yield case(replace(c, slots=[]), "cancel", token="nobody")
            bare = replace(c, slots=[], reporters=[])
            yield case(bare, "cancel", token="nobody")
            yield case(replace(bare, policy=None), "cancel", token="nobody")
            ahead = [Slot("t", NOON + 1, MINUTE)]
            yield case(replace(bare, slots=ahead), "cancel", token="nobody")
            yield case(c, "settle", token="t", kind="i", deltas=(("b3", 2),))


# ---------------------------------------------------------------------------- intervals


def waits_and_intervals() -> Iterator[Case]:
    """Intervals with their backoff, jitter and bounds, expiries beyond a week, and short waits."""
    for longest, interval, attempt, jitter in product(
        (0, 1, 2, 1_000), (1, 7, 400), (0, 1, 3, 64), (0, 3, 10_000)
    ):
        policy = PLAIN._replace(open_interval=interval, open_interval_max=longest, jitter=jitter)
        c = circuit(state="half_open", policy=policy, attempt=attempt, slots=[Slot("t", NOON, 9)])
        for open_for, nonce in ((0, NONCE), (0, "ffff0000"), (1, NONCE), (4_001, NONCE)):
            yield case(c, "settle", token="t", kind="f", open_for=open_for, nonce=nonce)
    c = circuit(state="half_open", slots=[Slot("t", NOON, 9)])
    for open_for in (0, 1, 2):
        yield case(c, "settle", token="t", kind="i", open_for=open_for)
        yield case(circuit(), "report", reporter="a", batch=(Run("i", 1, open_for),))
    for lease, nonce in product((1, 2, 3, 255, 499, 500, 501, MINUTE), ("0000", "8000", "ffff")):
        busy = circuit(state="half_open", slots=[Slot("t", NOON, lease)])
        yield case(busy, "acquire", token="u", nonce="0000" + nonce)
    for ttl, window in product((1, 7 * DAY, 8 * DAY, 10**12), (MINUTE, DAY)):
        c = circuit(policy=PLAIN._replace(window=window))
        yield case(c, "override", kind="forced_open", ttl=ttl)
    for hours in (0, 1, 2):
        for step in (-1, 0, 1):
            c = circuit(touched=NOON - hours * model.HOUR + step)
            yield case(c, "report", deltas=(("b0", 1),))


def small_things() -> Iterator[Case]:
    """Each total that clients count; a new window, and outcomes into it, in one step."""
    for name in model.TOTALS:
        if counted(name):
            yield case(circuit(), "report", deltas=((name, 3),))
    c = circuit(reporters=[Reporter("a", NOON, 2, 3, 1)], run=1)
    c.ring[0], c.ring[1] = [3, 2, 1], [1, 1, 1]
    wider = PLAIN._replace(version=2, window=2 * MINUTE)
    yield case(c, "report", offer=True, policy=wider, reporter="a", batch=(Run("s"), Run("f")))
    for age in (0, 1, SECOND - 1, SECOND, SECOND + 1):
        yield case(c, "report", reporter="a", batch=(Run("f", 1, 0, age),))
