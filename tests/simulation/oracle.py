"""What must always hold in the processes: the client's rules of the protocol, and its promises.

The store's rules are judged by ``server.py`` at every step.  A broken rule raises AssertionError,
whose message begins with the rule's name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed_breaker.errors import StoreDown
from distributed_breaker.model import Header, Reply, Step, load_header
from distributed_breaker.outage import TIMEOUTS
from distributed_breaker.permit import Permit
from distributed_breaker.session import FIRST_ANSWER, POLL, Request
from distributed_breaker.shadow import EVIDENCE, NO_GENERATION, Generation

if TYPE_CHECKING:
    from tests.simulation.process import Process, SimBreaker
    from tests.simulation.server import Server
    from tests.simulation.timeline import Timeline

# C6: two answers that do not come in time are 500 ms, a request and its reply take 10 at most when
# nothing is slow, and rounds do not begin at once.
STALE = POLL + 800
SOON = 500  # ms: more than a few rounds take when nothing goes wrong
LONGEST_WAIT = 2 * round(FIRST_ANSWER * 1000) + 10  # ms


@dataclass
class Probe:
    """A probe under way, by the store's permit."""

    process: Process
    generation: Generation
    began: int
    until: int  # when its lease ends, by true time


class Oracle:
    """Looks at every process after everything that it does."""

    def __init__(self, timeline: Timeline, server: Server) -> None:
        self._timeline = timeline
        self._server = server
        self._mirrors: dict[tuple[str, str], tuple[Header, int | None]] = {}
        self._probes: dict[int, Probe] = {}
        self._asked: dict[str, Counter[str]] = defaultdict(Counter)
        self._unflushed = ""  # futures swallow what their callbacks raise
        self._asked_at: dict[str, int] = {}  # when each token was sent with an acquire
        self._used: set[str] = set()  # tokens with which probes were made
        self._sure: set[tuple[str, str]] = set()  # who has probed since it was degraded
        self._denied: dict[tuple[str, str], tuple[int, Generation]] = {}
        # Outcomes per process, circuit and generation: of calls that it admitted, and reported.
        self._began: Counter[tuple[str, str, Generation]] = Counter()
        self._reported: Counter[tuple[str, str, Generation]] = Counter()
        self._suspended: dict[str, int] = {}
        self._settled: Counter[str] = Counter()  # how often each token was sent with a settle
        self.seen: Counter[str] = Counter()  # what has come to pass at all

    # ------------------------------------------------------------------ mirrors

    def look(self, process: Process) -> None:
        """C1, C6 and the promise that a loss never closes an open circuit."""
        assert not self._unflushed, f"flush: {self._unflushed}"
        for name, breaker in process.breakers.items():
            shadow = breaker._shadow
            header = shadow.header
            if not breaker.degraded:
                self._sure.discard((process.name, name))
            if header is None:
                continue
            before = self._mirrors.get((process.name, name))
            if before is None or before[0] is not header or before[1] != shadow.deadline:
                if before is not None:
                    self._moved(process, name, *before, header)
                self._mirrors[process.name, name] = header, shadow.deadline
            if shadow.synced and not breaker.degraded and not process.session.down:
                self._fresh_enough(process, name, header)

    def failed(self, process: Process, error: StoreDown, times: int) -> None:
        """A store that fails is left alone: at once, or after two timeouts in a row."""
        enough = not error.timeout or times >= TIMEOUTS
        assert process.session.down or not enough or not process.alive, (
            f"{process} goes on with a store that failed {times} times in a row: {error}"
        )

    def _moved(
        self, process: Process, name: str, old: Header, deadline: int | None, new: Header
    ) -> None:
        assert new.v >= old.v, f"C1: {process}'s mirror of {name} fell from {old} to {new}"
        if (new.v, new.nonce) == (old.v, old.nonce):
            return
        self.seen[f"mirror {old.state} to {new.state}"] += 1
        guarded = old.state != "closed" and (
            old.state == "half_open" or deadline is None or deadline > process.ms()
        )
        silently = new.state == "closed" and new.cause == "created"
        assert not (guarded and silently), (
            f"R12: {process} took a circuit that was made anew for the end of {old}: {new}"
        )

    def _fresh_enough(self, process: Process, name: str, header: Header) -> None:
        generation = header.v, header.nonce
        now = self._timeline.now
        if generation == self._server.generations[name] or process.frozen:
            return
        since = max(self._server.left[name].get(generation, now), process.frozen_at)
        assert now - since <= STALE, (
            f"C6: {process} is not degraded, and for {now - since} ms it has held {header} of "
            f"{name}; the store is at {self._server.header(name)}"
        )

    def subscribed(self, process: Process) -> None:
        """R9: what may have been missed before a subscription is read at once."""
        self._soon_knows(process, process.breakers, "R9", "subscribed")

    def heard(self, process: Process, push: str) -> None:
        """R12 and the ratchet: a push that a process does not believe makes it ask at once."""
        name, _, text = push.partition(" ")
        header = load_header(text)
        if (header.v, header.nonce) == self._server.generations[name]:
            self._soon_knows(process, [name], "R12", f"heard {text}")

    def _soon_knows(self, process: Process, names: Iterable[str], rule: str, happened: str) -> None:
        """What is over by now must not be held any longer when a few rounds could be made."""
        began = self._timeline.now

        def look() -> None:
            well = process.alive and process.frozen_at < began and process.wire.trouble < began
            if not well or process.session.down or process.wire.slow or process.wire.partitioned:
                return
            for name in names:
                breaker = process.breakers[name]
                header = breaker._shadow.header
                if breaker.degraded or header is None or process.frozen:
                    continue
                left = self._server.left[name].get((header.v, header.nonce), began)
                assert left >= began, (
                    f"{rule}: {process} has {happened} {SOON} ms ago, and holds {header} of "
                    f"{name}, which was over by then"
                )

        self._timeline.after(SOON, look)

    # ------------------------------------------------------------------ calls and probes

    def granted(self, process: Process, circuit: str, token: str) -> None:
        """R2: a permit that no probe uses is given back, and not left to its lease.  (One that is
        granted after its process has given up waiting may be granted after it was given back.)"""
        began = self._timeline.now
        if began - self._asked_at.get(token, 0) > 200:
            return

        def look() -> None:
            well = process.alive and not process.frozen and process.frozen_at < began
            tried = process.wire.trouble < began + SOON and not process.session.down
            # Who leaves while the store is away leaves its permit to the lease, as its settles.
            left = process.session.closed and process.wire.trouble >= began
            if not well or not tried or left or process.wire.slow or process.wire.partitioned:
                return
            left_alone = token not in self._used and self._server.holds(circuit, token)
            assert not left_alone or process.breakers[circuit].degraded, (
                f"R2: {process} has a permit of {circuit} since {began} ms and does not use it"
            )

        # After an answer that did not come, the way back to the store takes a while.
        self._timeline.after(2 * SOON, look)
        self._timeline.after(6 * SOON, look)

    def refused(self, process: Process, request: Request) -> None:
        """R5: a settle is kept until its lease ends, unless the store refuses its circuit."""
        circuit = request.circuit
        if process.session.closed or circuit is None or circuit.broken:
            return
        if request.kind == "settle":
            left = request.expires - process.ms()
            assert left <= 0, f"R5: {process} gives up a settle {left} ms before its lease ends"

    def waited(self, process: Process, began: int) -> None:
        """C5: a first call waits for the first answer, a probe for its permit, nobody for more."""
        waited = self._timeline.now - began
        assert waited <= LONGEST_WAIT or process.frozen_at >= began, (
            f"C5: {process} has waited for {waited} ms"
        )

    def admitted(self, process: Process, breaker: SimBreaker, permit: Permit) -> None:
        """C7 for calls; C2 and R1 for probes."""
        shadow, now = breaker._shadow, process.ms()
        if permit._lease is None:
            h = shadow.header
            held = h is not None and h.state in ("open", "forced_open")
            left = held and (shadow.deadline is None or shadow.deadline > now)
            assert not left, f"C7: {process} lets a call through, though it knows {h}"
            unsure = held or (h is not None and h.state == "half_open")
            assert (
                not (unsure and breaker.degraded) or (process.name, breaker.name) in self._sure
            ), (
                f"C7: {process} lets calls through without the store, though it knows {h} and no "
                f"probe of its own has succeeded"
            )
            self.seen["call"] += 1
        elif permit._lease.local is not None:
            self._sure.add((process.name, breaker.name))
            self.seen["local probe"] += 1
        else:
            self._probe_begins(process, breaker, permit)

    def _probe_begins(self, process: Process, breaker: SimBreaker, permit: Permit) -> None:
        lease = permit._lease
        assert lease is not None
        now = self._timeline.now
        self._used.add(lease.token)
        assert lease.token in self._server.granted, f"C2: {process} probes without a permit"
        granted, length = self._server.granted[lease.token]
        upset = sum(1 for at in self._server.upsets if at >= granted - length)
        stood_still = self._suspended.get(process.name, -1) >= granted
        assert now < granted + length or stood_still, (
            f"R1: {process} probes with a permit that was given {now - granted} ms ago, "
            f"for {length} ms"
        )
        if not stood_still:
            self._probes[id(permit)] = Probe(process, lease.shared, now, granted + length)
        running = sum(
            1
            for p in self._probes.values()
            if p.generation == lease.shared
            and p.process.alive
            and p.process.frozen_at < p.began
            and now < p.until
        )
        permits = breaker._shadow.policy.half_open_permits
        allowed = max(permits, breaker.policy.numbers.half_open_permits) * (1 + upset)
        assert running <= allowed, (
            f"C2: {running} probes at once on {breaker.name} with {permits} permits"
        )
        self.seen["probe"] += 1
        self.seen["two probes at once"] += running > 1

    def ended(self, process: Process, circuit: str, permit: Permit) -> None:
        """The call of a permit has ended."""
        self._probes.pop(id(permit), None)
        lease, era = permit._lease, permit._era
        generation = lease.shared if lease is not None else era.shared if era else NO_GENERATION
        self._began[process.name, circuit, generation] += 1

    def suspended(self, process: Process) -> None:
        """Its clock has stood still: leases that it holds may have ended without its noticing."""
        self._suspended[process.name] = self._timeline.now

    # ------------------------------------------------------------------ requests

    def sent(self, process: Process, steps: list[tuple[str, Step]]) -> None:
        """R3, R4 and R8; what a process knows, it says; S11: a late outcome is reported as late."""
        asked = Counter(name for name, step in steps if step.op == "acquire")
        assert not asked or max(asked.values()) == 1, f"R3: {process} asks twice at once: {asked}"
        assert not self._asked[process.name], f"R8: {process} begins a second round"
        self._asked[process.name] = asked
        self.seen.update(step.op for _, step in steps)
        for name, step in steps:
            self._true(process, name, step)
            if step.op == "acquire":
                until, generation = self._denied.get((process.name, name), (0, None))
                known = step.known.v, step.known.nonce
                assert process.ms() >= until or known != generation, (
                    f"R4: {process} asks for a permit of {name} {until - process.ms()} ms before "
                    f"the end of its denial"
                )
                self._asked_at[step.token] = self._timeline.now
            if step.op == "settle":
                self._settled[step.token] += 1
                self.seen["settle again"] += self._settled[step.token] == 2
        self.seen["evidence"] += sum(run.age >= 0 for _, step in steps for run in step.batch)

    def _true(self, process: Process, name: str, step: Step) -> None:
        shadow, known = process.breakers[name]._shadow, step.known
        if (known.v, known.nonce) == shadow.generation and shadow.deadline is not None:
            left = shadow.deadline - process.ms()
            assert known.state != "open" or known.remaining >= left, (
                f"ratchet: {process} says that {name} stays open for {known.remaining} ms, and "
                f"knows of {left}"
            )
        oldest = max((run.age for run in step.batch), default=-1)
        assert oldest <= min(shadow.policy.window, EVIDENCE) + SOON or process.frozen_at >= (
            self._timeline.now - oldest
        ), f"evidence: {process} sends an outcome of {name} that is {oldest} ms old"
        timely = sum(run.count for run in step.batch if run.age < 0)
        if timely and step.era != NO_GENERATION:
            place = process.name, name, step.era
            self._reported[place] += timely
            assert self._reported[place] <= self._began[place], (
                f"S11: {process} reports {self._reported[place]} outcomes of {name} for "
                f"{step.era}, in which {self._began[place]} of its calls began"
            )

    def answered(self, process: Process, steps: list[tuple[str, Step]], answer: Any) -> None:
        """The answer to a round's steps has come, or its error."""
        self._asked[process.name] = Counter()
        replies = answer if steps and not isinstance(answer, StoreDown) else []
        for (name, _), reply in zip(steps, replies, strict=False):
            if isinstance(reply, Reply) and reply.verdict == "deny":
                header = load_header(reply.header)
                until = process.ms() + reply.value
                self._denied[process.name, name] = until, (header.v, header.nonce)

    def forked(self, parent: Process, child: Process) -> None:
        """The child's local machines are where the parent's are."""
        self._sure |= {(child.name, name) for who, name in self._sure if who == parent.name}

    # ------------------------------------------------------------------ accounts

    def flushes(self, process: Process) -> None:
        """A flush that succeeds has told the store everything that was recorded before it, but for
        what had been lost."""
        said = dict(process.recorded)

        def done(future: Future[object]) -> None:
            if future.exception() is not None:
                return
            self.seen["flush that succeeds"] += 1
            for name, breaker in process.breakers.items():
                shadow = breaker._shadow
                settled = shadow.flushed + shadow.dropped
                if settled < said[name]:
                    self._unflushed = f"{process} of {name}: {said[name]} were, {settled} are done"

        process.session.flush().add_done_callback(done)

    def accounts(self, process: Process) -> None:
        """C4: recorded = flushed + dropped + pending, and recorded is what calls have said."""
        for name, breaker in process.breakers.items():
            account = breaker.conservation()
            parts = account["flushed"] + account["dropped"] + account["pending"]
            assert account["recorded"] == parts, f"C4: {process} of {name}: {account}"
            said = process.recorded[name]
            assert account["recorded"] == said, f"C4: {process} of {name}: {account}, said {said}"
            assert min(account.values()) >= 0, f"C4: {process} of {name}: {account}"
