"""What of one client waits in an outbox, and the thread that looks after it."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from os.path import exists
from typing import Any

from ..breaker import CircuitBreaker
from ..fallback.outbox import Entry, JsonValue, Outbox, OutboxError, Replayed, Written
from ..process import OwnLock
from ..workers import start_thread
from .client import users_folder

SOON, LATER = 0.1, 1.0  # s between two rounds: while something waits, and else
MOST, LONGEST = 1_000, 5.0  # deliveries, and seconds, in one round
SETTLED = 100_000_000  # ns after which a file's time of change is no longer the present one
MOST_SEEN = 10_000  # keys that are remembered between two writes
FEW, SHORT = 20, 0.2  # the same where a caller has to wait for the round

log = logging.getLogger("distributed_breaker")


def outbox_of(name: str, path: str | None, **bounds: Any) -> Outbox:
    """Where what a client cannot deliver waits: in its file, or in one of this user's."""
    state = users_folder("XDG_STATE_HOME", ".local/state")
    return Outbox(path or state / name / "outbox.db", backoff_max=5.0, **bounds)


class Waiting:
    """One topic of an outbox, whose entries are delivered once its circuit admits that.

    Args:
        outbox: where they wait; it belongs to this object from now on.
        topic: which.
        breaker: while it refuses, nothing is delivered.
        deliver: see ``Outbox.replay``.
        also: what the thread does in each round beside that; whether it is to be done again soon.
    """

    _lock = OwnLock()

    def __init__(
        self,
        outbox: Outbox,
        topic: str,
        breaker: CircuitBreaker,
        deliver: Callable[[Entry], object],
        also: Callable[[], bool] = lambda: False,
    ) -> None:
        self.outbox = outbox
        self.possible = True
        """Whether something may wait, as far as this process knows; the first look tells."""
        self._added = object()  # another one with each addition
        # When the file was written last, and what it has held of some keys since then.
        self._seen: tuple[Written | None, dict[str, Entry | None]] = (None, {})
        self._topic = topic
        self._breaker = breaker
        self._deliver = deliver
        self._also = also
        self._said = ""
        self._thread: _Thread | None = None

    def has_file(self) -> bool:
        """Whether anything has ever waited, so that it is worth looking; the thread looks, too.
        What only looks makes no file."""
        if self._thread is None or self._thread.alone:
            self.care()
        return exists(self.outbox.path)

    def add_many(self, items: Iterable[tuple[str, JsonValue, str]]) -> None:
        """Have these wait: kind, payload, key.

        Raises:
            OutboxError: they cannot be kept.
        """
        self.outbox.add_many(self._topic, items)
        with self._lock:
            self._added = object()
            self.possible = True
        self.care()

    def latest(self, key: str) -> Entry | None:
        """The newest one of a key; None as well if the file cannot be read."""
        written = self.outbox.written()
        at, seen = self._seen
        if written is not None and at == written and key in seen:
            return seen[key]
        try:
            found = self.outbox.latest(self._topic, key) if self.has_file() else None
        except OutboxError:
            return None
        # Within the same tick of the file system's clock another write would leave no trace.
        if written is not None and time.time_ns() - written[0] > SETTLED:
            if at != written or len(seen) >= MOST_SEEN:
                seen = {}
                self._seen = written, seen  # together: threads may have seen different states
            seen[key] = found
        return found

    def nothing_of(self, key: str) -> bool:
        """Whether it is known without reading the file that nothing of a key waits."""
        if not self.possible:
            return True
        at, seen = self._seen
        return key in seen and seen[key] is None and at == self.outbox.written()

    def holds(self, key: str, *, but: str = "") -> bool:
        """Whether one of a key and of another kind waits; not, if the file cannot be read."""
        try:
            return self.has_file() and self.outbox.holds(self._topic, key, but=but)
        except OutboxError:
            return False

    def count(self) -> int:
        """How many wait.

        Raises:
            OutboxError: the file cannot be read.
        """
        return self.outbox.waiting(self._topic) if self.has_file() else 0

    def problems(self, what: str) -> list[str]:
        """What is wrong with them, in sentences; ``what`` they are, such as "changes"."""
        stats, found = self.outbox.stats(), []
        if not stats["works"]:
            found.append(f"{what} cannot wait on disk: {stats['trouble']}")
        if stats["damaged"]:
            found.append(f"{len(stats['damaged'])} damaged files with {what} were put aside")
        parked = stats["topics"].get(self._topic, {}).get("parked", 0)
        if parked:
            found.append(f"{parked} {what} are parked, see `breakers outbox list`")
        return found

    def replay(self, *, limit: int = MOST, seconds: float = LONGEST) -> Replayed:
        """Deliver what waits; done by itself.  Raises as ``Outbox.replay``."""
        added = self._added
        done = self.outbox.replay(self._topic, self._deliver, limit=limit, seconds=seconds)
        self._possible_unless(added, done.left > 0)
        return done

    def _possible_unless(self, added: object, possible: bool) -> None:
        """Take it for possible or not, unless something was added meanwhile."""
        with self._lock:
            if self._added is added:
                self.possible = possible

    def care(self) -> None:
        """See to it that the thread lives, and looks soon."""
        thread = self._thread
        if thread is None:
            with self._lock:
                thread = self._thread = self._thread or _Thread(self)
        thread.wake()

    def round(self, *, limit: int = MOST, seconds: float = LONGEST) -> bool:
        """One round of the thread's; whether another one is to follow soon."""
        again = self._also()
        added = self._added
        if self.possible and not exists(self.outbox.path):
            self._possible_unless(added, False)
        # Once the circuit is due, what waits is tried as a probe, so no traffic is needed.
        if self.possible and not self._breaker.refusing:
            try:
                self.replay(limit=limit, seconds=seconds)
                self._said = ""
            except OutboxError as error:
                if str(error) != self._said:
                    log.warning("what waits for %s stays there: %s", self._breaker.name, error)
                self._said = str(error)
                return again
        return again or self.possible

    def close(self) -> None:
        """End the thread and close the file; what waits stays there.  Safe to call twice."""
        if self._thread is not None:
            self._thread.close()
        self.outbox.close()

    def forked(self) -> None:
        """A child has a thread of its own."""
        vars(self).pop("_lock", None)
        self._thread = None


class _Thread:
    """Makes rounds until it is closed, or nobody holds what it looks after any more.

    Where no thread can be started (uWSGI without threads), callers make short rounds now and then:
    then it is ``alone``.
    """

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = weakref.ref(waiting)
        self._wake = threading.Event()
        self._ended = False
        self._next = 0.0
        try:
            self._thread: threading.Thread | None = start_thread("circuit-breaker-care", self._run)
        except RuntimeError:
            self._thread = None
        self.alone = self._thread is None

    def wake(self) -> None:
        self._wake.set()
        if self.alone and time.monotonic() >= self._next and not self._ended:
            self._next = math.inf  # a round that wakes it makes no other
            try:
                self._round(limit=FEW, seconds=SHORT)
            finally:
                self._next = time.monotonic() + LATER

    def _run(self) -> None:
        soon = True
        while not self._ended:
            if self._waiting() is None:
                return
            soon = self._round()
            self._wake.clear()
            # What is put wakes it; rounds are not made more often than that, whatever comes.
            time.sleep(SOON)
            self._wake.wait(0 if soon else LATER)

    def _round(self, **bounds: Any) -> bool:
        waiting = self._waiting()
        try:
            return waiting is not None and waiting.round(**bounds)
        except Exception:
            log.exception("what waits is looked after again soon, after a defect")
            return True

    def close(self) -> None:
        self._ended = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
