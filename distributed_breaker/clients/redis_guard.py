"""The Redis that a circuit protects: connecting to it, which of its errors count, and redis-py's
own client under the circuit.

It has nothing to do with the store of the circuits.  Every answer has a deadline and nothing is
tried twice in secret: a client that retries for seconds would hold its callers when it matters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    TryAgainError,
)

from ..address import Address, address_of
from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..sections import Cache

# What says that Redis is unwell.  A miss, a wrong type or a missing right says nothing of it.
FAILURES: tuple[type[Exception], ...] = (
    redis.ConnectionError,  # a server that is loading included
    redis.TimeoutError,
    ReadOnlyError,
    OutOfMemoryError,
    ClusterDownError,
    RedisClusterException,
    TryAgainError,
)
# The same, of errors that have no type of their own.
CODES = ("MISCONF", "NOREPLICAS", "MASTERDOWN")
# What connections of the circuits' store have, and those of a cache do not.
_OWN = ("decode_responses", "encoding_errors", "socket_timeout", "socket_connect_timeout", "retry")


class CacheOpenException(CircuitBreakerOpenException, redis.ConnectionError):
    """A call was refused because the cache's circuit does not admit it.

    It is also redis-py's ConnectionError, so that code which copes with an unreachable Redis copes
    with this.
    """


def refused(error: CircuitBreakerOpenException) -> CacheOpenException:
    """The same refusal as the native error."""
    if isinstance(error, CacheOpenException):
        return error
    return CacheOpenException(*error.__reduce__()[1])


def counts(error: BaseException) -> bool:
    """Whether an error says that Redis is unwell."""
    if isinstance(error, FAILURES):
        return True
    return isinstance(error, redis.ResponseError) and str(error).startswith(CODES)


def was_never_sent(error: BaseException) -> bool:
    """Whether the server cannot have carried out what ended with this error."""
    if isinstance(error, CircuitBreakerOpenException):
        return True
    cause: BaseException | None = error
    for _ in range(5):
        if isinstance(cause, ConnectionRefusedError | FileNotFoundError):
            return True
        if cause is None:
            break
        cause = cause.__cause__ or cause.__context__
    # What a server answers instead of carrying it out.
    return isinstance(error, redis.ResponseError | redis.exceptions.BusyLoadingError)


def _options(address: Address, section: Cache) -> dict[str, Any]:
    options = {name: value for name, value in address.options.items() if name not in _OWN}
    return options | {
        "socket_timeout": section.socket_timeout,
        "socket_connect_timeout": section.connection_timeout,
    }


def connect(section: Cache) -> Any:
    """A client of the section's Redis; it connects when it is first used.

    Returns:
        redis-py's ``Redis``, or its ``RedisCluster`` for a ``redis+cluster`` URL.
    """
    return _connect(section, redis)


def connect_async(section: Cache) -> Any:
    """The same for asyncio: a client for one event loop."""
    return _connect(section, redis.asyncio)


def _connect(section: Cache, library: Any) -> Any:
    """``library``: redis-py's, or its half for asyncio, which has all classes by the same names."""
    address = address_of(section.address)
    options = _options(address, section)
    known = options | _sentinels_own(address)
    options["retry"] = library.retry.Retry(NoBackoff(), 0)
    if "connection_class" in options:
        name = options["connection_class"].__name__
        options["connection_class"] = getattr(library.connection, name)
    if address.kind == "cluster":
        nodes = [library.cluster.ClusterNode(host, port) for host, port in address.hosts]
        return library.RedisCluster(startup_nodes=nodes, **_of_cluster(options))
    if address.kind == "sentinel":
        sentinels = library.sentinel.Sentinel(address.hosts, sentinel_kwargs=known)
        return sentinels.master_for(address.primary, **options)
    return library.Redis.from_pool(library.ConnectionPool(**options))


def _of_cluster(options: dict[str, Any]) -> dict[str, Any]:
    # A moved slot is followed; a node that is away is not asked ten times.
    left_out = ("db", "host", "port", "connection_class")
    kept = {name: value for name, value in options.items() if name not in left_out}
    if options.get("connection_class") is not None:
        kept["ssl"] = options["connection_class"].__name__ == "SSLConnection"
    return kept


def _sentinels_own(address: Address) -> dict[str, Any]:
    return {name: address.sentinel_options.get(name) for name in ("username", "password", "db")}


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
