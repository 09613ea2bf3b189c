"""Threads that run users' code beside the link: listeners of transitions, and health checks."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .process import OwnLock

LISTENER_QUEUE = 1_000

log = logging.getLogger("distributed_breaker")


_NEVER = threading.Event()


def start_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread; RuntimeError where no thread can be started."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


Listeners = tuple[Callable[[Any], object], ...]

# The mark that ends a dispatcher's thread; never called.
_END: Listeners = (lambda _: None,)


class Dispatcher:
    """Calls listeners in order, from one thread, out of a bounded queue.

    The thread starts with the first event.  A listener that raises is logged, never noticed by
    the call that made the transition.  It is no ``queue.Queue``: gevent puts another class in its
    place, for whose tasks nobody can wait with a bound.

    Args:
        listeners: what hears of every circuit's transitions, before the circuit's own listeners.
    """

    _lock = OwnLock()

    def __init__(self, listeners: Listeners = ()) -> None:
        self.listeners = listeners
        self._queue: deque[tuple[Listeners, Any]] = deque()
        self._changed = threading.Condition(threading.Lock())  # never held while anything waits
        self._unfinished = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._left_behind = False
        self.dropped = 0

    def put(self, own: Listeners, event: object) -> None:
        """Queue one event, for ``own`` listeners and for those of all circuits; when listeners are
        too slow for the queue, it is dropped and counted."""
        listeners = (*self.listeners, *own)
        if not listeners:
            return
        with self._lock:
            if self._closed or not self._append(listeners, event):
                self.dropped += 1
                return
            try:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = start_thread("circuit-breaker-listeners", self._run)
            except RuntimeError:
                self.dropped += 1
                with self._changed:
                    self._queue.pop()
                    self._unfinished -= 1

    def _append(self, listeners: Listeners, event: object) -> bool:
        with self._changed:
            if len(self._queue) >= LISTENER_QUEUE:
                return False
            self._queue.append((listeners, event))
            self._unfinished += 1
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                listeners, event = self._queue.popleft()
            try:
                if self._left_behind:
                    _NEVER.wait()
                if listeners is _END:
                    return
                for listener in listeners:
                    self._call(listener, event)
            finally:
                with self._changed:
                    self._unfinished -= 1
                    self._changed.notify_all()

    def _call(self, listener: Callable[[Any], object], event: object) -> None:
        try:
            listener(event)
        except BaseException:
            # Also SystemExit: one listener must not end the thread that serves the others.
            log.exception("a listener of circuit transitions raised")

    def forked(self) -> None:
        """In the child: a thread that is a greenlet has come along, and must call nobody.

        Nothing is put into the queue any more, so it goes on only with what was in it.
        """
        self._left_behind = True

    def close(self, timeout: float) -> None:
        """Deliver what is queued, for at most ``timeout`` seconds, and end the thread."""
        self.join(timeout)
        with self._lock:
            self._closed = True
            if self._thread is None:
                return
            if not self._append(_END, None):
                return  # a listener hangs: its thread is a daemon and ends with the process
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def join(self, timeout: float) -> bool:
        """Wait until every queued event has been delivered; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout)


class HealthCheck:
    """A user's function that tells whether the dependency is well: it returns, or raises.

    It becomes the probe of an open circuit once it has passed while the circuit was closed, and
    stays it unless it runs longer than a permit's lease.

    Args:
        function: the user's.
        lease: of a permit, in ms.
        interval: ms after which a closed circuit is looked at again; None: it is not.
    """

    def __init__(
        self, function: Callable[[], object], lease: int, interval: int | None = None
    ) -> None:
        self.function = function
        self.passed = False
        self._lease = lease
        self._interval = interval
        self._began = 0
        self._running_since: int | None = None

    def due(self, now: int) -> bool:
        """Whether a closed circuit is to be looked at."""
        if not self.passed:
            return True
        return self._interval is not None and now - self._began >= self._interval

    def free(self, now: int) -> bool:
        """Whether it is not running; a check that hangs (ms) loses the trust it had."""
        since = self._running_since
        if since is not None and now - since > self._lease:
            self.passed = False
        return since is None

    def forked(self) -> None:
        """A child has none of its parent's threads."""
        self._running_since = None

    def start(self, now: int, target: Callable[[], None]) -> None:
        """Run ``target``, which calls the function, in a thread of its own."""

        def run() -> None:
            try:
                target()
            except Exception as error:
                log.debug("a health check did not pass: %r", error)
            finally:
                self._running_since = None

        self._running_since = self._began = now
        try:
            start_thread("circuit-breaker-health-check", run)
        except RuntimeError:
            self._running_since = None
