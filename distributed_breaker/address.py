"""From the store's URL to a Redis client: schemes, settings of every connection, redaction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

CONNECT_TIMEOUT = 0.5
READ_TIMEOUT = 0.25
SCHEMES = (
    "redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://, redis+cluster://, "
    "rediss+cluster://, memory://"
)


def _settings() -> dict[str, Any]:
    """Settings of every connection: a dead server costs a quarter of a second, once."""
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_timeout": READ_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "protocol": 2,
        "decode_responses": True,
        "encoding_errors": "replace",
        # CLIENT SETINFO needs a right that a least-privilege user does not have.
        "driver_info": None,
    }


def client_factory(url: str) -> tuple[Callable[[], Any], int]:
    """A function that makes the client, and the number of the database.

    Raises:
        ValueError: the URL's scheme or one of its parts is not usable.
    """
    if not isinstance(url, str):
        raise ValueError(f"the store's URL must be a text, not {type(url).__name__}")
    scheme, separator, _ = url.partition("://")
    transport, _, kind = scheme.partition("+")
    known = transport in ("redis", "rediss") and kind in _KINDS
    if not separator or not (known or scheme == "unix"):
        shown = redacted(url) if separator else "the store's URL"
        raise ValueError(f"{shown}: unknown scheme {scheme[:20]!r}; use one of {SCHEMES}")
    try:
        return _KINDS[kind](url)
    except (ValueError, TypeError) as error:
        problem = str(error)
    # Raised outside of the handler, so that no text of another library's that may hold a part of
    # a password stays attached to it.
    raise ValueError(f"{redacted(url)}: {problem}")


def _single(url: str) -> tuple[Callable[[], Any], int]:
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if not _port_is_right(parts):
        raise ValueError("the port must be a number up to 65535; escape / ? # @ in a password")
    if not url.startswith("unix:") and path and not path.isdigit():
        raise ValueError("the path must be a database number, such as /0")
    # Ours come last: an option in the URL must not make a dead server cost seconds.
    parsed: Any = parse_url
    options = {**parsed(url), **_settings()}
    off = MaintNotificationsConfig(enabled=False)
    redis.ConnectionPool(**options, maint_notifications_config=off).make_connection()

    def client() -> Any:
        pool = redis.ConnectionPool(**options, maint_notifications_config=off)
        return redis.Redis(connection_pool=pool)

    return client, int(options.get("db") or 0)


def _sentinel(url: str) -> tuple[Callable[[], Any], int]:
    parts = urlsplit(url)
    path = parts.path.strip("/").split("/")
    if not path[0] or len(path) > 2 or not (path[1:] or ["0"])[0].isdigit():
        raise ValueError(
            "name the monitored primary, such as redis+sentinel://host:26379/mymaster/0"
        )
    db = int((path[1:] or ["0"])[0])
    hosts = _hosts(parts.netloc, 26379)
    options = {**_access(parts), **_settings(), "db": db}

    def client() -> Any:
        sentinels: Any = redis.Sentinel
        watched = sentinels(hosts, sentinel_kwargs={**_settings(), "ssl": options["ssl"]})
        return watched.master_for(path[0], **options)

    return client, db


def _cluster(url: str) -> tuple[Callable[[], Any], int]:
    parts = urlsplit(url)
    if parts.path.strip("/") not in ("", "0"):
        raise ValueError("a cluster has only database 0: leave the path out")
    hosts = _hosts(parts.netloc, 6379)
    options: Any = {**_access(parts), **_settings(), "retry": Retry(NoBackoff(), 1)}

    def client() -> Any:
        node: Any = redis.cluster.ClusterNode
        return redis.RedisCluster(startup_nodes=[node(*host) for host in hosts], **options)

    return client, 0


_KINDS = {"": _single, "sentinel": _sentinel, "cluster": _cluster}


def _port_is_right(parts: SplitResult) -> bool:
    try:
        return parts.scheme == "unix" or parts.port is None or parts.port > 0
    except ValueError:
        return False


def _access(parts: SplitResult) -> dict[str, Any]:
    return {
        "username": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
        "ssl": parts.scheme.startswith("rediss"),
    }


def _hosts(netloc: str, port: int) -> list[tuple[str, int]]:
    hosts = []
    for part in netloc.rpartition("@")[2].split(","):
        host, colon, number = part.strip().rpartition(":")
        if not colon or part.endswith("]"):
            host, number = part.strip(), str(port)
        if not host or not number.isdigit() or int(number) > 65_535:
            raise ValueError("a host is missing, or its port is not a number up to 65535")
        hosts.append((host.strip("[]"), int(number)))
    return hosts


def redacted(url: str) -> str:
    """The URL without user, password and options, for messages and logs.

    A password may hold characters that should have been escaped, so everything before the last
    ``@`` goes.
    """
    scheme, separator, rest = url.partition("://")
    before, _, host = rest.rpartition("@")
    if "?" in rest and (not before or "?" in before):
        host = "" if before else rest.partition("?")[0]
    return f"{scheme}{separator}{re.split('[?#]', host)[0] or '***'}"
