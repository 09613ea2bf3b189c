"""From the store's URL to a Redis client: schemes, settings of every connection, redaction."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

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

Host = tuple[str, int]


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


@dataclass(frozen=True)
class Address:
    """What a URL says: which servers, how to speak to them, and what they are to each other.

    Attributes:
        kind: empty for one server, ``"sentinel"`` or ``"cluster"``.
        db: number of the database.
        options: redis-py's, of connections to the servers that hold circuits.
        hosts: where to ask first: the sentinels, or some nodes of the cluster.
        primary: by which name the sentinels know it.
        sentinel_options: redis-py's, of connections to the sentinels.
    """

    kind: str
    db: int
    options: dict[str, Any]
    hosts: tuple[Host, ...] = ()
    primary: str = ""
    sentinel_options: dict[str, Any] = field(default_factory=dict)

    def client(self) -> redis.Redis:
        """A client of the one server."""
        return _client(self.options)

    def client_at(self, host: Host) -> redis.Redis:
        """A client of one of a group's servers."""
        return _client({**self.options, "host": host[0], "port": host[1]})

    def sentinel_at(self, host: Host) -> redis.Redis:
        """A client of one sentinel."""
        return _client({**self.sentinel_options, "host": host[0], "port": host[1]})


def address_of(url: str) -> Address:
    """Read a URL.

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


def _single(url: str) -> Address:
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if not _port_is_right(parts):
        raise ValueError("the port must be a number up to 65535; escape / ? # @ in a password")
    if not url.startswith("unix:") and path and not path.isdigit():
        raise ValueError("the path must be a database number, such as /0")
    options = _options(url)
    return Address("", int(options.get("db") or 0), options)


def _sentinel(url: str) -> Address:
    parts = urlsplit(url)
    path = parts.path.strip("/").split("/")
    if not path[0] or len(path) > 2 or not (path[1:] or ["0"])[0].isdigit():
        raise ValueError(
            "name the monitored primary, such as redis+sentinel://host:26379/mymaster/0"
        )
    db = int((path[1:] or ["0"])[0])
    query = dict(parse_qsl(parts.query))
    # Sentinels have users of their own; without these, they are asked without a password.
    own = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    servers = _options(_as_single(parts, db, query))
    sentinels = {**servers, **own, "db": 0}
    return Address("sentinel", db, servers, _hosts(parts.netloc, 26379), path[0], sentinels)


def _cluster(url: str) -> Address:
    parts = urlsplit(url)
    if parts.path.strip("/") not in ("", "0"):
        raise ValueError("a cluster has only database 0: leave the path out")
    options = _options(_as_single(parts, 0, dict(parse_qsl(parts.query))))
    if options.get("db"):
        raise ValueError("a cluster has only database 0: leave db out")
    return Address("cluster", 0, options, _hosts(parts.netloc, 6379))


_KINDS = {"": _single, "sentinel": _sentinel, "cluster": _cluster}


def _as_single(parts: SplitResult, db: int, query: dict[str, str]) -> str:
    """The URL of one server of a group, wherever it is; its users and options are all alike."""
    access, at, _ = parts.netloc.rpartition("@")
    transport = parts.scheme.partition("+")[0]
    return f"{transport}://{access}{at}host/{db}?{urlencode(query)}"


def _options(url: str) -> dict[str, Any]:
    # Ours come last: an option in the URL must not make a dead server cost seconds.
    parsed: Any = parse_url
    options = {**parsed(url), **_settings()}
    _client(options).connection_pool.make_connection()  # raises if one of them is unknown
    return options


def _client(options: dict[str, Any]) -> redis.Redis:
    off = MaintNotificationsConfig(enabled=False)
    pool = redis.ConnectionPool(**options, maint_notifications_config=off)
    # Closing a client closes a pool only if it is the client's own.
    return redis.Redis.from_pool(pool)


def _port_is_right(parts: SplitResult) -> bool:
    try:
        return parts.scheme == "unix" or parts.port is None or parts.port > 0
    except ValueError:
        return False


def _hosts(netloc: str, port: int) -> tuple[Host, ...]:
    hosts = []
    for part in netloc.rpartition("@")[2].split(","):
        host, colon, number = part.strip().rpartition(":")
        if not colon or part.endswith("]"):
            host, number = part.strip(), str(port)
        if not host or not number.isdigit() or int(number) > 65_535:
            raise ValueError("a host is missing, or its port is not a number up to 65535")
        hosts.append((host.strip("[]"), int(number)))
    return tuple(hosts)


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
