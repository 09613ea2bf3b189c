"""Answers that are kept for the time when the service cannot give one, and requests that wait."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..fallback.memory import Entry, Hit
from ..fallback.tiers import Tiers
from .http_answers import is_secret

SAFE = frozenset({"GET", "HEAD"})
KEPT_STATUSES = frozenset({200, 203})
MOST_ITEMS, MOST_BYTES = 1_000, 16 * 2**20  # answers that are kept, and what they may take
# What belongs to one connection, or to one moment, is not kept.
_NOT_KEPT = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length",
     "set-cookie", "trailer", "upgrade", "proxy-authenticate", "age", "warning"}
)  # fmt: skip
# What is added when a request is sent that has waited.
_ADDED = frozenset({"content-length", "idempotency-key", "host", "connection"})


class Kept(NamedTuple):
    """An answer as it was kept, and its age in seconds."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    age: float


class Stored:
    """Answers to safe requests, by URL, by what they vary with, and by who has asked.

    They lie in this process's memory only: an answer to somebody's credentials belongs on no disk.
    """

    def __init__(self) -> None:
        self._tiers = Tiers(most_items=MOST_ITEMS, most_bytes=MOST_BYTES)

    def keep(self, call: Any, status: int, body: bytes, stale_ttl: float) -> None:
        """Keep what was heard, if it may be; a change of what the URL names makes it forgotten."""
        name = _name(call)
        if call.method not in SAFE:
            self._tiers.delete_many([name, _name(call, "HEAD")])
            return
        headers = call.heard
        if status == 304:
            self._renew(call, headers.get("etag"), stale_ttl)
            return
        vary = headers.get("vary", "")
        control = headers.get("cache-control", "")
        if status not in KEPT_STATUSES or "*" in vary or "no-store" in control:
            return
        lines = [str(status), *[f"{n}:{v}" for n, v in headers.items() if n not in _NOT_KEPT]]
        now = time.time()
        data = "\n".join(lines).encode() + b"\n\n" + body
        if vary:
            self._tiers.put(
                name, Entry(b"vary:" + vary.lower().encode(), now, now, now + stale_ttl)
            )
            name = _variant(name, vary.lower(), call.headers)
        self._tiers.put(name, Entry(data, now, now, now + stale_ttl))

    def find(self, call: Any) -> Kept | None:
        """The answer that is kept for a request."""
        _, hit = self._find(call)
        if hit is None:
            return None
        head, _, body = hit.entry.data.partition(b"\n\n")
        status, *lines = head.decode().split("\n")
        pairs = [line.partition(":") for line in lines]
        return Kept(int(status), [(n, v) for n, _, v in pairs], body, hit.age)

    def _find(self, call: Any) -> tuple[str, Hit | None]:
        name = _name(call)
        hit = self._tiers.get_from_memory(name, stale=True)
        if hit is not None and hit.entry.data.startswith(b"vary:"):
            name = _variant(name, hit.entry.data[5:].decode(), call.headers)
            hit = self._tiers.get_from_memory(name, stale=True)
        return name, hit

    def _renew(self, call: Any, tag: str | None, stale_ttl: float) -> None:
        """The service says that what somebody else has kept is still right: so is the same here."""
        name, hit = self._find(call)
        if hit is None or tag is None:
            return
        head = hit.entry.data.partition(b"\n\n")[0].decode()
        if f"\netag:{tag}\n" in f"{head}\n":
            now = time.time()
            for one in {_name(call), name}:
                entry = self._tiers.peek(one)
                if entry is not None:
                    self._tiers.put(one, Entry(entry.data, now, now, now + stale_ttl))

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held."""
        memory: dict[str, Any] = self._tiers.stats()["memory"]
        return memory

    def close(self) -> None:
        """Nothing is written; memory stays."""
        self._tiers.close()


def _name(call: Any, method: str = "") -> str:
    """Method, URL, and a mark of the credentials: nobody gets what another one has been told."""
    method = method or (call.method if call.method in SAFE else "GET")
    secrets = [f"{n}:{v}" for n, v in call.headers.items() if is_secret(n)]
    mark = hashlib.sha256("\n".join(sorted(secrets)).encode()).hexdigest()[:32] if secrets else ""
    return f"{method} {call.url.partition('#')[0]} {mark}"


def _variant(name: str, vary: str, headers: Mapping[str, str]) -> str:
    values = [f"{one.strip()}:{headers.get(one.strip(), '')}" for one in vary.split(",")]
    return name + "\n" + "\n".join(sorted(values))


# ---------------------------------------------------------------------------- requests that wait


def waiting(call: Any, key: str, own: Mapping[str, str]) -> dict[str, Any]:
    """A request as it waits on disk: without credentials, which the client adds when it is sent."""
    added = {name.lower() for name in own} | _ADDED
    headers = {n: v for n, v in call.headers.items() if not is_secret(n) and n not in added}
    body = base64.b64encode(call.body or b"").decode()
    return {"method": call.method, "url": call.url, "headers": headers, "body": body, "key": key}


def came_back(payload: Mapping[str, Any]) -> tuple[str, str, dict[str, str], bytes]:
    """Method, URL, headers and body of a request that has waited.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    headers = {str(name): str(value) for name, value in payload["headers"].items()}
    headers["Idempotency-Key"] = str(payload["key"])
    body = base64.b64decode(payload["body"], validate=True)
    return str(payload["method"]), str(payload["url"]), headers, body
