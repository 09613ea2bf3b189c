"""Web applications: each path is a command, and its query the options."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from tests.processes.apps.usage import carry_out, registry, use_before_forks

if "PRELOADED" in os.environ:
    use_before_forks()


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    options = dict(parse_qsl(environ["QUERY_STRING"]))
    body = json.dumps(carry_out(environ["PATH_INFO"].strip("/"), options)).encode()
    start_response("200 OK", [("Content-Type", "application/json"),
                              ("Content-Length", str(len(body)))])  # fmt: skip
    return [body]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The same for an ASGI server.  With CLOSES set, its end closes the registry, as it should."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
        return
    options = dict(parse_qsl(scope["query_string"].decode()))
    # In a thread: what the commands do may wait, and is not what an event loop should wait for.
    said = await asyncio.to_thread(carry_out, scope["path"].strip("/"), options)
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(said).encode()})


async def _live(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            if "CLOSES" in os.environ:
                await asyncio.to_thread(registry.close)
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "lifespan.startup.complete"})
