"""How long a call of a database may take: what the server is told, and what ends it here.

PostgreSQL ends a statement itself.  A server that does not answer at all, since it has stopped or
its host is gone, cannot: then the connection is cut here, a little later.  SQLite is interrupted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import dup
from typing import Any

from sqlalchemy import Connection

from ..process import OwnLock, follow_process
from ..workers import start_thread

GRACE = 0.5  # s that a server has beyond a call's time to say itself that it is over
IDLE = 0.001  # s of a deadline that has passed already

# In a connection's ``info``: the statement_timeout (ms) with which it was opened.
OPENED_WITH = "circuit_breaker_statement_timeout"
_SET = "SELECT set_config('statement_timeout', '{}', true)"
_SET_IDLE = _SET + ", set_config('idle_in_transaction_session_timeout', '{}', true)"
_WAS = "SELECT current_setting('statement_timeout'), set_config('statement_timeout', '{}', true)"

log = logging.getLogger("distributed_breaker")


# ---------------------------------------------------------------------------- here


class Watch:
    """A call that is ended at its deadline, unless it is over before.

    Attributes:
        fired: whether it was ended.
    """

    __slots__ = ("_end", "_until", "fired")

    def __init__(self, until: float, end: Callable[[], object]) -> None:
        self._until = until
        self._end = end
        self.fired = False


class Deadlines:
    """Ends calls at their deadlines, from one thread for all of a process.

    The thread starts with the first call.  Where none can be started, nothing is ended here.
    """

    _lock = OwnLock()

    def __init__(self) -> None:
        self.forked()
        follow_process(self)

    def forked(self) -> None:
        """A child has none of its parent's threads, and none of its calls."""
        vars(self).pop("_lock", None)
        self._live: dict[Watch, None] = {}
        self._next = math.inf
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """The thread is a daemon: calls that go on at the process's end have deadlines, too."""

    def begin(self, seconds: float, end: Callable[[], object]) -> Watch:
        """Have ``end`` called, from another thread, in so many seconds."""
        watch = Watch(time.monotonic() + max(seconds, IDLE), end)
        with self._lock:
            self._live[watch] = None
            # The thread sleeps until the earliest deadline that it has seen, even if that call is
            # over: so calls in turn, which have ever later deadlines, never wake it.
            if watch._until < self._next:
                self._next = watch._until
                self._wake.set()
            if self._thread is None:
                with suppress(RuntimeError):
                    self._thread = start_thread("circuit-breaker-deadlines", self._run)
        return watch

    def over(self, watch: Watch) -> None:
        """The call is over: from here on it is not ended any more."""
        with self._lock:
            self._live.pop(watch, None)

    def _run(self) -> None:
        wake = self._wake
        while wake is self._wake:
            self._round()
            rest = self._next - time.monotonic()
            wake.wait(None if rest == math.inf else max(rest, 0.0))
            wake.clear()

    def _round(self) -> None:
        # Ended under the lock, so that what is over is never ended: its connection may be another
        # call's by then.
        with self._lock:
            now = time.monotonic()
            for watch in [one for one in self._live if one._until <= now]:
                del self._live[watch]
                watch.fired = True
                try:
                    watch._end()
                except Exception as error:
                    # The driver knows that the connection is closed, or its loop is.
                    log.debug("a call could not be ended at its deadline: %r", type(error))
            self._next = min((one._until for one in self._live), default=math.inf)


deadlines = Deadlines()


def watch(connection: Connection, seconds: float) -> Watch | None:
    """Begin to watch a call of a connection; None where the driver knows no way to end one."""
    end = _end_of(connection)
    if end is None:
        return None
    grace = 0.0 if connection.dialect.name == "sqlite" else GRACE
    return deadlines.begin(seconds + grace, end)


@contextmanager
def watched(connection: Connection, seconds: float) -> Iterator[Watch | None]:
    """The same for a block."""
    watching = watch(connection, seconds)
    try:
        yield watching
    finally:
        if watching is not None:
            deadlines.over(watching)


def _end_of(connection: Connection) -> Callable[[], object] | None:
    """What ends a call of a connection, from another thread."""
    driver: Any = connection.connection.driver_connection
    is_async = connection.dialect.is_async
    if connection.dialect.name == "sqlite":
        if not is_async:
            return getattr(driver, "interrupt", None)
        loop = asyncio.get_running_loop()
        return lambda: asyncio.run_coroutine_threadsafe(driver.interrupt(), loop)
    if hasattr(driver, "fileno"):
        return lambda: _cut(driver.fileno())
    if is_async and hasattr(driver, "terminate"):
        loop = asyncio.get_running_loop()
        return lambda: loop.call_soon_threadsafe(driver.terminate)
    return None


def _cut(number: int) -> None:
    """Whoever waits for a socket learns that it has ended; it stays open until its owner closes
    it, so that its number is nobody else's."""
    with socket.socket(fileno=dup(number)) as other:
        other.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------------------- the server


def milliseconds(seconds: float) -> int:
    """What PostgreSQL is told; 0 would mean for ever."""
    return max(1, math.ceil(seconds * 1000))


def open_with(
    dialect: Any, record: Any, cparams: dict[str, Any], timeout: float, idle: float
) -> None:
    """Have a new connection begin with these times (seconds), which costs no round trip.

    Args:
        dialect, record, cparams: what SQLAlchemy's ``do_connect`` gives.
        timeout: for each statement.
        idle: for each pause within a transaction.
    """
    if dialect.name != "postgresql":
        return
    values = {
        "statement_timeout": milliseconds(timeout),
        "idle_in_transaction_session_timeout": milliseconds(idle),
    }
    if dialect.driver == "asyncpg":
        own = {name: str(value) for name, value in values.items()}
        cparams["server_settings"] = dict(cparams.get("server_settings") or {}) | own
    elif dialect.driver in ("psycopg", "psycopg2"):
        options = " ".join(f"-c {name}={value}" for name, value in values.items())
        # Beside what the user says himself; of two the later one counts.
        cparams["options"] = f"{cparams.get('options') or ''} {options}".strip()
    else:
        return
    if record is not None:
        record.info[OPENED_WITH] = values["statement_timeout"]


def tell(connection: Connection, timeout: float, *, idle: bool = False) -> None:
    """Have the statements of a transaction that has just begun end in time.

    Args:
        connection: whose.
        timeout: seconds for each.
        idle: also the pauses between them, in which the transaction holds its locks.
    """
    if connection.dialect.name != "postgresql":
        return
    wanted = milliseconds(timeout)
    if idle:
        connection.exec_driver_sql(_SET_IDLE.format(wanted, wanted))
    elif connection.info.get(OPENED_WITH) != wanted:
        connection.exec_driver_sql(_SET.format(wanted))


@contextmanager
def told(connection: Connection, timeout: float) -> Iterator[None]:
    """The same for one statement in the midst of somebody's transaction, which goes on."""
    if connection.dialect.name != "postgresql":
        yield
        return
    before = connection.exec_driver_sql(_WAS.format(milliseconds(timeout))).scalar_one()
    yield
    # After an error the transaction takes no statement any more, and its end restores the value.
    connection.exec_driver_sql(_SET.format(str(before).replace("'", "''")))


@contextmanager
def only_reads(connection: Connection) -> Iterator[None]:
    """Have SQLite refuse writes within the block; PostgreSQL knows it of the transaction."""
    if connection.dialect.name != "sqlite":
        yield
        return
    connection.exec_driver_sql("PRAGMA query_only = 1")
    try:
        yield
    finally:
        if not connection.closed and not connection.invalidated:
            connection.exec_driver_sql("PRAGMA query_only = 0")
