"""One simulated run: processes, one store, a plan of what befalls them, and how it must end.

``run`` carries a plan out.  A broken rule raises AssertionError, any other exception is a defect of
the library; both come with the plan's seed in ``Failure``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from distributed_breaker import shadow
from distributed_breaker.permit import Permit
from tests.simulation.oracle import Oracle
from tests.simulation.plan import LONGEST, MOST_PROCESSES, Event, Plan
from tests.simulation.process import Process
from tests.simulation.server import Machine, Modelled, Server
from tests.simulation.timeline import Timeline

BEAT = 100  # ms between the calls of each process when everything has healed
NEVER_WEDGED = 10_000  # ms beyond the timers after which a healed circuit must have settled


class Failure(AssertionError):
    """A run in which something did not hold.

    Attributes:
        rule: the first words of what was broken, by which two failures are told apart.
    """

    def __init__(self, plan: Plan, at: int, error: BaseException) -> None:
        text = str(error) if isinstance(error, AssertionError) else repr(error)
        self.rule = text.split(":", 1)[0][:80] or type(error).__name__
        self.plan = plan
        lines = traceback.format_exception(error)
        super().__init__(f"seed {plan.seed}, at {at} ms: {text}\n{''.join(lines[-12:])}")


class Defects(logging.Handler):
    """What the library logs with a traceback is a defect of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(record.exc_info[1])


class World:
    """Everything in one run."""

    def __init__(self, plan: Plan, machine: Callable[[str], Machine]) -> None:
        self.plan = plan
        self.timeline = Timeline(random.Random(f"ties {plan.seed}"))
        self.server = Server(self.timeline, {name: machine(name) for name in plan.circuits})
        self.oracle = Oracle(self.timeline, self.server)
        self.health = dict.fromkeys(plan.circuits, "well")
        self.healed = False
        self.processes: list[Process] = []
        self.calls: dict[str, dict[int, tuple[str, Permit]]] = {}
        self.server.on_transition = self._transition
        self.server.on_grant = self._granted
        self._armed: list[Event] = []
        self._culprits: dict[int, str] = {}  # which reporter's step an event has waited for
        self._born = 0
        self._versions = 0
        self._dead: Counter[str] = Counter()  # outcomes that died with their process, per circuit
        self._dead_flushed: Counter[str] = Counter()

    # ------------------------------------------------------------------ processes

    def _name(self) -> str:
        self._born += 1
        return str(self._born)

    def join(self, *, upgrade: bool = False) -> None:
        """A new process, with the present policy or (``upgrade``) a newer one."""
        if len(self.processes) >= MOST_PROCESSES:
            return
        policy = self.plan.policy
        if upgrade:
            self._versions += 1
        if self._versions:
            policy = replace(
                policy,
                version=self._versions,
                failure_threshold=policy.failure_threshold + self._versions % 3,
                open_interval=policy.open_interval / (1 + self._versions % 2),
                half_open_permits=1 + self._versions % policy.success_threshold,
            )
        process = Process(self, self._name(), policy, self.plan.explicit or upgrade)
        self.processes.append(process)
        process.start()

    def _granted(self, circuit: str, reporter: str, token: str) -> None:
        for process in self.processes:
            if f"r{process.name}" == reporter:
                self.oracle.granted(process, circuit, token)

    def _chosen(self, event: Event) -> Process | None:
        culprit = self._culprits.get(event.number, "")
        alive = [p for p in self.processes if p.alive]
        alive = [p for p in alive if f"r{p.name}" == culprit] or alive
        return alive[event.who % len(alive)] if alive else None

    def kill(self, process: Process) -> None:
        """Nothing that it knew can be asked for any more."""
        if not process.alive:
            return
        for name, breaker in process.breakers.items():
            account = breaker.conservation()
            self._dead[name] += account["recorded"]
            self._dead_flushed[name] += account["flushed"]
        process.die()
        self.processes.remove(process)

    # ------------------------------------------------------------------ events

    def due(self, event: Event) -> None:
        """An event's time has come; it may have to wait for a transition."""
        if "on" in event.more:
            self._armed.append(event)
        else:
            self.happen(event)

    def _transition(self, circuit: str, state: str, by: str) -> None:
        for event in list(self._armed):
            if (event.more["circuit"], event.more["on"]) == (circuit, state):
                self._armed.remove(event)
                if event.more["culprit"]:
                    self._culprits[event.number] = by
                self.timeline.after(event.more["delay"], functools.partial(self.happen, event))

    def happen(self, event: Event) -> None:
        """What the plan says."""
        self.oracle.seen[event.what] += 1
        getattr(self, f"do_{event.what}")(event)

    def _for_a_while(self, event: Event, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        begin()
        self.timeline.after(event.more["for_ms"], end)

    def _set_for_a_while(self, event: Event, on: object, name: str) -> None:
        self._for_a_while(event, lambda: setattr(on, name, True), lambda: setattr(on, name, False))

    def _set_on_wire(self, event: Event, name: str) -> None:
        process = self._chosen(event)
        if process is not None:
            self._set_for_a_while(event, process.wire, name)

    def do_burst(self, event: Event) -> None:
        process = self._chosen(event)
        if process is None:
            return
        call = functools.partial(process.call, event.more["circuit"], event.more["longest"])
        for i in range(event.more["calls"]):
            process.after(i * event.more["gap"], call)

    def do_health(self, event: Event) -> None:
        self.health[event.more["circuit"]] = event.more["health"]

    def do_sick(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            self._set_for_a_while(event, process, "sick")

    def do_cut(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            process.wire.cut()

    def do_slow(self, event: Event) -> None:
        self._set_on_wire(event, "slow")

    def do_partition(self, event: Event) -> None:
        self._set_on_wire(event, "partitioned")

    def do_deaf(self, event: Event) -> None:
        self._set_on_wire(event, "deaf")

    def do_repeat(self, event: Event) -> None:
        self._set_on_wire(event, "repeats")

    def do_refuse(self, event: Event) -> None:
        self._for_a_while(
            event,
            lambda: setattr(self.server, "refusing", event.more["code"]),
            lambda: setattr(self.server, "refusing", ""),
        )

    def do_stop(self, event: Event) -> None:
        if self.server.up:
            self._for_a_while(event, self.server.stop, self.server.go_on)

    def _cut_all(self) -> None:
        for process in self.processes:
            process.wire.cut()

    def do_restart(self, event: Event) -> None:
        if not self.server.up:
            return
        kept = self.server.older(0)
        older = self.server.older(event.more["lag"])
        nothing = dict.fromkeys(self.plan.circuits)
        held = {"kept": kept, "older": older, "empty": nothing}[event.more["data"]]

        def back() -> None:
            self.server.replace(held)
            self.server.up = True

        self._cut_all()
        self._for_a_while(event, self.server.die, back)

    def do_failover(self, event: Event) -> None:
        if self.server.up:
            self.server.subscribers.clear()
            self._cut_all()
            self.server.replace(self.server.older(event.more["lag"]))

    def do_flush(self, event: Event) -> None:
        self.server.replace(dict.fromkeys(self.plan.circuits))

    def do_evict(self, event: Event) -> None:
        self.server.replace({event.more["circuit"]: None})

    def do_broken_key(self, event: Event) -> None:
        circuit = event.more["circuit"]

        def begin() -> None:
            self.server.replace({circuit: None})
            self.server.foreign.add(circuit)

        self._for_a_while(event, begin, lambda: self.server.foreign.discard(circuit))

    def do_store_clock(self, event: Event) -> None:
        self.server.step_clock(event.more["by"])

    def do_freeze(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            self._for_a_while(event, process.freeze, process.thaw)

    def do_suspend(self, event: Event) -> None:
        process = self._chosen(event)
        if process is None:
            return

        def thaw() -> None:
            self.oracle.suspended(process)
            process.thaw()

        self._for_a_while(event, lambda: process.freeze(clock=True), thaw)

    def do_crash(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            self.kill(process)
            self.timeline.after(event.more["for_ms"], self.join)

    def do_ask_for_flush(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            process.do(lambda: self.oracle.flushes(process))

    def do_leave(self, event: Event) -> None:
        process = self._chosen(event)
        if process is None or process.frozen:
            return

        def end() -> None:
            process.session.end()
            for circuit in self.plan.circuits:
                process.call(circuit, 0)  # guards go on working
            self.oracle.accounts(process)

        process.do(lambda: self.oracle.flushes(process))
        process.after(self.timeline._chance.choice([0, 20, 1_000]), end)
        self.timeline.after(1_500, lambda: self.kill(process))

    def do_fork(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None and not process.frozen and len(self.processes) < MOST_PROCESSES:
            self.processes.append(process.fork(self._name()))

    def do_join(self, event: Event) -> None:
        self.join()

    def do_upgrade(self, event: Event) -> None:
        self.join(upgrade=True)

    def do_cancel(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            self._set_for_a_while(event, process, "cancels")

    def do_operate(self, event: Event) -> None:
        process = self._chosen(event)
        if process is not None:
            step, ttl = event.more["step"], event.more["ttl"]
            process.do(lambda: operate(process, event.more["circuit"], step, ttl))

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Everything that the plan says; then everything heals."""
        for _ in range(self.plan.processes):
            self.timeline.after(self.timeline._chance.randint(0, 300), self.join)
        for event in self.plan.events:
            self.timeline.after(event.at, functools.partial(self.due, event))
        self.timeline.run(LONGEST)
        self._armed.clear()
        # What lasts a while ends by then, and what was delayed comes.
        self.timeline.run(LONGEST + 8_000)
        self._check_accounts()
        self._heal()
        self.server.finish()

    def _heal(self) -> None:
        """L1 to L5: without faults, and with traffic, all agree and the circuits work."""
        self.healed = True
        if not self.processes:
            self.join()
        for circuit in self.health:
            self.health[circuit] = "well" if self.plan.recovers else "broken"
        begin = self.timeline.now
        for circuit in self.plan.circuits:
            if (h := self.server.header(circuit)) is not None and h.state.startswith("forced"):
                process = self.processes[0]
                process.do(lambda c=circuit, p=process: operate(p, c, "release", None))  # type: ignore[misc]
        end = begin + self._patience()
        for process in self.processes:
            self._beat(process, end)
        self.timeline.run(end + 1_000)
        flushed = [process.session.flush() for process in self.processes]
        self.timeline.run(self.timeline.now + 3_000)
        for future in flushed:
            assert future.done(), "L4: a flush does not come back, though everything is well"
            error = future.exception()
            assert error is None, f"L4: a flush failed, though everything is well: {error}"
        # Health checks go on probing what is dead, so a push may be under way at any moment.
        for _ in range(100):
            if self._agreed():
                break
            self.timeline.run(self.timeline.now + 10)
        self._check_end()

    def _agreed(self) -> bool:
        return all(
            breaker._shadow.generation == self.server.generations[name]
            for process in self.processes
            for name, breaker in process.breakers.items()
        )

    def _beat(self, process: Process, end: int) -> None:
        if self.timeline.now < end and process.alive:
            for circuit in self.plan.circuits:
                process.call(circuit, 20)
            process.after(BEAT, lambda: self._beat(process, end))

    def _patience(self) -> int:
        """How long the timers of all policies may take, one after the other (ms)."""
        longest = 0
        for process in self.processes:
            for breaker in process.breakers.values():
                for p in (breaker._shadow.policy, breaker.policy.numbers):
                    most_open = max(p.open_interval_max, 10 * p.open_interval) * 11 // 10
                    probes = (p.success_threshold + 2) * (p.permit_lease + 600)
                    longest = max(longest, most_open + p.open_interval * 2 + probes)
        return longest + NEVER_WEDGED

    def _check_accounts(self) -> None:
        for process in self.processes:
            self.oracle.accounts(process)
        self.oracle.seen["runs"] += 1

    def _check_end(self) -> None:
        self._check_accounts()
        for circuit in self.plan.circuits:
            header = self.server.header(circuit)
            assert header is not None, f"L4: nobody has told the store of {circuit}"
            flushed = self._dead_flushed[circuit]
            recorded = self._dead[circuit]
            for process in self.processes:
                breaker = process.breakers[circuit]
                mine = breaker._shadow.header
                assert not breaker.degraded, f"L4: {process} is still degraded"
                assert mine is not None, f"L4: {process} has heard nothing of {circuit}"
                assert (mine.v, mine.nonce) == (header.v, header.nonce), (
                    f"L4: {process} holds {mine}, the store {header}"
                )
                account = breaker.conservation()
                # A health check goes on probing what is dead, also after the flush.
                waiting = int(self.plan.checks and not self.plan.recovers)
                assert account["pending"] <= waiting, f"L4: {process} of {circuit}: {account}"
                flushed += account["flushed"]
                recorded += account["recorded"]
                state = str(breaker.state)
                if self.plan.recovers:
                    assert state == "closed", f"L5: {circuit} is well and {process} has it {state}"
                else:
                    assert state != "closed", f"L5: {circuit} is dead and {process} calls it"
            executed = self.server.executed[circuit]
            assert flushed <= executed <= recorded, (
                f"S10: {recorded} outcomes of {circuit} were recorded, {flushed} acknowledged, "
                f"and the store has counted {executed}"
            )


def operate(process: Process, circuit: str, step: str, ttl: float | None) -> None:
    """An operator's word; nobody waits for the answer."""
    breaker = process.breakers[circuit]
    if step in ("reset", "release"):
        breaker._operate(step, "operator", "simulated")
    else:
        kind = {"force_open": "forced_open", "force_closed": "forced_closed"}[step]
        breaker._override(kind, "operator", "simulated", ttl)


@contextlib.contextmanager
def _watched(world: World) -> Iterator[None]:
    """Turn whatever goes wrong into a Failure."""
    logger, defects = logging.getLogger("distributed_breaker"), Defects()
    propagate, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    logger.addHandler(defects)
    try:
        yield
        if defects.found:
            raise defects.found[0]
    except Exception as error:
        cause = defects.found[0] if defects.found else error
        raise Failure(world.plan, world.timeline.now, cause) from None
    finally:
        logger.removeHandler(defects)
        logger.propagate = propagate
        logger.setLevel(level)


def run(plan: Plan, machine: Callable[[str], Machine] | None = None) -> World:
    """Carry out a plan; raises Failure when something does not hold.

    Args:
        plan: what happens.
        machine: makes what carries out the steps of one circuit; the model by default.
    """
    make = machine if machine is not None else lambda _: Modelled()
    world = World(plan, make)
    with _watched(world), patch.object(shadow, "MAX_PENDING", plan.most_pending):
        world.run()
    return world
