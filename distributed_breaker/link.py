"""The link between one process and its store: flush, push, poll, degrade, return.

Two threads: one sends (all circuits' outcomes in one pipeline, acquires, settles, polls), one
listens to pushes.  They are started at first use, also in a forked child, and never touch the
application's connections.  Everything that changes the link's state runs in the sending thread;
callers only append to queues and wake it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import model
from .errors import NEEDS_OPERATOR, StoreDown, StoreError, StoreUnavailable
from .linked import FAST_FLUSH, SLOW_FLUSH, Clock, LinkedCircuit
from .model import Reply, Step
from .outage import Outage
from .process import close_with_process, follow_process, uwsgi_without_threads
from .store import Subscription
from .workers import start_thread

POLL = 2_000  # ms between polls, in case a push was lost
PING = 1.0  # s between signs of life on the subscription
FIRST_ANSWER = 0.29  # s that an admission may wait for the store; waking up takes a little more
CHUNK = 1_000  # steps in one pipeline
BROKEN_RETRY = 5_000  # ms between looks at a circuit that the store refuses

log = logging.getLogger("distributed_breaker")


class Store(Protocol):
    """What the link needs of a store; see ``RedisStore``."""

    def run(self, steps: Sequence[tuple[str, Step]]) -> list[Reply | StoreError]: ...
    def poll(self, circuits: Sequence[str]) -> tuple[int, list[str | None]]: ...
    def remember(self, circuits: Sequence[str]) -> None: ...
    def read(self, circuits: Sequence[str]) -> tuple[int, list[dict[str, str] | StoreError]]: ...
    def log(self, circuit: str, count: int = 50) -> list[dict[str, str]]: ...
    def subscribe(self) -> Subscription: ...
    def close(self) -> None: ...
    def forked(self) -> None: ...


@dataclass(eq=False, slots=True)
class Request:
    """Something that a caller waits for: a step on one circuit, a flush, or any look at the store.

    ``future`` gets (reply, ms at which the step was sent), or the look's result.  A settle is kept
    until ``expires`` (ms), the end of its lease; everything else fails with the store.
    """

    kind: str  # "acquire", "settle", "cancel", "operate", "flush", "look"
    circuit: LinkedCircuit | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the step, its op included
    look: Callable[[], Any] | None = None
    expires: int = 0
    future: Future[Any] = field(default_factory=Future)


class Link:
    """One process's link to one store.

    Args:
        store: the Redis side.
        clock: where time comes from.
        reporter: makes this process's random id; asked again after a fork.
        circuits: gives the circuits that this process holds, by name.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        reporter: Callable[[], str],
        circuits: dict[str, LinkedCircuit],
    ) -> None:
        self._store = store
        self._clock = clock
        self._new_reporter = reporter
        self._circuits = circuits
        self.closed = False
        self._logged: set[str] = set()
        self._subscription: Subscription | None = None
        self._reset()
        follow_process(self)

    def _reset(self) -> None:
        """Everything that belongs to one process: made anew in a forked child."""
        self._wake = threading.Event()
        self._start_lock = threading.Lock()
        self._sender: threading.Thread | None = None
        self._listener: threading.Thread | None = None
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._beat = 0  # counts the sender's rounds; 0: it has never run
        self._requests: deque[Request] = deque()
        self._urgent: deque[LinkedCircuit] = deque()
        self._to_sync: dict[str, LinkedCircuit] = {}
        self._to_remember: set[str] = set()
        self._next_tick = 0
        self._next_poll = 0
        self._poll_all = False
        self._poll_refused = False  # the last poll was, and the store has not gone since
        self.impatient = False  # a first answer did not come in time: nobody waits for one again
        self._no_threads = False
        self._random = random.Random()
        self._outage = Outage(self._random.uniform)

    # ------------------------------------------------------------------ for callers

    @property
    def down(self) -> str:
        """The code for which the store counts as gone; empty while it serves."""
        return self._outage.code

    def add(self, circuit: LinkedCircuit) -> None:
        """Begin to follow a circuit; its first sync starts in the background."""
        self._to_sync[circuit.name] = circuit
        self._to_remember.add(circuit.name)
        self.ensure_started()
        self._wake.set()

    def nudge(self, circuit: LinkedCircuit) -> None:
        """A bad outcome waits in this circuit: report it at once."""
        if circuit.nudged or self.down:
            return
        circuit.nudged = True
        self._urgent.append(circuit)
        self.ensure_started()
        self._wake.set()

    def submit(self, request: Request) -> Future[Any]:
        """Hand a request to the sending thread.  It fails at once while the store is down."""
        usable = self.ensure_started()
        if not usable or (self.down and request.kind != "settle"):
            self._refuse(request)
            return request.future
        self._requests.append(request)
        self._wake.set()
        return request.future

    def _refuse(self, request: Request) -> None:
        if request.circuit is not None and request.kind == "acquire":
            request.circuit.stop_asking()
        elif request.circuit is not None and request.kind == "settle":
            request.circuit.settle_done(False)
        why = self.down or ("closed" if self.closed else "no threads")
        _fail(request.future, StoreUnavailable(f"the store cannot be asked ({why})"))

    def ensure_started(self) -> bool:
        """Start the threads unless they run.  Returns False where threads cannot run."""
        if self._sender is not None and self._sender.is_alive():
            return True
        if self.closed or self._no_threads or sys.is_finalizing():
            return False
        with self._start_lock:
            if self._sender is not None and self._sender.is_alive():
                return True
            try:
                if uwsgi_without_threads():
                    raise RuntimeError("uWSGI runs without --enable-threads")
                self._sender = start_thread("circuit-breaker-link", self._send_loop)
                self._listener = start_thread("circuit-breaker-pushes", self._listen_loop)
            except RuntimeError as error:
                self.without_threads(str(error))
                return False
        close_with_process(self)
        return True

    def without_threads(self, why: str) -> None:
        """Background threads cannot run here: say so once, and let the shadows decide."""
        if not self._no_threads:
            self._no_threads = True
            self._outage.code = "NOTHREADS"
            log.warning(
                "circuit breakers run on local state only: background threads cannot run (%s); "
                "with uWSGI, add --enable-threads",
                why,
            )

    def missed_first_answer(self, circuit: LinkedCircuit) -> None:
        """The first answer did not come in time: the shadow decides, and nobody waits again."""
        if self._beat == 0 and not self.closed:
            self.without_threads("the sending thread has not run")
        self.impatient = True
        circuit.degrade()
        self._to_sync[circuit.name] = circuit

    def flush(self) -> Future[Any]:
        """Report everything recorded so far; the future fails if that is not acknowledged."""
        return self.submit(Request("flush"))

    def read(self, circuit: LinkedCircuit) -> Future[Any]:
        """The store's time in ms, all fields of one circuit, and its log, newest first."""

        def look() -> tuple[int, Any, list[dict[str, str]]]:
            now, fields = self._store.read([circuit.name])
            try:
                return now, fields[0], self._store.log(circuit.name)
            except StoreDown as error:
                if not error.loud:
                    raise
                return now, fields[0], []

        return self.submit(Request("look", look=look))

    def close(self, timeout: float = 1.0) -> None:
        """Flush and stop.  Safe to call twice; guards keep working on the last mirror."""
        if self.closed:
            return
        running = self._sender is not None and self._sender.is_alive()
        if running and not self.down:
            with contextlib.suppress(Exception):
                self.flush().result(timeout)
        self.closed = True
        self._stopping.set()
        self._up.set()
        self._wake.set()
        subscription = self._subscription
        if subscription is not None:
            subscription.wake()
        for thread in (self._sender, self._listener):
            if running and thread is not None and thread is not threading.current_thread():
                thread.join(timeout)
        self._store.close()
        for circuit in list(self._circuits.values()):
            circuit.degrade()
        while self._requests:
            self._refuse(self._requests.popleft())

    def forked(self) -> None:
        """R10: a child has none of its parent's threads, connections and pending outcomes."""
        if self._subscription is not None:
            self._subscription.close()
        self._reset()
        self._store.forked()
        reporter = self._new_reporter()
        for circuit in self._circuits.values():
            circuit.forked(reporter)
            self._to_sync[circuit.name] = circuit

    # ------------------------------------------------------------------ the sending thread

    def _send_loop(self) -> None:
        if self._no_threads:
            # It was only late: the first admission had already given up on it.
            self._no_threads = False
            self._outage.end()
        while not self._stopping.is_set():
            self._beat += 1
            wait = max(0, self._due() - self._clock.ms()) / 1000
            self._wake.wait(min(wait, 2.0))
            self._wake.clear()
            if self._stopping.is_set():
                return
            try:
                self._round()
            except Exception:
                # A defect here must not end the thread: the shadows take over until it is mended.
                log.exception("the circuit breakers' link failed")
                self._go_down("DEFECT", quiet=True)

    def _due(self) -> int:
        if self.down:
            return min(self._outage.look_at, self._next_tick)
        if self._requests or self._urgent or self._to_sync or self._poll_all:
            return 0
        return self._next_tick

    def _round(self) -> None:
        now = self._clock.ms()
        if self.down:
            for circuit in list(self._circuits.values()):
                circuit.nudged = False
                circuit.drain()
            self._urgent.clear()
            self._next_tick = now + SLOW_FLUSH
            self._keep_settles()
            if now >= self._outage.look_at:
                self._try_to_return()
            return
        self._up.set()
        requests = [self._requests.popleft() for _ in range(len(self._requests))]
        try:
            self._send(self._collect(now, requests), requests)
            if now >= self._next_poll or self._poll_all:
                self._poll(now)
        except StoreDown as error:
            asked = any(r.kind == "acquire" for r in requests) or bool(self._to_sync)
            self._store_failed(error, at_once=asked)
        except Exception as defect:
            for r in requests:
                _fail(r.future, StoreUnavailable(f"not acknowledged: {defect!r}"))
            raise

    def _collect(
        self, now: int, requests: list[Request]
    ) -> list[tuple[LinkedCircuit, Step, Request | None]]:
        """All steps of this round: outcomes first, then what callers wait for."""
        flush = any(r.kind == "flush" for r in requests)
        due: dict[str, LinkedCircuit] = {}
        while self._urgent:
            circuit = self._urgent.popleft()
            circuit.nudged = False
            due[circuit.name] = circuit
        if flush or now >= self._next_tick:
            troubled, soonest = False, now + SLOW_FLUSH
            for circuit in list(self._circuits.values()):
                if flush or circuit.flush_due(now):
                    due[circuit.name] = circuit
                troubled = troubled or circuit.troubled
                soonest = min(soonest, self._watch(circuit, now))
            self._next_tick = min(soonest, now + (FAST_FLUSH if troubled else SLOW_FLUSH))
        elif due:
            self._next_tick = min(self._next_tick, now + FAST_FLUSH)
        steps: list[tuple[LinkedCircuit, Step, Request | None]] = []
        to_sync = dict(self._to_sync)
        for circuit in {**due, **to_sync}.values():
            # What waits in a broken circuit is kept; a sync asks whether its key has been mended.
            out = [] if circuit.broken else circuit.outgoing()
            if not out and circuit.name in to_sync:
                out, circuit.sent = [circuit.step("report")], now
            steps += [(circuit, step, None) for step in out]
        for r in requests:
            if r.kind == "acquire" and r.circuit is not None and r.future.cancelled():
                r.circuit.stop_asking()
            elif r.circuit is not None:
                steps.append((r.circuit, r.circuit.step(**r.arguments), r))
        return steps

    def _watch(self, circuit: LinkedCircuit, now: int) -> int:
        """Deadlines of one circuit: a sync when a forced state ends, a check when open is due.

        Returns when to look again (ms).
        """
        circuit.run_check(now)
        if circuit.broken and now - circuit.sent >= BROKEN_RETRY:
            self._to_sync[circuit.name] = circuit
        deadline, forced = circuit.deadline()
        if deadline is None:
            return now + SLOW_FLUSH
        if deadline <= now:
            if forced:
                self._to_sync[circuit.name] = circuit
            return now + FAST_FLUSH
        return deadline

    def _send(
        self,
        steps: list[tuple[LinkedCircuit, Step, Request | None]],
        requests: list[Request],
    ) -> None:
        done = 0
        try:
            for start in range(0, len(steps), CHUNK):
                part = steps[start : start + CHUNK]
                sent = self._clock.ms()
                replies = self._store.run([(c.name, step) for c, step, _ in part])
                self._outage.answered()
                for (circuit, step, request), reply in zip(part, replies, strict=True):
                    self._take_reply(circuit, step, request, reply, sent)
                done = start + len(part)
            if self._to_remember:
                self._remember()
            for r in requests:
                if r.kind == "flush":
                    self._flushed(r)
                elif r.kind == "look" and r.look is not None:
                    self._look(r.future, r.look)
        except StoreDown as error:
            for circuit, step, request in steps[done:]:
                self._lose(circuit, step, request, error)
            for r in requests:
                if r.kind in ("flush", "look"):
                    _fail(r.future, StoreUnavailable(f"not acknowledged: {error}"))
            raise

    def _remember(self) -> None:
        """The set of names only helps readers, so its refusal degrades nothing."""
        names = list(self._to_remember)
        try:
            self._store.remember(names)
        except StoreDown as error:
            if not error.loud:
                raise
            self._say_once(f"names {error.code}", "names of circuits cannot be listed: %s", error)
        self._to_remember.difference_update(names)

    def _look(self, future: Future[Any], look: Callable[[], Any]) -> None:
        """A refused look fails alone; a store that is away concerns everybody."""
        try:
            _resolve(future, look())
        except StoreDown as error:
            if not error.loud:
                raise
            _fail(future, StoreUnavailable(f"the store refuses to be read: {error}"))

    def _flushed(self, request: Request) -> None:
        kept = [c for c in list(self._circuits.values()) if c.broken and c.has_output]
        if kept:
            why = f"the store refuses circuit {kept[0].name!r}: {kept[0].broken}"
            _fail(request.future, StoreUnavailable(f"not acknowledged: {why}"))
        else:
            _resolve(request.future, None)

    def _take_reply(
        self,
        circuit: LinkedCircuit,
        step: Step,
        request: Request | None,
        reply: Reply | StoreError,
        sent: int,
    ) -> None:
        self._to_sync.pop(circuit.name, None)
        if isinstance(reply, StoreError):
            self._one_circuit_failed(circuit, step, request, reply)
            return
        if circuit.answered(step, reply):
            self._to_sync[circuit.name] = circuit
        if circuit.degraded:
            circuit.heal()
        if reply.old == "":
            self._to_remember.add(circuit.name)
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
        if request.kind == "settle":
            circuit.settle_done(True)
        abandoned = not _resolve(request.future, (reply, sent))
        if abandoned and request.kind == "acquire" and reply.verdict == "grant":
            # R2: the caller has stopped waiting, so its permit goes back.
            self._requests.append(self._cancel(circuit, step))

    def _one_circuit_failed(
        self, circuit: LinkedCircuit, step: Step, request: Request | None, error: StoreError
    ) -> None:
        """The store refuses one circuit (wrong type, newer schema): its shadow decides."""
        self._say_once(
            f"{error.code} {circuit.name}",
            "circuit %s runs on local state only: the store answers %s; an operator must look at "
            "its key",
            circuit.name,
            error,
        )
        if request is not None and request.kind in ("settle", "cancel"):
            # Sending it again would be answered alike.
            self._refuse(request)
        else:
            self._lose(circuit, step, request, StoreDown(error.code, str(error)))
        circuit.degrade(error.code)

    def _lose(
        self, circuit: LinkedCircuit, step: Step, request: Request | None, error: StoreDown
    ) -> None:
        circuit.lost(step)
        if request is None:
            return
        if request.kind == "settle":
            request.arguments["retry"] = True
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

    # ------------------------------------------------------------------ pushes and polls

    def _poll(self, now: int) -> None:
        everything, self._poll_all = self._poll_all, False
        self._next_poll = now + POLL
        circuits = [
            c for c in list(self._circuits.values()) if everything or now - c.heard >= POLL - 100
        ]
        for start in range(0, len(circuits), CHUNK):
            part = circuits[start : start + CHUNK]
            try:
                time, headers = self._store.poll([c.name for c in part])
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
            header = model.load_header(text)
        except StoreError:
            # The script tells what is wrong, and the circuit degrades for it.
            self._to_sync[circuit.name] = circuit
            return
        if circuit.hear(header, header.since if now is None else now):
            self._to_sync[circuit.name] = circuit
            self._wake.set()

    def _listen_loop(self) -> None:
        """R9: whenever the subscription is (re)confirmed there was a gap, so everything is read."""
        failures = 0
        while not self._stopping.is_set():
            if not self._up.wait(2.0) or self._stopping.is_set():
                continue
            subscription: Subscription | None = None
            try:
                subscription = self._subscription = self._store.subscribe()
                failures = 0
                self._poll_all = True
                self._next_tick = 0
                self._wake.set()
                self._listen(subscription)
            except StoreDown as error:
                if self._stopping.is_set():
                    return
                self._poll_all = True
                self._wake.set()
                # The first failure has the sender look; if it fares alike, it is the one to say so.
                if error.loud and failures and not self.down:
                    self._say_once(f"subscribe {error.code}", "pushes cannot be heard: %s", error)
                failures = min(failures + 1, 6)
                self._stopping.wait(self._random.uniform(0.05, 0.1 * 2**failures))
            except Exception:
                log.exception("the circuit breakers' subscription failed")
                self._stopping.wait(1.0)
            finally:
                self._subscription = None
                if subscription is not None:
                    subscription.close()

    def _listen(self, subscription: Subscription) -> None:
        while not self._stopping.is_set():
            push = subscription.get(PING)
            if subscription.refused:
                self._say_once("ping", "the subscription lacks a right: %s", subscription.refused)
            if push is None:
                subscription.ping()
            elif push:
                name, _, header = push.partition(" ")
                circuit = self._circuits.get(name)
                if circuit is not None:
                    self._hear(circuit, header, None)

    # ------------------------------------------------------------------ degraded and back

    def _store_failed(self, error: StoreDown, at_once: bool) -> None:
        if self._outage.tolerates(error.timeout, at_once):
            self._next_poll = 0
            self._next_tick = 0
        else:
            self._go_down(error.code, error)

    def _go_down(self, code: str, error: Exception | None = None, *, quiet: bool = False) -> None:
        self._up.clear()
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

    def _try_to_return(self) -> None:
        try:
            self._store.poll([])
            if self._outage.good_answer(self._clock.ms()):
                self._sync_all()
        except StoreDown as error:
            self._outage.pause(self._clock.ms())
            if error.code in NEEDS_OPERATOR:
                self._say_once(error.code, "the store refuses us: %s; an operator must act", error)

    def _sync_all(self) -> None:
        circuits = list(self._circuits.values())
        for start in range(0, len(circuits), CHUNK):
            # Nothing is added, but it is written: a store that refuses writes has not returned.
            written = (("dropped", 0),)
            part = [(c, c.step("report", deltas=written)) for c in circuits[start : start + CHUNK]]
            replies = self._store.run([(c.name, step) for c, step in part])
            for (circuit, step), reply in zip(part, replies, strict=True):
                if isinstance(reply, StoreError):
                    self._one_circuit_failed(circuit, step, None, reply)
                    continue
                circuit.answered(step, reply)
                circuit.heal()
                circuit.nudged = True
                self._urgent.append(circuit)
                self._to_remember.add(circuit.name)
        log.info("circuit breakers share their state again")
        self._outage.end()
        self.impatient = False
        self._logged.clear()
        self._to_sync.clear()
        self._next_tick = 0
        self._up.set()

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
