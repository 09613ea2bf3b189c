"""What an HTTP client is made of: circuits by host, the retry budget, kept answers, the queue."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..fallback.outbox import Entry
from ..permit import Permit
from ..policy import Outcome, check_circuit
from ..process import OwnLock, follow_process
from ..sections import Circuit, HttpType
from .budget import RetryBudget
from .client import ManyHosts
from .driving import Ask, Driver, What
from .http_answers import InvalidAnswer, Judge, origin_of, shown
from .http_counts import Counts
from .http_network import Bounds, bounds
from .http_stored import Stored
from .waiting import Waiting, outbox_of

MISSING: Any = object()
LATE = "the answer was not whole when the call's total_timeout was over"
MOST_HOSTS = 256  # circuits of single hosts
SLOW_MEMORY = 0.1  # how much one attempt says of how slow the service is at the moment
SHORTEST = 0.5  # part of read_timeout that is left of it at least

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


class Act(Ask):
    """Something that the wire does; whether it is awaited is the wire's business."""


@dataclass(slots=True)
class Options:
    """What one request asks for beside what it sends."""

    connect: float | None = None
    read: float | None = None
    deadline: float | None = None  # monotonic seconds
    retry: bool = True
    plain: bool = False  # nothing but one attempt
    queue: bool = False
    default: Any = MISSING
    use_default: bool = True
    cache: bool = True
    validate: Any = None
    expected: Collection[int] | None = None
    content_types: Collection[str] = ()
    max_size: int | None = None
    redirects: bool = True
    of_client: bool = False  # the client's circuit guards it, wherever it goes
    streamed: bool = False  # whoever has asked the wire reads the body


@dataclass(slots=True)
class Call:
    """One request, as the rules see it."""

    request: Any  # the library's own
    method: str
    url: str
    headers: Mapping[str, str]  # by lower-case names
    body: bytes | None  # None: none, or one that can be read only once
    repeatable: bool
    options: Options
    how: Any = None  # what the wire needs beside
    heard: Any = None  # headers of the last answer, by lower-case names


class Answer(NamedTuple):
    """How an attempt ended: with a response, or with an error."""

    response: Any
    error: Exception | None
    outcome: Outcome
    repeatable: bool  # whether such an end may be another one when it is tried again
    wait: float | None  # s, Retry-After


class Wire(Driver):
    """Carries out rules with one library."""

    def _do(self, what: What) -> Any:
        return what.of(self) if isinstance(what, Act) else super()._do(what)

    def _do_async(self, what: What) -> Any:
        return what.of(self) if isinstance(what, Act) else super()._do_async(what)


class Attempts(Wire):
    """Sends attempts with one library, and says what its errors mean.

    Attributes:
        refusal: ours that is also an error of the library's.
        callers: mistakes of the caller's, which say nothing of the service.
        known: all errors of the library, and of the connections below it.
        timeouts: those of them that say that the time is over.
    """

    refusal: type[CircuitBreakerOpenException]
    callers: tuple[type[Exception], ...]
    known: tuple[type[Exception], ...]
    timeouts: tuple[type[Exception], ...]

    def __init__(self, client: HttpBase) -> None:
        self.client = client

    def invalid(self, call: Call, response: Any, message: str) -> Exception:
        """The error for an answer that the caller cannot use."""
        raise NotImplementedError

    def late(self, call: Call) -> Exception:
        """The library's error for an answer that is not whole in time."""
        raise NotImplementedError

    def outcome(self, error: BaseException) -> Outcome:
        """What an error says of the service."""
        known = isinstance(error, self.known) and not isinstance(error, self.callers)
        return Outcome.FAILURE if known else Outcome.IGNORED

    def bounds(self, call: Call) -> Bounds:
        """What holds for the connection of an attempt."""
        client = self.client
        return Bounds(call.options.deadline, client.section.refuse_private_hosts, client.counts)

    def headers_of(self, message: Any) -> dict[str, str]:
        """The headers of a request or answer of the library's, by lower-case names."""
        raise NotImplementedError

    def hear(self, call: Call, response: Any, seconds: float) -> None:
        """The head of an answer has come, after so many seconds."""
        call.heard = self.headers_of(response)
        self.client.counts.status(response.status_code, seconds)

    def is_late(self, call: Call, error: BaseException | None) -> bool:
        """Whether an error comes of the call's time being over, and does not say so."""
        end = call.options.deadline
        if error is None or end is None or isinstance(error, (InvalidAnswer, *self.timeouts)):
            return False
        return isinstance(error, self.known) and time.monotonic() >= end

    def check_length(self, call: Call, response: Any, limit: int) -> None:
        """Raise ``invalid`` for a body that says itself that it is too large."""
        told = call.heard.get("content-length", "")
        if told.isdigit() and int(told) > limit and call.method != "HEAD":
            raise self.too_large(call, response, limit)

    def too_large(self, call: Call, response: Any, limit: int) -> Exception:
        return self.invalid(call, response, f"the answer has more than {limit} bytes")

    def _native(self, error: BaseException) -> BaseException:
        if type(error) is CircuitBreakerOpenException:
            return self.refusal(*error.__reduce__()[1])
        return error


class InTime:
    """Within the block connections have a call's bounds; that its time is over is ``late``."""

    __slots__ = ("_call", "_token", "_wire")

    def __init__(self, wire: Attempts, call: Call) -> None:
        self._wire, self._call = wire, call

    def __enter__(self) -> None:
        self._token = bounds.set(self._wire.bounds(self._call))

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        bounds.reset(self._token)
        if error is not None and self._wire.is_late(self._call, error):
            raise self._wire.late(self._call) from error


class HttpBase(ManyHosts):
    """The parts, and what they need of each other.

    Attributes:
        counts: what it has done in this process.
        headers: sent with every request, whichever library sends it.
        auth: user and password for every request; None: none.
        judge: asked first which outcome a status is; None, or its answer None: the usual one.
    """

    section: HttpType
    _lock = OwnLock()

    def _begin(self) -> None:
        self._main = next(reversed(self.circuits.values()))
        self.headers: dict[str, str] = {}
        self.auth: tuple[str, str] | None = None
        self.judge: Judge | None = None
        self._hosts: dict[str, CircuitBreaker] = {}
        self._count_anew()
        self._slowness = 0.0
        self._stored = Stored()
        self._waiting: Waiting | None = None
        self._origin: tuple[str, str, int] | None = None
        self._set_origin()
        follow_process(self)

    def _count_anew(self) -> None:
        self.counts = Counts()
        self._budget = RetryBudget(self.section.retry_budget)

    @property
    def breaker(self) -> CircuitBreaker:
        """The circuit of the client; single hosts have circuits of their own."""
        return self._main

    # ------------------------------------------------------------------ where

    @property
    def base_url(self) -> str | None:
        """What relative paths are relative to."""
        return cast(str | None, self.explicit.get("base_url")) or self.section.base_url

    def use(self, **explicit: Any) -> None:
        """Take what a later caller of the getter says; None says nothing."""
        super().use(**explicit)
        if explicit.get("base_url") is not None:
            self._set_origin()

    def configure(self, section: Circuit) -> None:
        """The file has changed: go by its new section from the next call on."""
        super().configure(section)
        self._set_origin()
        self._check_health()

    def _set_origin(self) -> None:
        self._url_of.cache_clear()
        self._origin = None if self.base_url is None else origin_of(self.base_url)

    def _check_health(self) -> None:
        """See to it that the circuit's health check is the section's."""

    @functools.cached_property
    def _url_of(self) -> Any:
        return functools.lru_cache(1_000)(self._make_url)

    def _make_url(self, url: str) -> str:
        if urlsplit(url).scheme in ("http", "https"):
            return url
        base = self.base_url
        if base is None:
            raise ValueError(
                f"{self.name} has no base_url, so {url.partition('?')[0]!r} leads nowhere: set "
                f"base_url in the file, give it to get_http_circuit_breaker, or name the whole URL"
            )
        return f"{base.rstrip('/')}/{url.lstrip('/')}" if url else base

    def circuit_of(self, url: str) -> CircuitBreaker:
        """The circuit that guards a URL: the client's for its base_url, else its host's."""
        if self.further is None:
            return self._main
        origin = origin_of(url)
        if origin == self._origin:
            return self._main
        _, host, port = origin
        name = f"{host}:{port}"
        found = self._hosts.get(name)
        return found if found is not None else self._circuit_of_host(name)

    def _circuit_of_host(self, name: str) -> CircuitBreaker:
        try:
            check_circuit(f"{self._main.name}@{name}")
        except ValueError:
            return self._main  # too long, or an address with a zone
        with self._lock:
            if len(self._hosts) >= MOST_HOSTS:
                closed = (n for n, b in self._hosts.items() if b.state == "closed")
                gone = next(closed, None)
                if gone is None:
                    return self._main
                self._hosts = {n: b for n, b in self._hosts.items() if n != gone}
            assert self.further is not None
            made = self.further(name)
            self._hosts = {**self._hosts, name: made}
            own = {n: b for n, b in self.circuits.items() if "@" not in n}
            self.circuits = {**{f"@{n}": b for n, b in self._hosts.items()}, **own}
        return made

    # ------------------------------------------------------------------ how long, how often

    def timeouts(self, options: Options, permit: Permit) -> tuple[float, float]:
        """Seconds for connecting and for reading: less while the service is slow, or on trial."""
        section = self.section
        connect = section.connect_timeout if options.connect is None else options.connect
        read = section.read_timeout if options.read is None else options.read
        part = SHORTEST if permit.is_probe else 1.0 - (1.0 - SHORTEST) * self._slowness
        return connect, read * part

    def took(self, seconds: float) -> None:
        """An attempt has taken so long."""
        section = self.section
        slow = section.slow_call_duration or section.read_timeout * SHORTEST
        self._slowness += SLOW_MEMORY * ((seconds >= slow) - self._slowness)

    def may_retry(self) -> bool:
        """Take a retry out of the budget, if there is one."""
        self._budget.share = self.section.retry_budget
        allowed = self._budget.take(self.counts["requests"])
        self.counts.add("retries" if allowed else "retries_over_budget")
        return allowed

    def fell_back(self, how: str, breaker: CircuitBreaker) -> None:
        """Something else than the service has answered."""
        self.counts.add(how)
        breaker.count_fallback()

    # ------------------------------------------------------------------ what waits

    @property
    def _queue(self) -> Waiting:
        if self._waiting is None:
            with self._lock:
                if self._waiting is None:
                    outbox = outbox_of(self.name, self.section.outbox_path)
                    self._waiting = Waiting(outbox, self.name, self._main, self._deliver)
        return self._waiting

    def _deliver(self, entry: Entry) -> object:
        """Send a request that has waited."""
        raise NotImplementedError

    # ------------------------------------------------------------------ looking

    def stats(self) -> dict[str, Any]:
        """Counts of this process, and what it holds.

        ``requests`` and ``attempts`` of them, of which ``retries`` were no first ones;
        ``retries_over_budget`` that were not made; ``statuses`` by number; ``bytes`` of bodies;
        ``times`` of looking up the host, connecting, TLS, waiting for the answer and reading it;
        ``served_stale``, ``defaults``, ``fallbacks``, ``queued``: what was answered instead;
        ``slowness`` from 0 to 1, by which timeouts are shortened; ``hosts`` with circuits of their
        own, and how many of them are ``open``.
        """
        hosts = list(self._hosts.values())
        return {
            **self.counts.stats(),
            "slowness": round(self._slowness, 3),
            "stored": self._stored.stats(),
            "hosts": {"total": len(hosts), "open": sum(b.refusing for b in hosts)},
            "outbox": self._queue.outbox.stats() if self.section.enable_request_queue else None,
        }

    def problems(self) -> list[str]:
        """What is wrong beside the client's own circuit: hosts that are left alone, the queue."""
        found = self._queue.problems("requests") if self.section.enable_request_queue else []
        hosts = list(self._hosts.items())
        away = [name for name, breaker in hosts if breaker.refusing]
        if away:
            found.append(f"{len(away)} of {len(hosts)} hosts are left alone: {', '.join(away[:5])}")
        return found

    def forked(self) -> None:
        """A child makes locks, connections and a thread of its own."""
        self.__dict__.pop("_lock", None)
        self._count_anew()
        if self._waiting is not None:
            self._waiting.forked()

    def close(self) -> None:
        """Let go of connections and files; what waits stays on disk."""
        if self._waiting is not None:
            self._waiting.close()
        self._stored.close()

    def _shown(self, call: Call) -> str:
        return f"{call.method} {shown(call.url)}"
