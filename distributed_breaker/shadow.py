"""Who decides in this process: the mirror of the shared state, the local machine, or both.

Pure: no clock, no I/O, no lock.  Every time is passed in, in milliseconds of a monotonic clock,
and chance comes from a function given at construction.  One ``Shadow`` serves one circuit.

An operator's override decides alone.  Otherwise the more protective of mirror and local machine
decides: while the fleet's circuit is closed, a local machine that has tripped means *quarantine*
(this process alone is sick).  While the store cannot be reached (*degraded*) the local machine
decides, starting from the last known shared state.  With ``alone`` there is no store at all, and
the local machine is the circuit (``memory://``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from . import model
from .model import NOTHING, Header, Known, Reply, Run, Step
from .policy import Numbers, State

EVIDENCE = 30_000  # ms: older outcomes are no evidence when the store returns
MAX_PENDING = 512  # runs that wait to be sent; older ones are folded into late counts
MERGE = 1_000  # ms: equal outcomes that began within it share one run
MAX_COUNT = 65_536  # outcomes in one run on the wire

# What a rejection says to people, by the cause of the transition.
REASONS = {
    "run": "too many failures in a row",
    "rate": "too many calls failed",
    "slow": "too many calls were slow",
    "probe": "a probe failed",
    "retry_after": "the dependency asked for a pause",
    "restored": "restored after the store lost it",
}
NO_RECOVERY = "an operator must reset it: automatic recovery is switched off"

Generation = tuple[int, str]
NO_GENERATION: Generation = (0, "-")
UNCOUNTED: Generation = (-1, "-")  # of calls while the circuit is disabled


class Bad(NamedTuple):
    """An outcome other than a fast success, as it lies in a tally."""

    kind: str
    duration: int  # ns, 0 when not measured
    began: int  # ms
    open_for: int = 0
    detail: str = ""


Item = int | Bad  # a fast success is only its duration in ns


class Era:
    """One generation of one circuit in this process, with its tally of outcomes not yet drained.

    A call appends to the era that admitted it, however the circuit has changed meanwhile, so a
    late result can never count for a newer generation.
    """

    __slots__ = ("append", "drained", "fast", "local", "plain", "shared", "tally")

    def __init__(
        self,
        shared: Generation,
        local: Generation,
        now: int,
        *,
        plain: bool = True,
        fast: int = 0,
    ) -> None:
        self.tally: list[Item] = []
        self.append = self.tally.append
        self.shared = shared
        self.local = local
        self.drained = now
        # Whether every return is a success; if not, one below this duration (ns) still is.  It is
        # asked in each call, and may change with the policy, which begins a new era.
        self.plain = plain
        self.fast = fast

    def take(self) -> list[Item]:
        """Remove and return what has been appended.  Appends of other threads may go on."""
        items = self.tally[:]
        del self.tally[: len(items)]
        return items


class Decision(NamedTuple):
    """What to do with a call: ``admit``, ``refuse``, ``ask`` the store for a permit, ``probe``
    with a local permit, or ``sync`` first.  ``until`` (ms) is when a refusal ends, 0: unknown."""

    action: str
    state: State
    source: str
    until: int = 0
    reason: str = ""


@dataclass(slots=True)
class Pending:
    """A run of outcomes that the store has not been told of."""

    era: Generation
    kind: str
    count: int
    open_for: int
    began: int
    evidence: bool = False


class Shadow:
    """The decisions and the bookkeeping of one circuit in one process.

    Args:
        policy: this process's own numbers, offered to the store in the first sync.
        reporter: this process's random id.
        nonce: makes 8 random hexadecimal digits.
        chance: makes a random number, 0 ≤ x < 1.
        now: the present (ms).
        alone: there is no store; the local machine is the circuit.
        explicit: the user gave a policy; only then is it offered to the store.
        auto_recovery: False keeps an open circuit open until an operator acts.
    """

    def __init__(
        self,
        policy: Numbers,
        reporter: str,
        nonce: Callable[[], str],
        chance: Callable[[], float],
        now: int,
        *,
        alone: bool = False,
        explicit: bool = True,
        auto_recovery: bool = True,
    ) -> None:
        self.auto_recovery = auto_recovery
        self.disabled = False  # all calls are admitted, and none is counted
        self.offered = policy
        self.policy = policy
        self.reporter = reporter
        self.alone = alone
        self.explicit = explicit
        self.degraded = False
        self.synced = alone
        self.header: Header | None = None
        self.deadline: int | None = None  # when an open or forced state ends; None: without end
        self.heard = now
        self.since = now  # when the mirrored state began, at the latest, by our clock
        self.wait_until = 0  # R4: a denial is obeyed until then
        self.asking = False  # R3: one acquire at a time
        self.probed_by_check = False  # a health check is the probe, so calls do not ask
        self.pending: deque[Pending] = deque()
        self.stale: Counter[str] = Counter()  # outcomes that can only count as late
        self.deltas: Counter[str] = Counter()
        self.handed_on: Counter[str] = Counter()  # what the deltas have been, for monitoring
        self.detail = ""
        self.flushed = self.dropped = 0
        self.last_trip: tuple[model.Event, int] | None = None  # of the local machine, with its time
        self._tripped: model.Circuit | None = None  # the local machine, if it has tripped by itself
        self._offer_again = False
        self._offered_to = 0  # the fresh generation to which the policy was offered again
        self._moved = False  # another generation was adopted while degraded
        self._nonce = nonce
        self._chance = chance
        self.bad_at: int | None = None  # when the local machine last took in a bad outcome
        self.local = self._new_local(now)

    # ------------------------------------------------------------------ the local machine

    def _local_numbers(self) -> Numbers:
        """Alone, the local machine has the policy's permits; otherwise it probes one at a time."""
        if self.alone:
            return self.policy
        return self.policy._replace(quorum=1, half_open_permits=1)

    def _local_step(self, op: str, now: int, **arguments: object) -> Reply:
        step = Step(
            op,
            self._nonce(),
            self._local_numbers(),
            offer=True,
            reporter=self.reporter,
            detail=self.detail,
            **arguments,  # type: ignore[arg-type]
        )
        stepped = model.step(self.local, step, now)
        for event in stepped.events:
            if event.cause in model.TRIPS:
                self.last_trip = (event, now)
                self._tripped = self.local
        return stepped.reply

    def _new_local(self, now: int, known: Known = NOTHING) -> model.Circuit:
        self.bad_at = None
        step = Step("report", self._nonce(), self._local_numbers(), known, offer=True)
        return model.step(None, step, now).circuit

    def tick(self, now: int) -> None:
        """Let a forced state of the local machine run out, where it is the circuit."""
        if self.alone:
            self._local_step("report", now)

    @property
    def local_generation(self) -> Generation:
        """Which generation of the local machine an era belongs to."""
        return (self.local.v, self.local.nonce)

    @property
    def generation(self) -> Generation:
        """The shared generation that outcomes recorded now belong to."""
        return NO_GENERATION if self.header is None else (self.header.v, self.header.nonce)

    # ------------------------------------------------------------------ the mirror

    def known(self, now: int) -> Known:
        """What every operation tells the store of this process's knowledge."""
        h = self.header
        if h is None:
            return NOTHING
        return Known(h.v, h.nonce, h.state, self._left(now), h.attempt)

    def _left(self, now: int) -> int:
        if self.header is None or self.header.state not in ("open", "forced_open", "forced_closed"):
            return 0
        return -1 if self.deadline is None else max(0, self.deadline - now)

    def _guarding(self, now: int) -> bool:
        """R12: the mirror holds something that one newcomer's blank circuit must not undo."""
        h = self.header
        if h is None or h.state == "closed":
            return False
        return h.state in ("open", "half_open") or self._left(now) != 0

    def hear(
        self,
        header: Header,
        remaining: int,
        now: int,
        answering: Known | None = None,
        store_now: int | None = None,
    ) -> bool:
        """Take in a header that was pushed, polled, or (``answering``) replied to a step of ours.

        ``store_now`` is the store's time when it gave the header.  C1: the mirror's v never falls.
        Returns True when the store must be asked at once, with what this process knows, because it
        seems to have lost what we know.
        """
        mine = self.header
        lasted = 0 if store_now is None else max(0, store_now - header.since)
        if mine is None:
            self._take(header, remaining, now, lasted)
            return False
        if (header.v, header.nonce) == (mine.v, mine.nonce):
            if header.n >= mine.n:
                self.header = header
                self.heard = now
                self.since = min(self.since, now - lasted)
                if self.deadline is not None and remaining >= 0:
                    self.deadline = min(self.deadline, now + remaining)
            return False
        if header.v < mine.v:
            return answering is None
        ours = answering is not None and (answering.v, answering.nonce) == (mine.v, mine.nonce)
        if header.v == mine.v:
            # Of two generations with one v, only the store's own reply tells which one it holds.
            if ours:
                self._take(header, remaining, now, lasted)
            return answering is None
        if header.fresh and not ours and self._guarding(now):
            return True
        self._take(header, remaining, now, lasted)
        return False

    def _take(self, header: Header, remaining: int, now: int, lasted: int) -> None:
        """Adopt another generation: it empties the local machine and ends a quarantine.

        A closed circuit that was only made again after a loss says nothing about the dependency,
        so it ends nothing.
        """
        made_again = header.state == "closed" and header.cause in ("created", "restored")
        self.header = header
        self.deadline = None if remaining < 0 else now + remaining
        self.heard = now
        self.since = now - lasted
        self.wait_until = 0
        if made_again and self._tripped is self.local and self.local.state != "closed":
            return
        if not self.degraded:
            self.local = self._new_local(now)
            return
        self._moved = True
        if self.local.state == "closed":
            self._start_protected(now)

    def answered(self, step: Step, reply: Reply, now: int) -> bool:
        """Take in the reply to one of our steps; returns True when another sync must follow."""
        header = model.load_header(reply.header)
        if reply.policy:
            self.policy = Numbers.parse(reply.policy) or self.policy
        elif step.offer:
            self.policy = step.policy
        self.synced = True
        if step.offer and step.policy == self.offered:
            self._offer_again = False
        again = self.hear(header, reply.remaining, now, step.known, reply.now)
        if reply.verdict == "deny" and self.generation == (header.v, header.nonce):
            self.wait_until = now + reply.value
        if header.fresh and reply.policy and self.explicit and self._offered_to != header.v:
            # The circuit was made anew, perhaps by a process that knows no policy: offer ours once.
            self._offered_to = header.v
            self._offer_again = True
            return True
        return again

    # ------------------------------------------------------------------ deciding

    def decide(self, now: int, *, by_check: bool = False) -> Decision:
        """What to do with a call that arrives now, or with a health check.  Changes nothing."""
        if self.disabled:
            return Decision("admit", State.CLOSED, "disabled")
        if self.alone:
            return self._decide_locally(now, "shared")
        h = self.header
        if h is not None and h.state == "forced_open" and self._left(now) != 0:
            until = 0 if self.deadline is None else self.deadline
            return Decision("refuse", State.FORCED_OPEN, "override", until, "forced open")
        if h is not None and h.state == "forced_closed" and self._left(now) != 0:
            return Decision("admit", State.FORCED_CLOSED, "override")
        if self.degraded:
            local = self._decide_locally(now, "shadow")
            if h is not None and h.state == "open" and self._left(now) > max(0, local.until - now):
                return self._decide_shared(h, now, by_check)  # C7: pushes may still come through
            return local
        if h is None or not self.synced:
            return Decision("sync", State.CLOSED, "shadow")
        if h.state in ("closed", "forced_closed"):
            if self.local.state == "closed":
                return Decision("admit", State.CLOSED, "shared")
            return self._decide_locally(now, "quarantine")
        return self._decide_shared(h, now, by_check)

    def _decide_shared(self, h: Header, now: int, by_check: bool) -> Decision:
        state = State.OPEN if h.state == "open" else State.HALF_OPEN
        left = self._left(now)
        if h.state == "open" and left > 0:
            return Decision("refuse", state, "shared", now + left, REASONS.get(h.cause, h.cause))
        if h.state == "open" and not self.auto_recovery:
            return Decision("refuse", state, "shared", 0, NO_RECOVERY)
        if self.wait_until > now:
            return Decision("refuse", state, "shared", self.wait_until, "all permits are out")
        if self.asking or (self.probed_by_check and not by_check):
            return Decision("refuse", state, "shared", 0, "a probe is under way")
        return Decision("ask", state, "shared")

    def _decide_locally(self, now: int, source: str) -> Decision:
        c = self.local
        if c.state in ("closed", "forced_closed"):
            source = source if c.state == "closed" else "override"
            return Decision("admit", State(c.state), source)
        left = model.remaining(c.state, c.since, c.duration, now)
        cause = c.header.cause
        if c.state == "forced_open":
            until = now + left if left > 0 else 0
            return Decision("refuse", State.FORCED_OPEN, "override", until, "forced open")
        if c.state == "open":
            if left > 0:
                return Decision("refuse", State.OPEN, source, now + left, REASONS.get(cause, cause))
            if not self.auto_recovery:
                return Decision("refuse", State.OPEN, source, 0, NO_RECOVERY)
            return Decision("probe", State.OPEN, source)
        ends = [s.since + s.lease for s in c.slots if s.since + s.lease > now]
        p = self._local_numbers()
        successes = min(c.successes, p.success_threshold - 1)  # as when a new policy is settled
        if len(ends) >= p.half_open_permits or successes + len(ends) >= p.success_threshold:
            until = min(min(ends), now + model.MAX_DENY)
            return Decision("refuse", State.HALF_OPEN, source, until, "all permits are out")
        return Decision("probe", State.HALF_OPEN, source)

    def new_token(self) -> str:
        """16 random hexadecimal digits: the name of one permit."""
        return self._nonce() + self._nonce()

    def local_acquire(self, token: str, now: int) -> Reply:
        """Ask the local machine for a permit."""
        return self._local_step("acquire", now, token=token)

    def local_settle(
        self, token: str, generation: Generation, item: Bad, now: int, shared: Generation
    ) -> None:
        """Settle a local probe.  In quarantine its outcome is reported like any other."""
        self.detail = item.detail or self.detail
        deltas = tuple(durations([item.duration]).items()) if self.alone else ()
        reply = self._local_step(
            "settle",
            now,
            era=generation,
            token=token,
            kind=item.kind,
            open_for=item.open_for,
            deltas=deltas,
        )
        if self.alone:
            self.flushed += 1
            if reply.verdict == "stale":
                late = (Run(item.kind),)
                self._local_step("report", now, era=NO_GENERATION, batch=late, deltas=deltas)
        else:
            self.deltas.update(durations([item.duration]))
            self._queue(Pending(shared, item.kind, 1, 0, item.began))

    def operate(self, now: int, op: str, detail: str, **arguments: object) -> Reply:
        """An operator's step on the local machine, where it is the circuit."""
        self.detail = detail
        return self._local_step(op, now, **arguments)

    # ------------------------------------------------------------------ degraded and back

    def degrade(self, now: int) -> None:
        """The store cannot decide: start from the last known state, never less protective."""
        if self.degraded or self.alone:
            return
        self.degraded = True
        self.asking = False
        self._start_protected(now)

    def _start_protected(self, now: int) -> None:
        """Begin the local machine in the state of the mirror, if that protects (C7).

        half_open becomes open for a random part of the interval, and the start of probes is
        spread, so that many processes that lost the store together send few.
        """
        h = self.header
        if h is None or h.state not in ("open", "half_open", "forced_open"):
            return
        self._moved = True
        left = max(0, self._left(now))
        if h.state == "half_open":
            left = round(self._chance() * self.policy.open_interval)
        else:
            left += round(self._chance() * self.policy.open_interval / 4)
        self.local = self._new_local(now, Known(1, "-", "open", left, h.attempt))

    def heal(self, now: int) -> None:
        """The store decides again, after a sync.  Evidence is merged, never state.

        Evidence is what was never sent, began after the last local transition and after the
        store's present state, and is at most min(window, 30 s) old.  The store looks at its age
        too, but on its way an outcome seems to grow younger, so what we know comes first.
        Everything else can only count as late.
        """
        oldest = max(now - self._oldest_evidence, self.local.since, self.since)
        kept: deque[Pending] = deque()
        for p in self.pending:
            if p.began > oldest:
                p.evidence = True
                kept.append(p)
            else:
                self.stale[p.kind] += p.count
        self.pending = kept
        self.degraded = False
        # The same closed generation as before: a local trip goes on as a quarantine.
        if self._moved or self.generation == NO_GENERATION:
            self.local = self._new_local(now)
        self._moved = False

    @property
    def _oldest_evidence(self) -> int:
        return min(self.policy.window, EVIDENCE)

    # ------------------------------------------------------------------ outcomes

    def absorb(self, era: Era, now: int) -> int:
        """Drain an era into the local machine and into what waits to be sent; returns how many."""
        items = era.take()
        began, era.drained = era.drained, now
        if not items or era.shared == UNCOUNTED:
            return 0
        runs = self._runs(items, began)
        if len(runs) > 1 or runs[0].kind != "s":
            self.bad_at = now
        if era.local != self.local_generation:
            # They began before the last local transition, whatever their durations say.
            for p in runs:
                p.began = min(p.began, self.local.since)
        if self.alone:
            batch = tuple(Run(p.kind, p.count, p.open_for) for p in runs)
            deltas = self._take_deltas()
            self._local_step("report", now, era=era.local, batch=batch, deltas=deltas)
            self.flushed += len(items)
            return len(items)
        if self.degraded or self.header is None or self.header.state == "closed":
            batch = tuple(Run(p.kind, p.count, p.open_for) for p in runs)
            self._local_step("report", now, era=era.local, batch=batch)
        for p in runs:
            p.era = era.shared
            self._queue(p)
        return len(items)

    def _runs(self, items: list[Item], since: int) -> list[Pending]:
        """Items as runs of equal outcomes, with their durations counted.

        A fast success carries no time of its own: it began no earlier than the era was last
        drained, less the longest duration.
        """
        try:
            total = sum(items)  # type: ignore[arg-type]
        except TypeError:
            return self._mixed_runs(items, since)
        began = since
        if total:
            self.deltas.update(durations(items))  # type: ignore[arg-type]
            began -= max(items) // 1_000_000  # type: ignore[operator]
        return [Pending(NO_GENERATION, "s", len(items), 0, began)]

    def _mixed_runs(self, items: list[Item], since: int) -> list[Pending]:
        runs: list[Pending] = []
        spent: list[int] = []
        for item in items:
            if isinstance(item, int):
                kind, open_for, began = "s", 0, since - item // 1_000_000
                spent.append(item)
            else:
                kind, open_for, began = item.kind, item.open_for, item.began
                spent.append(item.duration)
                self.detail = item.detail or self.detail
            last = runs[-1] if runs else None
            if last is not None and last.kind == kind and not (open_for or last.open_for):
                last.count += 1
                last.began = min(last.began, began)
            else:
                runs.append(Pending(NO_GENERATION, kind, 1, open_for, began))
        if any(spent):
            self.deltas.update(durations(spent))
        return runs

    def _queue(self, new: Pending) -> None:
        last = self.pending[-1] if self.pending else None
        if (
            last is not None
            and (last.era, last.kind) == (new.era, new.kind)
            and not (last.open_for or new.open_for or last.evidence)
            and new.began - last.began < MERGE
        ):
            last.count += new.count
            last.began = min(last.began, new.began)
            return
        self.pending.append(new)
        if len(self.pending) > MAX_PENDING:
            old = self.pending.popleft()
            self.stale[old.kind] += old.count

    def late(self, kind: str, deltas: tuple[tuple[str, int], ...]) -> None:
        """An outcome that can only count as late."""
        self.stale[kind] += 1
        self.deltas.update(dict(deltas))

    def counted(self, name: str, count: int) -> None:
        """Add to a total that only clients know: calls that were ``rejected``, and so on."""
        if self.alone:
            self.local.totals[model.INDEX[name]] += count
        else:
            self.deltas[name] += count

    @property
    def waiting(self) -> int:
        """How many drained outcomes the store has not acknowledged yet."""
        return sum(p.count for p in self.pending) + self.stale.total()

    def adopt(self, policy: Numbers, *, auto_recovery: bool) -> None:
        """Another policy was given to this process: it is offered to the store in the next step,
        which takes it unless it knows a higher version."""
        self.auto_recovery = auto_recovery
        if policy == self.offered and self.explicit:
            return
        self.offered, self.explicit = policy, True
        self._offer_again = True
        if policy.version >= self.policy.version:
            self.policy = policy

    @property
    def policy_mismatch(self) -> bool:
        """Whether the fleet's policy is another one than this process was given."""
        return self.synced and self.explicit and self.policy != self.offered

    # ------------------------------------------------------------------ steps for the store

    def step(self, op: str, now: int, **arguments: object) -> Step:
        """A step that carries what this process knows; the policy is offered until it was heard."""
        offer = self.explicit and (self._offer_again or not self.synced)
        return Step(
            op,
            self._nonce(),
            self.offered if offer else self.policy,
            self.known(now),
            offer,
            reporter=self.reporter,
            **arguments,  # type: ignore[arg-type]
        )

    def outgoing(self, now: int) -> list[Step]:
        """Take all that waits and return it as report steps, in order, within the script's bounds.

        Whoever takes them must call ``acknowledged`` or ``lost`` for each.
        """
        batches: list[tuple[Generation, list[Run]]] = []
        bad = MAX_COUNT
        for p in self.pending:
            if p.evidence and now - p.began > self._oldest_evidence:
                self.stale[p.kind] += p.count
                continue
            era = self.generation if p.evidence else p.era
            age = now - p.began if p.evidence else -1
            limit = MAX_COUNT if p.kind in "si" else model.MAX_BAD
            for count in _parts(p.count, limit):
                heavy = 0 if p.kind in "si" else count
                full = batches and (
                    len(batches[-1][1]) >= model.MAX_TOKENS or bad + heavy > model.MAX_BAD
                )
                if not batches or batches[-1][0] != era or full:
                    batches.append((era, []))
                    bad = 0
                batches[-1][1].append(Run(p.kind, count, p.open_for, age))
                bad += heavy
        for kind, total in self.stale.items():
            limit = MAX_COUNT if kind in "si" else model.MAX_BAD
            for count in _parts(total, limit):
                batches.append((NO_GENERATION, [Run(kind, count)]))
        self.pending.clear()
        self.stale.clear()
        deltas = self._take_deltas()
        if deltas and not batches:
            batches.append((self.generation, []))
        return [
            self.step(
                "report",
                now,
                era=era,
                batch=tuple(runs),
                deltas=deltas if i == 0 else (),
                detail=self.detail,
            )
            for i, (era, runs) in enumerate(batches)
        ]

    def _take_deltas(self) -> tuple[tuple[str, int], ...]:
        deltas, self.deltas = self.deltas, Counter()
        self.handed_on.update(deltas)
        return tuple(deltas.items())

    def acknowledged(self, step: Step) -> None:
        """S10: an acknowledged outcome is counted exactly once."""
        self.flushed += sum(run.count for run in step.batch)

    def lost(self, step: Step) -> None:
        """It is unknown whether the store has counted it: it is not sent again, but accounted."""
        count = sum(run.count for run in step.batch)
        self.dropped += count
        if count:
            self.deltas["dropped"] += count


def _parts(total: int, limit: int) -> Iterable[int]:
    while total > 0:
        yield min(total, limit)
        total -= limit


def durations(spent: list[int]) -> dict[str, int]:
    """Deltas of the totals: the sum in µs, and buckets whose upper bounds are 2^(20+i) ns."""
    if not any(spent):
        return {}
    deltas: Counter[str] = Counter()
    for bits, count in Counter(map(int.bit_length, spent)).items():
        deltas[f"b{min(15, max(0, bits - 20))}"] += count
    deltas["duration_us"] = sum(spent) // 1000
    return dict(deltas)
