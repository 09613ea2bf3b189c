"""Name → breaker: one registry for one store and namespace in one process, bounded."""

from __future__ import annotations

import random
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from .admission import result, result_async
from .breaker import CircuitBreaker, stored_circuit
from .errors import StoreError, StoreUnavailable
from .link import Link
from .linked import SYSTEM_CLOCK, Clock, LinkedCircuit
from .nodes import Command
from .policy import Policy, check_circuit, check_namespace
from .process import OwnLock, follow_process
from .session import Request
from .shadow import Shadow
from .snapshot import Snapshot, snapshot_of
from .store import RedisStore
from .transitions import Transition, log_transition
from .workers import Dispatcher

MAX_BREAKERS = 10_000
# To a breaker that nobody outside holds: the dictionary's, its own Turn's, getrefcount's argument.
OWN_REFERENCES = 3


class CircuitBreakerRegistry:
    """The breakers of one process that share one store and namespace.

    Made by ``from_url``.  Usable as a context manager, which closes it.
    """

    _lock = OwnLock()

    def __init__(
        self, store: RedisStore | None, namespace: str, clock: Callable[[], float] | None = None
    ) -> None:
        self.kind = CircuitBreaker  # what breakers are made of; see make_with
        self.namespace = check_namespace(namespace)
        self._store = store
        self._clock = SYSTEM_CLOCK if clock is None else _clock_of(clock)
        self._breakers: dict[str, CircuitBreaker] = {}
        # At memory:// it would take the only thread, so there somebody else must listen first.
        self._dispatcher = Dispatcher(() if store is None else (log_transition,))
        self._random = random.SystemRandom()
        self._reporter = uuid.uuid4().hex[:16]
        self.faults: Any = None  # what is injected into its circuits, if anything is: faults.py
        self.flush_at_exit = True  # False: what is recorded and not yet told is given up by close
        circuits: dict[str, LinkedCircuit] = self._breakers  # type: ignore[assignment]
        self._link = None if store is None else Link(store, self._clock, self._renew, circuits)
        if self._link is not None:
            self._link.follower = self
        follow_process(self)

    @classmethod
    def from_url(
        cls,
        url: str,
        namespace: str = "default",
        *,
        clock: Callable[[], float] | None = None,
    ) -> CircuitBreakerRegistry:
        """A registry for the store at ``url``.  Connects to nothing and never fails for a server
        that is not there.

        Args:
            url: ``redis://host:port/db``, ``rediss://…`` (TLS), ``unix:///path?db=0``,
                ``redis+sentinel://host:26379,host2:26379/mymaster/0``,
                ``redis+cluster://host:7000,host2:7001``, or ``memory://`` (this process only).
            namespace: circuits of different namespaces have nothing to do with each other.
            clock: monotonic seconds, in place of ``time.monotonic``; for tests.

        Raises:
            ValueError: the URL or the namespace cannot be used.
        """
        check_namespace(namespace)
        if isinstance(url, str) and url.startswith("memory://"):
            return cls(None, namespace, clock)
        return cls(RedisStore(url, namespace), namespace, clock)

    def __repr__(self) -> str:
        kind = "memory" if self._store is None else "redis"
        return f"<CircuitBreakerRegistry {self.namespace!r} {kind}, {len(self._breakers)} breakers>"

    @property
    def url(self) -> str:
        """Where the circuits are kept, with the credentials; ``memory://``: in this process."""
        return "memory://" if self._store is None else self._store.url

    def breaker(
        self, name: str, policy: Policy | None = None, *, disabled: bool = False
    ) -> CircuitBreaker:
        """The breaker of one circuit; the same object for the same name.

        Args:
            name: letters, digits and ``_.:@/-``, at most 128.
            policy: None takes the policy that the store holds, or the defaults.
            disabled: begin switched off; see ``CircuitBreaker.switch``.

        Raises:
            ValueError: the name is not allowed, the breaker exists with another policy, or the
                registry is full of breakers that are in use.
        """
        existing = self._breakers.get(name)
        if existing is None:
            check_circuit(name)
            if policy is not None and not isinstance(policy, Policy):
                raise TypeError(f"policy must be a Policy, not {policy!r}")
            with self._lock:
                existing = self._breakers.get(name)
                if existing is None:
                    return self._make(name, policy, disabled)
        if policy is not None and policy != existing.policy:
            raise ValueError(
                f"circuit {name!r} already has another policy in this process: "
                f"{existing.policy!r}; leave the policy out, or give the same one"
            )
        return existing

    def _make(self, name: str, policy: Policy | None, disabled: bool) -> CircuitBreaker:
        if len(self._breakers) >= MAX_BREAKERS:
            self._evict()
        given = policy if policy is not None else Policy()
        shadow = Shadow(
            given.numbers,
            self._reporter,
            self._nonce,
            self._random.random,
            self._clock.ms(),
            alone=self._link is None,
            explicit=policy is not None,
            auto_recovery=given.auto_recovery,
        )
        shadow.disabled = disabled
        made = self.kind(name, given, shadow, self._clock, self._link, self._dispatcher)
        self._breakers[name] = made
        if self.faults is not None:
            self.faults.made(made)
        if self._link is not None and not disabled:
            self._link.add(made)
        return made

    def make_with(self, kind: type[CircuitBreaker]) -> None:
        """Make breakers of this class from now on, and those that there are, too.

        For instrumentation: whoever does not want it pays nothing for it.

        Args:
            kind: a subclass that adds methods and no fields, or CircuitBreaker itself again.
        """
        with self._lock:
            self.kind = kind
            for breaker in self._breakers.values():
                breaker.__class__ = kind

    def forget(self, name: str) -> bool:
        """Give up a breaker that nobody outside holds, that is closed and has nothing to report.
        The store keeps its circuit.  Returns whether it is gone."""
        with self._lock:
            return name not in self._breakers or self._forget(name)

    def _forget(self, name: str) -> bool:
        # No name may be left to the breaker here: it would look as if somebody held it.
        if sys.getrefcount(self._breakers[name]) > OWN_REFERENCES:
            return False
        if not self._breakers[name].dispensable:
            return False
        del self._breakers[name]
        return True

    def _evict(self) -> None:
        """Make room; the store keeps the circuits of breakers that are given up."""
        for name in list(self._breakers):
            if self._forget(name) and len(self._breakers) < MAX_BREAKERS * 9 // 10:
                return
        if len(self._breakers) >= MAX_BREAKERS:
            raise ValueError(
                f"this registry holds {MAX_BREAKERS} breakers, all in use: name circuits after "
                f"dependencies, not after users or requests"
            )

    def _nonce(self) -> str:
        return f"{self._random.getrandbits(32):08x}"

    def forked(self) -> None:
        """A child must not keep locks that a thread of its parent held."""
        if self._link is not None:
            self._link.forked()
            return
        reporter = self._renew()
        for breaker in self._breakers.values():
            breaker.forked(reporter)

    def _renew(self) -> str:
        """After a fork: a new id and new locks."""
        vars(self).pop("_lock", None)
        self._dispatcher.forked()
        self._dispatcher = Dispatcher(self._dispatcher.listeners)
        self._reporter = uuid.uuid4().hex[:16]
        for breaker in self._breakers.values():
            breaker._dispatcher = self._dispatcher
        return self._reporter

    # ------------------------------------------------------------------ all circuits

    def flush(self, timeout: float = 1.0) -> None:
        """Return once everything recorded before the call is acknowledged by the store, and
        listeners have heard of it.

        Raises:
            StoreUnavailable: it was not, within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        result(self._flushing(), timeout)
        if not self._dispatcher.join(max(0.0, deadline - time.monotonic())):
            raise StoreUnavailable(f"listeners have not finished within {timeout:g} s")

    async def flush_async(self, timeout: float = 1.0) -> None:
        """The same without blocking the event loop; does not wait for listeners."""
        await result_async(self._flushing(), timeout)

    def _flushing(self) -> Future[Any]:
        if self._link is not None:
            return self._link.flush()
        for breaker in list(self._breakers.values()):
            breaker.drain()
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def snapshot(self, timeout: float = 1.0) -> dict[str, Snapshot]:
        """The fleet's view of every circuit in the namespace, also those of other processes.

        Raises:
            StoreUnavailable: the store did not answer within ``timeout`` seconds.
        """
        if self._link is None:
            return {name: breaker.snapshot() for name, breaker in sorted(self._breakers.items())}
        return self._snapshots(result(self._reading(), timeout))

    def examine(self, commands: Sequence[Command], timeout: float = 1.0) -> list[Any]:
        """The store's answers to plain commands, each of them or a StoreError; sent by the link.

        Raises:
            StoreUnavailable: the store did not answer within ``timeout`` seconds, or memory:// has
                none.
        """
        store, link = self._store, self._link
        if store is None or link is None:
            raise StoreUnavailable("circuits at memory:// have no store")
        return list(result(link.submit(Request("look", look=lambda: store.ask(commands))), timeout))

    @property
    def shared(self) -> bool:
        """Whether there is a store; False for memory://."""
        return self._store is not None

    def breakers(self) -> list[CircuitBreaker]:
        """Those that this process holds."""
        return list(self._breakers.values())

    def on_transition(self, callback: Callable[[Transition], object]) -> None:
        """Call ``callback`` with each Transition of any circuit that this process holds, or will
        hold, in order, from a thread of the library's."""
        heard_by = self._dispatcher.listeners or (log_transition,)
        self._dispatcher.listeners = (*heard_by, callback)

    def snapshot_here(self) -> dict[str, Snapshot]:
        """What this process knows of its own circuits by itself; the store is not asked."""
        breakers = sorted(self._breakers.items())
        return {name: snapshot_of(name, None, 0, breaker.own_view()) for name, breaker in breakers}

    async def snapshot_async(self, timeout: float = 1.0) -> dict[str, Snapshot]:
        """The same without blocking the event loop."""
        if self._link is None:
            return self.snapshot()
        return self._snapshots(await result_async(self._reading(), timeout))

    def _reading(self) -> Future[Any]:
        store, link = self._store, self._link
        assert store is not None
        assert link is not None

        def look() -> tuple[list[str], int, list[dict[str, str] | StoreError]]:
            names = sorted({*store.names(), *self._breakers})
            return names, *store.read(names)

        return link.submit(Request("look", look=look))

    def _snapshots(
        self, read: tuple[list[str], int, list[dict[str, str] | StoreError]]
    ) -> dict[str, Snapshot]:
        names, now, all_fields = read
        snapshots = {}
        for name, fields in zip(names, all_fields, strict=True):
            circuit = stored_circuit(fields)
            breaker = self._breakers.get(name)
            if circuit is None and breaker is None:
                continue  # its key has expired
            own = None if breaker is None else breaker.own_view()
            snapshots[name] = snapshot_of(name, circuit, now, own)
        return snapshots

    def close(self) -> None:
        """Flush, and stop the threads.  Safe to call twice; also done at exit.

        Breakers keep working on what this process knows.
        """
        if self._link is not None:
            self._link.close(flush=self.flush_at_exit)
        self._dispatcher.close(1.0)

    def __enter__(self) -> CircuitBreakerRegistry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _clock_of(seconds: Callable[[], float]) -> Clock:
    return Clock(lambda: round(seconds() * 1000), seconds, lambda: round(seconds() * 1e9))
