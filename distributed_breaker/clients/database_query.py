"""One query of ``execute_query``: its attempts, and what answers instead of the database."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Query as LegacyQuery
from sqlalchemy.sql import Executable

from ..errors import CircuitBreakerOpenException
from ..policy import Outcome
from .backoff import backoff
from .database_errors import DatabaseOpenException, QueryTimeout, verdict
from .database_outbox import WriteQueue
from .database_statements import shown_of
from .database_stored import Asked
from .database_values import Rows
from .database_work import Params, Work
from .database_writes import Written

if TYPE_CHECKING:
    from .database import DatabaseClient

FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0  # s, bounds of the waits before another attempt
# What another attempt may answer; a timeout says that it would take as long again.
_AGAIN = frozenset({"connection", "conflict"})
MOST_SLOW = 50  # texts of slow queries that are told apart


class Attempts:
    """A query, until it is answered or not tried again.

    Args:
        client: whose circuits and section hold.
        statement, params: what.
        dialect: what it is compiled with, if that is known.
        kind: ``read`` or ``write``.
        read_only: whether the database is to refuse writes.
        timeout: seconds for all attempts together.
        stores: whether the result is kept, and a kept one may answer.
        replica: whether the replica is asked first.
        queue: where it waits if it cannot be carried out; None: it does not wait.
    """

    def __init__(
        self,
        client: DatabaseClient,
        statement: Any,
        params: Params,
        dialect: Dialect | None,
        kind: str,
        read_only: bool,
        timeout: float,
        stores: bool,
        replica: bool,
        queue: WriteQueue | None,
    ) -> None:
        self._statement, self._params, self._dialect = statement, params, dialect
        self._client = client
        self._kind, self._read_only, self._stores = kind, read_only, stores
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._made = 0
        self.on_replica = replica
        """Whether the next attempt, or the one that is under way, is the replica's."""
        self._queue = queue
        self._work: Work | None = None

    @property
    def may_wait(self) -> bool:
        """Whether it is worth looking, before the first attempt, for others that wait."""
        return self._queue is not None and self._queue.some_may_wait

    def behind(self) -> Written | None:
        """Have it wait behind others; see ``WriteQueue.behind``."""
        return None if self._queue is None else self._queue.behind(self._statement, self._params)

    def work(self) -> Work:
        """The next attempt, which is a call of its own."""
        left = self._timeout
        if self._work is not None:
            left = max(0.001, self._end - time.monotonic())
        self._made += not self.on_replica
        self._began = time.time()
        circuit = "replica" if self.on_replica else self._kind
        client = self._client
        self._work = Work(client, client.circuits[circuit], left, self._read_only)
        return self._work

    def answered(self, result: Any) -> Any:
        """The database has answered; returns the result."""
        self._ended()
        stored = self._client.stored
        if stored is not None and self._stores and isinstance(result, Rows):
            context = None if self._work is None else self._work.context
            if context is not None and stored.wants(_mark_of(context), self._began):
                asked = _sent(context, self._params)
                if asked is not None:
                    stored.keep(asked, result, self._began)
        return result

    def again(self, error: Exception) -> float | None:
        """Seconds until the next attempt; None: there is none.

        What the replica cannot answer is asked of the database itself.  There a read is tried
        again, and so is a write for which there was no connection to send it on.
        """
        self._ended()
        client, work = self._client, self._work
        if self.on_replica:
            self.on_replica = False
            refused = isinstance(error, CircuitBreakerOpenException)
            failed = refused or verdict(error).outcome is Outcome.FAILURE
            return 0.0 if failed and time.monotonic() < self._end else None
        if self._made > client.section.max_retries or work is None:
            return None
        outcome, kind = verdict(error)
        if outcome is not Outcome.FAILURE or kind not in _AGAIN or isinstance(error, QueryTimeout):
            return None
        if self._kind == "write" and work.connected:
            return None
        wait = backoff(self._made, FIRST_WAIT, LONGEST_WAIT)
        if time.monotonic() + wait >= self._end or client.circuits[self._kind].refusing:
            return None
        client.tally("retries")
        return wait

    def instead(self, error: Exception) -> Rows | Written:
        """A kept result while the circuit is open; or a write that was refused waits.

        Raises:
            Exception: ``error``, if there is none.
        """
        client = self._client
        breaker = client.circuits[self._kind]
        sent = self._work is not None and self._work.connected
        if self._queue is not None and isinstance(error, DatabaseOpenException) and not sent:
            return self._queue.instead(self._statement, self._params, error)
        stored = client.stored
        if stored is None or not self._stores or self._kind != "read":
            raise error
        if not (isinstance(error, CircuitBreakerOpenException) or breaker.refusing):
            raise error
        asked = _asked(self._statement, self._params, self._dialect)
        found = None if asked is None else stored.find(asked)
        if found is None:
            raise error
        client.tally("served_stale")
        breaker.count_fallback()
        return found

    def _ended(self) -> None:
        """An attempt is over, however it ended."""
        client, work = self._client, self._work
        if work is None or not work.connected:
            return
        if self._kind == "write" and client.stored is not None:
            text = self._text()
            if text is None:
                client.stored.wrote(None)
            else:
                client.stored.sent([text[0]], text[1])
        section, seconds = client.section, work.seconds
        if section.enable_query_analysis and seconds >= section.slow_query_threshold:
            text = self._text()
            client.slow.add("" if text is None else shown_of(*text), seconds)

    def _text(self) -> tuple[str, str] | None:
        """The statement for the driver, and the dialect; None: it cannot be known."""
        context = None if self._work is None else self._work.context
        if context is not None:
            return context.statement, context.dialect.name
        compiled = _compile(self._statement, self._dialect)
        return None if compiled is None else (compiled.string, compiled.dialect.name)


def _mark_of(context: Any) -> Any:
    """What tells one query from others in this process, in a tenth of the time of a whole key."""
    (values, *_) = context.compiled_parameters or ({},)
    return (context.statement, *values.values())


def _sent(context: Any, params: Params) -> Asked | None:
    """What was sent; None: it is not known."""
    compiled = context.compiled
    if compiled is None:
        return None
    # A compiled statement is used again for others of its form, whose values lie beside it.
    found = compiled.construct_params(
        _values(params), extracted_parameters=context.extracted_parameters
    )
    return Asked(compiled.string, found, context.dialect.name)


def _asked(statement: Any, params: Params, dialect: Dialect | None) -> Asked | None:
    """What would be sent; None: it cannot be known without a connection."""
    compiled = _compile(statement, dialect)
    if compiled is None:
        return None
    found = compiled.construct_params(_values(params))
    return Asked(compiled.string, found, compiled.dialect.name)


def _compile(statement: Any, dialect: Dialect | None) -> Any:
    if isinstance(statement, LegacyQuery):
        statement = statement.statement
    if not isinstance(statement, Executable) or dialect is None:
        return None
    return statement.compile(dialect=dialect)  # type: ignore[attr-defined]


def _values(params: Params) -> dict[str, Any] | None:
    return dict(params) if isinstance(params, Mapping) else None


class SlowQueries:
    """Texts of slow queries without values, how often they came, and how long they took."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._texts: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._count = 0

    def add(self, text: str, seconds: float) -> None:
        """One was slow.  Of many texts those that came last are kept."""
        with self._lock:
            self._count += 1
            times, longest = self._texts.pop(text, (0, 0.0))
            self._texts[text] = times + 1, max(longest, seconds)
            if len(self._texts) > MOST_SLOW:
                self._texts.popitem(last=False)

    def stats(self) -> dict[str, Any]:
        """``count`` of them all, and the texts with their ``times`` and ``longest`` seconds."""
        with self._lock:
            texts = {
                text: {"times": times, "longest": round(longest, 3)}
                for text, (times, longest) in self._texts.items()
            }
            return {"count": self._count, "texts": texts}
