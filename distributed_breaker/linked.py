"""One circuit in one process: the shadow under its lock, and the eras that calls append to.

Calls read one attribute and append to a tally; everything else happens here under a lock that is
never held across user code or I/O.  The link and the breaker both work on this object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from math import inf
from typing import NamedTuple

from . import model
from .model import Header, Reply, Step, remaining
from .policy import Policy, State
from .process import OwnLock
from .shadow import UNCOUNTED, Bad, Decision, Era, Generation, Shadow, durations
from .transitions import Transition
from .workers import HealthCheck

FAST_FLUSH = 250  # ms between reports of good outcomes while the circuit has seen failures
SLOW_FLUSH = 2_000  # ms between them while it has not
ASK_AGAIN = 250  # ms after which a refusal without a known end is looked at again
FULL = 4_096  # entries of a tally after which the appending call drains it
NEVER = 1 << 62  # ns; no call lasts that long
OVERFULL = 65_536  # entries after which it waits for its turn to drain


class Clock(NamedTuple):
    """Where time comes from: monotonic milliseconds, the same in seconds (a rejection reads that
    one, since it costs least), and nanoseconds for durations."""

    ms: Callable[[], int]
    seconds: Callable[[], float]
    ns: Callable[[], int]


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


SYSTEM_CLOCK = Clock(_monotonic_ms, time.monotonic, time.perf_counter_ns)


# What a rejection says: when it is worth trying again (s, 0: unknown), state, source and reason.
# A plain tuple is unpacked several times faster than a named one.
Refusal = tuple[float, str, str, str]


class Turn:
    """After a circuit's lock was released: taking in what others have left meanwhile.

    It stands around the lock and does not hold it: a signal handler may raise between any two
    lines (a time limit of Celery's does), and only the lock's own ``with`` leaves no gap in which
    it would stay taken for ever.
    """

    __slots__ = ("_circuit",)

    def __init__(self, circuit: LinkedCircuit) -> None:
        self._circuit = circuit

    def __enter__(self) -> None:
        """Nothing is to be done before."""

    def __exit__(self, *error: object) -> None:
        circuit = self._circuit
        era = circuit._current or (circuit._retired[-1] if circuit._retired else None)
        if circuit._left and era is not None:
            circuit.drain_if_free(era)


class LinkedCircuit:
    """The state of one circuit in this process.

    Args:
        name: the circuit's name.
        policy: this process's policy.
        shadow: who decides.
        clock: where time comes from.
    """

    _lock = OwnLock()

    def __init__(self, name: str, policy: Policy, shadow: Shadow, clock: Clock) -> None:
        self.name = name
        self._shadow = shadow
        self._clock = clock
        self._turn = Turn(self)
        self._judge_by(policy)
        self._left = False  # somebody found the lock taken and left outcomes to its holder
        self._current: Era | None = None  # None unless calls are admitted
        # What calls read: the same, but None while each of them is to be inspected.
        self._era: Era | None = None
        self._inspected = False
        # Calls before this time (s) are refused with these words, without a look at the rest.  The
        # words outlive the refusal: a call may have read the time just before it changed.
        self._refuse_until = 0.0
        self._refused: Refusal = (0.0, State.OPEN.value, "shared", "")
        self._decision = Decision("sync", State.CLOSED, "shadow")
        self._retired: list[Era] = []
        self._rejections: list[None] = []
        self._fallbacks: list[None] = []
        self.told = {"rejected": 0, "fallbacks": 0}  # what these lists have held, for monitoring
        self._recorded = 0
        self._handed = 0  # outcomes taken by the link that are neither acknowledged nor lost
        self.sent = clock.ms()  # when the link last took what waits
        self.nudged = False  # waits in the link's queue of urgent circuits
        self.broken = ""  # the code for which the store refuses this one circuit
        self.check: HealthCheck | None = None
        # The header that was heard last, and its text: most polls say the same again.
        self._heard: tuple[str, Header | None] = ("", None)
        self.first_answer: Future[None] = Future()  # done once synced or degraded
        if shadow.alone:
            self.first_answer.set_result(None)
        with self._turn, self._lock:
            self._refresh(clock.ms())

    # ------------------------------------------------------------------ settings

    def _judge_by(self, policy: Policy) -> None:
        """What calls need of a policy, so that they need not look into it."""
        self.policy = policy
        slow = policy.slow_call_duration
        self._never_slow = slow is None
        self._slow_ns = NEVER if slow is None else round(slow * 1e9)
        # (A flag of its own, since comparing integers above 2^30 costs more than all else that is
        # done in a call.)
        self._plain = slow is None and policy.record_result is None
        self._fast_ns = self._slow_ns if policy.record_result is None else 0

    def adopt(self, policy: Policy) -> None:
        """Go by another policy from now on, without losing state or outcomes."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._drain(now)
            self._judge_by(policy)
            self._shadow.adopt(policy.numbers, auto_recovery=policy.auto_recovery)
            self._retire()
            self._refresh(now)

    @property
    def disabled(self) -> bool:
        """Whether all calls are admitted and none is counted."""
        return self._shadow.disabled

    def switch(self, *, on: bool) -> None:
        """Switch the circuit on or off.  Off, it is a pass-through; what it has counted stays."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._drain(now)
            self._shadow.disabled = not on
            if on and not self._shadow.synced and self.first_answer.done():
                self.first_answer = Future()  # it was only done because nobody had to wait
            self._refresh(now)

    # ------------------------------------------------------------------ deciding

    def _refresh(self, now: int) -> None:
        """Make what calls read agree with the shadow's decision.  The lock is held, so that
        transitions are announced in order."""
        shadow = self._shadow
        old, new = self._decision, shadow.decide(now)
        self._decision = new
        if new.action == "admit":
            shared, local = shadow.generation, shadow.local_generation
            era = self._current
            if shadow.disabled:
                shared = local = UNCOUNTED
            if era is None or era.shared != shared or era.local != local:
                self._retire()
                era = Era(shared, local, now, plain=self._plain, fast=self._fast_ns)
                self._current = era
            self._era = None if self._inspected else era
            self._refuse_until = 0.0
        else:
            self._retire()
            self._refuse_until = 0.0
            if new.action == "refuse":
                self._refused = refusal_of(new)
                # Only an operator's word holds without end.  Another unknown end (a probe is under
                # way) is asked for again soon, in case nothing tells that it has come.
                unknown = inf if new.source == "override" else (now + ASK_AGAIN) / 1000
                self._refuse_until = self._refused[0] or unknown
        if new.action != "sync" and not self.first_answer.done():
            self.first_answer.set_result(None)
        same = old.state == new.state and (old.source == new.source or new.action == "admit")
        if same or old.action == "sync":
            return
        generation, cause = shadow.generation[0], ""
        if new.source in ("shared", "override") and shadow.header is not None:
            cause = shadow.header.cause
        elif new.source != "shared" or shadow.alone:
            generation, cause = shadow.local.v, shadow.local.header.cause
        self._changed(Transition(self.name, old.state, new.state, new.source, cause, generation))

    def _changed(self, change: Transition) -> None:
        """Announce a change; the lock is held, so it may only be queued."""

    def _retire(self) -> None:
        if self._current is not None:
            self._retired = [*_in_use(self._retired), self._current]
            self._current = self._era = None

    def decide(self, *, by_check: bool = False) -> Decision:
        """Decide about a call that arrives now; ``ask`` reserves the one acquire in flight."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._shadow.tick(now)
            self._refresh(now)
            decision = self._shadow.decide(now, by_check=True) if by_check else self._decision
            if decision.action == "ask":
                self._shadow.asking = True
        return decision

    def decide_again(self, decision: Decision) -> Decision:
        """The present refusal, or the old decision with what has become known."""
        with self._turn, self._lock:
            now = self._shadow.decide(self._clock.ms())
        return now if now.action == "refuse" else decision._replace(reason="all permits are out")

    def new_token(self) -> str:
        """A name for one permit that no other permit of the fleet has."""
        return self._shadow.new_token()

    def acquire_locally(self, token: str) -> tuple[Decision, Generation, Generation]:
        """Take a permit of the local machine: the decision, its generation and the shared one."""
        with self._turn, self._lock:
            now = self._clock.ms()
            decision = self._shadow.decide(now)
            if decision.action == "probe":
                reply = self._shadow.local_acquire(token, now)
                if reply.verdict != "grant":
                    until = now + reply.value
                    decision = decision._replace(action="refuse", until=until)
            self._refresh(now)
            generations = (self._shadow.local_generation, self._shadow.generation)
        return decision, *generations

    def settle_locally(
        self, token: str, generation: Generation, item: Bad, shared: Generation
    ) -> None:
        """Settle a permit of the local machine."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._recorded += 1
            self._shadow.local_settle(token, generation, item, now, shared)
            self._refresh(now)

    def operate(self, op: str, detail: str, **arguments: object) -> Reply:
        """An operator's step where there is no store."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._drain(now)
            reply = self._shadow.operate(now, op, detail, **arguments)
            self._refresh(now)
        return reply

    # ------------------------------------------------------------------ outcomes

    def _drain(self, now: int) -> None:
        """Take in what calls have appended.  The lock is held."""
        for name, calls in (("rejected", self._rejections), ("fallbacks", self._fallbacks)):
            if calls:
                count = len(calls)
                del calls[:count]
                self.told[name] += count
                self._shadow.counted(name, count)
        if self._current is not None:
            self._recorded += self._shadow.absorb(self._current, now)
        if self._retired:
            # No name may be left to the last of them here: it would look as if a call held it.
            self._recorded += sum([self._shadow.absorb(era, now) for era in self._retired])
            self._retired = _in_use(self._retired)

    def drain(self) -> None:
        """Take in what calls have appended, waiting for the lock (it is never held for long)."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._drain(now)
            self._refresh(now)

    def drain_if_free(self, era: Era) -> None:
        """Take in outcomes at once, unless another thread holds the lock: then it will do it.

        The mark is set before the try, and looked at after each release, so that nothing which a
        loser appended stays behind.
        """
        self._left = True
        while self._left:
            # Not by a try that may be lost: see Turn.  Two that come at once may wait a little.
            if self._lock.locked() and len(era.tally) < OVERFULL:
                return
            with self._lock:
                self._left = False
                now = self._clock.ms()
                if era is not self._current and era not in self._retired:
                    self._retired.append(era)
                self._drain(now)
                self._refresh(now)

    # ------------------------------------------------------------------ for the link

    def outgoing(self) -> list[Step]:
        """All steps that tell the store what it has not been told."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self._drain(now)
            self._refresh(now)
            steps = self._shadow.outgoing(now)
            self._handed += sum(run.count for step in steps for run in step.batch)
            self.sent = now
        return steps

    def step(self, op: str, **arguments: object) -> Step:
        """A step with this process's present knowledge."""
        with self._turn, self._lock:
            return self._shadow.step(op, self._clock.ms(), **arguments)

    def answered(self, step: Step, reply: Reply) -> bool:
        """Take in a reply; True when another sync must follow at once."""
        with self._turn, self._lock:
            now = self._clock.ms()
            if step.op == "report":
                self._shadow.acknowledged(step)
                self._handed -= sum(run.count for run in step.batch)
            if step.op == "acquire":
                self._shadow.asking = False
            again = self._shadow.answered(step, reply, now)
            self._refresh(now)
        return again

    def lost(self, step: Step) -> None:
        """A step got no answer: nobody knows whether the store has carried it out."""
        with self._turn, self._lock:
            if step.op == "report":
                self._shadow.lost(step)
                self._handed -= sum(run.count for run in step.batch)
            if step.op == "acquire":
                self._shadow.asking = False
                self._refresh(self._clock.ms())

    def settle_done(self, acknowledged: bool) -> None:
        """A settle was counted; or nobody knows whether it was, or it was given up."""
        with self._turn, self._lock:
            self._handed -= 1
            if acknowledged:
                self._shadow.flushed += 1
            else:
                self._shadow.dropped += 1
                self._shadow.deltas["dropped"] += 1

    def settled_late(self, step: Step) -> None:
        """A settle came too late and was counted nowhere: it is reported as a late outcome."""
        with self._turn, self._lock:
            self._handed -= 1
            self._shadow.late(step.kind, step.deltas)

    def settle_inherited(self, item: Bad) -> None:
        """A child goes on with a probe that was under way when it was forked.  The permit stays its
        parent's, who may still be calling: to the store the child's outcome comes late."""
        with self._turn, self._lock:
            self._recorded += 1
            self._shadow.late(item.kind, tuple(durations([item.duration]).items()))

    def settle_begun(self) -> None:
        """A probe's outcome was recorded and waits for its settle to be acknowledged."""
        with self._turn, self._lock:
            self._recorded += 1
            self._handed += 1

    def stop_asking(self) -> None:
        """The acquire in flight was given up."""
        with self._turn, self._lock:
            self._shadow.asking = False
            self._refresh(self._clock.ms())

    def hear(self, text: str, store_now: int | None) -> bool:
        """Take in a header that was polled at ``store_now`` (ms), or pushed (None: at its
        transition); True when a sync must follow.  Raises StoreError if it cannot be read."""
        shadow = self._shadow
        same, header = self._heard
        if text == same and header and header is shadow.header and header.state == "closed":
            # Nothing changes but the mirror's age, and there may be thousands of quiet circuits.
            shadow.heard = self._clock.ms()
            return False
        header = model.load_header(text)
        at = header.since if store_now is None else store_now
        left = remaining(header.state, header.since, header.duration, at)
        with self._turn, self._lock:
            now = self._clock.ms()
            again = shadow.hear(header, left, now, None, at)
            self._refresh(now)
        self._heard = (text, header)
        return again

    def degrade(self, broken: str = "") -> None:
        """The store cannot decide for this circuit: the local machine takes over."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self.broken = broken or self.broken
            self._drain(now)
            self._shadow.degrade(now)
            self._refresh(now)

    def heal(self) -> None:
        """The store decides again."""
        with self._turn, self._lock:
            now = self._clock.ms()
            self.broken = ""
            self._drain(now)
            self._shadow.heal(now)
            self._refresh(now)

    def forked(self, reporter: str) -> None:
        """R10: the child drops what the parent has not flushed, and counts as unsynced."""
        vars(self).pop("_lock", None)
        self.first_answer = Future()
        shadow = self._shadow
        shadow.reporter = reporter
        shadow.synced = shadow.alone
        shadow.degraded = False  # it asks for itself; what the parent knew stays
        shadow.asking = False
        shadow.pending.clear()
        shadow.stale.clear()
        shadow.deltas.clear()
        shadow.handed_on.clear()
        shadow.flushed = shadow.dropped = self._recorded = self._handed = 0
        for era in [*self._retired, *([self._current] if self._current is not None else [])]:
            era.take()
        self._rejections.clear()
        self._fallbacks.clear()
        self.told = dict.fromkeys(self.told, 0)
        self.nudged = False
        self.broken = ""
        if self.check is not None:
            self.check.forked()
        if shadow.alone:
            self.first_answer.set_result(None)
            return
        self._retire()
        self._decision = Decision("sync", State.CLOSED, "shadow")
        self._refuse_until = 0.0

    # ------------------------------------------------------------------ looks, without effect

    def troubled(self, now: int) -> bool:
        """Whether the circuit deserves frequent reports: it is not closed, or has seen bad outcomes
        within its window."""
        if self._decision.action != "admit":
            return True
        shadow = self._shadow
        return shadow.bad_at is not None and now - shadow.bad_at < shadow.policy.window

    def restless(self, now: int) -> bool:
        """Whether the link must look at it between two sweeps of all circuits."""
        return bool(
            self.troubled(now)
            or self.check
            or self.broken
            or self._decision.source == "override"  # forced closed, perhaps for a time
        )

    @property
    def degraded(self) -> bool:
        """Whether the local machine decides because the store cannot."""
        return self._shadow.degraded

    @property
    def policy_mismatch(self) -> bool:
        """Whether the fleet's policy is another one than this process was given."""
        return self._shadow.policy_mismatch

    @property
    def heard(self) -> int:
        """When the mirror was last confirmed (ms)."""
        return self._shadow.heard

    @property
    def mirror_age(self) -> float | None:
        """Seconds since the mirror was last confirmed; None where there is no store."""
        shadow = self._shadow
        return None if shadow.alone else max(0, self._clock.ms() - shadow.heard) / 1000

    @property
    def source(self) -> str:
        """Who decided last: see ``Snapshot.source``."""
        return self._decision.source

    def deadline(self) -> tuple[int | None, bool]:
        """When the mirrored open or forced state ends (ms; None: never), and if it is forced."""
        header = self._shadow.header
        if header is None or header.state in ("closed", "half_open"):
            return None, False
        return self._shadow.deadline, header.state != "open"

    def run_check(self, now: int) -> None:
        """Start the circuit's health check when it is wanted; the breaker knows how."""

    def check_wanted(self, now: int) -> str:
        """Whether a health check should ``learn`` whether it passes, ``probe``, or rest (empty)."""
        with self._turn, self._lock:
            check, shadow = self.check, self._shadow
            if check is None:
                return ""
            free = check.free(now)
            shadow.probed_by_check = check.passed
            self._refresh(now)
            if not free:
                return ""
            if self._decision.action == "admit":
                return "learn" if check.due(now) else ""
            asked = shadow.decide(now, by_check=True).action == "ask"
            return "probe" if check.passed and asked else ""

    @property
    def has_output(self) -> bool:
        """Whether the store has not been told everything."""
        shadow = self._shadow
        era = self._current
        if shadow.disabled:
            return False
        return bool(
            shadow.pending
            or shadow.stale
            or shadow.deltas
            or any(era.tally for era in self._retired)
            or self._rejections
            or self._fallbacks
            or (era is not None and era.tally)
        )

    @property
    def has_late(self) -> bool:
        """Whether there are outcomes that can only count as late."""
        return bool(self._shadow.stale)

    def flush_due(self, now: int) -> bool:
        """Whether outcomes that can wait have waited long enough."""
        if not self.has_output:
            return False
        return now - self.sent >= (FAST_FLUSH if self.troubled(now) else SLOW_FLUSH) - 10

    def time_spent(self) -> dict[str, int]:
        """Of this process's calls: how many were in each bucket, and their sum; probes apart.

        The lock is held, so that what is on its way to the store is counted just once.
        """
        with self._turn, self._lock:
            spent = self._shadow.handed_on.copy()
            spent.update(self._shadow.deltas)
        return {name: n for name, n in spent.items() if name[0] in "bd" and name != "dropped"}

    def conservation(self) -> dict[str, int]:
        """C4: recorded = flushed + dropped + pending."""
        with self._turn, self._lock:
            self._drain(self._clock.ms())
            shadow = self._shadow
            return {
                "recorded": self._recorded,
                "flushed": shadow.flushed,
                "dropped": shadow.dropped,
                "pending": shadow.waiting + self._handed,
            }


def refusal_of(decision: Decision) -> Refusal:
    """What a rejection says of the decision behind it."""
    return decision.until / 1000, decision.state.value, decision.source, decision.reason


def _in_use(eras: list[Era]) -> list[Era]:
    """The eras that a call may still append to, or that hold something.

    A call in flight holds its era.  The order matters: when nobody holds it, nobody can append
    any more, so an empty tally stays empty.
    """
    return [era for era in eras if sys.getrefcount(era) > _IDLE or era.tally]


_IDLE = 0
_IDLE = next(  # how many references there are to an era that nobody else holds
    n
    for n in range(10)
    if not [e for e in [Era((0, "-"), (0, "-"), 0)] if sys.getrefcount(e) > n or e.tally]
)
