"""A durable, ordered outbox: what could not be delivered during an outage waits here for its turn.

Entries wait in topics.  A topic is replayed in the order of its entries' ids by one process of the
host at a time, which holds a lease on it.  Delivery is *at least once*: an entry is deleted after
its delivery has returned, so one that was being delivered when its process died, froze, or could
not write the file is delivered again; ``Entry.uid`` is what the receiver knows it by.

The file survives kill -9 and power loss: what is added is synced to disk before ``add`` returns.
Deletions of what was delivered are synced by the hundred, and when a replay ends: a power loss in
its midst means that its last deliveries, at most ``outbox_lease.MOST_UNSYNCED``, are made again.
The death of processes undoes no deletion.
"""

from __future__ import annotations

import logging
import operator
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterable
from itertools import islice
from time import monotonic
from typing import Any, NamedTuple

from ..policy import check_number
from .file_errors import Written
from .outbox_lease import Lease, Parked, Rules, attempt, tidy
from .outbox_rows import (
    KIND,
    SELECT,
    Entry,
    Item,
    JsonValue,
    OutboxError,
    OutboxFull,
    checked,
    chosen,
    encoded,
    entry_of,
)
from .private_file import PrivateFile

__all__ = [
    "Entry",
    "Item",
    "JsonValue",
    "Outbox",
    "OutboxError",
    "OutboxFull",
    "Parked",
    "Replayed",
    "Written",
]

NAME = 200  # characters of a topic or kind
KEY = 4_096  # characters of a key
PAGE = 10_000  # entries that can be listed at a time
DAY = 86_400.0

log = logging.getLogger("distributed_breaker")

_ADD = "INSERT INTO entries (topic, kind, key, payload, bytes, created) VALUES (?, ?, ?, ?, ?, ?)"
_RETRY = "UPDATE entries SET parked = 0, attempts = 0, error = '' WHERE parked = 1"


class Replayed(NamedTuple):
    """How a replay went."""

    delivered: int
    parked: int
    left: int
    """How many still wait."""
    busy: bool
    """Another process or thread has the topic's lease, or has taken it in the meantime."""
    error: str
    """What stopped the replay, or keeps the topic waiting; empty: nothing."""
    wait: float
    """Seconds for which the topic is left alone after a failure; until then nobody delivers."""


def _whole(name: str, value: int, most: float) -> int:
    return operator.index(int(check_number(name, operator.index(value), 1, most)))


class Outbox:
    """Entries that wait on this host's disk until they can be delivered.

    One object may be used by all threads; processes each make their own on the same path.  It may
    be used on both sides of a fork.

    Args:
        path: the file; see ``PrivateFile``.  Beside it lie its log and its lock, and damaged files
            that were moved aside (``<name>.damaged-<time>``).
        most_entries: waiting and parked ones, of all topics.
        most_bytes: of their topics, kinds, keys and payloads, of all topics.
        attempts: deliveries that may fail before an entry is parked.
        lease: seconds that a process may spend on one delivery before another one may take over.
        backoff: seconds that a topic is left alone after a first failure; each further one
            doubles them.
        backoff_max: their upper bound.
        now: seconds since 1970.
        chance: a number from 0 to 1, which shortens each of these waits by up to a half.

    Raises:
        TypeError, ValueError: an argument is out of bounds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        most_entries: int = 100_000,
        most_bytes: int = 256 * 2**20,
        attempts: int = 20,
        lease: float = 30.0,
        backoff: float = 0.5,
        backoff_max: float = 60.0,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._most_entries = _whole("most_entries", most_entries, 10**9)
        self._most_bytes = _whole("most_bytes", most_bytes, 2**40)
        self._rules = Rules(
            _whole("attempts", attempts, 10**6),
            check_number("lease", lease, 0.001, DAY),
            check_number("backoff", backoff, 0.001, DAY),
            check_number("backoff_max", backoff_max, backoff, DAY),
            now,
            chance,
        )
        self._file = PrivateFile(path, KIND)

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._file.path

    def written(self) -> Written | None:
        """When it was written last, by whomever: what was read before is true while this stays the
        same, but for writes within the same tick of the file system's clock.  None: not known."""
        return self._file.place.written()

    def __repr__(self) -> str:
        return f"<Outbox {self.path}>"

    # ------------------------------------------------------------------------ adding

    def add(self, topic: str, kind: str, payload: JsonValue, *, key: str = "") -> int:
        """Add an entry and return its id; when this returns, it is durable.

        Args:
            topic: what is delivered in order, and by one process at a time.
            kind: what the delivery makes of it.
            payload: anything that JSON gives back unchanged.
            key: what ``holds`` and ``latest`` find it by.

        Raises:
            OutboxFull: there is no room.
            OutboxError: the file cannot be written.
            TypeError, ValueError: an argument cannot be stored.
        """
        return self.add_many(topic, [(kind, payload, key)])[0]

    def add_many(
        self, topic: str, items: Iterable[tuple[str, JsonValue] | tuple[str, JsonValue, str]]
    ) -> list[int]:
        """Add all of these (kind, payload, key), or none; returns their ids.  Raises as ``add``."""
        checked("topic", topic, 1, NAME)
        now = self._rules.now()
        rows = []
        for item in islice(items, self._most_entries + 1):
            kind, payload, key = Item(*item)
            checked("kind", kind, 1, NAME)
            checked("key", key, 0, KEY)
            parts = (topic, kind, key, encoded(kind, payload))
            rows.append((*parts, sum(len(part.encode()) for part in parts), now))

        def add(db: sqlite3.Connection) -> list[int]:
            self._make_sure_of_room(db, len(rows), sum(row[4] for row in rows))
            return [db.execute(_ADD, row).lastrowid or 0 for row in rows]

        return self._file.write(add, mend=True) if rows else []

    def _make_sure_of_room(self, db: sqlite3.Connection, entries: int, size: int) -> None:
        sums = "SELECT total(waiting), total(parked), total(bytes) FROM topics"
        waiting, parked, used = map(int, db.execute(sums).fetchone())
        if waiting + parked + entries > self._most_entries:
            bound = f"most_entries={self._most_entries}"
        elif used + size > self._most_bytes:
            bound = f"most_bytes={self._most_bytes}"
        else:
            return
        raise OutboxFull(
            f"the outbox {self.path} has no room for {entries} more ({size} bytes) within {bound}: "
            f"{waiting} wait and {parked} are parked ({used} bytes); let them be delivered, purge "
            f"parked ones, or raise the bound"
        )

    # ------------------------------------------------------------------------ looking

    def waiting(self, topic: str | None = None) -> int:
        """How many wait, in one topic or in all; parked ones do not.  A look at one row.

        Raises:
            OutboxError: the file cannot be read.
        """
        question, values = "SELECT total(waiting) FROM topics", list[str]()
        if topic is not None:
            question, values = f"{question} WHERE topic = ?", [topic]
        return self._file.read(lambda db: int(db.execute(question, values).fetchone()[0]))

    def holds(self, topic: str, key: str, *, but: str = "") -> bool:
        """Whether an entry with this key waits, of another kind than ``but``.  Raises as
        ``waiting``."""
        question = (
            "SELECT 1 FROM entries WHERE topic = ? AND key = ? AND parked = 0 AND kind != ? LIMIT 1"
        )
        values = (topic, key, but)
        return self._file.read(lambda db: db.execute(question, values).fetchone() is not None)

    def latest(self, topic: str, key: str) -> Entry | None:
        """The newest waiting entry with this key.  Raises as ``waiting``."""
        question = f"{SELECT} WHERE topic = ? AND key = ? AND parked = 0 ORDER BY id DESC LIMIT 1"
        row = self._file.read(lambda db: db.execute(question, (topic, key)).fetchone())
        return None if row is None else entry_of(row)

    def entries(
        self,
        topic: str | None = None,
        *,
        parked: bool | None = None,
        limit: int = 100,
        after: int = 0,
    ) -> list[Entry]:
        """Entries in their order.

        Args:
            topic: only of this one.
            parked: only those that are, or are not.
            limit: at most so many, up to 10 000.
            after: only those with greater ids: the last one of a page gives the next page.

        Raises:
            OutboxError: the file cannot be read.
        """
        condition, values = chosen(None, topic)
        if parked is not None:
            condition += " AND parked = ?"
            values.append(int(parked))
        question = f"{SELECT} WHERE {condition} AND id > ? ORDER BY id LIMIT ?"
        values += [after, _whole("limit", limit, PAGE)]
        return [
            entry_of(row) for row in self._file.read(lambda db: list(db.execute(question, values)))
        ]

    def stats(self) -> dict[str, Any]:
        """What there is to see; never raises.

        Returns:
            ``path``; ``works``: whether it can be read, and could be written when last tried;
            ``trouble``: if not, why; ``damaged``: files that were moved aside; and by the name of
            each topic in ``topics``: ``waiting``, ``parked``, ``bytes``, and ``oldest``, the age
            of the oldest waiting entry in seconds (None: nothing waits).
        """
        question = """
            SELECT topic, waiting, parked, bytes, (SELECT created FROM entries
                WHERE topic = topics.topic AND parked = 0 ORDER BY id LIMIT 1)
            FROM topics WHERE waiting + parked > 0 ORDER BY topic
        """
        rows: list[tuple[str, int, int, int, float | None]] = []
        trouble = ""
        try:
            rows = self._file.read(lambda db: list(db.execute(question)))
        except OutboxError as error:
            trouble = str(error)
        trouble = trouble or self._file.trouble
        now = self._rules.now()
        topics = {
            topic: {
                "waiting": waiting,
                "parked": parked,
                "bytes": size,
                "oldest": None if oldest is None else max(0.0, now - oldest),
            }
            for topic, waiting, parked, size, oldest in rows
        }
        return {
            "path": self.path,
            "works": not trouble,
            "trouble": trouble,
            "damaged": self._file.place.damaged(),
            "topics": topics,
        }

    # ------------------------------------------------------------------------ delivering

    def replay(
        self,
        topic: str,
        deliver: Callable[[Entry], object],
        *,
        limit: int = 1000,
        seconds: float | None = None,
    ) -> Replayed:
        """Deliver what waits in a topic, in its order, until one fails; at least once each.

        Call it when the dependency is thought to be well.  Nothing is locked during a delivery,
        and no transaction is open, so it may use this outbox itself.

        Args:
            deliver: it returns: the entry is deleted.  It raises ``Parked``: the entry is put
                aside, and the next one is delivered.  It is refused by a circuit
                (``CircuitBreakerOpenException``): the replay ends, and nothing is held against the
                entry.  It raises another exception: that counts as an attempt, the replay ends,
                and all processes leave the topic alone for the backoff; the entry is parked if it
                was its last attempt.  What is no ``Exception`` (KeyboardInterrupt) is raised
                again, and the entry waits as before.
            limit: deliveries that may be made.
            seconds: no delivery is begun later than this; None: no bound.

        Raises:
            OutboxError: the file cannot be read or written.  What was just delivered may be
                delivered again.
            TypeError, ValueError: an argument is of no use, or ``deliver`` is a coroutine function.
        """
        checked("topic", topic, 1, NAME)
        limit = _whole("limit", limit, 10**9)
        end = None if seconds is None else monotonic() + check_number("seconds", seconds, 0.0, DAY)
        lease = Lease(self._file, topic, self._rules)
        turn = lease.take()
        delivered, parked, left = 0, turn.parked, None
        try:
            for _ in range(limit):
                if turn.head is None or (end is not None and monotonic() >= end):
                    break
                if not lease.fresh():
                    turn = lease.renew()
                    parked += turn.parked
                if turn.head is None:
                    break
                outcome = attempt(deliver, turn.head)
                turn = lease.settle(turn.head, outcome)
                delivered += outcome.kind == "delivered" and not turn.busy
                parked += turn.parked
        finally:
            left = lease.release()
            if parked:
                log.warning(
                    "%d entries of the topic %r could not be delivered and are parked in the "
                    "outbox %s: mend what ails them and let them be retried, or purge them",
                    parked,
                    topic,
                    self.path,
                )
        left = turn.left if left is None else left
        return Replayed(delivered, parked, left, turn.busy, turn.error, turn.wait)

    # ------------------------------------------------------------------------ stepping in

    def retry(self, ids: Iterable[int] | None = None, topic: str | None = None) -> int:
        """Let parked entries wait again, in their old places and with all their attempts.

        Args:
            ids: only these.
            topic: only those of this one.

        Returns:
            How many that were.

        Raises:
            OutboxError: the file cannot be written.
        """
        condition, values = chosen(ids, topic)
        question = f"{_RETRY} AND {condition}"
        return self._file.write(lambda db: db.execute(question, values).rowcount)

    def purge(
        self,
        ids: Iterable[int] | None = None,
        topic: str | None = None,
        parked_only: bool = False,
    ) -> int:
        """Delete entries that nobody shall deliver any more.  Arguments and errors as ``retry``.

        Raises:
            ValueError: nothing says which.
        """
        if ids is None and topic is None and not parked_only:
            raise ValueError("purge() would delete all topics: say ids, topic or parked_only")
        condition, values = chosen(ids, topic)
        condition += " AND parked = 1" if parked_only else ""

        def purge(db: sqlite3.Connection) -> int:
            count = db.execute(f"DELETE FROM entries WHERE {condition}", values).rowcount
            tidy(db)
            return count

        return self._file.write(purge)

    def close(self) -> None:
        """Close the file; a later call opens it again.  Done by itself when the process ends."""
        self._file.close()
