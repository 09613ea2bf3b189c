"""A simulated process: the real breaker, admission, shadow and session, on virtual time.

Only what touches the machine is replaced: the link's threads by ``Wire`` and ``_turn``, the waits
of callers by ``_wait``, the thread of a health check by a call.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from distributed_breaker import CircuitBreakerOpenException, Outcome, Policy, admission
from distributed_breaker.breaker import CircuitBreaker
from distributed_breaker.errors import StoreDown, StoreUnavailable
from distributed_breaker.link import LONGEST_WAIT
from distributed_breaker.linked import Clock
from distributed_breaker.model import Step
from distributed_breaker.permit import Permit
from distributed_breaker.session import FIRST_ANSWER, Ask, Asks, Request, Session
from distributed_breaker.shadow import Shadow
from distributed_breaker.workers import Dispatcher, HealthCheck
from tests.simulation.timeline import Action
from tests.simulation.wire import Wire

if TYPE_CHECKING:
    from tests.simulation.world import World


class Failed(Exception):
    """What a dependency raises."""


class SimSession(Session):
    """The session, whose rounds the process makes."""

    def __init__(self, process: Process) -> None:
        self._process = process
        super().__init__(
            process.clock,
            process.breakers,  # type: ignore[arg-type]
            lambda: random.Random(process.chance.getrandbits(32)),
        )

    def wake(self) -> None:
        self._process.wake()

    def ensure_started(self) -> bool:
        self._process.ensure_started()
        return not self.closed

    def want_pushes(self, wanted: bool) -> None:
        self._process.wire.want_pushes(wanted)

    def _refuse(self, request: Request) -> None:
        self._process.world.oracle.refused(self._process, request)
        super()._refuse(request)


class SimBreaker(CircuitBreaker):
    """The breaker; its health check is run by the process."""

    process: Process

    def __deepcopy__(self, seen: dict[int, Any]) -> SimBreaker:
        """As a fork copies it; breakers refuse to be pickled, which copying would do."""
        twin = SimBreaker.__new__(SimBreaker)
        seen[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, seen))
        return twin

    def run_check(self, now: int) -> None:
        wanted = self.check_wanted(now) if self.check is not None else ""
        if wanted:
            self.check._running_since = now  # type: ignore[union-attr]
            self.process.check(self, wanted)


class Process:
    """One process.  Everything that it does goes through ``do``."""

    def __init__(self, world: World, name: str, policy: Policy, explicit: bool) -> None:
        self.world = world
        self.name = name
        self.chance = random.Random(f"{world.plan.seed} {name}")
        self.policy = policy
        self.explicit = explicit
        self.alive = True
        self.sick = False
        self.cancels = False
        self._frozen = 0  # how many faults keep it frozen
        self._stands = 0  # since when its clock stands still (ms), 0: it does not
        self._late: list[Action] = []
        self._origin = self.chance.randrange(1_000, 10**9)
        self.frozen_at = -1
        self.clock = Clock(self.ms, lambda: self.ms() / 1000, lambda: self.ms() * 1_000_000)
        self.breakers: dict[str, SimBreaker] = {}
        self.dispatcher = Dispatcher()  # nobody listens, so it starts no thread
        self.recorded: dict[str, int] = {}
        self.wire = Wire(self, world.timeline, world.server, f"{world.plan.seed} wire {name}")
        self.session = SimSession(self)
        self._round: Asks | None = None
        self._started = self._woken = False
        self._alarm = 0
        self._asked: list[str] = []  # circuits whose acquire is under way

    def __repr__(self) -> str:
        return f"<process {self.name}>"

    def start(self) -> None:
        """Make the breakers, as the registry does."""
        for circuit in self.world.plan.circuits:
            shadow = Shadow(
                self.policy.numbers,
                f"r{self.name}",
                self._nonce,
                self.chance.random,
                self.ms(),
                explicit=self.explicit,
            )
            breaker = SimBreaker(
                circuit, self.policy, shadow, self.clock, self.session, self.dispatcher  # type: ignore[arg-type]
            )  # fmt: skip
            breaker.process = self
            if self.world.plan.checks:
                breaker.check = HealthCheck(lambda: None, self.policy.numbers.permit_lease)
            self.breakers[circuit] = breaker
            self.recorded[circuit] = 0
            self.session.add(breaker)

    def _nonce(self) -> str:
        return f"{self.chance.getrandbits(32):08x}"

    # ------------------------------------------------------------------ time

    def ms(self) -> int:
        """This process's monotonic clock."""
        now = self._stands or self.world.timeline.now
        return self._origin + now

    def after(self, delay: int, action: Action) -> None:
        # A dead one schedules nothing: what it left half done ends when garbage is collected, which
        # must not take a number from the run's chance.
        if self.alive:
            self.world.timeline.after(delay, lambda: self.do(action))

    def do(self, action: Action) -> None:
        """Do something now, or when the process can."""
        if not self.alive:
            return
        if self._frozen:
            self._late.append(action)
            return
        action()
        self.world.oracle.look(self)

    def freeze(self, *, clock: bool = False) -> None:
        """Stand still; with ``clock`` its clock does, too (a suspended machine)."""
        self._frozen += 1
        self.frozen_at = self.world.timeline.now
        if clock and not self._stands:
            self._stands = self.world.timeline.now

    def thaw(self) -> None:
        self._frozen -= 1
        if self._frozen:
            return
        if self._stands:
            self._origin -= self.world.timeline.now - self._stands
            self._stands = 0
        self.frozen_at = self.world.timeline.now
        late, self._late = self._late, []
        for action in late:
            self.after(0, action)

    @property
    def frozen(self) -> bool:
        return self._frozen > 0

    def die(self) -> None:
        """SIGKILL."""
        self.alive = False
        self.wire.end()

    # ------------------------------------------------------------------ the link's sending thread

    def ensure_started(self) -> None:
        """A forked child makes rounds from its first use on."""
        if not self._started:
            self._started = True
            self.wake()

    def wake(self) -> None:
        self._woken = True
        if self._round is None and self._started:
            self.after(self.chance.randint(0, 1), self._turn)

    def _turn(self) -> None:
        """Make a round, if none is being made and one is due."""
        if self._round is not None:
            return
        if not self._woken and self.ms() < self.session.due():
            self._set_alarm()
            return
        self._woken = False
        self._round = self.session.round()
        self._go_on(lambda: next(self._round))  # type: ignore[arg-type]

    def _set_alarm(self) -> None:
        self._alarm += 1
        alarm = self._alarm
        wait = min(max(0, self.session.due() - self.ms()), round(LONGEST_WAIT * 1000))

        def ring() -> None:
            if alarm == self._alarm:
                # Whatever the time is: a thread that waits 2 s looks again.
                self._woken = True
                self._turn()

        self.after(wait, ring)

    def _go_on(self, step: Callable[[], Ask]) -> None:
        try:
            ask = step()
        except StopIteration:
            self._round = None
            if self._woken:
                self.after(0, self._turn)
            else:
                self._set_alarm()
            return
        steps = list(ask.about) if ask.what == "run" else []
        if steps:
            self.world.oracle.sent(self, steps)
        self.wire.ask(ask, lambda value: self._answered(steps, value))

    def _answered(self, steps: list[tuple[str, Step]], value: Any) -> None:
        asks = self._round
        assert asks is not None
        self.world.oracle.answered(self, steps, value)
        if isinstance(value, StoreDown):
            self._go_on(lambda: asks.throw(value))
        else:
            self._go_on(lambda: asks.send(value))

    # ------------------------------------------------------------------ calls

    def call(self, circuit: str, longest: int) -> None:
        """One protected call, from its admission to its end."""
        breaker = self.breakers[circuit]
        if breaker._era is not None:
            self._admitted(breaker, breaker.acquire(), longest)
            return
        seconds = breaker._seconds()
        if seconds < breaker._refuse_until:
            breaker._rejection(seconds)
            return
        self._admission(breaker, longest, by_check=False)

    def check(self, breaker: SimBreaker, wanted: str) -> None:
        """A health check: it learns whether it passes, or is the probe; some hang for ever."""
        if self.chance.random() < 0.02:
            return
        if wanted == "probe":
            self._admission(breaker, 20, by_check=True)
            return

        def learn() -> None:
            check = breaker.check
            assert check is not None
            check._running_since = None
            check.passed = check.passed or self._outcome(breaker.name)[0] is Outcome.SUCCESS

        self.after(self.chance.randint(0, 20), learn)

    def _admission(self, breaker: SimBreaker, longest: int, *, by_check: bool) -> None:
        rules = admission._admission(breaker, by_check)
        began = self.world.timeline.now

        def go_on(step: Callable[[], Any]) -> None:
            try:
                future, owned = step()
            except StopIteration as end:
                self.world.oracle.waited(self, began)
                self._admitted(breaker, end.value, longest, by_check=by_check)
            except CircuitBreakerOpenException:
                self.world.oracle.waited(self, began)
                if by_check:
                    breaker.check._running_since = None  # type: ignore[union-attr]
            else:
                self._wait(rules, future, owned, go_on, not by_check)

        go_on(lambda: next(rules))

    def _wait(
        self,
        rules: Generator[Any, Any, Permit],
        future: Future[Any],
        owned: bool,
        go_on: Callable[[Callable[[], Any]], None],
        cancellable: bool,
    ) -> None:
        """What ``admission.wait`` does, without blocking."""
        over = False

        def end(value: Callable[[], Any]) -> None:
            nonlocal over
            if not over:
                over = True
                result = value()
                go_on(lambda: rules.send(result))

        def answer() -> Any:
            try:
                return future.result(0)
            except StoreUnavailable:
                return None

        def cancel() -> None:
            nonlocal over
            if not over:
                over = True
                rules.close()

        future.add_done_callback(lambda _: self.after(0, lambda: end(answer)))
        given_up = lambda: admission.given_up(future, owned)  # noqa: E731
        self.after(round(FIRST_ANSWER * 1000), lambda: end(given_up))
        if cancellable and self.chance.random() < (0.5 if self.cancels else 0.05):
            self.after(self.chance.choice([0, 1, 2, 5, 100]), cancel)

    def _admitted(
        self, breaker: SimBreaker, permit: Permit, longest: int, *, by_check: bool = False
    ) -> None:
        self.world.oracle.admitted(self, breaker, permit)
        duration = self.chance.randint(0, longest)
        if self.world.health[breaker.name] == "slow":
            duration += 150

        def end() -> None:
            if by_check:
                breaker.check._running_since = None  # type: ignore[union-attr]
            self.settle(breaker, permit)

        self.world.calls.setdefault(self.name, {})[id(permit)] = (breaker.name, permit)
        self.after(duration, end)

    def settle(self, breaker: SimBreaker, permit: Permit) -> None:
        """The call ends, as the dependency wants it."""
        self.world.calls.get(self.name, {}).pop(id(permit), None)
        self.world.oracle.ended(self, breaker.name, permit)
        outcome, open_for = self._outcome(breaker.name)
        self.recorded[breaker.name] += 1
        if outcome is Outcome.SUCCESS:
            permit.success()
        elif outcome is Outcome.FAILURE:
            permit.failure(Failed("it failed"), open_for)
        else:
            permit.ignore()

    def _outcome(self, circuit: str) -> tuple[Outcome, float | None]:
        health = "broken" if self.sick else self.world.health[circuit]
        fails = {"well": 0.01, "slow": 0.01, "broken": 0.95, "flaky": 0.5}[health]
        if self.world.healed:
            fails = 1.0 if health == "broken" else 0.0
        elif self.chance.random() < 0.03:
            return Outcome.IGNORED, None
        if self.chance.random() >= fails:
            return Outcome.SUCCESS, None
        wants_pause = self.chance.random() < 0.02 and not self.world.healed
        return Outcome.FAILURE, self.chance.choice([0.2, 2.0, 50.0]) if wants_pause else None

    # ------------------------------------------------------------------ forks

    def fork(self, name: str) -> Process:
        """A child that was forked at this moment, with what one thread of the parent was doing."""
        child = Process(self.world, name, self.policy, self.explicit)
        child._origin = self._origin
        seen: dict[int, Any] = {
            id(self): child, id(self.session): child.session, id(self.world): self.world,
            id(self.dispatcher): child.dispatcher,
        }  # fmt: skip
        for breaker in self.breakers.values():
            seen[id(breaker._lock)] = threading.Lock()
            seen[id(breaker.first_answer)] = Future()
        running = list(self.world.calls.get(self.name, {}).values())
        breakers, held = copy.deepcopy((self.breakers, running[:1]), seen)
        child.breakers.update(breakers)
        for breaker in breakers.values():
            breaker._clock, breaker._seconds = child.clock, child.clock.seconds
            breaker._now_ns = child.clock.ns
            breaker._shadow._nonce = child._nonce
            breaker._shadow._chance = child.chance.random
            child.recorded[breaker.name] = 0
            for era in (breaker._era, *breaker._retired):
                if era is not None:
                    era.append = era.tally.append
        child.session.fork(f"r{name}")
        self.world.oracle.forked(self, child)
        for circuit, permit in held:
            if child.chance.random() < 0.5:
                delay = child.chance.randint(0, 50)
                child.after(delay, lambda c=circuit, p=permit: child.settle(child.breakers[c], p))  # type: ignore[misc]
        return child
