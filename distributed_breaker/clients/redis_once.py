"""redis-py's client without what it has for trying again, for commands that are tried once.

redis-py spends about as long on its pool, its retries and its measurements as on the command
itself, which is more than a circuit breaker adds; here that time is saved.
"""

from __future__ import annotations

from typing import Any

import redis
from redis.observability.providers import get_observability_instance


def client_of(**options: Any) -> redis.Redis:
    """A client of one server that tries nothing again; with redis-py's metrics on, its own.

    Args:
        options: what redis-py's ``ConnectionPool`` takes.
    """
    if get_observability_instance().is_enabled():
        return redis.Redis.from_pool(redis.ConnectionPool(**options))
    return Once.from_pool(_Pool(**options))


class Once(redis.Redis):
    """Sends a command and returns its answer."""

    # ``execute_command``, which calls this, is what tools for tracing replace.
    def _execute_command(self, *args: Any, **options: Any) -> Any:
        pool = self.connection_pool
        connection: Any = pool.get_connection()
        try:
            connection.send_command(*args)
            return self.parse_response(connection, args[0], **options)  # type: ignore[no-untyped-call]
        except redis.ResponseError:
            raise
        except BaseException:
            # An answer that is still to come must not be the next command's.
            connection.disconnect()
            raise
        finally:
            pool.release(connection)


class _Pool(redis.ConnectionPool):
    """Keeps the connections that come back whole; to redis-py's pool they are still in use, so
    they count among its ``max_connections``, and are closed with all others."""

    _kept: list[Any]  # its methods are atomic, so no lock is needed

    def reset(self) -> None:  # by the constructor, and in a fork's child
        self._kept = []
        super().reset()

    def get_connection(self, *args: Any, **options: Any) -> Any:
        self._checkpid()
        try:
            connection = self._kept.pop()
        except IndexError:
            return super().get_connection()
        try:
            if not connection.can_read():
                return connection
        except (redis.RedisError, OSError):
            pass
        # Closed by the server, or something was sent by it: redis-py knows what to do.
        super().release(connection)
        return super().get_connection()

    def release(self, connection: Any) -> None:
        if connection.is_connected and not connection.should_reconnect():
            self._kept.append(connection)
        else:
            super().release(connection)
