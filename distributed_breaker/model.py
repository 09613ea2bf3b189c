"""The state machine of one circuit in pure Python: the twin of ``lua/breaker.lua``.

Both files hold the same machine: the same functions, under the same names, in the same order,
each opening with the rules it keeps.  A change of one is a change of the other; the tests in
``tests/equivalence`` compare them state by state.  No clock and no I/O live here: time comes in
as ``now`` (milliseconds), chance as ``nonce`` (8 hexadecimal digits).

The shadow breaker and ``memory://`` run on this machine; the wire form that the script keeps is
made by ``dump`` and read by ``load``.  ``lua/README.md`` specifies fields, operations and replies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import StoreError
from .policy import Numbers, State

SCHEMA = 1
BUCKETS = 12
REPORTERS = 8
HOUR = 3_600_000
DAY = 24 * HOUR
WEEK = 7 * DAY
FRESH = 10_000  # ms for which a rebuilt circuit still listens to older knowledge
FRESH_MARGIN = 250  # ms by which another open state must outlast ours to replace it
ACTIVE = 60_000  # ms after its last outcome during which a reporter counts towards the quorum
MAX_ATTEMPT = 64  # bounds the backoff loop; no interval still grows after so many steps
MAX_DENY = 500  # ms after which a refused prober may ask again
MAX_TOKENS = 512  # runs in one batch
MAX_BAD = 1024  # bad outcomes in one batch: they are judged one by one
MAX_SPAN = 1_000_000_000_000  # ms: no ttl, remaining time, open_for or age is longer
MAX_TIME = 253_402_300_799_999  # ms: the year 9999; later times and generations are nonsense
TRIPS = frozenset({"run", "rate", "slow", "retry_after", "probe"})  # causes that open a circuit
TOTALS = (
    "calls failures slow ignored rejected late dropped probes fallbacks trips opens half_opens "
    "closes last_success last_failure duration_us"
).split() + [f"b{i}" for i in range(16)]
STATES = frozenset(State)
INDEX = {name: i for i, name in enumerate(TOTALS)}


class Known(NamedTuple):
    """What a client knows of a circuit: the header it holds and the time that is left of it.

    ``remaining`` is in milliseconds, -1 without end; ``v`` 0 means that it knows nothing.
    """

    v: int = 0
    nonce: str = "-"
    state: str = "closed"
    remaining: int = 0
    attempt: int = 0


NOTHING = Known()


class Run(NamedTuple):
    """``count`` equal outcomes in a row within a batch.

    ``kind`` is one of ``s f i`` (success, failure, ignored), in capitals when slow.  ``open_for``
    (ms, 0: none) opens the circuit at once.  ``age`` is how many ms ago the calls began, -1 when
    that does not matter (the generation alone then says whether they count).
    """

    kind: str
    count: int = 1  # type: ignore[assignment]  # it hides tuple.count, which nobody needs here
    open_for: int = 0
    age: int = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One operation with its arguments: what the store runs as one atomic script.

    ``policy`` is the policy that the client holds; with ``offer`` it asks the store to take it.
    ``era`` is the generation that ``batch`` or ``token`` belongs to.  ``deltas`` add to totals.
    """

    op: str
    nonce: str
    policy: Numbers
    known: Known = NOTHING
    offer: bool = False
    era: tuple[int, str] = (0, "-")
    reporter: str = "-"
    batch: tuple[Run, ...] = ()
    deltas: tuple[tuple[str, int], ...] = ()
    token: str = "-"
    kind: str = "i"
    open_for: int = 0
    ttl: int = -1
    detail: str = ""


class Reply(NamedTuple):
    """What a step answers; ``header`` is the newest shared state.

    ``remaining`` is what is left of an open or forced state in ms (-1: without end).  ``cause`` is
    empty unless *this* step made a transition.  ``verdict`` is ``ok``, ``noop``, ``go``,
    ``grant``, ``deny`` or ``stale``, ``value`` its milliseconds.  ``policy`` is the stored policy
    when the client's differs, else empty.  ``failed`` names after-effects that the store refused.
    """

    header: str
    now: int
    remaining: int
    old: str
    cause: str
    verdict: str
    value: int
    policy: str
    failed: str = ""


class Header(NamedTuple):
    """The header of a circuit, as stored, pushed and polled."""

    v: int
    nonce: str
    state: str
    since: int
    duration: int
    attempt: int
    successes: int
    fresh: bool
    n: int
    cause: str = "-"


@dataclass(slots=True)
class Slot:
    """A permit that is out: its token, when its lease began and how long it is."""

    token: str
    since: int
    lease: int


@dataclass(slots=True)
class Reporter:
    """One process's share: its last outcome and its bad outcomes in two half-windows and the run.

    The reporter ``*`` holds what reporters had that were pushed out of the table.
    """

    id: str
    last: int = 0
    cur: int = 0
    prev: int = 0
    run: int = 0


@dataclass(slots=True)
class Event:
    """One transition as the log keeps it."""

    old: str
    new: str
    v: int
    cause: str
    evidence: str
    detail: str


@dataclass(slots=True)
class Circuit:
    """One circuit, unpacked.  ``ring`` is newest bucket first, each [calls, failures, slow]."""

    v: int
    nonce: str
    state: str = "closed"
    since: int = 0
    duration: int = 0
    attempt: int = 0
    successes: int = 0
    fresh: bool = False
    n: int = 0
    head: int = 0
    run: int = 0
    ring: list[list[int]] = field(default_factory=lambda: empty_ring())
    half: int = 0
    reporters: list[Reporter] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    policy: Numbers | None = None
    totals: list[int] = field(default_factory=lambda: [0] * len(TOTALS))
    reason: str = ""
    touched: int = 0

    @property
    def header(self) -> Header:
        """The part that mirrors follow."""
        return Header(
            self.v, self.nonce, self.state, self.since, self.duration, self.attempt,
            self.successes, self.fresh, self.n, self.reason.partition(" ")[0] or "-",
        )  # fmt: skip


@dataclass(slots=True)
class Context:
    """One step under way: its time, its arguments, and the transitions it has made so far."""

    now: int
    step: Step
    policy: Numbers
    events: list[Event] = field(default_factory=list)
    dirty: bool = False  # something must be written; a mere look at the circuit leaves it False


# ---------------------------------------------------------------------------- packed text


def load_header(text: str) -> Header:
    """A newer schema is refused, never guessed at.  Words behind the known ones are ignored, and
    gone with the next write: what a newer library adds goes into hash fields of its own."""
    parts = text.split(" ")
    if parts[0].isdigit() and int(parts[0]) > SCHEMA:
        raise StoreError(f"CBSCHEMA the circuit has schema {parts[0]}, this library knows {SCHEMA}")
    try:
        if int(parts[0]) < 0 or parts[3] not in STATES:
            raise ValueError(text)
        return Header(
            int(parts[1]), parts[2], parts[3], int(parts[4]), int(parts[5]), int(parts[6]),
            int(parts[7]), parts[8] == "f", int(parts[9]), parts[10] if len(parts) > 10 else "-",
        )  # fmt: skip
    except (ValueError, IndexError):
        raise StoreError("CBCORRUPT the circuit's header cannot be read") from None


def empty_ring() -> list[list[int]]:
    """Nothing in any bucket."""
    return [[0, 0, 0] for _ in range(BUCKETS)]


def load(fields: dict[str, str]) -> Circuit | None:
    """An absent circuit is None; absent fields are empty."""
    if "h" not in fields:
        return None
    h = load_header(fields["h"])
    c = Circuit(*h[:9])
    window = fields.get("w", "0 0").split(" ")
    c.head, c.run = int(window[0]), int(window[1])
    for entry in window[5:]:
        offset, *counts = map(int, entry.split(":"))
        c.ring[offset] = counts
    shares = fields.get("r", "0").split(" ")
    c.half = int(shares[0])
    for entry in shares[1:]:
        name, last, cur, prev, run = entry.split(":")
        c.reporters.append(Reporter(name, int(last), int(cur), int(prev), int(run)))
    for entry in fields.get("s", "").split():
        token, since, lease = entry.split(":")
        c.slots.append(Slot(token, int(since), int(lease)))
    c.policy = Numbers.parse(fields.get("p", ""))
    for i, count in enumerate(fields.get("t", "").split()[: len(TOTALS)]):
        c.totals[i] = int(count)
    c.reason = fields.get("x", "")
    c.touched = int(fields.get("e", "0"))
    return c


def counts(c: Circuit) -> tuple[int, int, int]:
    """S8: the window's totals are the sum of its ring."""
    calls = failures = slow = 0
    for bucket in c.ring:
        calls += bucket[0]
        failures += bucket[1]
        slow += bucket[2]
    return calls, failures, slow


def dump_header(c: Circuit) -> str:
    """Schema, generation, nonce, state, since, duration, attempt, successes, flags, counter, and
    the cause of the last transition, which stands first in the reason."""
    h = c.header
    flags = "f" if h.fresh else "-"
    return (
        f"{SCHEMA} {h.v} {h.nonce} {h.state} {h.since} {h.duration} {h.attempt} "
        f"{h.successes} {flags} {h.n} {h.cause}"
    )


def dump(c: Circuit) -> dict[str, str]:
    """Only buckets that hold something are written, newest first."""
    window = [str(n) for n in (c.head, c.run, *counts(c))]
    for offset, (calls, failures, slow) in enumerate(c.ring):
        if calls > 0:
            window.append(f"{offset}:{calls}:{failures}:{slow}")
    shares = [str(c.half)]
    shares += [f"{r.id}:{r.last}:{r.cur}:{r.prev}:{r.run}" for r in c.reporters]
    return {
        "h": dump_header(c),
        "w": " ".join(window),
        "r": " ".join(shares),
        "s": " ".join(f"{s.token}:{s.since}:{s.lease}" for s in c.slots),
        "p": c.policy.text() if c.policy is not None else "",
        "t": " ".join(map(str, c.totals)),
        "x": c.reason,
        "e": str(c.touched),
    }


# ---------------------------------------------------------------------------- time


def remaining(state: str, since: int, duration: int, now: int) -> int:
    """S12: 0 ≤ remaining ≤ duration under any clock; -1 stands for a forced state without end."""
    if state not in ("open", "forced_open", "forced_closed"):
        return 0
    if duration < 0:
        return -1
    return max(0, min(since + duration - now, duration))


def rebase(x: Context, c: Circuit) -> None:
    """A clock that was set back restarts a timer at most once, instead of stopping it; freshness
    has ended by then, once and for all."""
    if c.fresh and x.now - c.since >= FRESH:
        c.fresh = False
        x.dirty = True
    if c.since > x.now:
        c.since = x.now
        x.dirty = True
    for slot in c.slots:
        if slot.since > x.now:
            slot.since = x.now
            x.dirty = True


def roll(c: Circuit, p: Numbers, now: int) -> None:
    """The ring and the half-windows move on with time.  A clock that was set back leaves them as
    they are, and reporters that were seen later than now are seen now."""
    index = now // max(1, p.window // BUCKETS)
    if index < c.head:
        for r in c.reporters:
            r.last = min(r.last, now)
    shift = min(index - c.head, BUCKETS)
    for _ in range(shift):
        c.ring.pop()
        c.ring.insert(0, [0, 0, 0])
    c.head = index
    half = now // max(1, p.window // 2)
    if half > c.half:
        for r in c.reporters:
            r.prev = r.cur if half == c.half + 1 else 0
            r.cur = 0
    c.half = half
    c.reporters = [r for r in c.reporters if r.id != "*" or r.cur + r.prev + r.run > 0]


# ---------------------------------------------------------------------------- transitions


def active(c: Circuit, p: Numbers, now: int) -> int:
    """Reporters with an outcome in the last max(60 s, window)."""
    horizon = now - max(ACTIVE, p.window)
    return sum(1 for r in c.reporters if r.id != "*" and r.last >= horizon)


def transition(x: Context, c: Circuit, state: str, cause: str, duration: int) -> None:
    """S2: v = max(now, v_store + 1, v_client + 1), with the step's nonce.

    Every transition empties window, run, shares and slots, and ends ``fresh``.  Leaving closed
    forgets the reporters that are no longer active and entering closed counts the others as seen
    now: the time while nobody may call must not make one process look alone (S15).
    """
    p = x.policy
    roll(c, p, x.now)
    calls, failures, slow = counts(c)
    evidence = f"{calls} {failures} {slow} {c.run} {active(c, p, x.now)}"
    if c.state in ("closed", "forced_closed"):
        horizon = x.now - max(ACTIVE, p.window)
        c.reporters = [r for r in c.reporters if r.last >= horizon]
    old = c.state
    c.v = max(x.now, c.v + 1, x.step.known.v + 1)
    c.nonce = x.step.nonce
    c.state = state
    c.since = x.now
    c.duration = duration
    c.successes = 0
    c.fresh = False
    c.slots = []
    c.run = 0
    c.ring = empty_ring()
    c.reporters = [
        Reporter(r.id, x.now if state == "closed" else r.last) for r in c.reporters if r.id != "*"
    ]
    if state in ("open", "forced_open"):
        c.totals[INDEX["opens"]] += 1
    elif state == "half_open":
        c.totals[INDEX["half_opens"]] += 1
    else:
        c.totals[INDEX["closes"]] += 1
    c.reason = f"{cause} {x.now} {x.step.detail}"
    x.dirty = True
    x.events.append(Event(old, state, c.v, cause, evidence, x.step.detail))


def open_duration(p: Numbers, attempt: int, nonce: str) -> int:
    """min(max, interval × multiplier^attempt) in whole steps, lengthened by the nonce's jitter."""
    duration = p.open_interval
    if p.open_interval_max > 0:
        for _ in range(attempt):
            duration = min(duration * p.backoff_multiplier // 100, p.open_interval_max)
    return duration + duration * p.jitter // 10_000 * int(nonce[:4], 16) // 65_536


def go_open(x: Context, c: Circuit, cause: str, attempt: int, open_for: int) -> None:
    """open_for is bounded by open_interval_max, or by 10 open intervals; it takes no jitter."""
    p = x.policy
    c.attempt = min(attempt, MAX_ATTEMPT)
    duration = open_duration(p, c.attempt, x.step.nonce)
    if open_for > 0:
        most = p.open_interval_max if p.open_interval_max > 0 else 10 * p.open_interval
        duration = min(open_for, most)
    transition(x, c, "open", cause, duration)


def trip(x: Context, c: Circuit, cause: str, open_for: int) -> None:
    """A trip takes attempt 0 if the closed period lasted at least as long as the last open one."""
    rested = x.now - c.since >= c.duration
    c.totals[INDEX["trips"]] += 1
    go_open(x, c, cause, 0 if rested else c.attempt + 1, open_for)


def restore(x: Context, c: Circuit) -> None:
    """The client's knowledge becomes the store's; half_open counts as open with nothing left, and
    a forced state that has run out as what follows it."""
    known = x.step.known
    state, left = known.state, known.remaining
    if state == "half_open" or (state == "forced_open" and left == 0):
        state, left = "open", 0
    elif state == "closed" or (state == "forced_closed" and left == 0):
        state, left = "closed", 0
    c.attempt = known.attempt
    transition(x, c, state, "restored", left)
    c.fresh = True


def rank(state: str, left: int) -> int:
    """forced > open with time left > half_open (and open that is due) > closed."""
    if state in ("forced_open", "forced_closed"):
        return 3 if left != 0 else (1 if state == "forced_open" else 0)
    if state == "open":
        return 2 if left > 0 else 1
    return 1 if state == "half_open" else 0


def ratchet(x: Context, c: Circuit) -> None:
    """A client that knows a higher v proves that the store lost writes: its state wins.

    While the circuit is fresh, other generations win too, if their state is more protective.
    """
    known = x.step.known
    if known.v > c.v:
        restore(x, c)
    elif known.v > 0 and c.fresh and (known.v < c.v or known.nonce != c.nonce):
        left = remaining(c.state, c.since, c.duration, x.now)
        theirs, ours = rank(known.state, known.remaining), rank(c.state, left)
        longer = theirs == ours == 2 and known.remaining > left + FRESH_MARGIN
        if theirs > ours or longer:
            restore(x, c)


def lapse(x: Context, c: Circuit) -> None:
    """A forced state that has run out is released: forced_open goes on to half_open."""
    if c.state not in ("forced_open", "forced_closed"):
        return
    if remaining(c.state, c.since, c.duration, x.now) == 0:
        transition(x, c, "half_open" if c.state == "forced_open" else "closed", "expired", 0)


def settle_policy(x: Context, c: Circuit) -> None:
    """An offered policy is taken unless the stored version is higher; a new window starts empty,
    and a lower success_threshold still asks for one more success (L2)."""
    offered = x.step.policy
    stored = c.policy
    if stored is None:
        c.policy = offered
        x.dirty = True
    elif x.step.offer and offered.version >= stored.version and offered != stored:
        c.policy = offered
        x.policy = offered
        x.dirty = True
        c.successes = min(c.successes, offered.success_threshold - 1)
        if offered.window != stored.window:
            c.ring = empty_ring()
            for r in c.reporters:
                r.cur = r.prev = 0


# ---------------------------------------------------------------------------- the trip rule


def agreed(x: Context, c: Circuit, need: int, run: bool) -> bool:
    """S15: with q ≥ 2, no reporter contributes more than its q-th part of what a trip needs."""
    q = min(x.policy.quorum, active(c, x.policy, x.now))
    if q <= 1:
        return True
    need = max(need, q)
    cap = (need + q - 1) // q
    total = 0
    for r in c.reporters:
        share = r.run if run else r.cur + r.prev
        total += share if r.id == "*" else min(share, cap)
    return total >= need


def verdict(x: Context, c: Circuit) -> str:
    """S9: the cause for which the circuit must trip now, or an empty text."""
    p = x.policy
    if c.run >= p.failure_threshold and agreed(x, c, p.failure_threshold, True):
        return "run"
    calls, failures, slow = counts(c)
    if calls < p.minimum_calls:
        return ""
    for cause, bad, rate in (("rate", failures, p.failure_rate), ("slow", slow, p.slow_call_rate)):
        if rate > 0 and bad * 10_000 >= rate * calls:
            need = min(p.failure_threshold, (rate * p.minimum_calls + 9_999) // 10_000)
            if agreed(x, c, need, False):
                return cause
    return ""


def reporter_of(x: Context, c: Circuit) -> Reporter:
    """The step's reporter, seen now.  A full table loses the reporter with the smallest share, the
    least recent first; what it loses goes to ``*``, so that many small shares still add up."""
    own = None
    for r in c.reporters:
        if r.id == x.step.reporter:
            own = r
    if own is None:
        own = Reporter(x.step.reporter)
        named = [r for r in c.reporters if r.id != "*"]
        if len(named) >= REPORTERS:
            lost = min(named, key=lambda r: (r.cur + r.prev + r.run, r.last))
            c.reporters = [r for r in c.reporters if r is not lost]
            if lost.cur + lost.prev + lost.run > 0:
                rest = next((r for r in c.reporters if r.id == "*"), None)
                if rest is None:
                    rest = Reporter("*")
                    c.reporters.append(rest)
                rest.cur += lost.cur
                rest.prev += lost.prev
                rest.run += lost.run
        c.reporters.append(own)
    own.last = x.now
    return own


def add_good(x: Context, c: Circuit, count: int) -> None:
    """A good outcome ends the run, for every reporter.  It takes nobody's place in a table full of
    active reporters: there are as many as any quorum asks for."""
    known = any(r.id == x.step.reporter for r in c.reporters)
    if known or active(c, x.policy, x.now) < REPORTERS:
        reporter_of(x, c)
    c.ring[0][0] += count
    c.run = 0
    for r in c.reporters:
        r.run = 0


def add_bad(x: Context, c: Circuit, kind: str) -> None:
    """A bad outcome is a failure, or a slow call; a slow failure counts once."""
    own = reporter_of(x, c)
    c.ring[0][0] += 1
    if kind in "fF":
        c.ring[0][1] += 1
    if kind in "SFI":
        c.ring[0][2] += 1
    c.run += 1
    own.run += 1
    own.cur += 1


def count_totals(x: Context, c: Circuit, kind: str, count: int) -> None:
    """Every outcome counts in the totals, whatever generation it belongs to."""
    t = c.totals
    x.dirty = True
    t[INDEX["calls"]] += count
    if kind in "fF":
        t[INDEX["failures"]] += count
        t[INDEX["last_failure"]] = x.now
    elif kind in "sS":
        t[INDEX["last_success"]] = x.now
    else:
        t[INDEX["ignored"]] += count
    if kind in "SFI":
        t[INDEX["slow"]] += count


def add_deltas(x: Context, c: Circuit) -> None:
    """Totals that only the client can count."""
    for name, count in x.step.deltas:
        x.dirty = True
        c.totals[INDEX[name]] += count


def record(x: Context, c: Circuit, run: Run) -> int:
    """Record outcomes one after the other, judge after each, and return how many counted.

    Good ones go in two pieces: the first ends with the call that completes ``minimum_calls`` (or
    is one call: time may have made a rate true); after it, further good calls only lower a rate.
    """
    kind, count = run.kind, run.count
    roll(c, x.policy, x.now)
    if kind == "i":
        if run.open_for > 0 and c.state == "closed":
            trip(x, c, "retry_after", run.open_for)
        return count
    done = 0
    while done < count:
        part = 1
        if kind == "s":
            part = count - done
            if done == 0:
                part = min(part, max(1, x.policy.minimum_calls - counts(c)[0]))
            add_good(x, c, part)
        else:
            add_bad(x, c, kind)
        done += part
        if c.state == "closed":
            cause = "retry_after" if run.open_for > 0 else verdict(x, c)
            if cause != "":
                trip(x, c, cause, run.open_for)
                return done
    return done


# ---------------------------------------------------------------------------- operations


def report(x: Context, c: Circuit) -> tuple[str, int]:
    """A batch counts only for its own generation while that is closed (or forced_closed).

    S11: everything else is late and changes nothing but totals.  An empty batch is a sync.
    Without an age a run has -1: its calls began in this generation, however late it began.
    """
    add_deltas(x, c)
    for run in x.step.batch:
        count_totals(x, c, run.kind, run.count)
        counted = 0
        current = (c.v, c.nonce) == x.step.era and c.state in ("closed", "forced_closed")
        if current and x.now - run.age >= c.since:
            counted = record(x, c, run)
        c.totals[INDEX["late"]] += run.count - counted
    return "ok", 0


def acquire(x: Context, c: Circuit) -> tuple[str, int]:
    """S3, S4, S7: permits are leased, bounded by the policy, and never given before time."""
    p = x.policy
    if c.state in ("closed", "forced_closed"):
        return "go", 0
    left = remaining(c.state, c.since, c.duration, x.now)
    if c.state == "forced_open" or left > 0:
        return "deny", left
    if c.state == "open":
        transition(x, c, "half_open", "due", c.duration)
    live, shortest = 0, MAX_DENY
    for slot in c.slots:
        lease = max(0, slot.since + slot.lease - x.now)
        if slot.token == x.step.token:
            return "grant", lease
        if lease > 0:
            live += 1
            shortest = min(shortest, lease)
    if live < p.half_open_permits and c.successes + live < p.success_threshold:
        mine = Slot(x.step.token, x.now, p.permit_lease)
        if len(c.slots) < p.half_open_permits:
            c.slots.append(mine)
        else:
            for i, slot in enumerate(c.slots):
                if slot.since + slot.lease <= x.now:
                    c.slots[i] = mine
                    break
        x.dirty = True
        return "grant", p.permit_lease
    return "deny", shortest - shortest * int(x.step.nonce[4:8], 16) // 131_072


def settle(x: Context, c: Circuit) -> tuple[str, int]:
    """S5, S6: a token counts once, in its own generation.

    One failure or slow probe reopens.  A settle that finds no permit changes nothing, totals
    included: it may have been carried out before, and only its client knows whether it was sent
    once.
    """
    kind, p = x.step.kind, x.policy
    mine = [s for s in c.slots if s.token == x.step.token]
    if (c.v, c.nonce) != x.step.era or c.state != "half_open" or not mine:
        return "stale", 0
    c.slots = [s for s in c.slots if s.token != x.step.token]
    add_deltas(x, c)
    count_totals(x, c, kind, 1)
    c.totals[INDEX["probes"]] += 1
    if kind == "s":
        c.successes += 1
        if c.successes >= p.success_threshold:
            transition(x, c, "closed", "recovered", c.duration)
    elif kind != "i" or x.step.open_for > 0:
        cause = "retry_after" if x.step.open_for > 0 else "probe"
        go_open(x, c, cause, c.attempt + 1, x.step.open_for)
    return "ok", 0


def cancel(x: Context, c: Circuit) -> tuple[str, int]:
    """R2: gives back a permit whose grant never arrived."""
    kept = [s for s in c.slots if s.token != x.step.token]
    if len(kept) == len(c.slots):
        return "noop", 0
    c.slots = kept
    x.dirty = True
    return "ok", 0


def override(x: Context, c: Circuit) -> tuple[str, int]:
    """An operator's word: forced_open or forced_closed, for ``ttl`` ms or without end (-1)."""
    transition(x, c, x.step.kind, x.step.kind, x.step.ttl)
    return "ok", 0


def release(x: Context, c: Circuit) -> tuple[str, int]:
    """forced_open goes to half_open, never straight to closed; forced_closed goes to closed."""
    if c.state not in ("forced_open", "forced_closed"):
        return "noop", 0
    transition(x, c, "half_open" if c.state == "forced_open" else "closed", "released", 0)
    return "ok", 0


def reset(x: Context, c: Circuit) -> tuple[str, int]:
    """Closed, attempt 0, from any state."""
    c.attempt = 0
    transition(x, c, "closed", "reset", 0)
    return "ok", 0


OPERATIONS = {
    "report": report,
    "acquire": acquire,
    "settle": settle,
    "cancel": cancel,
    "override": override,
    "release": release,
    "reset": reset,
}


# ---------------------------------------------------------------------------- the step


def create(x: Context) -> Circuit:
    """An unknown circuit is created from what the client knows, or closed; fresh either way."""
    c = Circuit(0, "-")
    if x.step.known.v > 0:
        restore(x, c)
    else:
        transition(x, c, "closed", "created", 0)
        c.fresh = True
    c.totals[INDEX["closes"]] = 0
    x.events[0].old = ""
    return c


def expiry(x: Context, c: Circuit) -> int:
    """Idle circuits expire after 7 days, refreshed hourly; never while forced without end.

    Returns the ms for PEXPIRE, -1 for PERSIST (the log then gets 7 days), 0 for neither.
    """
    if c.duration < 0:
        c.touched = 0
        return -1 if x.events else 0
    if not x.events and c.touched <= x.now < c.touched + HOUR:
        return 0
    c.touched = x.now
    left = remaining(c.state, c.since, c.duration, x.now)
    return max(WEEK, left + x.policy.window)


class Stepped(NamedTuple):
    """The reply of a step together with its after-effects, which a store carries out."""

    circuit: Circuit
    reply: Reply
    events: list[Event]
    expiry: int
    dirty: bool


def step(c: Circuit | None, s: Step, now: int) -> Stepped:
    """Carry out one operation.  S14: the result is a function of circuit, step and ``now``.

    The circuit is changed in place (None: it is created).  A step that changes nothing leaves
    ``n`` alone, so that a store need not write.
    """
    if s.known.v > MAX_TIME and (c is None or s.known.v > c.v):
        # A v beyond any clock's could not be followed by another one; the store's own may be.
        raise StoreError("CBARG argument known is malformed")
    x = Context(now, s, s.policy)
    old = c.state if c is not None else ""
    if c is None:
        c = create(x)
    else:
        x.policy = c.policy if c.policy is not None else s.policy
        rebase(x, c)
        ratchet(x, c)
        lapse(x, c)
    settle_policy(x, c)
    word, value = OPERATIONS[s.op](x, c)
    stored = x.policy.text()
    ttl = 0
    if x.dirty:
        c.n += 1
        ttl = expiry(x, c)
    reply = Reply(
        header=dump_header(c),
        now=now,
        remaining=remaining(c.state, c.since, c.duration, now),
        old=old,
        cause=x.events[-1].cause if x.events else "",
        verdict=word,
        value=value,
        policy="" if stored == s.policy.text() else stored,
    )
    return Stepped(c, reply, x.events, ttl, x.dirty)
