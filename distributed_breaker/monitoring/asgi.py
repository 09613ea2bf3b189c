"""The endpoints as an ASGI application, which Starlette and FastAPI can mount.

app.mount("/circuit-breakers", asgi_app())
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..services import Services
from .endpoints import LARGEST, Answer, Endpoints, Request, below
from .live import BEAT, HEARTBEAT, Watcher
from .source import Inside

STREAMS = 1_000  # they hold no thread
SLOW = 30.0  # s for which a client may take nothing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def asgi_app(
    services: Services | None = None,
    *,
    prefix: str = "",
    token: str | None = None,
    streams: int = STREAMS,
) -> Application:
    """An application that answers for this process; for arguments see ``wsgi.wsgi_app``."""
    return Application(Endpoints(Inside(services), token=token, streams=streams), prefix)


class Application:
    """Carries requests of ASGI to the endpoints, whose work a thread does.

    Args:
        endpoints: what answers.
        prefix: below which the paths are; others are not found.
    """

    def __init__(self, endpoints: Endpoints, prefix: str = "") -> None:
        below(prefix, "")
        self.endpoints = endpoints
        self._prefix = prefix

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            answer = await asyncio.to_thread(
                self.endpoints.answer, await self._asked(scope, receive)
            )
            await self._send(answer, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _asked(self, scope: Message, receive: Receive) -> Request:
        whole, root = scope["path"], scope.get("root_path", "").rstrip("/")
        mounted = whole[len(root) :] if below(root, whole) is not None else whole
        path = below(self._prefix, mounted)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        return Request(
            scope["method"].upper(),
            f"/{whole}" if path is None else path,
            headers.get(b"accept", ""),
            headers.get(b"authorization", ""),
            await _body(receive) if scope["method"].upper() == "POST" else b"",
            (scope.get("client") or ("",))[0],
            whole.rpartition("/")[2],
        )

    async def _send(self, answer: Answer, receive: Receive, send: Send) -> None:
        headers = [
            (name.lower().encode(), value.encode("latin-1")) for name, value in answer.headers
        ]
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        try:
            await send(start)
            if answer.stream is not None:
                await _stream(answer.stream, receive, send)
            await send({"type": "http.response.body", "body": answer.body})
        finally:
            if answer.stream is not None:
                self.endpoints.leave(answer.stream)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self.endpoints.close()
                await send({"type": "lifespan.shutdown.complete"})
                return
            await send({"type": "lifespan.startup.complete"})


async def _body(receive: Receive) -> bytes:
    """The body, as far as it may be used: a larger one is longer than it may be."""
    body, more = b"", True
    while more and len(body) <= LARGEST:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _stream(watcher: Watcher, receive: Receive, send: Send) -> None:
    """Send events until nobody takes them, or there are no more."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # The loop has ended.
            loop.call_soon_threadsafe(changed.set)

    watcher.notify = notify
    gone = asyncio.create_task(_gone(receive))
    try:
        while not gone.done():
            changed.clear()
            data = b"".join(watcher.taken())
            if not data:
                if watcher.ended:
                    return
                news = asyncio.create_task(changed.wait())
                await asyncio.wait({gone, news}, timeout=HEARTBEAT, return_when="FIRST_COMPLETED")
                news.cancel()
                if changed.is_set() or gone.done():
                    continue
                data = BEAT
            message = {"type": "http.response.body", "body": data, "more_body": True}
            await asyncio.wait_for(send(message), SLOW)
    except (TimeoutError, OSError):
        pass  # It is too slow, or has gone; it will come again.
    finally:
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
