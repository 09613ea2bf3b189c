"""The link between one process and its store: the two threads on which a session is carried out.

One thread sends: it makes the session's rounds and does what they ask for.  The other listens to
pushes.  They are started at first use, also in a forked child, and never touch the application's
connections.  What is said, and what the answers mean, stands in ``session.py``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from .errors import StoreDown, StoreError
from .linked import Clock, LinkedCircuit
from .model import Reply, Step
from .process import (
    Follower,
    OwnLock,
    before_uwsgi_forks,
    close_with_process,
    uwsgi_without_threads,
)
from .session import Ask, Asks, Request, Session
from .store import Subscription
from .workers import start_thread

PING = 1.0  # s between signs of life on the subscription
LONGEST_WAIT = 2.0  # s after which a waiting thread looks again, whatever it was told

log = logging.getLogger("distributed_breaker")

_NEVER = threading.Event()


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


class Link(Session):
    """One process's link to one store.

    Args:
        store: the Redis side.
        clock: where time comes from.
        reporter: makes this process's random id; asked again after a fork.
        circuits: gives the circuits that this process holds, by name.
    """

    _start_lock = OwnLock()

    def __init__(
        self,
        store: Store,
        clock: Clock,
        reporter: Callable[[], str],
        circuits: dict[str, LinkedCircuit],
    ) -> None:
        self._store = store
        self._new_reporter = reporter
        self._subscription: Subscription | None = None
        super().__init__(clock, circuits)
        self.follower: Follower = self  # what is closed when the process ends: the registry

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._wake = threading.Event()
        vars(self).pop("_start_lock", None)
        self._sender: threading.Thread | None = None
        self._listener: threading.Thread | None = None
        self._stopping = threading.Event()
        self._pushes_wanted = threading.Event()
        self._beat = 0  # counts the sender's rounds; 0: it has never run
        self._no_threads = False

    def wake(self) -> None:
        self._wake.set()

    def want_pushes(self, wanted: bool) -> None:
        if wanted:
            self._pushes_wanted.set()
        else:
            self._pushes_wanted.clear()

    def ensure_started(self) -> bool:
        """Start the threads unless they run.  Returns False where threads cannot run."""
        if self._sender is not None and self._sender.is_alive():
            return True
        if self.closed or self._no_threads or sys.is_finalizing() or before_uwsgi_forks():
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
                self._without_threads(str(error))
                return False
        close_with_process(self.follower)
        return True

    def _without_threads(self, why: str) -> None:
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
        if self._beat == 0 and not self.closed:
            self._without_threads("the sending thread has not run")
        super().missed_first_answer(circuit)

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

    def close(self, timeout: float = 1.0, *, flush: bool = True) -> None:
        """Flush and stop.  Safe to call twice; guards keep working on the last mirror."""
        if self.closed:
            return
        running = self._sender is not None and self._sender.is_alive()
        if flush and running and not self.down:
            with contextlib.suppress(Exception):
                self.flush().result(timeout)
        self.closed = True
        self._stopping.set()
        self._pushes_wanted.set()
        self._wake.set()
        subscription = self._subscription
        if subscription is not None:
            subscription.wake()
        for thread in (self._sender, self._listener):
            if running and thread is not None and thread is not threading.current_thread():
                thread.join(timeout)
        self._store.close()
        self.end()

    def forked(self) -> None:
        """R10: a child has none of its parent's threads and connections."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        self._store.forked()
        self.fork(self._new_reporter())

    def use(self, store: Store) -> Store:
        """Go on with another store, and hear pushes from it; returns the one before."""
        before, self._store = self._store, store
        subscription = self._subscription
        if subscription is not None:
            subscription.wake()
        self._poll_all = True
        self.wake()
        return before

    # ------------------------------------------------------------------ the sending thread

    def _send_loop(self) -> None:
        if self._no_threads:
            # It was only late: the first admission had already given up on it.
            self._no_threads = False
            self._outage.end()
        stopping, wake = self._stopping, self._wake
        while not stopping.is_set():
            self._beat += 1
            wait = max(0, self.due() - self._clock.ms()) / 1000
            wake.wait(min(wait, LONGEST_WAIT))
            self._stay_behind(stopping)
            wake.clear()
            if not stopping.is_set():
                self._carry_out(self.round())

    def _stay_behind(self, stopping: threading.Event) -> None:
        """Never returns if this thread is the parent's, in a forked child.

        Threads are not copied, but a thread that gevent has made a greenlet is, and the child would
        have two senders, one of them on the parent's connection.  It cannot end, as ``threading``
        no longer knows it; so it waits for ever.
        """
        if self._stopping is not stopping:
            _NEVER.wait()

    def _carry_out(self, asks: Asks) -> None:
        """Do what a round asks for, one after the other, and tell it how that went."""
        stopping = self._stopping
        try:
            ask = next(asks)
            while True:
                answer, error = None, None
                try:
                    answer = self._do(ask)
                except Exception as raised:
                    error = raised
                self._stay_behind(stopping)
                ask = asks.send(answer) if error is None else asks.throw(error)
        except StopIteration:
            pass

    def _do(self, ask: Ask) -> Any:
        if ask.what == "run":
            return self._store.run(ask.about)
        if ask.what == "poll":
            return self._store.poll(ask.about)
        if ask.what == "remember":
            return self._store.remember(ask.about)
        return ask.about()

    # ------------------------------------------------------------------ the listening thread

    def _listen_loop(self) -> None:
        stopping, wanted = self._stopping, self._pushes_wanted
        while not stopping.is_set():
            told = wanted.wait(LONGEST_WAIT)
            self._stay_behind(stopping)
            if not told or stopping.is_set():
                continue
            subscription: Subscription | None = None
            try:
                subscription = self._store.subscribe()
                self._stay_behind(stopping)
                self._subscription = subscription
                self.subscribed()
                self._listen(subscription)
            except StoreDown as error:
                self._stay_behind(stopping)
                if stopping.is_set():
                    return
                stopping.wait(self.subscription_lost(error))
                self._stay_behind(stopping)
            except Exception:
                self._stay_behind(stopping)
                log.exception("the circuit breakers' subscription failed")
                stopping.wait(1.0)
            finally:
                self._subscription = None
                if subscription is not None:
                    subscription.close()

    def _listen(self, subscription: Subscription) -> None:
        while not self._stopping.is_set():
            push = subscription.get(PING)
            if subscription.refused:
                self.ping_refused(subscription.refused)
            if push is None:
                subscription.ping()
            elif push:
                self.pushed(push)
