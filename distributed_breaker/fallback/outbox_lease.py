"""Who may deliver a topic, and what becomes of an entry: leases, attempts and backoff."""

from __future__ import annotations

import inspect
import os
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Literal, NamedTuple

from ..errors import CircuitBreakerOpenException
from .outbox_rows import SELECT, Entry, OutboxError, entry_of
from .private_file import PrivateFile

_HEAD = f"{SELECT} WHERE topic = ? AND parked = 0 ORDER BY id LIMIT 1"
_ERROR = f"SELECT coalesce((SELECT error FROM ({_HEAD})), '')"
_LOOK = "SELECT waiting, owner, until, lease, failures, next_at FROM topics WHERE topic = ?"
_KEEP = "UPDATE topics SET owner = ?, until = ?, lease = ? WHERE topic = ?"
_LET_GO = "UPDATE topics SET owner = '' WHERE topic = ? AND owner = ?"
_ATTEMPT = "UPDATE entries SET attempts = ?, parked = ?, error = ? WHERE id = ?"
ERROR = 500  # characters that are kept of an error
MOST_UNSYNCED = 100  # removals that a power loss may undo …
LONGEST_UNSYNCED = 1.0  # … and seconds after which the next one is synced in any case
_FAR_AHEAD = 2  # leases; a clock that was set back a little must not part a holder from its lease


class Parked(Exception):
    """Raised by a delivery: this entry can never be delivered.  It is put aside for an operator."""


class Rules(NamedTuple):
    """What an outbox was told; see there."""

    attempts: int
    lease: float
    backoff: float
    backoff_max: float
    now: Callable[[], float]
    chance: Callable[[], float]


class Outcome(NamedTuple):
    """How one delivery ended."""

    kind: Literal["delivered", "parked", "failed", "refused"]
    error: str = ""
    wait: float = 0.0
    """Of a refused one: seconds for which it was told to wait."""


def _text_of(error: BaseException) -> str:
    """An error in a line that can be stored, whatever it is made of."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text[:ERROR].encode(errors="backslashreplace").decode()


def attempt(deliver: Callable[[Entry], object], entry: Entry) -> Outcome:
    """Deliver an entry and say how that ended."""
    try:
        result: object = deliver(entry)
    except Parked as error:
        return Outcome("parked", _text_of(error))
    except CircuitBreakerOpenException as error:
        return Outcome("refused", _text_of(error), error.retry_after)
    except Exception as error:
        return Outcome("failed", _text_of(error))
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("deliver returned an awaitable, and nobody awaits it: use a function")
    return Outcome("delivered")


class Turn(NamedTuple):
    """Where a replay stands after a transaction."""

    head: Entry | None
    """What is to be delivered next; None: nothing, by this replay."""
    left: int
    parked: int = 0
    """How many were parked in this transaction."""
    busy: bool = False
    error: str = ""
    wait: float = 0.0


class Lease:
    """The right to deliver one topic, for one replay.

    It goes by the wall clock, the only one that processes share and that survives a reboot.  A
    step of the clock can part a holder from its lease, but it will not hold a topic for longer
    than ``_FAR_AHEAD`` leases, and every transaction asks anew whose it is.
    """

    def __init__(self, file: PrivateFile, topic: str, rules: Rules) -> None:
        self._file = file
        self._topic = topic
        self._rules = rules
        self._token = secrets.token_hex(8)
        self._until = 0.0
        self._unsynced = 0
        self._synced_at = monotonic()

    @property
    def _owner(self) -> str:
        # A delivery may fork, and its child must not go on with what its parent does.
        return f"{os.getpid()}-{self._token}"

    def take(self) -> Turn:
        """Take the lease, unless another one has it or the topic is to be left alone."""
        rules = self._rules

        def take(db: sqlite3.Connection) -> Turn:
            now = rules.now()
            row = db.execute(_LOOK, (self._topic,)).fetchone()
            if row is None or not row[0]:
                return Turn(None, 0)
            left, owner, until, lease, _, next_at = row
            if owner and now < until <= now + _FAR_AHEAD * lease:
                return Turn(None, left, busy=True)
            if now < next_at <= now + rules.backoff_max:
                error = db.execute(_ERROR, (self._topic,)).fetchone()[0]
                return Turn(None, left, error=error, wait=next_at - now)
            self._keep(db)
            return self._next(db, self._blame(db) if owner else 0)

        return self._file.write(take, mend=True)

    def fresh(self) -> bool:
        """Whether there is time enough for a delivery: half a lease."""
        lease = self._rules.lease
        return self._until - lease <= self._rules.now() <= self._until - lease / 2

    def renew(self) -> Turn:
        """Go on with what is the head now, if the lease is still held."""

        def renew(db: sqlite3.Connection) -> Turn:
            lost = self._lost(db)
            if lost is not None:
                return lost
            self._keep(db)
            return self._next(db)

        return self._file.write(renew)

    def settle(self, entry: Entry, outcome: Outcome) -> Turn:
        """Note how the head's delivery ended, and renew the lease; nothing if that is lost.

        To sync each removal would take most of a replay's time.  One that a power loss undoes only
        means that its entry is delivered once more, so all that counts is that they are few.
        """

        def settle(db: sqlite3.Connection) -> Turn:
            lost = self._lost(db)
            if lost is not None:
                return lost
            self._keep(db)
            parked = 0
            if outcome.kind == "delivered":
                db.execute("DELETE FROM entries WHERE id = ?", (entry.id,))
            elif outcome.kind != "refused":
                parked = self._attempt(db, outcome.error, entry.id, outcome.kind == "parked")
            wait = self._back_off(db, outcome)
            turn = self._next(db, parked)
            return turn._replace(head=None, error=outcome.error, wait=wait) if wait else turn

        sync = (
            outcome.kind != "delivered"
            or self._unsynced + 1 >= MOST_UNSYNCED
            or monotonic() - self._synced_at >= LONGEST_UNSYNCED
        )
        turn = self._file.write(settle, sync=sync)
        self._unsynced += 1
        if sync:
            self._unsynced, self._synced_at = 0, monotonic()
        return turn

    def release(self) -> int | None:
        """Give it back and return how many wait; None: it was never taken, or ends by itself."""

        def release(db: sqlite3.Connection) -> int:
            db.execute(_LET_GO, (self._topic, self._owner))
            tidy(db)
            row = db.execute(_LOOK, (self._topic,)).fetchone()
            return row[0] if row else 0

        if not self._until:
            return None
        # The replay's own result, or its error, says more than this one.
        with suppress(OutboxError):
            return self._file.write(release)
        return None

    # ------------------------------------------------------------------------ in a transaction

    def _lost(self, db: sqlite3.Connection) -> Turn | None:
        """Where the replay stands without its lease; None: it has it.

        One that has run out but that nobody took is still held: nobody else has delivered.
        """
        row = db.execute(_LOOK, (self._topic,)).fetchone()
        if row is not None and row[1] == self._owner:
            return None
        return Turn(None, row[0] if row else 0, busy=True)

    def _keep(self, db: sqlite3.Connection) -> None:
        lease = self._rules.lease
        self._until = self._rules.now() + lease
        db.execute(_KEEP, (self._owner, self._until, lease, self._topic))

    def _next(self, db: sqlite3.Connection, parked: int = 0) -> Turn:
        head = None
        while head is None:
            row = db.execute(_HEAD, (self._topic,)).fetchone()
            if row is None:
                break
            try:
                head = entry_of(row)
            except OutboxError as error:
                parked += self._attempt(db, str(error), row[0], True)
        (left,) = db.execute(
            "SELECT waiting FROM topics WHERE topic = ?", (self._topic,)
        ).fetchone()
        return Turn(head, left, parked)

    def _attempt(self, db: sqlite3.Connection, error: str, entry: int, hopeless: bool) -> int:
        """Count an attempt; returns 1 if it was the entry's last."""
        row = db.execute("SELECT attempts + 1 FROM entries WHERE id = ?", (entry,)).fetchone()
        if row is None:
            return 0  # An operator has purged it meanwhile.
        (attempts,) = row
        parked = int(hopeless or attempts >= self._rules.attempts)
        db.execute(_ATTEMPT, (attempts, parked, error, entry))
        return parked

    def _blame(self, db: sqlite3.Connection) -> int:
        """The last holder never came back, and was delivering the head, which may be the reason.

        Else an entry that kills its process, or that takes longer than a lease, would be delivered
        for ever and let nothing past.
        """
        why = "the process that delivered it died, or was not back within its lease"
        row = db.execute(_HEAD, (self._topic,)).fetchone()
        return self._attempt(db, why, row[0], False) if row else 0

    def _back_off(self, db: sqlite3.Connection, outcome: Outcome) -> float:
        """Leave the topic alone after a failure; returns for how long, in seconds."""
        rules = self._rules
        failures, wait = 0, 0.0
        if outcome.kind in ("failed", "refused"):
            (failures,) = db.execute(
                "SELECT failures FROM topics WHERE topic = ?", (self._topic,)
            ).fetchone()
        if outcome.kind == "failed":
            failures += 1
            wait = min(rules.backoff_max, rules.backoff * 2 ** min(failures - 1, 60))
            wait *= 1 - rules.chance() / 2
        elif outcome.kind == "refused":
            wait = min(rules.backoff_max, outcome.wait or rules.backoff)
        db.execute(
            "UPDATE topics SET failures = ?, next_at = ? WHERE topic = ?",
            (failures, rules.now() + wait if wait else 0.0, self._topic),
        )
        return wait


def tidy(db: sqlite3.Connection) -> None:
    """Forget topics that nothing waits in and nobody holds."""
    db.execute("DELETE FROM topics WHERE waiting = 0 AND parked = 0 AND owner = ''")
