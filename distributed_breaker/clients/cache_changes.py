"""Changes of cached keys, as ``lua/cache.lua`` carries them out, and values as they are stored."""

from __future__ import annotations

import functools
import json
import time
from typing import Any, NamedTuple, cast

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from ..fallback.outbox import Entry
from ..store import sha

SCRIPT = "cache.lua"
OURS = "cb:"  # how names begin that are the library's own
HORIZON = 3_600.0  # s within which a change that waited is carried out; later its key is deleted


class Change(NamedTuple):
    """One change of one key, as ``lua/cache.lua`` carries it out."""

    op: str
    name: str
    stamp: int  # µs
    data: bytes = b""
    ttl: float | None = None  # s

    def payload(self) -> dict[str, Any]:
        """What is kept of it on disk, beside the key."""
        ttl = None if self.ttl is None else ms(self.ttl)
        return {"stamp": self.stamp, "data": self.data.decode(), "ttl": ttl}

    @classmethod
    def read(cls, entry: Entry) -> Change:
        """From what is kept of it."""
        payload = cast(dict[str, Any], entry.payload)
        ttl = payload["ttl"]
        life = None if ttl is None else ttl / 1000
        op, stamp = entry.kind, int(payload["stamp"])
        waited = time.time() - stamp / 1e6
        if op not in ("set", "delete", "increment", "expire"):
            raise ValueError(f"unknown operation {op!r}")
        if op == "set" and (waited > HORIZON or (life is not None and life <= waited)):
            # It is over, or what was written since cannot be told any more: nobody shall read
            # something older than this.
            op = "delete"
        elif life is not None and op in ("set", "expire"):
            life = max(0.001, life - waited)
        return cls(op, entry.key, stamp, payload["data"].encode(), life)

    def words(self, replayed: str = "") -> tuple[list[str], list[Any]]:
        """Keys and arguments of the script."""
        keys = [self.name, beside(self.name, "w")]
        if replayed and self.op == "increment":
            keys.append(beside(self.name, f"i:{replayed}"))
        ttl = "" if self.ttl is None else ms(self.ttl)
        return keys, [self.op, self.stamp, ms(HORIZON), int(bool(replayed)), self.data, ttl]

    def command(self) -> tuple[Any, ...]:
        """The script's call as a command of Redis."""
        keys, words = self.words()
        return "EVALSHA", sha(SCRIPT), len(keys), *keys, *words


def beside(name: str, what: str) -> str:
    """A key of ours that lies in the same slot of a cluster as ``name``.

    Each pair of arguments has its own, and it begins with ``OURS``.
    """
    # As servers do: what stands between the first brace and the next closing one decides, unless
    # that is nothing.
    start = name.find("{")
    end = name.find("}", start + 1)
    if 0 <= start < end - 1:
        return f"cb:{what}:{{{name[start + 1 : end]}}}:{name}"
    if name and "}" not in name:
        return f"cb:{what}:{{{name}}}"
    # No tag can hold such a name, so another one stands for its slot.
    return f"cb:{what}:{{{_tags()[key_slot(name.encode())]}}}:{name}"


@functools.cache
def _tags() -> dict[int, int]:
    """For each slot a number that lies there; once in a process that takes a tenth of a second."""
    tags: dict[int, int] = {}
    number = 0
    while len(tags) < REDIS_CLUSTER_HASH_SLOTS:
        tags.setdefault(key_slot(b"%d" % number), number)
        number += 1
    return tags


# ---------------------------------------------------------------------------- values


def encode(key: str, value: Any) -> bytes:
    """A value as JSON.

    Raises:
        TypeError, ValueError: JSON has no such value; the message names key and type.
    """
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise type(error)(
            f"the value of {key!r} ({type(value).__name__}) is not JSON: {error}; give it as "
            f"texts, numbers, lists and objects, or store bytes with `.redis`"
        ) from None


_DECODER = json.JSONDecoder()


def decode(data: bytes) -> Any:
    """What is stored.  What another program has stored, and is not JSON, comes as text or bytes."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data
    try:
        # As json.loads does it, in half the time.
        value, end = _DECODER.raw_decode(text)
        if end == len(text):
            return value
    except ValueError:
        pass  # spaces around it, or no JSON
    try:
        return json.loads(text)
    except ValueError:
        return text


def ms(seconds: float) -> int:
    """Whole milliseconds, at least one."""
    return max(1, round(seconds * 1000))
