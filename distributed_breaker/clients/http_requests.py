"""The rules of HTTP clients, carried out with requests."""

from __future__ import annotations

import io
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from requests.utils import rewind_body
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..permit import Permit
from .http_answers import InvalidAnswer, InvalidRequest, PrivateHost, origin_of
from .http_base import LATE, Attempts, Call, InTime, Options, Wire
from .http_network import addresses, bounds, left, timed, took, with_deadline

PIECE = 65_536  # bytes that are read at a time

MOST_ORIGINS = 1_000  # for which it is known what the environment says of them
# Whether proxies come from the environment only; elsewhere the system has settings of its own.
_BY_ENVIRONMENT = urllib.request.getproxies is urllib.request.getproxies_environment

Ended = Callable[[BaseException | None, bool, int], None]


class HttpOpenException(CircuitBreakerOpenException, requests.ConnectionError):
    """A call was refused because its circuit does not admit it; also requests' ConnectionError."""

    def __init__(self, *args: Any) -> None:
        CircuitBreakerOpenException.__init__(self, *args)
        self.request = self.response = None


class InvalidResponse(InvalidAnswer, requests.RequestException):
    """An answer that the caller cannot use; also requests' RequestException."""


# ---------------------------------------------------------------------------- connections


class _Connecting(HTTPConnection):
    """Opens connections, and has all their waits end with the deadline of the call."""

    def _new_conn(self) -> Any:
        host, usual = self._dns_host, self.timeout
        deadline = bounds.get().deadline
        last: Exception = NewConnectionError(self, f"{host} has no address")
        try:
            timeout = left(usual if isinstance(usual, int | float) else None, deadline)
            for address in addresses(host, self.port or 80, timeout):
                self._dns_host = address
                self.timeout = left(timeout, deadline)
                try:
                    with timed("connect"):
                        return with_deadline(super()._new_conn())
                except NewConnectionError as error:
                    last = error
            raise last
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"{host}: {error}") from error
        except OSError as error:
            if isinstance(error, NewConnectionError):
                raise
            raise NameResolutionError(host, self, error) from error  # type: ignore[arg-type]
        finally:
            self._dns_host, self.timeout = host, usual

    def request(self, *args: Any, **kwargs: Any) -> Any:
        # A connection from the pool goes by the deadline of this call, not of the one before.
        if self.sock is not None:
            self._follow()
        return super().request(*args, **kwargs)

    def connect(self) -> None:
        super().connect()
        self.sock = with_deadline(self.sock)
        self._follow()

    def _follow(self) -> None:
        if self.sock is not None and hasattr(self.sock, "deadline"):
            self.sock.deadline = bounds.get().deadline


class _ConnectingTls(_Connecting, HTTPSConnection):
    _opened = 0.0  # when the connection below was there, monotonic seconds

    def _new_conn(self) -> Any:
        sock = super()._new_conn()
        self._opened = time.monotonic()
        return sock

    def connect(self) -> None:
        super().connect()
        took("tls", self._opened)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connecting


class _PoolTls(HTTPSConnectionPool):
    ConnectionCls = _ConnectingTls


# ---------------------------------------------------------------------------- the adapter


class CircuitBreakerAdapter(HTTPAdapter):
    """requests' transport adapter with the rules of a client: mount it in any session.

    Args:
        client: whose circuits, retries and fallbacks its requests have.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self._wire = RequestsWire(self)
        section = client.section
        super().__init__(section.pool_connections, section.pool_maxsize, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _PoolTls}

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send a request by the rules; ``timeout`` may be the client's own Options."""
        client = self.client
        options = timeout
        if not isinstance(timeout, Options):
            connect, read = timeout if isinstance(timeout, tuple) else (timeout, timeout)
            end = time.monotonic() + client.section.total_timeout
            options = Options(connect, read, end, streamed=stream)
        body = request.body
        data = body.encode() if isinstance(body, str) else body
        whole = data is None or isinstance(data, bytes)
        position = getattr(request, "_body_position", None)
        call = Call(
            request, (request.method or "GET").upper(), request.url or "",
            self._wire.headers_of(request), data if whole else None,
            whole or isinstance(position, int), options, (verify, cert, proxies),
        )  # fmt: skip
        wire = self._wire
        response: requests.Response = wire._drive(client._exchange(wire, call))
        return response

    def forget(self) -> None:
        """A fork's child must not use its parent's connections."""
        section = self.client.section
        self.init_poolmanager(section.pool_connections, section.pool_maxsize)
        self.proxy_manager = {}

    def really_send(self, call: Call, connect: float, read: float) -> requests.Response:
        """One attempt; the response's body has not been read."""
        verify, cert, proxies = call.how
        return super().send(
            call.request, stream=True, timeout=(connect, read), verify=verify, cert=cert,
            proxies=proxies,
        )  # fmt: skip


class RequestsWire(Attempts):
    """What the rules ask for, done by requests."""

    refusal = HttpOpenException
    callers = (
        requests.exceptions.InvalidURL,
        requests.exceptions.MissingSchema,
        requests.exceptions.InvalidSchema,
        requests.exceptions.InvalidHeader,
        requests.exceptions.InvalidProxyURL,
        requests.exceptions.UnrewindableBodyError,
        InvalidRequest,
        PrivateHost,
    )
    known = (requests.RequestException, InvalidAnswer, OSError)
    timeouts = (requests.Timeout,)

    def __init__(self, adapter: CircuitBreakerAdapter) -> None:
        super().__init__(adapter.client)
        self._adapter = adapter

    def admit(self, breaker: CircuitBreaker) -> Permit:
        return breaker.acquire()

    def headers_of(self, message: Any) -> dict[str, str]:
        return {
            name.lower(): value if isinstance(value, str) else value.decode("latin-1")
            for name, value in message.headers.items()
        }

    def send(self, call: Call, connect: float, read: float, limit: int) -> requests.Response:
        request = call.request
        if call.body is None and isinstance(getattr(request, "_body_position", None), int):
            rewind_body(request)
        begun = time.monotonic()
        with InTime(self, call):
            response = self._adapter.really_send(call, connect, read)
            self.hear(call, response, time.monotonic() - begun)
            response.stale, response.fallback = False, ""  # type: ignore[attr-defined]
            if not call.options.streamed:
                self._read(call, response, limit)
        return response

    def read(self, call: Call, response: requests.Response, limit: int) -> None:
        with InTime(self, call):
            self._read(call, response, limit)

    def _read(self, call: Call, response: requests.Response, limit: int) -> None:
        begun = time.monotonic()
        pieces, size = [], 0
        try:
            self.check_length(call, response, limit)
            for piece in response.iter_content(PIECE):
                size += len(piece)
                if size > limit:
                    raise self.too_large(call, response, limit)
                pieces.append(piece)
        except BaseException:
            response.close()
            raise
        response._content = b"".join(pieces)
        response._content_consumed = True  # type: ignore[attr-defined]
        self.client.counts.body(size, time.monotonic() - begun)

    def follow(
        self, call: Call, response: requests.Response, limit: int, ended: Ended
    ) -> requests.Response:
        """Have the outcome come with the end of the body."""
        self.check_length(call, response, limit)
        response.raw = _Body(self, call, response, limit, ended)
        return response

    def drop(self, response: requests.Response) -> None:
        response.close()

    def make(
        self, call: Call, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> requests.Response:
        response = requests.Response()
        response.status_code = status
        for name, value in headers:
            response.headers[name] = value
        response.raw = io.BytesIO(body)
        response._content, response._content_consumed = body, True  # type: ignore[attr-defined]
        response.url, response.request = call.url, call.request
        response.encoding = requests.utils.get_encoding_from_headers(response.headers)
        response.stale, response.fallback = False, ""  # type: ignore[attr-defined]
        return response

    def invalid(self, call: Call, response: Any, message: str) -> Exception:
        response.close()
        return InvalidResponse(message, request=call.request, response=response)

    def late(self, call: Call) -> Exception:
        return requests.ReadTimeout(LATE, request=call.request)

    def repeatable(self, error: Exception) -> bool:
        if isinstance(error, requests.exceptions.SSLError | InvalidAnswer):
            return False
        mended = (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        )
        return isinstance(error, mended)


class _Body:
    """A body that is read later, by whom it may concern: it tells when and how it ended."""

    def __init__(
        self, wire: RequestsWire, call: Call, response: requests.Response, limit: int, ended: Ended
    ) -> None:
        self._raw, self._wire, self._call, self._response = response.raw, wire, call, response
        self._limit, self._ended = limit, ended
        self._size, self._over = 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, amount: int = PIECE, decode_content: bool | None = None) -> Iterator[bytes]:
        pieces = self._raw.stream(amount, decode_content=decode_content)
        while True:
            piece = self._guarded(lambda: next(pieces, b""))
            if not piece:
                self._end(None, True)
                return
            yield piece

    def read(self, amt: int | None = None, *args: Any, **kwargs: Any) -> bytes:
        piece = self._guarded(lambda: self._raw.read(amt, *args, **kwargs))
        if amt is None or (not piece and amt):
            self._end(None, True)
        return piece

    def close(self) -> None:
        self._raw.close()
        self._end(None, False)

    def release_conn(self) -> None:
        self._raw.release_conn()
        self._end(None, False)

    def _guarded(self, work: Callable[[], bytes]) -> bytes:
        wire, call = self._wire, self._call
        try:
            with InTime(wire, call):
                piece = work()
            self._size += len(piece)
            if self._size > self._limit:
                raise wire.too_large(call, self._response, self._limit)
        except BaseException as error:
            self._raw.close()
            self._end(_counted(error), False)
            raise
        return piece

    def _end(self, error: BaseException | None, whole: bool) -> None:
        if not self._over:
            self._over = True
            self._ended(error, whole, self._size)


def _counted(error: BaseException) -> BaseException:
    """urllib3's errors, which requests would make its own a little later."""
    if isinstance(error, Exception) and type(error).__module__.startswith("urllib3"):
        return requests.ConnectionError(str(error))
    return error


class Session(Wire):
    """What follows redirects, done by a session that has the adapter."""

    def __init__(self, session: requests.Session) -> None:
        self._session = session
        # Of a session as it was: what the environment says for single hosts.
        self._known: tuple[Any, dict[Any, dict[str, Any]]] = ((), {})

    def hop(self, request: Any, options: Options, auth: Any = None) -> requests.Response:
        """Send one request; a redirect is its answer."""
        settings = {**self._settings(request.url or ""), "stream": options.streamed}
        return self._session.send(
            request, timeout=cast(Any, options), allow_redirects=False, **settings
        )

    def drop(self, response: requests.Response) -> None:
        response.close()

    def _settings(self, url: str) -> dict[str, Any]:
        """The session's ``merge_environment_settings``, which for each request would look through
        the whole environment twice; only what is asked there is the same as before."""
        session = self._session
        # What os.environ shows: to compare that takes a hundredth of the time.
        environment = getattr(os.environ, "_data", None) if _BY_ENVIRONMENT else None
        now = (session.trust_env, session.verify, session.cert, session.proxies, environment)
        known, settings = self._known
        if now != known:
            copied = environment and dict(environment)
            known, settings = (*now[:3], dict(session.proxies), copied), {}
            self._known = known, settings
        origin = origin_of(url)
        found = settings.get(origin)
        if found is None:
            found = dict(session.merge_environment_settings(url, {}, None, None, None))
            if environment is not None and len(settings) < MOST_ORIGINS:
                settings[origin] = found
        return {**found, "proxies": {**found["proxies"]}}


__all__ = ["CircuitBreakerAdapter", "HttpOpenException", "InvalidResponse", "Session"]
