"""Failures, delays and outages of the store, made on purpose: for tests, and for one's own process.

Refused unless ``CIRCUIT_BREAKER_FAULT_INJECTION=true`` stands in the process's environment.  What
is injected holds in this process only, for a bounded time, and shows in the log and in its health.
Circuits that no fault concerns are not touched; those that one concerns send each call the long
way, through ``admitted``.
"""

from __future__ import annotations

import asyncio
import fnmatch
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from .breaker import CircuitBreaker
from .errors import StoreDown, StoreError
from .link import Store
from .model import Reply, Step
from .permit import Permit
from .policy import check_number
from .process import OwnLock, follow_process
from .registry import CircuitBreakerRegistry
from .store import Subscription

SWITCH = "CIRCUIT_BREAKER_FAULT_INJECTION"
LONGEST = 3_600.0  # s that one fault may last
LONGEST_DELAY = 300.0  # s
MOST = 100  # faults of one registry at once
SLICE = 0.05  # s after which a call that is delayed looks whether its fault is gone

log = logging.getLogger("distributed_breaker")


class FaultsNotEnabled(RuntimeError):
    """Faults may not be injected into this process."""


class InjectedFailure(ConnectionError):
    """What a call ends with when its failure is injected, unless another error is asked for."""


def enabled() -> bool:
    """Whether faults may be injected into this process."""
    return os.environ.get(SWITCH, "").strip().lower() in ("true", "1", "yes", "on")


class Fault:
    """Something that goes wrong on purpose, until ``remove`` or the end of its time.

    Usable as a context manager, which removes it.

    Attributes:
        what: a sentence for people.
        seconds: for how long it holds unless it is removed.
        ends: when that is over, by the registry's clock.
    """

    def __init__(self, among: _Faults, what: str, seconds: float) -> None:
        self._among = among
        self.what = what
        self.seconds = check_number("seconds", seconds, 0.001, LONGEST)
        self.ends = among.now() + seconds

    @property
    def active(self) -> bool:
        """Whether it holds now."""
        return self in self._among.faults and self._among.now() < self.ends

    def begin(self) -> None:
        """Make it hold."""

    def end(self) -> None:
        """Make it no longer hold."""

    def remove(self) -> None:
        """End it.  Safe to call twice."""
        self._among.remove(self)

    def __repr__(self) -> str:
        return f"<Fault: {self.what}>"

    def __enter__(self) -> Fault:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


# ---------------------------------------------------------------------------- calls


def inject(
    registry: CircuitBreakerRegistry,
    circuits: str,
    *,
    failures: float = 0.0,
    error: Callable[[], Exception] = InjectedFailure,
    latency: float = 0.0,
    delayed: float = 1.0,
    seconds: float = 60.0,
    seed: int | None = None,
) -> Fault:
    """Make calls of this process fail, or take longer, before the dependency is asked.

    To the circuit it is as if the call itself had done so: failures open it, and delays count as
    duration.  Health checks that are an open circuit's probe are concerned, too; circuits that are
    switched off are not.

    Args:
        registry: whose circuits.
        circuits: a name, or a pattern with ``*``, ``?`` and ``[…]``; also those made later.
        failures: share of the calls that fail, 0 to 1.
        error: makes what they raise: of a client's circuit, an error of its library
            (``redis.ConnectionError``), which is what its fallbacks are for.
        latency: seconds that a call is delayed, up to 300.
        delayed: share of the calls that are, 0 to 1.
        seconds: for how long, up to 3600; less if it is removed before.
        seed: of the chance that picks the calls.

    Raises:
        FaultsNotEnabled: the environment does not say that they may be.
        ValueError, TypeError: a number is out of range, or nothing would go wrong.
    """
    check_number("failures", failures, 0.0, 1.0)
    check_number("latency", latency, 0.0, LONGEST_DELAY)
    check_number("delayed", delayed, 0.0, 1.0)
    if not failures and not (latency and delayed):
        raise ValueError("nothing would go wrong: give failures or latency")
    parts = [f"{failures * 100:.3g} % of the calls fail"] if failures else []
    parts += [f"{delayed * 100:.3g} % take {latency:g} s longer"] if latency and delayed else []
    what = f"injected into circuits {circuits}: {', '.join(parts)}"
    among = _of(registry)
    return among.add(
        _OfCalls(among, what, seconds, circuits, failures, error, latency, delayed, seed)
    )


class _OfCalls(Fault):
    def __init__(
        self,
        among: _Faults,
        what: str,
        seconds: float,
        circuits: str,
        failures: float,
        error: Callable[[], Exception],
        latency: float,
        delayed: float,
        seed: int | None,
    ) -> None:
        super().__init__(among, what, seconds)
        self._circuits = circuits
        self._failures, self._error = failures, error
        self._latency, self._delayed = latency, delayed
        self._chance = random.Random(seed)

    def concerns(self, circuit: str) -> bool:
        return fnmatch.fnmatchcase(circuit, self._circuits)

    def draw(self) -> tuple[float, Exception | None]:
        """For one call: seconds to wait, and what to raise then."""
        chance = self._chance.random
        wait = self._latency if chance() < self._delayed else 0.0
        return wait, self._error() if chance() < self._failures else None

    def begin(self) -> None:
        self._among.inspect()

    def end(self) -> None:
        self._among.inspect()


class _Inspector:
    """Has the faults of one circuit happen to its calls."""

    def __init__(self, among: _Faults, faults: Sequence[_OfCalls]) -> None:
        self._among = among
        self._faults = faults

    def admitted(self, permit: Permit) -> None:
        for fault in self._happening(permit):
            wait, error = fault.draw()
            end = time.monotonic() + wait
            while fault.active and (left := end - time.monotonic()) > 0:
                time.sleep(min(SLICE, left))
            if error is not None:
                raise error

    async def admitted_async(self, permit: Permit) -> None:
        for fault in self._happening(permit):
            wait, error = fault.draw()
            end = time.monotonic() + wait
            while fault.active and (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(SLICE, left))
            if error is not None:
                raise error

    def _happening(self, permit: Permit) -> Sequence[_OfCalls]:
        if permit._breaker.disabled or not (permit._era or permit._lease):
            return ()  # nobody counts it, or it is part of a probe that was looked at
        happening = [fault for fault in self._faults if fault.active]
        if len(happening) < len(self._faults):
            self._among.expire()
        return happening


# ---------------------------------------------------------------------------- the store


def store_outage(registry: CircuitBreakerRegistry, *, seconds: float = 60.0) -> Fault:
    """Let this process go on as if its store refused all connections.

    Args:
        registry: whose store.
        seconds: for how long, up to 3600.

    Raises:
        FaultsNotEnabled: the environment does not say that they may be.
        ValueError, TypeError: ``seconds`` is out of range, there is an outage already, or the
            registry is ``memory://``.
    """
    if registry._link is None:
        raise ValueError("a memory:// registry has no store that could be away")
    among = _of(registry)
    return among.add(_Outage(among, "injected: the store seems to be away", seconds))


class _Outage(Fault):
    """Stands in for the store, and steps aside when its time is over."""

    def begin(self) -> None:
        link = self._among.registry._link
        assert link is not None
        self._link = link
        self._store: Store = link.use(self)

    def end(self) -> None:
        self._link.use(self._store)

    def run(self, steps: Sequence[tuple[str, Step]]) -> list[Reply | StoreError]:
        return self._or_away().run(steps)

    def poll(self, circuits: Sequence[str]) -> tuple[int, list[str | None]]:
        return self._or_away().poll(circuits)

    def remember(self, circuits: Sequence[str]) -> None:
        self._or_away().remember(circuits)

    def read(self, circuits: Sequence[str]) -> tuple[int, list[dict[str, str] | StoreError]]:
        return self._or_away().read(circuits)

    def log(self, circuit: str, count: int = 50) -> list[dict[str, str]]:
        return self._or_away().log(circuit, count)

    def subscribe(self) -> Subscription:
        return self._or_away().subscribe()

    def _or_away(self) -> Store:
        if self.active:
            raise StoreDown("CONNECTION", "an outage of the store is injected")
        self._among.expire()
        return self._store

    def close(self) -> None:
        self._store.close()

    def forked(self) -> None:
        self._store.forked()


# ---------------------------------------------------------------------------- all of a registry


def faults(registry: CircuitBreakerRegistry) -> list[Fault]:
    """Those that hold now, the oldest first."""
    among: _Faults | None = registry.faults
    if among is None:
        return []
    among.expire()
    return list(among.faults)


def remove_all(registry: CircuitBreakerRegistry) -> None:
    """End all faults of a registry."""
    for fault in faults(registry):
        fault.remove()


class _Faults:
    """What goes wrong in one registry."""

    _lock = OwnLock()

    def __init__(self, registry: CircuitBreakerRegistry) -> None:
        self.registry = registry
        self.faults: tuple[Fault, ...] = ()
        self.now = registry._clock.seconds
        follow_process(self)

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            if len(self.faults) >= MOST:
                raise ValueError(f"{MOST} faults hold already: remove some")
            if isinstance(fault, _Outage) and any(isinstance(f, _Outage) for f in self.faults):
                raise ValueError("an outage of the store is injected already: remove it first")
            self.faults = (*self.faults, fault)
            fault.begin()
        log.warning("%s; for %g s", fault.what, fault.seconds)
        return fault

    def remove(self, fault: Fault) -> None:
        with self._lock:
            if fault not in self.faults:
                return
            self.faults = tuple(f for f in self.faults if f is not fault)
            fault.end()
        log.warning("no longer %s", fault.what)

    def expire(self) -> None:
        """End those whose time is over."""
        now = self.now()
        for fault in self.faults:
            if now >= fault.ends:
                self.remove(fault)

    def made(self, breaker: CircuitBreaker) -> None:
        """A new breaker may be concerned, too."""
        with self._lock:
            self._show(breaker)

    def inspect(self) -> None:
        """Have the calls looked at that a fault concerns, and no others.  The lock is held."""
        for breaker in list(self.registry._breakers.values()):
            self._show(breaker)

    def _show(self, breaker: CircuitBreaker) -> None:
        of_calls = (fault for fault in self.faults if isinstance(fault, _OfCalls))
        concerned = [fault for fault in of_calls if fault.concerns(breaker.name)]
        if concerned or isinstance(breaker._inspector, _Inspector):
            breaker.inspect(_Inspector(self, concerned) if concerned else None)

    def close(self) -> None:
        """The process ends, and the faults with it."""

    def forked(self) -> None:
        """A child has its parent's faults, for as long as they last there."""
        vars(self).pop("_lock", None)


def _of(registry: CircuitBreakerRegistry) -> _Faults:
    if not enabled():
        raise FaultsNotEnabled(
            f"faults may not be injected into this process: set {SWITCH}=true in its environment, "
            f"and never where users' requests are served without your knowledge"
        )
    with registry._lock:
        if registry.faults is None:
            registry.faults = _Faults(registry)
        found: _Faults = registry.faults
        return found
