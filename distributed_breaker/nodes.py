"""Which server gets a command: the only one, or the primary that Sentinels name now.

redis-py's own ``RedisCluster`` and ``Sentinel`` are not used: they send again by themselves what
may have been carried out, ask every node they know without a bound, and hold locks meanwhile.  Here
a command goes out a second time only when the server has said that it did not carry it out, and
every wait has a bound.  The reasons stand in ``docs/decisions/0008-groups.md``; clusters in
``cluster.py``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import redis
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError

from .address import Address, Host

RENEWAL = 2.0  # s between questions to the Sentinels while all is well
MOST_PATIENCE = 32  # times that long, while no Sentinel answers
LONGEST_SEARCH = 1.0  # s after which no further server is asked where things are

# What one learns nothing from: nobody is there, a refusal, an answer that no such server gives.
UNUSABLE = (redis.RedisError, OSError, ValueError, TypeError, LookupError)

T = TypeVar("T")
Answers = list[Any]  # an error that answers one command stands in its place


@dataclass(slots=True)
class Command:
    """A command, and what is known of it.

    Attributes:
        key: decides where it goes in a cluster; empty for a command that any node can answer.
        words: name and arguments.
        alone: the same with no key but that one, for a slot whose keys are on their way to another
            node: while some are there and some here, neither node takes a command with both.
        parted: whether it went out like that.
    """

    key: str
    words: tuple[Any, ...]
    alone: tuple[Any, ...] = ()
    parted: bool = False


class Nodes(Protocol):
    """The servers behind one URL.  Methods raise redis-py's errors."""

    def ask(self, commands: Sequence[Command], *, timed: bool = False) -> tuple[Answers, Answers]:
        """Send commands, in one pipeline per server; the answers, and to TIME by each server."""

    def connection(self) -> Any:
        """A new connection, not yet open, on which all pushes of the group are heard."""

    def serves(self, connection: Any) -> bool:
        """Whether pushes are heard on this connection, as far as is known."""

    def connections(self) -> list[Any]:
        """All connections, also those in use, without a lock: a thread that a forked child does
        not have may hold it."""

    def close(self) -> None:
        """Close them."""


# ---------------------------------------------------------------------------- one server


def tell(
    client: redis.Redis,
    script: str,
    commands: Sequence[tuple[Any, ...]],
    *,
    timed: bool = False,
    asking: bool = False,
) -> tuple[Answers, Answers]:
    """Send commands to one server in a pipeline, again only those whose script it did not know.

    Returns the answers, and with ``timed`` the server's to TIME, which it is asked first.
    """
    first: list[tuple[Any, ...]] = [("TIME",)] if timed else []
    commands = [*first, *commands]
    answers = pipeline(client, commands, asking)
    unknown = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
    if unknown:
        (loaded,) = pipeline(client, [("SCRIPT", "LOAD", script)])
        if isinstance(loaded, redis.RedisError):
            raise loaded
        again = pipeline(client, [commands[i] for i in unknown], asking)
        for i, answer in zip(unknown, again, strict=True):
            answers[i] = answer
    return answers[len(first) :], answers[: len(first)]


def pipeline(
    client: redis.Redis, commands: Sequence[tuple[Any, ...]], asking: bool = False
) -> Answers:
    pipe: Any
    with client.pipeline(transaction=False) as pipe:
        for command in commands:
            if asking:
                pipe.execute_command("ASKING")
            pipe.execute_command(*command)
        answers: Answers = pipe.execute(raise_on_error=False)
    return answers[1::2] if asking else answers


class Single:
    """One server."""

    def __init__(self, address: Address, script: str) -> None:
        self._client = address.client()
        self._script = script

    def ask(self, commands: Sequence[Command], *, timed: bool = False) -> tuple[Answers, Answers]:
        return tell(self._client, self._script, [c.words for c in commands], timed=timed)

    def connection(self) -> Any:
        return self._client.connection_pool.make_connection()

    def serves(self, connection: Any) -> bool:
        return True

    def connections(self) -> list[Any]:
        return connections_of([self._client])

    def close(self) -> None:
        self._client.close()


def connections_of(clients: Iterable[redis.Redis]) -> list[Any]:
    found: list[Any] = []
    for client in clients:
        pool: Any = client.connection_pool
        found += [*pool._available_connections, *pool._in_use_connections]
    return found


def host_of(connection: Any) -> Host:
    return connection.host, int(connection.port)


# ---------------------------------------------------------------------------- Sentinel


class Watched:
    """The server that the Sentinels name as primary now.

    They are asked again after everything that looks like a failover: a lost connection, silence, or
    READONLY, which is what a primary says when it has become a replica.  And now and then by the
    listening thread, since after a failover by hand the old primary goes on for some ten seconds
    before it is told; what it takes in meanwhile is lost.
    """

    def __init__(self, address: Address, script: str) -> None:
        self._address = address
        self._script = script
        self._sentinels = list(address.hosts)  # replaced, never changed: two threads use it
        self._lock = threading.Lock()  # the sending and the listening thread may ask at once
        self._primary: Host | None = None
        self._client: redis.Redis | None = None
        self._asked = 0.0  # s, when they were last asked
        self._patience = 1  # how many times RENEWAL it takes until they are asked again

    def ask(self, commands: Sequence[Command], *, timed: bool = False) -> tuple[Answers, Answers]:
        client = self._found()
        try:
            answers, times = tell(client, self._script, [c.words for c in commands], timed=timed)
        except (redis.RedisError, OSError):
            self._forget(client)
            raise
        if any(isinstance(answer, (ReadOnlyError, MasterDownError)) for answer in answers):
            self._forget(client)
        return answers, times

    def connection(self) -> Any:
        return self._found().connection_pool.make_connection()

    def serves(self, connection: Any) -> bool:
        if time.monotonic() - self._asked > RENEWAL * self._patience:
            # Where no Sentinel answers, the primary that is known is as good as before.  Pushes
            # wait meanwhile, so such questions become rare.
            self._patience = min(self._patience * 2, MOST_PATIENCE)
            with contextlib.suppress(*UNUSABLE):
                self._move_to(self._discover())
        return self._primary in (None, host_of(connection))

    def connections(self) -> list[Any]:
        return connections_of([self._client] if self._client is not None else [])

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _found(self) -> redis.Redis:
        with self._lock:
            if self._client is None:
                self._primary = self._discover()
                self._client = self._address.client_at(self._primary)
            return self._client

    def _move_to(self, primary: Host) -> None:
        with self._lock:
            if primary == self._primary:
                return
            client, self._client, self._primary = self._client, None, primary
        if client is not None:
            # What is under way there may end.
            client.connection_pool.disconnect(inuse_connections=False)

    def _forget(self, client: redis.Redis) -> None:
        with self._lock:
            if self._client is client:
                self._client = None
                # The Sentinel that was asked may be cut off from the others, and not know better.
                self._sentinels = [*self._sentinels[1:], self._sentinels[0]]
        client.close()

    def _discover(self) -> Host:
        """Ask one Sentinel after the other, until one names the primary."""

        def look(sentinel: Host) -> Host:
            name = self._address.primary
            others = [s for s in self._sentinels if s != sentinel]
            self._sentinels = [*others, sentinel]  # so that one without an answer is asked last
            with contextlib.closing(self._address.sentinel_at(sentinel)) as client:
                (said,) = pipeline(client, [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)])
            if isinstance(said, redis.RedisError):
                raise said
            if not said:
                raise redis.ResponseError(f"the Sentinels know no primary {name!r}")
            primary = str(said[0]), int(said[1])
            self._sentinels, self._patience = [sentinel, *others], 1
            return primary

        self._asked = time.monotonic()
        return first_answer(self._sentinels, look)


def first_answer(hosts: Iterable[Host], look: Callable[[Host], T]) -> T:
    """Ask servers in turn, within a bound.  Raises what the last of them said, or why it didn't."""
    deadline = time.monotonic() + LONGEST_SEARCH
    problem: Exception = redis.ConnectionError("no server is known")
    for host in list(hosts):
        try:
            return look(host)
        except UNUSABLE as error:
            problem = error
        if time.monotonic() > deadline:
            break
    raise problem
