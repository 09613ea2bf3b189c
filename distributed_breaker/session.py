"""What one process says to its store, and what the answers mean: the link without its threads.

No thread, no socket and no clock of its own: ``Link`` carries out what a round asks for, on two
threads; a simulation carries it out on a virtual network.  A *round* is a generator of ``Ask``s
that is sent each answer, or is thrown the error; between two of them callers go on, pushes are
heard, and processes are forked.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .errors import NEEDS_OPERATOR, StoreDown, StoreError, StoreUnavailable
from .linked import FAST_FLUSH, SLOW_FLUSH, Clock, LinkedCircuit
from .model import Reply, Step
from .outage import Outage

POLL = 2_000  # ms between polls, in case a push was lost
FIRST_ANSWER = 0.29  # s that an admission may wait for the store; waking up takes a little more
CHUNK = 1_000  # steps in one pipeline
BROKEN_RETRY = 5_000  # ms between looks at a circuit that the store refuses
MAX_SUBSCRIBE_TRIES = 6  # after so many failures the pauses between them grow no longer

log = logging.getLogger("distributed_breaker")


class Ask(NamedTuple):
    """Something to have done by the store, and the answer to be sent back.

    ``run``: steps [(circuit, Step)] in one pipeline, each at most once → [Reply | StoreError];
    ``poll``: circuits → (the store's ms, [header | None]); ``remember``: names → None;
    ``look``: a function to call → what it returns.  Each may raise StoreDown.
    """

    what: Literal["run", "poll", "remember", "look"]
    about: Any


Asks = Generator[Ask, Any, None]


@dataclass(eq=False, slots=True)
class Request:
    """Something that a caller waits for: a step on one circuit, a flush, or any look at the store.

    ``future`` gets (reply, ms at which the step was sent), or the look's result.  A settle is kept
    until ``expires`` (ms), the end of its lease, and sent ``again``; everything else fails with the
    store.
    """

    kind: str  # "acquire", "settle", "cancel", "operate", "flush", "look"
    circuit: LinkedCircuit | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the step, its op included
    look: Callable[[], Any] | None = None
    expires: int = 0
    again: bool = False
    future: Future[Any] = field(default_factory=Future)


# A step of one circuit, with the request that it carries out, if anybody waits for it.
Planned = tuple[LinkedCircuit, Step, Request | None]


class Session:
    """One process's side of the talk with one store.

    Callers only append to queues and call ``wake``; everything else changes in ``round`` and in
    what is heard.

    Args:
        clock: where time comes from.
        circuits: gives the circuits that this process holds, by name.
        new_random: makes the source of chance; asked again after a fork.
    """

    def __init__(
        self,
        clock: Clock,
        circuits: dict[str, LinkedCircuit],
        new_random: Callable[[], random.Random] = random.Random,
    ) -> None:
        self._clock = clock
        self._circuits = circuits
        self._new_random = new_random
        self.closed = False
        self._logged: set[str] = set()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Everything that belongs to one process: made anew in a forked child."""
        self._requests: deque[Request] = deque()
        self._urgent: deque[LinkedCircuit] = deque()
        self._to_sync: dict[str, LinkedCircuit] = {}
        # Those whose sync is under way.  Meanwhile a push may ask for another one.
        self._syncing: dict[str, LinkedCircuit] = {}
        self._to_remember: dict[str, None] = {}
        self._next_tick = 0  # when the restless circuits are looked at, and when all of them are
        self._next_sweep = 0
        # Thousands of quiet circuits must cost next to nothing, so only these are looked at often.
        self._restless: dict[str, None] = {}
        self._next_poll = 0
        self._kept: list[LinkedCircuit] = []  # broken ones that have not been told of in this round
        self._poll_all = False
        self._poll_refused = False  # the last poll was, and the store has not gone since
        self._subscribe_failures = 0
        self.impatient = False  # a first answer did not come in time: nobody waits for one again
        self._random = self._new_random()
        self._outage = Outage(self._random.uniform)

    # ------------------------------------------------------------------ for the edge to fill in

    def wake(self) -> None:
        """There is something to do: begin the next round now."""
        raise NotImplementedError

    def ensure_started(self) -> bool:
        """See to it that rounds are made; False where that is impossible."""
        raise NotImplementedError

    def want_pushes(self, wanted: bool) -> None:
        """Whether a subscription is of use now."""
        raise NotImplementedError

    # ------------------------------------------------------------------ for callers

    @property
    def down(self) -> str:
        """The code for which the store counts as gone; empty while it serves."""
        return self._outage.code

    def add(self, circuit: LinkedCircuit) -> None:
        """Begin to follow a circuit; its first sync starts in the background."""
        self._to_sync[circuit.name] = circuit
        self._to_remember[circuit.name] = None
        self.ensure_started()
        self.wake()

    def nudge(self, circuit: LinkedCircuit) -> None:
        """A bad outcome waits in this circuit: report it at once."""
        if circuit.nudged or self.down:
            return
        circuit.nudged = True
        self._urgent.append(circuit)
        self.ensure_started()
        self.wake()

    def submit(self, request: Request) -> Future[Any]:
        """Queue a request for the next round.  It fails at once while the store is down."""
        usable = self.ensure_started()
        if not usable or (self.down and request.kind != "settle"):
            self._refuse(request)
            return request.future
        self._requests.append(request)
        self.wake()
        return request.future

    def _refuse(self, request: Request) -> None:
        if request.circuit is not None and request.kind == "acquire":
            request.circuit.stop_asking()
        elif request.circuit is not None and request.kind == "settle":
            request.circuit.settle_done(False)
        why = self.down or ("closed" if self.closed else "no threads")
        _fail(request.future, StoreUnavailable(f"the store cannot be asked ({why})"))

    def missed_first_answer(self, circuit: LinkedCircuit) -> None:
        """The first answer did not come in time: the shadow decides, and nobody waits again."""
        self.impatient = True
        circuit.degrade()
        self._to_sync[circuit.name] = circuit

    def flush(self) -> Future[Any]:
        """Report everything recorded so far; the future fails if that is not acknowledged."""
        return self.submit(Request("flush"))

    def end(self) -> None:
        """No round will be made any more: the local machines decide, and nobody waits in vain."""
        self.closed = True
        for circuit in list(self._circuits.values()):
            circuit.degrade()
        while self._requests:
            self._refuse(self._requests.popleft())

    def fork(self, reporter: str) -> None:
        """R10: a child has none of its parent's pending outcomes, and counts as unsynced."""
        self._begin_anew()
        for circuit in self._circuits.values():
            circuit.forked(reporter)
            if not circuit.disabled:
                self._to_sync[circuit.name] = circuit

    def _in_use(self) -> list[LinkedCircuit]:
        """The circuits that the store is asked about: all but those that are switched off."""
        return [circuit for circuit in list(self._circuits.values()) if not circuit.disabled]

    # ------------------------------------------------------------------ rounds

    def due(self) -> int:
        """When the next round must be made (ms), unless ``wake`` is called before."""
        if self.down:
            return min(self._outage.look_at, self._next_tick)
        if self._requests or self._urgent or self._to_sync or self._syncing or self._poll_all:
            return 0
        return min(self._next_tick, self._next_sweep, self._next_poll)

    def round(self) -> Asks:
        """All that is to be said now."""
        try:
            if self.down:
                yield from self._round_while_down()
            else:
                yield from self._round_while_up()
        except Exception:
            # A defect here must not end the link: the shadows take over until it is mended.
            log.exception("the circuit breakers' link failed")
            self._go_down("DEFECT", quiet=True)

    def _round_while_down(self) -> Asks:
        now = self._clock.ms()
        for circuit in list(self._circuits.values()):
            circuit.nudged = False
            circuit.drain()
        self._urgent.clear()
        self._next_tick = now + SLOW_FLUSH
        self._keep_settles()
        if now >= self._outage.look_at:
            yield from self._try_to_return()

    def _round_while_up(self) -> Asks:
        self.want_pushes(True)
        now = self._clock.ms()
        requests = [self._requests.popleft() for _ in range(len(self._requests))]
        try:
            yield from self._send(self._collect(now, requests), requests)
            if now >= self._next_poll or self._poll_all:
                yield from self._poll(now)
        except StoreDown as error:
            asked = any(r.kind == "acquire" for r in requests) or bool(self._syncing)
            if self._outage.tolerates(error.timeout, asked):
                self._next_poll = 0
                self._next_tick = 0
            else:
                self._go_down(error.code, error)
        except Exception as defect:
            for r in requests:
                _fail(r.future, StoreUnavailable(f"not acknowledged: {defect!r}"))
            raise

    def _collect(self, now: int, requests: list[Request]) -> list[Planned]:
        """All steps of this round: outcomes first, then what callers wait for."""
        flush = any(r.kind == "flush" for r in requests)
        due: dict[str, LinkedCircuit] = {}
        while self._urgent:
            circuit = self._urgent.popleft()
            circuit.nudged = False
            due[circuit.name] = circuit
        urgent = dict.fromkeys(due)
        if flush or now >= min(self._next_tick, self._next_sweep):
            self._next_tick = now + SLOW_FLUSH
            for circuit in self._looked_at(now, all_of_them=flush):
                if flush or circuit.flush_due(now):
                    due[circuit.name] = circuit
                if circuit.restless(now):
                    self._restless[circuit.name] = None
                    self._next_tick = min(self._next_tick, self._watch(circuit, now))
        if urgent:
            self._restless.update(urgent)
            self._next_tick = min(self._next_tick, now + FAST_FLUSH)
        steps: list[Planned] = []
        # What waits in a broken circuit is kept; a sync asks whether its key has been mended.
        self._kept = [circuit for circuit in due.values() if circuit.broken]
        if flush:
            self._to_sync.update({c.name: c for c in self._kept})
        for name in list(self._to_sync):
            self._syncing[name] = self._to_sync.pop(name)
        for circuit in {**due, **self._syncing}.values():
            out = [] if circuit.broken else circuit.outgoing()
            if not out and circuit.name in self._syncing:
                out, circuit.sent = [circuit.step("report")], now
            steps += [(circuit, step, None) for step in out]
        for r in requests:
            if r.kind == "acquire" and r.circuit is not None and r.future.cancelled():
                r.circuit.stop_asking()
            elif r.circuit is not None:
                steps.append((r.circuit, r.circuit.step(**r.arguments), r))
        return steps

    def _looked_at(self, now: int, *, all_of_them: bool) -> list[LinkedCircuit]:
        """The circuits that a tick looks at: all, every SLOW_FLUSH, and else the restless ones."""
        if all_of_them or now >= self._next_sweep:
            self._next_sweep = now + SLOW_FLUSH
            looked_at = list(self._circuits.values())
        else:
            looked_at = [self._circuits[name] for name in self._restless if name in self._circuits]
        self._restless.clear()
        return looked_at

    def _watch(self, circuit: LinkedCircuit, now: int) -> int:
        """Deadlines of one restless circuit: a sync when a forced state ends, a check
        when open is due.

        Returns when to look again (ms).
        """
        circuit.run_check(now)
        if circuit.broken and now - circuit.sent >= BROKEN_RETRY:
            self._to_sync[circuit.name] = circuit
        again = now + (FAST_FLUSH if circuit.troubled(now) else SLOW_FLUSH)
        deadline, forced = circuit.deadline()
        if deadline is None:
            return again
        if deadline <= now:
            if forced:
                self._to_sync[circuit.name] = circuit
            return now + FAST_FLUSH
        return min(again, deadline)

    def _send(self, steps: list[Planned], requests: list[Request]) -> Asks:
        done = 0
        try:
            for start in range(0, len(steps), CHUNK):
                part = steps[start : start + CHUNK]
                sent = self._clock.ms()
                replies = yield Ask("run", [(c.name, step) for c, step, _ in part])
                self._outage.answered()
                for planned, reply in zip(part, replies, strict=True):
                    self._take_reply(planned, reply, sent)
                done = start + len(part)
            if self._to_remember:
                yield from self._remember()
            for r in requests:
                if r.kind == "flush":
                    self._flushed(r, steps)
                elif r.kind == "look" and r.look is not None:
                    yield from self._look(r.future, r.look)
        except StoreDown as error:
            for planned in steps[done:]:
                self._lose(planned, error)
            for r in requests:
                if r.kind in ("flush", "look"):
                    _fail(r.future, StoreUnavailable(f"not acknowledged: {error}"))
            raise

    def _remember(self) -> Asks:
        """The set of names only helps readers, so its refusal degrades nothing."""
        names = list(self._to_remember)
        try:
            yield Ask("remember", names)
        except StoreDown as error:
            if not error.loud:
                raise
            self._say_once(f"names {error.code}", "names of circuits cannot be listed: %s", error)
        for name in names:
            self._to_remember.pop(name, None)

    def _look(self, future: Future[Any], look: Callable[[], Any]) -> Asks:
        """A refused look fails alone; a store that is away concerns everybody."""
        try:
            _resolve(future, (yield Ask("look", look)))
        except StoreDown as error:
            if not error.loud:
                raise
            _fail(future, StoreUnavailable(f"the store refuses to be read: {error}"))

    def _flushed(self, request: Request, steps: list[Planned]) -> None:
        kept = [c for c in list(self._circuits.values()) if c.broken and c.has_output]
        late = any(circuit.has_late for circuit, _, asked in steps if asked is not None)
        if late or any(not c.broken and c.has_output for c in self._kept):
            # A settle came too late, or a key has been mended: that must be told, too.
            self._requests.append(request)
        elif kept:
            why = f"the store refuses circuit {kept[0].name!r}: {kept[0].broken}"
            _fail(request.future, StoreUnavailable(f"not acknowledged: {why}"))
        else:
            _resolve(request.future, None)

    # ------------------------------------------------------------------ answers

    def _take_reply(self, planned: Planned, reply: Reply | StoreError, sent: int) -> None:
        circuit, step, request = planned
        self._syncing.pop(circuit.name, None)
        if isinstance(reply, StoreError):
            self._one_circuit_failed(planned, reply)
            return
        if circuit.answered(step, reply):
            self._to_sync[circuit.name] = circuit
        if circuit.degraded:
            circuit.heal()
        if reply.old == "":
            self._to_remember[circuit.name] = None
        if circuit.policy_mismatch:
            self._say_once(
                f"policy {circuit.name}",
                "circuit %s: this process was given another policy than the fleet's, which rules; "
                "give all processes the same one, or raise its version",
                circuit.name,
            )
        for refused in set(reply.failed.split()):
            self._say_once(refused, "an after-effect was refused by the store: %s", refused)
        if request is None:
            return
        if request.kind == "settle" and reply.verdict == "stale" and not request.again:
            circuit.settled_late(step)
        elif request.kind == "settle":
            # R5: stale to a repeated one: perhaps an earlier one was counted, perhaps none.
            circuit.settle_done(reply.verdict == "ok")
        abandoned = not _resolve(request.future, (reply, sent))
        if abandoned and request.kind == "acquire" and reply.verdict == "grant":
            # R2: the caller has stopped waiting, so its permit goes back.
            self._requests.append(self._cancel(circuit, step))

    def _one_circuit_failed(self, planned: Planned, error: StoreError) -> None:
        """The store refuses one circuit (wrong type, newer schema): its shadow decides."""
        circuit, _, request = planned
        self._say_once(
            f"{error.code} {circuit.name}",
            "circuit %s runs on local state only: the store answers %s; an operator must look at "
            "its key",
            circuit.name,
            error,
        )
        circuit.degrade(error.code)
        if request is not None and request.kind in ("settle", "cancel"):
            # Sending it again would be answered alike.
            self._refuse(request)
        else:
            self._lose(planned, StoreDown(error.code, str(error)))

    def _lose(self, planned: Planned, error: StoreDown) -> None:
        circuit, step, request = planned
        circuit.lost(step)
        if request is None:
            return
        if request.kind == "settle":
            request.again = True
            self._requests.append(request)
            return
        if step.op == "acquire":
            self._requests.append(self._cancel(circuit, step))
        unknown = " (it is unknown whether it was carried out)" if error.timeout else ""
        _fail(request.future, StoreUnavailable(f"{error}{unknown}"))

    def _cancel(self, circuit: LinkedCircuit, acquire: Step) -> Request:
        """R2: gives back a permit that nobody waits for, at the latest when its lease ends."""
        expires = self._clock.ms() + acquire.policy.permit_lease
        arguments = {"op": "cancel", "token": acquire.token}
        return Request("cancel", circuit, arguments, expires=expires)

    # ------------------------------------------------------------------ polls and pushes

    def _poll(self, now: int) -> Asks:
        everything, self._poll_all = self._poll_all, False
        held = self._in_use()
        circuits = [c for c in held if everything or now - c.heard >= POLL // 2]
        # No mirror gets older than POLL, and none is polled more often than twice in that time.
        younger = (c.heard for c in held if now - c.heard < POLL // 2)
        self._next_poll = min(younger, default=now) + POLL
        for start in range(0, len(circuits), CHUNK):
            part = circuits[start : start + CHUNK]
            try:
                time, headers = yield Ask("poll", [c.name for c in part])
            except StoreDown as error:
                if not error.loud:
                    raise
                # A sync asks for the same, only it costs the server more.  If that is refused too,
                # it says so; if it is not, the next refused poll does.
                if self._poll_refused:
                    self._say_once("poll", "polls are refused by the store: %s", error)
                self._poll_refused = True
                self._to_sync.update({c.name: c for c in part})
                continue
            for circuit, text in zip(part, headers, strict=True):
                if text is None:
                    self._to_sync[circuit.name] = circuit
                else:
                    self._hear(circuit, text, time)

    def _hear(self, circuit: LinkedCircuit, text: str, now: int | None) -> None:
        """A header from a push (``now`` None: it was sent at the transition) or a poll."""
        try:
            again = circuit.hear(text, now)
        except StoreError:
            # The script tells what is wrong, and the circuit degrades for it.
            again = True
        if again:
            self._to_sync[circuit.name] = circuit
            self.wake()

    def pushed(self, push: str) -> None:
        """A push has been heard: ``<circuit> <header>``."""
        name, _, header = push.partition(" ")
        circuit = self._circuits.get(name)
        if circuit is not None:
            self._hear(circuit, header, None)

    def subscribed(self) -> None:
        """R9: whenever the subscription is (re)confirmed there was a gap: everything is read."""
        self._subscribe_failures = 0
        self._poll_all = True
        self._next_tick = 0
        self.wake()

    def subscription_lost(self, error: StoreDown) -> float:
        """A subscription failed or was not to be had; returns how long to pause (s)."""
        looked, self._poll_all = not self._poll_all, True
        self.wake()
        # The first failure has a round look; if that fares alike, it is the one to say so.
        if error.loud and self._subscribe_failures and looked and not self.down:
            self._say_once(f"subscribe {error.code}", "pushes cannot be heard: %s", error)
        tries = self._subscribe_failures = min(self._subscribe_failures + 1, MAX_SUBSCRIBE_TRIES)
        return self._random.uniform(0.05, 0.1 * 2**tries)

    def ping_refused(self, answer: str) -> None:
        """The subscription is alive, but may not be asked whether it is."""
        self._say_once("ping", "the subscription lacks a right: %s", answer)

    # ------------------------------------------------------------------ degraded and back

    def _go_down(self, code: str, error: Exception | None = None, *, quiet: bool = False) -> None:
        self.want_pushes(False)
        self._poll_refused = False
        if not self._outage.begin(code, self._clock.ms()):
            return
        if code in NEEDS_OPERATOR:
            self._say_once(code, "circuit breakers run on local state only: the store refuses us: "
                           "%s; retrying will not help, an operator must", error)  # fmt: skip
        elif not quiet:
            log.warning("circuit breakers run on local state only: %s", error or code)
        for circuit in list(self._circuits.values()):
            circuit.degrade()
        self._keep_settles()

    def _keep_settles(self) -> None:
        """While the store is down, settles wait until their lease ends; the rest fails now."""
        now = self._clock.ms()
        for _ in range(len(self._requests)):
            request = self._requests.popleft()
            if request.expires > now and not self.closed:
                self._requests.append(request)
            else:
                self._refuse(request)

    def _try_to_return(self) -> Asks:
        try:
            yield Ask("poll", [])
            if self._outage.good_answer(self._clock.ms()):
                yield from self._sync_all()
        except StoreDown as error:
            self._outage.pause(self._clock.ms())
            if error.code in NEEDS_OPERATOR:
                self._say_once(error.code, "the store refuses us: %s; an operator must act", error)

    def _sync_all(self) -> Asks:
        self._to_sync.clear()
        self._syncing.clear()
        circuits = self._in_use()
        for start in range(0, len(circuits), CHUNK):
            # Nothing is added, but it is written: a store that refuses writes has not returned.
            written = (("dropped", 0),)
            part = [(c, c.step("report", deltas=written)) for c in circuits[start : start + CHUNK]]
            replies = yield Ask("run", [(c.name, step) for c, step in part])
            for (circuit, step), reply in zip(part, replies, strict=True):
                if isinstance(reply, StoreError):
                    self._one_circuit_failed((circuit, step, None), reply)
                    continue
                if circuit.answered(step, reply):
                    self._to_sync[circuit.name] = circuit
                circuit.heal()
                circuit.nudged = True
                self._urgent.append(circuit)
                self._to_remember[circuit.name] = None
        log.info("circuit breakers share their state again")
        self._outage.end()
        self.impatient = False
        self._logged.clear()
        self._next_tick = 0
        self.want_pushes(True)

    def _say_once(self, key: str, message: str, *arguments: object) -> None:
        if key not in self._logged:
            self._logged.add(key)
            log.error(message, *arguments)


def _resolve(future: Future[Any], value: object) -> bool:
    """Set a result unless the waiter has given up; returns whether it was taken."""
    try:
        future.set_result(value)
    except Exception:
        return False
    return True


def _fail(future: Future[Any], error: Exception) -> None:
    with contextlib.suppress(Exception):
        future.set_exception(error)
