"""The rules of HTTP clients, carried out with httpx, by blocking and on an event loop."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import httpx

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..permit import Permit
from .http_answers import InvalidAnswer, InvalidRequest, PrivateHost
from .http_base import LATE, Attempts, Call, InTime, Options, Wire
from .httpx_network import AsyncBackend, Backend

# To parse a URL takes httpx a tenth of a request's time.
_parsed = functools.lru_cache(1_000)(httpx.URL)

Ended = Callable[[BaseException | None, bool, int], None]
_OPTIONS = "circuit_breaker"  # where a request carries the client's options


class HttpxOpenException(CircuitBreakerOpenException, httpx.ConnectError):
    """A call was refused because its circuit does not admit it; also httpx's ConnectError."""

    def __init__(self, *args: Any) -> None:
        CircuitBreakerOpenException.__init__(self, *args)
        self._request = None


class InvalidResponse(InvalidAnswer, httpx.DecodingError):
    """An answer that the caller cannot use; also httpx's DecodingError."""

    def __init__(self, message: str, request: Any, response: Any) -> None:
        httpx.DecodingError.__init__(self, message, request=request)
        self.response = response


class Response(httpx.Response):
    """httpx's response with a bound for its body, and what the rules say of it.

    Attributes:
        stale: it is a stored one.
        fallback: what has answered instead of the service: ``stale``, ``default``, ``queued``, or
            nothing.
    """

    stale = False
    fallback = ""
    _bound: Callable[[int], None] | None = None

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        size = 0
        for piece in super().iter_bytes(chunk_size):
            size += len(piece)
            if self._bound is not None:
                self._bound(size)
            yield piece

    async def aiter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        size = 0
        async for piece in super().aiter_bytes(chunk_size):
            size += len(piece)
            if self._bound is not None:
                self._bound(size)
            yield piece


# ---------------------------------------------------------------------------- what both have


class _HttpxWire(Attempts):
    refusal = HttpxOpenException
    callers = (
        httpx.InvalidURL,
        httpx.UnsupportedProtocol,
        httpx.LocalProtocolError,
        httpx.StreamError,
        InvalidRequest,
        PrivateHost,
    )
    known = (httpx.HTTPError, InvalidAnswer, OSError)
    timeouts = (httpx.TimeoutException,)

    def __init__(self, client: Any, send: Callable[[httpx.Request], Any]) -> None:
        super().__init__(client)
        self._send = send

    def call_of(self, request: httpx.Request) -> Call:
        options = request.extensions.get(_OPTIONS)
        told = None
        if options is None:
            told = request.extensions.get("timeout") or {}
            end = time.monotonic() + self.client.section.total_timeout
            # Whether its body is a stream is not known here; the outcome comes with its end.
            options = Options(
                connect=told.get("connect"), read=told.get("read"), deadline=end, streamed=True
            )
        whole = isinstance(request.stream, httpx.ByteStream)
        body = request.read() if whole else None
        method, url, headers = request.method.upper(), str(request.url), self.headers_of(request)
        return Call(request, method, url, headers, body, whole, options, told)

    def headers_of(self, message: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        for raw_name, raw in message.headers.raw:
            name, value = raw_name.decode("latin-1").lower(), raw.decode("latin-1")
            found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def _timed(self, call: Call, connect: float, read: float) -> httpx.Request:
        request: httpx.Request = call.request
        timeout: dict[str, float | None]
        timeout = {"connect": connect, "read": read, "write": read, "pool": connect}
        if call.how is not None:  # a client of the user's has said it
            end = call.options.deadline
            rest = None if end is None else max(0.0, end - time.monotonic())
            timeout |= {name: call.how.get(name) or rest for name in ("write", "pool")}
        request.extensions = {**request.extensions, "timeout": timeout}
        return request

    def _bounded(self, call: Call, response: Any, limit: int, begun: float) -> Response:
        """The same with a bound for its body.  To make another one of it would take as long as
        all else here."""
        seconds = time.monotonic() - begun
        self.hear(call, response, seconds)
        response.__class__ = Response
        made = cast(Response, response)
        made.request, made.elapsed = call.request, timedelta(seconds=seconds)

        def bound(size: int) -> None:
            if size > limit:
                raise self.too_large(call, made, limit)

        made._bound = bound
        return made

    def make(
        self, call: Call, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> Response:
        made = Response(status, headers=headers, content=body, request=call.request)
        made.elapsed = timedelta(0)
        return made

    def invalid(self, call: Call, response: Any, message: str) -> Exception:
        return InvalidResponse(message, call.request, response)

    def late(self, call: Call) -> Exception:
        return httpx.ReadTimeout(LATE, request=call.request)

    def repeatable(self, error: Exception) -> bool:
        if isinstance(error, InvalidAnswer) or "certificate" in str(error).lower():
            return False
        return isinstance(error, httpx.TransportError) and not isinstance(error, self.callers)


class _End:
    """Has the outcome come with the end of a body, whoever reads it."""

    def __init__(self, wire: _HttpxWire, call: Call, body: Any, ended: Ended) -> None:
        self._wire, self._call, self._body, self._ended = wire, call, body, ended
        self._over = False

    def _end(self, error: BaseException | None, whole: bool, size: int) -> None:
        if not self._over:
            self._over = True
            self._ended(error, whole, size)


# ---------------------------------------------------------------------------- by blocking


class HttpxWire(_HttpxWire):
    """What the rules ask for, done by httpx."""

    def admit(self, breaker: CircuitBreaker) -> Permit:
        return breaker.acquire()

    def send(self, call: Call, connect: float, read: float, limit: int) -> Response:
        begun = time.monotonic()
        with InTime(self, call):
            sent = self._send(self._timed(call, connect, read))
            response = self._bounded(call, sent, limit, begun)
            if not call.options.streamed:
                self._read(call, response, limit)
        return response

    def read(self, call: Call, response: Response, limit: int) -> None:
        with InTime(self, call):
            self._read(call, response, limit)

    def _read(self, call: Call, response: Response, limit: int) -> None:
        begun = time.monotonic()
        try:
            self.check_length(call, response, limit)
            response.read()
        except BaseException:
            response.close()
            raise
        self.client.counts.body(len(response.content), time.monotonic() - begun)

    def follow(self, call: Call, response: Response, limit: int, ended: Ended) -> Response:
        self.check_length(call, response, limit)
        response.stream = _Body(self, call, cast(httpx.SyncByteStream, response.stream), ended)
        return response

    def drop(self, response: httpx.Response) -> None:
        response.close()


class _Body(_End, httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        size = 0
        pieces = iter(self._body)
        try:
            while True:
                with InTime(self._wire, self._call):
                    piece = next(pieces, None)
                if piece is None:
                    break
                size += len(piece)
                yield piece
        except Exception as error:
            self._end(error, False, size)
            raise
        except GeneratorExit:
            self._end(None, False, size)
            raise
        self._end(None, True, size)

    def close(self) -> None:
        self._body.close()
        self._end(None, False, 0)


class CircuitBreakerTransport(httpx.HTTPTransport):
    """httpx's transport with the rules of a client: give it to any ``httpx.Client``.

    Args:
        client: whose circuits, retries and fallbacks its requests have.
        arguments: see ``httpx.HTTPTransport``.
    """

    def __init__(self, client: Any, **arguments: Any) -> None:
        arguments.setdefault("limits", limits_of(client))
        super().__init__(**arguments)
        self._pool._network_backend = Backend()
        self._client = client
        self._wire = HttpxWire(client, super().handle_request)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request by the rules."""
        wire = self._wire
        return cast(
            httpx.Response, wire._drive(self._client._exchange(wire, wire.call_of(request)))
        )


# ---------------------------------------------------------------------------- on an event loop


class AsyncHttpxWire(_HttpxWire):
    """The same without blocking the event loop."""

    async def admit(self, breaker: CircuitBreaker) -> Permit:
        return await breaker.acquire_async()

    async def send(self, call: Call, connect: float, read: float, limit: int) -> Response:
        begun = time.monotonic()
        async with _InTime(self, call):
            sent = await self._send(self._timed(call, connect, read))
            response = self._bounded(call, sent, limit, begun)
            if not call.options.streamed:
                await self._read(call, response, limit)
        return response

    async def read(self, call: Call, response: Response, limit: int) -> None:
        async with _InTime(self, call):
            await self._read(call, response, limit)

    async def _read(self, call: Call, response: Response, limit: int) -> None:
        begun = time.monotonic()
        try:
            self.check_length(call, response, limit)
            await response.aread()
        except BaseException:
            await response.aclose()
            raise
        self.client.counts.body(len(response.content), time.monotonic() - begun)

    async def follow(self, call: Call, response: Response, limit: int, ended: Ended) -> Response:
        self.check_length(call, response, limit)
        response.stream = _AsyncBody(self, call, response.stream, ended)
        return response

    async def drop(self, response: httpx.Response) -> None:
        await response.aclose()


class _InTime(InTime):
    """The same, and the block itself ends by the call's deadline."""

    __slots__ = ("_timeout",)

    async def __aenter__(self) -> None:
        end = self._call.options.deadline
        self._timeout = asyncio.timeout(None if end is None else max(0.0, end - time.monotonic()))
        await self._timeout.__aenter__()
        super().__enter__()

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            super().__exit__(kind, error, traceback)
        finally:
            try:
                await self._timeout.__aexit__(kind, error, traceback)
            except TimeoutError:
                raise self._wire.late(self._call) from error


class _AsyncBody(_End, httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        pieces = self._body.__aiter__()
        try:
            while True:
                async with _InTime(self._wire, self._call):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                size += len(piece)
                yield piece
        except Exception as error:
            self._end(error, False, size)
            raise
        except BaseException:
            self._end(None, False, size)
            raise
        self._end(None, True, size)

    async def aclose(self) -> None:
        await self._body.aclose()
        self._end(None, False, 0)


class AsyncCircuitBreakerTransport(httpx.AsyncHTTPTransport):
    """The same for ``httpx.AsyncClient``."""

    def __init__(self, client: Any, **arguments: Any) -> None:
        arguments.setdefault("limits", limits_of(client))
        super().__init__(**arguments)
        self._pool._network_backend = AsyncBackend(self._pool._network_backend)
        self._client = client
        self._wire = AsyncHttpxWire(client, super().handle_async_request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request by the rules."""
        wire = self._wire
        rules = self._client._exchange(wire, wire.call_of(request))
        return cast(httpx.Response, await wire._drive_async(rules))


def limits_of(client: Any) -> httpx.Limits:
    """How many connections the section lets be kept."""
    section = client.section
    kept = section.pool_maxsize * section.pool_connections
    return httpx.Limits(max_connections=None, max_keepalive_connections=kept)


class Session(Wire):
    """What follows redirects on one event loop, done by a client of httpx's."""

    def __init__(self, client: Any) -> None:
        self.transport = client.async_transport()
        self.client = httpx.AsyncClient(transport=self.transport, timeout=None)

    def request(self, method: str, url: str, native: dict[str, Any]) -> httpx.Request:
        """Make a request, with what all requests of the client have."""
        return self.client.build_request(method, _parsed(url), **native)

    async def hop(self, request: httpx.Request, options: Options, auth: Any) -> httpx.Response:
        request.extensions = {**request.extensions, _OPTIONS: options}
        client = self.client
        if auth is not None or request.url.userinfo:
            streamed = options.streamed
            return await client.send(request, stream=streamed, auth=auth, follow_redirects=False)
        # Of what httpx's client does this is all that it would do here, and it takes as long for
        # the rest as we do for all the rules.
        try:
            response = await self.transport.handle_async_request(request)
        except httpx.RequestError as error:
            error.request = request
            raise
        if "set-cookie" in response.headers:
            client.cookies.extract_cookies(response)
        if response.has_redirect_location:
            response.next_request = client._build_redirect_request(request, response)
        return cast(httpx.Response, response)

    async def drop(self, response: httpx.Response) -> None:
        await response.aclose()
