"""The rules of HTTP clients, carried out with httpx, by blocking and on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import httpx

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..permit import Permit
from ..policy import Outcome
from .http_answers import InvalidAnswer, InvalidRequest, PrivateHost
from .http_base import Call, Options, Wire
from .http_network import bounded, limits
from .httpx_network import AsyncBackend, Backend

Ended = Callable[[BaseException | None, bool, int], None]
_OPTIONS = "circuit_breaker"  # where a request carries the client's options

CALLERS = (
    httpx.InvalidURL,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
    httpx.StreamError,
    InvalidRequest,
    PrivateHost,
)


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


class _HttpxWire(Wire):
    def __init__(self, client: Any, send: Callable[[httpx.Request], Any]) -> None:
        self._owner = client
        self._send = send

    def _native(self, error: BaseException) -> BaseException:
        if type(error) is CircuitBreakerOpenException:
            return HttpxOpenException(*error.__reduce__()[1])
        return error

    def call_of(self, request: httpx.Request) -> Call:
        client = self._owner
        options = request.extensions.get(_OPTIONS)
        if options is None:
            told = request.extensions.get("timeout") or {}
            end = time.monotonic() + client.section.total_timeout
            # Whether its body is a stream is not known here; the outcome comes with its end.
            options = Options(
                connect=told.get("connect"), read=told.get("read"), deadline=end, reads=False
            )
        whole = isinstance(request.stream, httpx.ByteStream)
        body = request.read() if whole else None
        url = str(request.url)
        return Call(request, request.method.upper(), url, request.headers, body, whole, options)

    def _timed(self, call: Call, connect: float, read: float) -> httpx.Request:
        request: httpx.Request = call.request
        timeout = {"connect": connect, "read": read, "write": read, "pool": connect}
        request.extensions = {**request.extensions, "timeout": timeout}
        return request

    def _bounded(self, call: Call, response: httpx.Response, limit: int) -> Response:
        """The same with a bound, which need not be reached to be found."""
        made = Response(
            response.status_code, headers=response.headers, stream=response.stream,
            extensions=response.extensions, request=call.request,
        )  # fmt: skip

        def bound(size: int) -> None:
            if size > limit:
                raise self._too_large(call, made, limit)

        made._bound = bound
        return made

    def _not_too_long(self, call: Call, response: Response, limit: int) -> None:
        told = response.headers.get("Content-Length", "")
        if told.isdigit() and int(told) > limit and call.method != "HEAD":
            raise self._too_large(call, response, limit)

    def _too_large(self, call: Call, response: Response, limit: int) -> Exception:
        return self.invalid(call, response, f"the answer has more than {limit} bytes")

    def make(
        self, call: Call, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> Response:
        made = Response(status, headers=headers, content=body, request=call.request)
        made.elapsed = timedelta(0)
        return made

    def invalid(self, call: Call, response: Any, message: str) -> Exception:
        return InvalidResponse(message, call.request, response)

    def late(self, call: Call) -> Exception:
        message = "the answer was not whole when the call's total_timeout was over"
        return httpx.ReadTimeout(message, request=call.request)

    def outcome(self, error: BaseException) -> Outcome:
        if isinstance(error, CALLERS) or not isinstance(error, Exception):
            return Outcome.IGNORED
        known = isinstance(error, httpx.HTTPError | InvalidAnswer | OSError)
        return Outcome.FAILURE if known else Outcome.IGNORED

    def repeatable(self, error: Exception) -> bool:
        if isinstance(error, InvalidAnswer) or "certificate" in str(error).lower():
            return False
        return isinstance(error, httpx.TransportError) and not isinstance(error, CALLERS)

    @property
    def _public_only(self) -> bool:
        return bool(self._owner.section.refuse_private_hosts)

    @staticmethod
    def _is_late(call: Call, error: BaseException | None) -> bool:
        end = call.options.deadline
        mine = isinstance(error, httpx.HTTPError | OSError)
        known = isinstance(error, InvalidAnswer | httpx.TimeoutException)
        return mine and not known and end is not None and time.monotonic() >= end


# ---------------------------------------------------------------------------- by blocking


class HttpxWire(_HttpxWire):
    """What the rules ask for, done by httpx."""

    def admit(self, breaker: CircuitBreaker) -> Permit:
        return breaker.acquire()

    def send(self, call: Call, connect: float, read: float) -> Response:
        options = call.options
        try:
            with bounded(options.deadline, self._public_only):
                response = self._send(self._timed(call, connect, read))
        except Exception as error:
            if self._is_late(call, error):
                raise self.late(call) from error
            raise
        return self._bounded(call, response, options.max_size or self._limit)

    @property
    def _limit(self) -> int:
        return int(self._owner.section.max_response_size)

    def read(self, call: Call, response: Response, limit: int) -> None:
        try:
            self._not_too_long(call, response, limit)
            with bounded(call.options.deadline, self._public_only):
                response.read()
        except BaseException as error:
            response.close()
            if self._is_late(call, error):
                raise self.late(call) from error
            raise
        response.elapsed = timedelta(0)

    def follow(self, call: Call, response: Response, limit: int, ended: Ended) -> Response:
        self._not_too_long(call, response, limit)
        response.stream = _Body(self, call, cast(httpx.SyncByteStream, response.stream), ended)
        return response

    def drop(self, response: httpx.Response) -> None:
        response.close()


class _Body(httpx.SyncByteStream):
    """A body that is read later: it tells when and how it ended."""

    def __init__(self, wire: HttpxWire, call: Call, body: Any, ended: Ended) -> None:
        self._wire, self._call, self._body, self._ended = wire, call, body, ended
        self._over = False

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        pieces = iter(self._body)
        try:
            while True:
                with bounded(self._call.options.deadline, False):
                    piece = next(pieces, None)
                if piece is None:
                    break
                size += len(piece)
                yield piece
        except Exception as error:
            self._end(error, False, size)
            if self._wire._is_late(self._call, error):
                raise self._wire.late(self._call) from error
            raise
        except GeneratorExit:
            self._end(None, False, size)
            raise
        self._end(None, True, size)

    def close(self) -> None:
        self._body.close()
        self._end(None, False, 0)

    def _end(self, error: BaseException | None, whole: bool, size: int) -> None:
        if not self._over:
            self._over = True
            self._ended(error, whole, size)


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

    async def send(self, call: Call, connect: float, read: float) -> Response:
        options = call.options
        before = limits.public_only
        with _Late(self, call):
            async with asyncio.timeout(_rest(call)):
                limits.public_only = self._public_only
                try:
                    response = await self._send(self._timed(call, connect, read))
                finally:
                    limits.public_only = before
        size = options.max_size or int(self._owner.section.max_response_size)
        return self._bounded(call, response, size)

    async def read(self, call: Call, response: Response, limit: int) -> None:
        try:
            self._not_too_long(call, response, limit)
            with _Late(self, call):
                async with asyncio.timeout(_rest(call)):
                    await response.aread()
        except BaseException:
            await response.aclose()
            raise
        response.elapsed = timedelta(0)

    async def follow(self, call: Call, response: Response, limit: int, ended: Ended) -> Response:
        self._not_too_long(call, response, limit)
        response.stream = _AsyncBody(self, call, response.stream, ended)
        return response

    async def drop(self, response: httpx.Response) -> None:
        await response.aclose()


def _rest(call: Call) -> float | None:
    end = call.options.deadline
    return None if end is None else max(0.0, end - time.monotonic())


class _Late:
    """A deadline that has passed is httpx's own ReadTimeout."""

    def __init__(self, wire: _HttpxWire, call: Call) -> None:
        self._wire, self._call = wire, call

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if type(error) is TimeoutError or self._wire._is_late(self._call, error):
            raise self._wire.late(self._call) from error


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, wire: AsyncHttpxWire, call: Call, body: Any, ended: Ended) -> None:
        self._wire, self._call, self._body, self._ended = wire, call, body, ended
        self._over = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        pieces = self._body.__aiter__()
        try:
            while True:
                with _Late(self._wire, self._call):
                    async with asyncio.timeout(_rest(self._call)):
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

    def _end(self, error: BaseException | None, whole: bool, size: int) -> None:
        if not self._over:
            self._over = True
            self._ended(error, whole, size)


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
        self.client = httpx.AsyncClient(transport=client.async_transport(), timeout=None)

    async def hop(self, request: httpx.Request, options: Options, auth: Any) -> httpx.Response:
        request.extensions = {**request.extensions, _OPTIONS: options}
        return await self.client.send(
            request, stream=options.stream, auth=auth, follow_redirects=False
        )

    async def drop(self, response: httpx.Response) -> None:
        await response.aclose()
