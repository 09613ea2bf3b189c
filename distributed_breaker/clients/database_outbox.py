"""Writes that wait on disk while the write circuit refuses them, and when they are carried out."""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from ..fallback.outbox import Entry, Outbox, OutboxError, Parked, Replayed
from .database_errors import DatabaseOpenException
from .database_replay import TABLE, Batch, is_unwell, make_ready, said, transact
from .database_sessions import Sessions
from .database_statements import targets_of
from .database_writes import CannotWait, Written, write_down
from .waiting import Waiting, outbox_of

if TYPE_CHECKING:
    from .database import DatabaseClient

# While it is on trial, a write that fails by itself keeps the circuit open for the whole fleet.
ATTEMPTS = 5
LONGEST_KIND = 100  # characters
CLEANED_EVERY = 3_600.0  # s between two looks for old keys
MOST = 50  # writes that are carried out in one transaction
# s; a transaction that was shorter is made larger the next time, one that was longer smaller: it is
# one call, and a slow one may open the circuit again.
QUICK, SLOW = 0.25, 1.0


class WriteQueue:
    """The writes of one client that wait.

    Args:
        client: whose they are.
        sessions: where its connections come from.
    """

    def __init__(self, client: DatabaseClient, sessions: Sessions) -> None:
        self._client = client
        self._breaker = breaker = client.circuits["write"]
        self._sessions = sessions
        self._topic = name = client.name
        outbox = outbox_of(name, client.section.outbox_path, attempts=ATTEMPTS)
        self._queue = Waiting(outbox, name, breaker, self._deliver, self._look)
        self._written: object = None  # when the file was, as last seen
        self._ready: weakref.ref[Any] | None = None  # the engine whose table of keys is there
        self._cleaned = float("-inf")
        self._carried_out: frozenset[str] = frozenset()  # of these only the entries are left
        self._alone_until = 0  # the id up to which each has a transaction of its own
        self._size = 1  # how many go into one transaction
        self._trouble = ""
        self.queued = self.replayed = 0
        # Other processes of the host may have begun to let writes wait.
        queue = weakref.ref(self._queue)
        breaker.on_transition(lambda _: _wake(queue()))

    # ------------------------------------------------------------------ instead of the database

    @property
    def some_may_wait(self) -> bool:
        """Whether it is worth looking for others."""
        return self._queue.possible

    def behind(self, statement: Any, params: Any) -> Written | None:
        """Have a write wait if others do: what came first goes first.

        Returns:
            None: none waits, or this one could not be carried out later as it is now.

        Raises:
            DatabaseOpenException: it would have to wait, and cannot be kept.
        """
        try:
            if not self._queue.possible or not self._queue.count():
                return None
        except OutboxError:
            return None  # nothing can wait there, and the database may be well
        try:
            return self._put(statement, params)
        except CannotWait:
            return None
        except OutboxError as error:
            raise self._refusal("earlier writes wait, and there is no room for more") from error

    def instead(self, statement: Any, params: Any, refusal: DatabaseOpenException) -> Written:
        """Have a write wait that was refused.

        Raises:
            DatabaseOpenException: the refusal, if the write cannot wait; its cause says why.
        """
        try:
            return self._put(statement, params)
        except (CannotWait, OutboxError) as error:
            raise refusal from error

    def _put(self, statement: Any, params: Any) -> Written:
        engine = self._sessions.lasting()
        if engine is None:
            raise CannotWait("it is not known by which engine it is to be carried out")
        payload = write_down(statement, params, _inner(engine))
        key = uuid.uuid4().hex
        try:
            self._queue.add_many([(_kind_of(payload["sql"], engine.dialect.name), payload, key)])
        except (TypeError, ValueError) as error:
            raise CannotWait("it holds text that is none") from error
        self.queued += 1
        self._breaker.count_fallback()
        return Written(0, queued=True, key=key)

    def _refusal(self, why: str) -> DatabaseOpenException:
        breaker = self._breaker
        return DatabaseOpenException(breaker.name, 0.0, str(breaker.state), "shared", why)

    # ------------------------------------------------------------------ carrying out

    def replay(self) -> Replayed:
        """See ``DatabaseClient.replay``."""
        if isinstance(self._sessions.lasting(), AsyncEngine):
            with suppress(RuntimeError):
                asyncio.get_running_loop()
                raise TypeError("on an event loop: await asyncio.to_thread(client.replay)")
        return self._queue.replay()

    def _look(self) -> bool:
        """Whether the file was written since it was last looked at, by whichever process."""
        written = self.outbox.written()
        if written != self._written:
            self._written = written
            self._queue.possible = True
        return False

    def _deliver(self, entry: Entry) -> None:
        """Carry out a write, and those that follow it, of which then only the entries are left."""
        if entry.uid not in self._carried_out:
            engine = self._sessions.lasting()
            if engine is None:
                raise self._refusal("this process has not been given a database yet")
            self._prepare(engine)
            following = []
            if entry.id > self._alone_until and self._size > 1:
                following = self.outbox.entries(
                    self._topic, parked=False, limit=self._size - 1, after=entry.id
                )
            self._carry_out(engine, [entry, *following])
        self.replayed += 1

    def _prepare(self, engine: Engine | AsyncEngine) -> None:
        """See to it that the table of keys is there, and does not grow for ever."""
        ready = self._ready is not None and self._ready() is _inner(engine)
        if ready and time.monotonic() - self._cleaned < CLEANED_EVERY:
            return
        for again in (True, False):
            try:
                transact(self._client, engine, make_ready)
                break
            except DatabaseOpenException:
                raise
            except Exception as error:
                # PostgreSQL fails if another process makes the table at the same moment.
                if not again or is_unwell(error):
                    raise self._stopped(error) from error
        self._ready, self._cleaned = weakref.ref(_inner(engine)), time.monotonic()
        self._trouble = ""

    def _carry_out(self, engine: Engine | AsyncEngine, entries: list[Entry]) -> None:
        """All or none of them.

        Raises:
            Parked, WriteFailed: the only one, or the first one, is to blame.
            DatabaseOpenException: none of them is.
        """
        batch = Batch(entries)
        began = time.monotonic()
        try:
            try:
                transact(self._client, engine, batch)
            finally:
                if self._client.stored is not None:
                    self._client.stored.sent(batch.texts, engine.dialect.name)
        except DatabaseOpenException:
            raise
        except Exception as error:
            # Which of them are well shows when each has a transaction of its own.
            self._alone_until, self._size = entries[-1].id, 1
            unwell = is_unwell(error)
            if batch.at is None or (unwell and batch.at is not entries[0]):
                raise self._stopped(error) from error
            if unwell:
                raise WriteFailed(said(error)) from error  # the write may be the reason
            if len(entries) == 1:
                raise Parked(said(error)) from error
            self._carry_out(engine, entries[:1])
            return
        took = time.monotonic() - began
        if took > SLOW:
            self._size = max(1, self._size // 2)
        elif took < QUICK:
            self._size = min(MOST, self._size * 2)
        self._carried_out = frozenset(entry.uid for entry in entries)

    def _stopped(self, error: Exception) -> DatabaseOpenException:
        """What ends a replay without being held against any write."""
        if not is_unwell(error):
            self._ready = None
            self._trouble = f"writes wait since the table {TABLE} cannot be used: {said(error)}"
        return self._refusal(said(error))

    # ------------------------------------------------------------------ looking, and ends

    @property
    def outbox(self) -> Outbox:
        """Where they wait."""
        return self._queue.outbox

    def stats(self) -> dict[str, Any]:
        """See ``DatabaseClient.stats``."""
        on = self._client.section.enable_write_queue
        return {
            "queued": self.queued,
            "replayed": self.replayed,
            "outbox": self.outbox.stats() if on else None,
        }

    def problems(self) -> list[str]:
        """What is wrong with them, in sentences."""
        if not self._client.section.enable_write_queue:
            return []
        found = self._queue.problems("writes")
        return [*found, self._trouble] if self._trouble else found

    def care(self) -> None:
        """See to it that what waits since an earlier life of the process is carried out."""
        self._queue.care()

    def forked(self) -> None:
        """A child has a thread of its own."""
        self._queue.forked()

    def close(self) -> None:
        """What waits stays on disk.  Safe to call twice."""
        self._queue.close()


class WriteFailed(Exception):
    """A write could not be carried out, and is tried again."""


def _kind_of(sql: str, dialect: str) -> str:
    """What a write is, for people: its verb and its tables."""
    verb = sql.split(maxsplit=1)[0].upper()
    words = [verb if verb.isalpha() else "WRITE", *sorted(targets_of(sql, dialect) or ())]
    return " ".join(words)[:LONGEST_KIND]


def _inner(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def _wake(queue: Waiting | None) -> None:
    if queue is not None:
        queue.possible = True
