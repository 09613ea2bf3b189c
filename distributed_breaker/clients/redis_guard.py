"""The Redis that a circuit protects: connecting to it, which of its errors count, and redis-py's
own client under the circuit.

It has nothing to do with the store of the circuits.  Every answer has a deadline and nothing is
tried twice in secret: a client that retries for seconds would hold its callers when it matters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

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
    address = address_of(section.address)
    options = _options(address, section) | {"retry": redis.retry.Retry(NoBackoff(), 0)}
    if address.kind == "cluster":
        node: Any = redis.cluster.ClusterNode
        nodes = [node(host, port) for host, port in address.hosts]
        return redis.RedisCluster(startup_nodes=nodes, **_of_cluster(options))
    if address.kind == "sentinel":
        known = _options(address, section) | _sentinels_own(address)
        sentinel: Any = redis.sentinel.Sentinel
        return sentinel(address.hosts, sentinel_kwargs=known).master_for(address.primary, **options)
    return redis.Redis.from_pool(redis.ConnectionPool(**options))


def connect_async(section: Cache) -> Any:
    """The same for asyncio: a client for one event loop."""
    address = address_of(section.address)
    options = _options(address, section)
    options["retry"] = redis.asyncio.retry.Retry(NoBackoff(), 0)
    if "connection_class" in options:
        name = options["connection_class"].__name__
        options["connection_class"] = getattr(redis.asyncio.connection, name)
    if address.kind == "cluster":
        nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in address.hosts]
        return redis.asyncio.RedisCluster(startup_nodes=nodes, **_of_cluster(options))
    if address.kind == "sentinel":
        known = _options(address, section) | _sentinels_own(address)
        sentinel: Any = redis.asyncio.sentinel.Sentinel
        return sentinel(address.hosts, sentinel_kwargs=known).master_for(address.primary, **options)
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options))


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
    client.execute_command = _under(breaker, client.execute_command)
    pipeline = client.pipeline

    @functools.wraps(pipeline)
    def of_pipeline(*args: Any, **kwargs: Any) -> Any:
        made = pipeline(*args, **kwargs)
        made.execute = _under(breaker, made.execute)
        return made

    client.pipeline = of_pipeline
    return client


def guarded_async(client: Any, breaker: CircuitBreaker) -> Any:
    """The same for a client of asyncio."""
    execute = client.execute_command

    async def execute_command(*args: Any, **kwargs: Any) -> Any:
        try:
            async with breaker.guard():
                return await execute(*args, **kwargs)
        except CircuitBreakerOpenException as error:
            _raise_refused(error)

    client.execute_command = execute_command
    pipeline = client.pipeline

    @functools.wraps(pipeline)
    def of_pipeline(*args: Any, **kwargs: Any) -> Any:
        made = pipeline(*args, **kwargs)
        carry_out = made.execute

        async def execute_all(*args: Any, **kwargs: Any) -> Any:
            try:
                async with breaker.guard():
                    return await carry_out(*args, **kwargs)
            except CircuitBreakerOpenException as error:
                _raise_refused(error)

        made.execute = execute_all
        return made

    client.pipeline = of_pipeline
    return client


def _under(breaker: CircuitBreaker, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with breaker.guard():
                return function(*args, **kwargs)
        except CircuitBreakerOpenException as error:
            _raise_refused(error)

    return call


def _raise_refused(error: CircuitBreakerOpenException) -> NoReturn:
    if isinstance(error, redis.ConnectionError):
        raise error
    raise refused(error) from None
