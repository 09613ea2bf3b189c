"""The Redis side: encode a step, run the script, decode the reply.

How a client is made, with connections of our own, short timeouts and no hidden retries, stands in
``address.py``, and which server is asked in ``nodes.py`` and ``cluster.py``.  All methods block;
only the link's threads call them.  What goes over the wire is specified in ``lua/README.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol

import redis

from .address import Address, address_of
from .cluster import Cluster
from .errors import StoreDown, StoreError
from .model import Reply, Run, Step
from .nodes import Command, Nodes, Single, Watched
from .process import OwnLock

OLDEST = (6, 2)

# Codes that concern one key; every other error concerns the whole store.
OF_ONE_KEY = frozenset({"WRONGTYPE", "CBSCHEMA", "CBCORRUPT", "CBARG", "ERR"})

# How the servers behind a URL are spoken to, by the kind of address.
KINDS: dict[str, Callable[[Address, str], Nodes]] = {
    "": Single,
    "sentinel": Watched,
    "cluster": Cluster,
}


class Subscription(Protocol):
    """A subscription to the pushes of one namespace.

    ``refused`` is what the server says instead of answering PING, if it refuses that.
    """

    refused: str

    def get(self, timeout: float) -> str | None:
        """The next push (``<circuit> <header>``), or None after ``timeout`` seconds."""

    def ping(self) -> None:
        """Ask for a sign of life; ``get`` raises StoreDown if none has come a second later."""

    def wake(self) -> None:
        """End a ``get`` that waits in another thread; it raises StoreDown."""

    def close(self) -> None:
        """Close the connection."""


# ---------------------------------------------------------------------------- the wire


@cache
def script(name: str = "breaker.lua") -> str:
    """The text of a script; by default of the one that carries out every step."""
    return (Path(__file__).parent / "lua" / name).read_text(encoding="utf-8")


@cache
def sha(name: str = "breaker.lua") -> str:
    """A script's name on the server."""
    return hashlib.sha1(script(name).encode(), usedforsecurity=False).hexdigest()


def key_of(namespace: str, circuit: str) -> str:
    """The circuit's key; the braces put it and its log into one cluster slot."""
    return f"cb:{{{namespace}:{circuit}}}"


def names_key(namespace: str) -> str:
    """The set of all names of circuits."""
    return f"cb:{namespace}:circuits"


def encode_batch(batch: Iterable[Run]) -> str:
    """Runs as ``<kind><count>[*<open_for>][@<age>]``, separated by blanks."""
    return " ".join(
        f"{r.kind}{r.count}"
        + (f"*{r.open_for}" if r.open_for > 0 else "")
        + (f"@{r.age}" if r.age >= 0 else "")
        for r in batch
    )


def encode(step: Step, channel: str, circuit: str, now: int | None = None) -> list[str]:
    """The script's ARGV for one step; ``now`` (ms) replaces the server's clock in tests."""
    k = step.known
    common = [
        step.op,
        "" if now is None else str(now),
        step.nonce,
        channel,
        circuit,
        f"{k.v} {k.nonce} {k.state} {k.remaining} {k.attempt}",
        step.policy.text(),
        "1" if step.offer else "0",
    ]
    era = f"{step.era[0]} {step.era[1]}"
    deltas = " ".join(f"{name}:{count}" for name, count in step.deltas)
    own = {
        "report": [era, step.reporter, encode_batch(step.batch), deltas, step.detail],
        "acquire": [step.token],
        "settle": [
            era,
            step.token,
            step.kind,
            str(step.open_for),
            deltas,
            step.detail,
        ],
        "cancel": [step.token],
        "override": [step.kind, str(step.ttl), step.detail],
        "release": [step.detail],
        "reset": [step.detail],
    }
    return common + own[step.op]


def decode(answer: Sequence[str]) -> Reply:
    """The script's reply."""
    header, now, remaining, old, cause, verdict, value, policy, failed = answer[:9]
    return Reply(header, int(now), int(remaining), old, cause, verdict, int(value), policy, failed)


def code_of(error: redis.RedisError) -> str:
    """An error's code.  Only the code is ever compared: texts differ between servers."""
    if isinstance(error, redis.TimeoutError):
        return "TIMEOUT"
    code = error.status_code
    if isinstance(error, redis.ConnectionError) and code in (None, "ERR"):
        return "CONNECTION"  # also "max number of clients reached", which passes
    if code is not None:
        return str(code)
    word = str(error).split(" ", 1)[0]
    return word if re.fullmatch(r"[A-Z]+", word) else "ERR"


def _raise_down(error: redis.RedisError) -> NoReturn:
    raise StoreDown(code_of(error), str(error)) from error


# ---------------------------------------------------------------------------- the store


class RedisStore:
    """One namespace of circuits in Redis or Valkey.

    Args:
        url: where the server is; see ``address.SCHEMES``.
        namespace: prefix of every key and of the channel.

    Nothing is connected before the first step.
    """

    _lock = OwnLock()  # the sending and the listening thread share the nodes

    def __init__(self, url: str, namespace: str) -> None:
        self.namespace = namespace
        self.url = url
        self._address = address_of(url)
        self._nodes: Nodes | None = None
        self._opening: Any = None  # the listening thread's connection, the last that was made
        self._checked = False
        self.channel = f"cb:{self._address.db}:{namespace}"
        self._names = names_key(namespace)

    def run(self, steps: Sequence[tuple[str, Step]]) -> list[Reply | StoreError]:
        """Carry out steps on circuits, in one pipeline, each at most once.

        A step is sent again only when the server answers that it has not carried it out.

        Raises:
            StoreDown: the store cannot serve; nothing is known of steps without an answer.
        """
        commands = [self._command(circuit, step) for circuit, step in steps]
        replies = [self._reply(answer) for answer in self._execute(commands)]
        return [
            _without_log(reply) if command.parted and isinstance(reply, Reply) else reply
            for command, reply in zip(commands, replies, strict=True)
        ]

    def poll(self, circuits: Sequence[str]) -> tuple[int, list[str | None]]:
        """The server's time in ms and the header of each circuit (None: there is none)."""
        now, answers = self._look([("HGET", self._key(name), "h") for name in circuits])
        headers: list[str | None] = []
        for answer in answers:
            if isinstance(answer, redis.RedisError) and code_of(answer) not in OF_ONE_KEY:
                _raise_down(answer)
            headers.append(answer if isinstance(answer, str) else None)
        return now, headers

    def read(self, circuits: Sequence[str]) -> tuple[int, list[dict[str, str] | StoreError]]:
        """The server's time in ms and all fields of each circuit (empty: there is none)."""
        now, answers = self._look([("HGETALL", self._key(name)) for name in circuits])
        fields: list[dict[str, str] | StoreError] = []
        for answer in answers:
            if isinstance(answer, redis.RedisError):
                fields.append(StoreError(f"{code_of(answer)} {answer}"))
            else:
                fields.append(dict(answer))
        return now, fields

    def log(self, circuit: str, count: int = 50) -> list[dict[str, str]]:
        """The last transitions of one circuit, newest first."""
        key = self._key(circuit) + ":log"
        (answer,) = self._execute([Command(key, ("XREVRANGE", key, "+", "-", "COUNT", count))])
        self._raise_first([answer])
        return [dict(fields) for _, fields in answer]

    def remember(self, circuits: Sequence[str]) -> None:
        """Add names to the set of known circuits."""
        self._raise_first(self._execute([Command(self._names, ("SADD", self._names, *circuits))]))

    def names(self) -> list[str]:
        """The names of all known circuits of the namespace, sorted."""
        (answer,) = self._execute([Command(self._names, ("SMEMBERS", self._names))])
        self._raise_first([answer])
        return sorted(answer)

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Plain commands, for somebody who examines the server; an error that answers one of them
        stands in its place, as a StoreError."""
        return [
            StoreError(f"{code_of(a)} {a}") if isinstance(a, redis.RedisError) else a
            for a in self._execute(commands)
        ]

    def subscribe(self) -> Subscription:
        """Open the connection that hears transitions.  Raises StoreDown."""
        nodes = self._connected()
        with _failures():
            connection = self._opening = nodes.connection()
            connection.connect()
            return _Channel(connection, self.channel, lambda: nodes.serves(connection))

    def close(self) -> None:
        """Close the connections; a later step opens them again."""
        nodes, self._nodes, self._checked = self._nodes, None, False
        if nodes is not None:
            nodes.close()

    def forked(self) -> None:
        """Forget the parent's connections, which a child must not speak on.

        The child's copies are closed, which tells the server nothing.  Left open, they would keep
        the parent's subscription alive after its death, with nobody to read what is pushed.
        """
        left = self._nodes.connections() if self._nodes is not None else []
        for connection in [self._opening, *left]:
            if connection is not None:
                connection.disconnect()
        self._nodes, self._opening, self._checked = None, None, False
        vars(self).pop("_lock", None)

    def _key(self, circuit: str) -> str:
        return key_of(self.namespace, circuit)

    def _command(self, circuit: str, step: Step) -> Command:
        """A step, and the same step without the log, which may be on another node for a while."""
        key, arguments = self._key(circuit), encode(step, self.channel, circuit)
        whole = ("EVALSHA", sha(), 2, key, key + ":log", *arguments)
        return Command(key, whole, alone=("EVALSHA", sha(), 1, key, *arguments))

    def _reply(self, answer: Any) -> Reply | StoreError:
        if not isinstance(answer, redis.RedisError):
            try:
                return decode(answer)
            except (ValueError, TypeError) as error:
                raise StoreDown("CBANSWER", f"not the script's reply: {answer!r:.80}") from error
        code = code_of(answer)
        if code not in OF_ONE_KEY:
            _raise_down(answer)
        text = str(answer)
        return StoreError(text if text.startswith(code) else f"{code} {text}")

    def _raise_first(self, answers: Sequence[Any]) -> None:
        for answer in answers:
            if isinstance(answer, redis.RedisError):
                _raise_down(answer)

    def _execute(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands together; an error that answers one command stands in its place."""
        return self._ask(commands, timed=False)[0]

    def _look(self, reads: Sequence[tuple[Any, ...]]) -> tuple[int, list[Any]]:
        """Read keys, and the time.

        The nodes of a cluster have a clock each.  Of those that were asked the last counts, so that
        what remains of a deadline is never taken for less than it is.
        """
        answers, times = self._ask([Command(words[1], words) for words in reads], timed=True)
        self._raise_first(times)
        return min(map(_ms, times)), answers

    def _ask(self, commands: Sequence[Command], *, timed: bool) -> tuple[list[Any], list[Any]]:
        nodes = self._connected()
        with _failures():
            return nodes.ask(commands, timed=timed)

    def _connected(self) -> Nodes:
        with self._lock:
            if self._nodes is None:
                self._nodes = KINDS[self._address.kind](self._address, script())
            if not self._checked:
                self._check_version(self._nodes)
                self._checked = True
            return self._nodes

    def _check_version(self, nodes: Nodes) -> None:
        """HELLO needs no right of its own, unlike INFO; servers before 6.0 do not know it."""
        with _failures():
            ((hello,), _) = nodes.ask([Command("", ("HELLO",))])
        version = ""
        if isinstance(hello, redis.RedisError) and "unknown command" in str(hello).lower():
            version = "5"
        elif isinstance(hello, list):
            version = str(dict(zip(hello[::2], hello[1::2], strict=False)).get("version", ""))
        elif isinstance(hello, dict):
            version = str(hello.get("version", ""))
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if numbers and numbers < OLDEST:
            raise StoreDown(
                "CBOLD", f"the server's version {version} is older than 6.2: upgrade it"
            )


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Say in this library's terms what a Redis client raises."""
    try:
        yield
    except redis.RedisError as error:
        _raise_down(error)
    except OSError as error:
        raise StoreDown("CONNECTION", str(error)) from error
    except (ValueError, TypeError, LookupError) as error:
        # The client's own parsing of a reply failed: whatever answers there is no Redis.
        raise StoreDown("CBANSWER", f"the server's answer is not Redis's: {error!r}") from error


def _without_log(reply: Reply) -> Reply:
    """The reply to a step that was sent without its log, and so could not write it.

    An entry of the log is lost, which harms nothing, and nobody needs to act.
    """
    failed = (e for e in reply.failed.split() if not e.startswith(("xadd=", "pexpire=")))
    return reply._replace(failed=" ".join(failed))


def _ms(time: Sequence[str]) -> int:
    try:
        return int(time[0]) * 1000 + int(time[1]) // 1000
    except (ValueError, TypeError, LookupError) as error:
        raise StoreDown("CBANSWER", f"not a reply to TIME: {time!r:.80}") from error


class _Channel:
    """A subscription on a bare connection: redis-py's PubSub reconnects and subscribes again
    without a word, and what was pushed meanwhile would be missed unnoticed."""

    def __init__(self, connection: Any, channel: str, right: Callable[[], bool]) -> None:
        self._connection = connection
        self._right = right
        self._waiting_for_pong = False
        self.refused = ""
        connection.send_command("SUBSCRIBE", channel)
        answer = connection.read_response()
        if isinstance(answer, redis.RedisError):
            raise answer

    def get(self, timeout: float) -> str | None:
        if not self._right():
            raise StoreDown("CONNECTION", "this server has left the group; subscribe to another")
        try:
            if not self._connection.can_read(timeout=timeout):
                if self._waiting_for_pong:
                    raise redis.ConnectionError("no answer to PING on the subscription")
                return None
            message = self._connection.read_response()
        except redis.ResponseError as error:
            # The only thing that is asked here is PING: a refusal is a sign of life, too.
            self.refused = f"{code_of(error)} {error}"
            message = None
        except redis.RedisError as error:
            _raise_down(error)
        except OSError as error:
            raise StoreDown("CONNECTION", str(error)) from error
        if isinstance(message, list) and message[0] == "message":
            return str(message[2])
        self._waiting_for_pong = False
        return ""

    def ping(self) -> None:
        try:
            self._connection.send_command("PING", check_health=False)
        except redis.RedisError as error:
            _raise_down(error)
        self._waiting_for_pong = True

    def wake(self) -> None:
        connected = self._connection._sock
        if connected is not None:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.disconnect()
