"""The Redis that a circuit protects: connecting to it, which of its errors count, and redis-py's
own client under the circuit.

It has nothing to do with the store of the circuits.  Every answer has a deadline and nothing is
tried twice in secret: a client that retries for seconds would hold its callers when it matters.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ClusterError,
    ExceptionType,
    OutOfMemoryError,
    ReadOnlyError,
    SlotNotCoveredError,
    TryAgainError,
)

from ..address import Address, address_of
from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..sections import Cache as Section
from .redis_cluster import AsyncCluster, Cluster, Later, Unreachable

# What says that Redis is unwell.  A miss, a wrong type or a missing right says nothing of it.
FAILURES: tuple[type[Exception], ...] = (
    redis.ConnectionError,  # a server that is loading included
    redis.TimeoutError,
    ReadOnlyError,
    OutOfMemoryError,
    ClusterDownError,
    SlotNotCoveredError,
)
# A slot is on its way to another node: its keys cannot be used together now, but Redis is well.
BETWEEN: tuple[type[Exception], ...] = (TryAgainError, ClusterError)
_NOT_DONE = (
    redis.ResponseError,
    redis.exceptions.BusyLoadingError,
    ClusterError,
    redis.sentinel.MasterNotFoundError,
    redis.asyncio.sentinel.MasterNotFoundError,
    Unreachable,
)
# The same as FAILURES, of errors that have no type of their own.
CODES = ("MISCONF", "NOREPLICAS", "MASTERDOWN")
# What connections of the circuits' store have, and those of a cache do not.
_OWN = ("decode_responses", "encoding_errors", "socket_timeout", "socket_connect_timeout", "retry")
# What the servers of a group are asked for themselves.
_PLACE = ("host", "port", "db", "connection_class")


class CacheOpenException(CircuitBreakerOpenException, redis.ConnectionError):
    """A call was refused because the cache's circuit does not admit it.

    It is also redis-py's ConnectionError, so that code which copes with an unreachable Redis copes
    with this.
    """

    # What redis-py's own errors have, and their repr needs.
    error_type = ExceptionType.NETWORK
    status_code = None


def refused(error: CircuitBreakerOpenException) -> CacheOpenException:
    """The same refusal as the native error."""
    if isinstance(error, CacheOpenException):
        return error
    return CacheOpenException(*error.__reduce__()[1])


def unwell(error: BaseException) -> bool:
    """Whether an error says that Redis is unwell."""
    if isinstance(error, FAILURES):
        return True
    return isinstance(error, redis.ResponseError) and str(error).startswith(CODES)


def counts(error: BaseException) -> bool:
    """Whether an error means that what stands behind Redis is asked."""
    return unwell(error) or isinstance(error, BETWEEN)


def raise_outage(answers: Sequence[Any]) -> None:
    """Raise one of some answers if it counts, rather one that says that Redis is unwell."""
    errors = [a for a in answers if isinstance(a, Exception) and counts(a)]
    if errors:
        raise next(filter(unwell, errors), errors[0])


def was_never_sent(error: BaseException) -> bool:
    """Whether the server cannot have carried out what ended with this error."""
    if isinstance(error, CircuitBreakerOpenException):
        return True
    cause: BaseException | None = error
    for _ in range(5):
        # A Sentinel's client says of READONLY that the connection is lost.
        if isinstance(cause, ConnectionRefusedError | FileNotFoundError | ReadOnlyError):
            return True
        if cause is None:
            break
        cause = cause.__cause__ or cause.__context__
    # What was answered instead of carrying it out, or kept from being sent.
    return isinstance(error, _NOT_DONE)


def _options(address: Address, section: Section, library: Any) -> dict[str, Any]:
    options = {name: value for name, value in address.options.items() if name not in _OWN}
    return options | {
        "socket_timeout": section.socket_timeout,
        "socket_connect_timeout": section.connection_timeout,
        "retry": library.retry.Retry(NoBackoff(), 0),
    }


def connect(section: Section, client_of: Callable[..., Any] | None = None) -> Any:
    """A client of the section's Redis; it connects when it is first used.

    Args:
        section: where Redis is, and how long it may take.
        client_of: makes the client of a single server, from its pool's options; redis-py's own if
            it is left out.

    Returns:
        redis-py's ``Redis``, or its ``RedisCluster`` for a ``redis+cluster`` URL.
    """
    address = address_of(section.address)
    if address.kind == "cluster":
        return Later(lambda: Cluster(**_of_cluster(address, section, redis)))
    return _connect(address, section, redis, _Watched, client_of)


def connect_async(section: Section) -> Any:
    """The same for asyncio: a client for one event loop."""
    address = address_of(section.address)
    if address.kind == "cluster":
        # Each MOVED is followed for its slot; learning all anew would cut what is under way.
        options = _of_cluster(address, section, redis.asyncio)
        return AsyncCluster(**options, reinitialize_steps=0)
    return _connect(address, section, redis.asyncio, _AsyncWatched)


def _connect(
    address: Address,
    section: Section,
    library: Any,
    watched: Any,
    client_of: Callable[..., Any] | None = None,
) -> Any:
    """``library``: redis-py's, or its half for asyncio, which has all classes by the same names."""
    options = _options(address, section, library)
    if address.kind == "sentinel":
        options = _of_group(options)
        own = {name: address.sentinel_options.get(name) for name in ("username", "password")}
        sentinels = library.sentinel.Sentinel(address.hosts, sentinel_kwargs=options | own)
        named = {"db": address.db, "redis_class": watched}
        return sentinels.master_for(address.primary, **options, **named)
    if "connection_class" in options:
        name = options["connection_class"].__name__
        options["connection_class"] = getattr(library.connection, name)
    if client_of is not None:
        return client_of(**options)
    return library.Redis.from_pool(library.ConnectionPool(**options))


def _of_cluster(address: Address, section: Section, library: Any) -> dict[str, Any]:
    nodes = [library.cluster.ClusterNode(host, port) for host, port in address.hosts]
    return {"startup_nodes": nodes, **_of_group(_options(address, section, library))}


def _of_group(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a group's clients, which choose places and kinds of connections themselves."""
    secure = options.get("connection_class") is not None
    return {n: value for n, value in options.items() if n not in _PLACE} | {"ssl": secure}


class _Watched(redis.Redis):
    """The primary that Sentinels name; it takes the connections to them along."""

    def close(self) -> None:
        super().close()
        pool: Any = self.connection_pool
        pool.sentinel_manager.close()


class _AsyncWatched(redis.asyncio.Redis):
    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        await pool.sentinel_manager.aclose()


# ---------------------------------------------------------------------------- under the circuit


def guarded(client: Any, breaker: CircuitBreaker) -> Any:
    """redis-py's client, each of whose commands and pipelines is a call under the circuit.

    Raises:
        CacheOpenException: from its commands, while the circuit does not admit them.
    """

    def under(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                with breaker.guard():
                    return function(*args, **kwargs)
            except CircuitBreakerOpenException as error:
                raise refused(error) from None

        return call

    if isinstance(client, Later):
        # To connect is a call of its own: it may fail, and it is not to be tried while the circuit
        # is open.
        return client.then(lambda make: under(lambda: _with_each(make(), under)))
    return _with_each(client, under)


def guarded_async(client: Any, breaker: CircuitBreaker) -> Any:
    """The same for a client of asyncio."""

    def under(function: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                async with breaker.guard():
                    return await function(*args, **kwargs)
            except CircuitBreakerOpenException as error:
                raise refused(error) from None

        return call

    return _with_each(client, under)


def _with_each(client: Any, under: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """Change what carries out commands, in the client and in each pipeline that it makes."""
    pipeline = client.pipeline

    @functools.wraps(pipeline)
    def of_pipeline(*args: Any, **kwargs: Any) -> Any:
        made = pipeline(*args, **kwargs)
        made.execute = under(made.execute)
        return made

    client.execute_command = under(client.execute_command)
    client.pipeline = of_pipeline
    return client


# ---------------------------------------------------------------------------- event loops


class PerLoop:
    """One client for each event loop that asks for it.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._clients: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def get(self) -> Any:
        """The running event loop's."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            # A connection knows its loop, so a loop that has ended would be kept by its client.
            for other in list(self._clients):
                if other.is_closed():
                    del self._clients[other]
            client = self._clients[loop] = self._make()
        return client

    async def aclose(self) -> None:
        """Close the running event loop's."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()
