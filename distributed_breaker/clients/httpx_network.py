"""httpx's connections, whose every wait ends with the deadline of the call they are used for."""

from __future__ import annotations

import asyncio
from typing import Any

import httpcore

from .http_network import addresses, bounds, left, refuse_private, timed


class Stream(httpcore.NetworkStream):
    """A connection whose every wait ends with the deadline of the call that it is used for."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        with timed("tls"):
            return Stream(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(timeout: float | None) -> float | None:
    try:
        return left(timeout, bounds.get().deadline)
    except TimeoutError as error:
        raise httpcore.ReadTimeout(str(error)) from None


class Backend(httpcore.SyncBackend):
    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        timeout = kwargs.get("timeout", args[0] if args else None)
        last: Exception = httpcore.ConnectError(f"{host} has no address")
        try:
            found = addresses(host, port, left(timeout, bounds.get().deadline))
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        for address in found:
            try:
                with timed("connect"):
                    return Stream(super().connect_tcp(address, port, *args, **kwargs))
            except httpcore.ConnectError as error:
                last = error
        raise last


class AsyncStream(httpcore.AsyncNetworkStream):
    """A connection that tells how long TLS took, and is closed when that is cancelled; all else is
    the other's own."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self.read = stream.read  # type: ignore[method-assign]
        self.write = stream.write  # type: ignore[method-assign]
        self.aclose = stream.aclose  # type: ignore[method-assign]
        self.get_extra_info = stream.get_extra_info  # type: ignore[method-assign]

    async def start_tls(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        try:
            with timed("tls"):
                return await self._stream.start_tls(*args, **kwargs)
        except BaseException:
            await self._stream.aclose()
            raise


class AsyncBackend(httpcore.AsyncNetworkBackend):
    """Refuses hosts that are not public by the address that is really connected to.

    The look-up is part of connecting.
    """

    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._backend = backend

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if bounds.get().public_only:
            loop = asyncio.get_running_loop()
            infos = await loop.getaddrinfo(host, port)
            found = [str(info[4][0]) for info in infos]
            refuse_private(host, found)
            host = found[0]
        with timed("connect"):
            return AsyncStream(await self._backend.connect_tcp(host, port, *args, **kwargs))

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> Any:
        return await self._backend.connect_unix_socket(*args, **kwargs)

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)
