"""Connections whose every wait ends with the deadline of the call that they are used for.

A timeout of a socket begins anew with every byte, so it does not bound a server that drips; and no
timeout bounds the look-up of a host.  Both requests and httpx are given what is here.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from ..workers import start_thread
from .http_answers import PrivateHost
from .http_counts import Counts

T = TypeVar("T")


class Bounds(NamedTuple):
    """What holds for the connections that are opened and used at the moment.

    Attributes:
        deadline: by which all their waits end, in monotonic seconds.
        public_only: whether addresses that are not public are refused.
        counts: told what each phase took.
    """

    deadline: float | None = None
    public_only: bool = False
    counts: Counts | None = None


# Not a thread's: requests on one event loop have bounds of their own.
bounds: ContextVar[Bounds] = ContextVar("circuit_breaker_http", default=Bounds())  # noqa: B039


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Count how long a phase takes, if it comes to its end."""
    begun = time.monotonic()
    yield
    took(phase, begun)


def took(phase: str, begun: float) -> None:
    """Count a phase that has ended now; ``begun`` in monotonic seconds."""
    counts = bounds.get().counts
    if counts is not None:
        counts.took(phase, time.monotonic() - begun)


def left(timeout: float | None, deadline: float | None) -> float | None:
    """Seconds that a wait may take.

    Raises:
        TimeoutError: none.
    """
    if deadline is None:
        return timeout
    rest = deadline - time.monotonic()
    if rest <= 0:
        raise TimeoutError("the time for the whole call is over")
    return rest if timeout is None else min(timeout, rest)


def addresses(host: str, port: int, timeout: float | None) -> list[str]:
    """The addresses of a host, looked up in a thread of its own, since nothing can end a look-up.

    Raises:
        TimeoutError: it took too long.
        socket.gaierror: there is no such host.
        PrivateHost: it has an address that is not public, and these are refused.
    """
    if _is_address(host):
        found = [host]
    else:
        with timed("dns"):
            found = _within(timeout, lambda: _look_up(host, port))
    if bounds.get().public_only:
        refuse_private(host, found)
    return found


def refuse_private(host: str, found: list[str]) -> None:
    """Raise PrivateHost if one of a host's addresses is not public."""
    for address in found:
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise PrivateHost(f"{host} is not a public host: refuse_private_hosts forbids it")


def _look_up(host: str, port: int) -> list[str]:
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _within(timeout: float | None, work: Callable[[], T]) -> T:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    try:
        start_thread("circuit-breaker-look-up", run)
    except RuntimeError:
        return work()  # no thread can be started here
    try:
        return future.result(timeout)
    except FutureTimeout:
        raise TimeoutError("the look-up of the host took too long") from None


class _Deadline:
    """What both kinds of socket have: whatever is read or written ends by ``deadline``."""

    deadline: float | None = None
    _usual: float | None = None

    def settimeout(self, value: float | None) -> None:
        self._usual = value
        super().settimeout(value)  # type: ignore[misc]

    def _shrink(self) -> None:
        deadline = self.deadline
        if deadline is None:
            return
        rest = left(self._usual, deadline)
        if rest != self._usual:
            super().settimeout(rest)  # type: ignore[misc]

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        self._shrink()
        got: int = super().recv_into(*args, **kwargs)  # type: ignore[misc]
        return got

    def send(self, *args: Any, **kwargs: Any) -> int:
        self._shrink()
        sent: int = super().send(*args, **kwargs)  # type: ignore[misc]
        return sent

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        self._shrink()
        super().sendall(*args, **kwargs)  # type: ignore[misc]


class DeadlineSocket(_Deadline, socket.socket):
    """A socket with a deadline beside its timeout."""


class DeadlineTlsSocket(_Deadline, ssl.SSLSocket):
    """The same with TLS."""


def with_deadline(sock: Any) -> Any:
    """Give a socket that a library has made a deadline; one of an unusual kind stays as it is."""
    if type(sock) is socket.socket:
        timeout = sock.gettimeout()
        family, kind, proto = sock.family, sock.type, sock.proto
        sock = DeadlineSocket(family, kind, proto, fileno=sock.detach())
        sock.settimeout(timeout)
    elif type(sock) is ssl.SSLSocket:
        sock.__class__ = DeadlineTlsSocket
        sock.settimeout(sock.gettimeout())
    return sock
