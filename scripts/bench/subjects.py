"""Ours and the peers behind one interface, so that every topic measures all in the same way.

A subject is one library with one storage.  It is made in the process that uses it, and gives
guarded breakers by name.  Every library is imported only where it is used: the tests and the other
topics do without them, and a fresh process pays only for what it measures.

All do the same job: one breaker, in a process that shares nothing or through the same server.
Without ``Rules`` a breaker has its library's defaults.  With them it opens at the given number of
failures, stays open for the given time, and closes after one good probe.  The clients of peers with
Redis have the limits that ours has: 0.3 s for an answer or a connection, and no repetition.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .figures import OURS

if TYPE_CHECKING:
    from distributed_breaker import CircuitBreaker

Some = TypeVar("Some", bound="Subject")

SETTLED = 5.0  # s in which a circuit must have opened in the store
PATIENCE = 0.3  # s that a client waits for an answer of its server

Call = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class Rules:
    """When a breaker opens, for how long (s), and how many calls one that keeps each call keeps."""

    failures: int
    interval: float = 3_600.0
    window: int = 100


@dataclass(frozen=True)
class Guarded:
    """One breaker of one library.

    Attributes:
        forms: how a call through it is written: form → statement.
        names: what the statements are written with.
        refusal: what a refused call raises.
        call: one guarded call of a function, in whatever form the library has.
        failures: how many failures the breaker has counted, where it tells.
    """

    forms: Mapping[str, str]
    names: Mapping[str, object]
    refusal: type[BaseException]
    call: Call
    failures: Callable[[], int] | None = None


class Subject:
    """One library with one storage, in one process; ``url`` is the server's or empty."""

    title = ""
    packages: tuple[str, ...] = ()  # as pip names them
    shared = False  # its state is in Redis
    how = ""  # the configuration that is compared, in words
    loop: asyncio.AbstractEventLoop | None = None  # in which it awaits, if it has to

    def __init__(self, url: str) -> None:
        self.url = url

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        """A breaker, admitting calls."""
        raise NotImplementedError

    def declare(self, names: Sequence[str], rules: Rules) -> int:
        """Say which breakers there will be, where a library makes use of that; how many it made."""
        return 0

    def settle(self) -> None:
        """What was recorded is where it is meant to be."""

    def close(self) -> None:
        """Let go of threads and connections."""

    @functools.cached_property
    def client(self) -> Any:
        """A client of the server with the limits that ours has."""
        return module("redis").Redis.from_url(
            self.url,
            socket_timeout=PATIENCE,
            socket_connect_timeout=PATIENCE,
            retry=module("redis.retry").Retry(module("redis.backoff").NoBackoff(), 0),
        )


def module(name: str) -> Any:
    return importlib.import_module(name)


# ------------------------------------------------------------------ what is guarded


class Boom(Exception):
    """The failure of a dependency."""


def work() -> None:
    pass


async def work_async() -> None:
    pass


def work_generator() -> Iterator[None]:
    yield


async def work_async_generator() -> AsyncIterator[None]:
    yield


def boom() -> None:
    raise Boom


async def boom_async() -> None:
    raise Boom


WORK: dict[str, object] = {
    "f": work,
    "f_async": work_async,
    "f_generator": work_generator,
    "f_async_generator": work_async_generator,
}

# The forms that are written alike, whichever the library.
DECORATED = {
    "decorator": "guarded()",
    "async decorator": "await guarded_async()",
    "generator": "for _ in guarded_generator():\n    pass",
    "async generator": "async for _ in guarded_async_generator():\n    pass",
}


def decorated(decorator: Callable[[Any], Any], *forms: str) -> dict[str, object]:
    """Names for the decorated forms."""
    functions: dict[str, Any] = {
        "decorator": work,
        "async decorator": work_async,
        "generator": work_generator,
        "async generator": work_async_generator,
    }
    names = ("guarded", "guarded_async", "guarded_generator", "guarded_async_generator")
    pairs = zip(functions.items(), names, strict=True)
    return {name: decorator(function) for (form, function), name in pairs if form in forms}


def written(**forms: str) -> dict[str, str]:
    """Statements by form; an empty one is written as it is for every library."""
    spelled = {form.replace("_", " ").strip(): statement for form, statement in forms.items()}
    return {form: statement or DECORATED[form] for form, statement in spelled.items()}


# ------------------------------------------------------------------ ours


class Ours(Subject):
    """This library, shared through the server."""

    title = OURS
    packages = ("distributed-breaker",)
    shared = True
    how = (
        "shared, durations measured unless said otherwise; with rules: `quorum=1`, "
        "`success_threshold=1`, no jitter"
    )
    measure = True

    def __init__(self, url: str) -> None:
        super().__init__(url)
        from distributed_breaker import CircuitBreakerRegistry

        self.registry = CircuitBreakerRegistry.from_url(url, "bench")

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        from distributed_breaker import CircuitBreakerOpenException

        breaker = self._breaker(name, rules)
        breaker.call(work)  # which waits for the store's first answer
        forms = written(
            decorator="",
            call="breaker.call(f)",
            with_="with breaker.guard():\n    f()",
            with_breaker="with breaker:\n    f()",
            two_steps="permit = breaker.acquire()\nf()\npermit.success()",
            async_decorator="",
            async_call="await breaker.call_async(f_async)",
            async_with="async with breaker.guard():\n    await f_async()",
            generator="",
            async_generator="",
        )
        names = WORK | {"breaker": breaker} | decorated(breaker, *DECORATED)

        def failures() -> int:
            self.registry.flush(10.0)
            return int(self.registry.snapshot()[name].totals["failures"])

        return Guarded(forms, names, CircuitBreakerOpenException, breaker.call, failures)

    def declare(self, names: Sequence[str], rules: Rules) -> int:
        """As an application does at its start; the store is asked for all of them together."""
        self._declared = [self._breaker(name, rules) for name in names]
        return len(names)

    def _breaker(self, name: str, rules: Rules | None) -> CircuitBreaker:
        from distributed_breaker import Policy

        if rules is None:
            return self.registry.breaker(name, Policy(measure=self.measure))
        policy = Policy(
            failure_threshold=min(rules.failures, 1_000_000),
            failure_rate=None,
            open_interval=rules.interval,
            jitter=0.0,
            quorum=1,
            success_threshold=1,
            measure=self.measure,
        )
        return self.registry.breaker(name, policy)

    def wait_open(self, name: str) -> None:
        """Until the store has opened a circuit; a process may know it sooner."""
        deadline = time.monotonic() + SETTLED
        while self.registry.breaker(name).snapshot().shared_state != "open":
            if time.monotonic() > deadline:
                raise RuntimeError(f"the circuit {name!r} has not opened in the store")
            time.sleep(0.001)

    def settle(self) -> None:
        self.registry.flush(10.0)

    def close(self) -> None:
        self.registry.close()


class Bare(Subject):
    """No breaker at all: what it shows is the machine."""

    title = "no breaker"
    how = "the bare call"

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        return Guarded({}, WORK, NotImplementedError, lambda function: function())


class OursUnmeasured(Ours):
    """This library with ``measure=False``."""

    title = f"{OURS}, no durations"
    measure = False


# ------------------------------------------------------------------ for all


def version(package: str) -> str:
    """The installed version of a package, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def using(
    kind: type[Some], url: str, loop: asyncio.AbstractEventLoop | None = None
) -> Iterator[Some]:
    """A subject that is closed at the end of the block."""
    subject = kind(url)
    subject.loop = loop
    try:
        yield subject
    finally:
        subject.close()


def open_up(guarded: Guarded) -> None:
    """Open a breaker whose rules ask for one failure."""
    with contextlib.suppress(Boom, guarded.refusal):
        guarded.call(boom)
