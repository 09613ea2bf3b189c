"""Rows and parameters, and JSON from which their values come back as they were."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID


class Rows(list[dict[str, Any]]):
    """The rows of a read, as dictionaries by their columns' names.

    Attributes:
        stale: they were read earlier, since the database could not be asked now.
        age: seconds since then; None: they were read now.
    """

    stale = False
    age: float | None = None


_MARK = "$type"
_TO: dict[type, tuple[str, Callable[[Any], Any]]] = {
    datetime: ("datetime", datetime.isoformat),
    date: ("date", date.isoformat),
    time: ("time", time.isoformat),
    timedelta: ("timedelta", lambda v: [v.days, v.seconds, v.microseconds]),
    Decimal: ("decimal", str),
    UUID: ("uuid", str),
    bytes: ("bytes", lambda v: base64.b64encode(v).decode()),
    memoryview: ("bytes", lambda v: base64.b64encode(v).decode()),
}
_FROM: dict[str, Callable[[Any], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda parts: timedelta(*parts),
    "decimal": Decimal,
    "uuid": UUID,
    "bytes": base64.b64decode,
}


def encode(value: Any, *, sort: bool = False) -> bytes:
    """A value as JSON.

    Args:
        value: of what JSON has, dates, times, Decimal, UUID and bytes.
        sort: dictionaries by their keys, so that equal ones have equal texts.

    Raises:
        TypeError: something in it has no such text.
    """
    made = 0

    def tagged(value: Any) -> dict[str, Any]:
        nonlocal made
        made += 1
        return _tagged(value)

    text = json.dumps(value, default=tagged, sort_keys=sort, separators=(",", ":"))
    if text.count(_MARK) != made:
        raise TypeError(f"it has {_MARK!r} in it, which is the mark of what JSON has not")
    return text.encode()


def decode(data: bytes) -> Any:
    """What was encoded."""
    return json.loads(data, object_hook=_untagged)


def _tagged(value: Any) -> dict[str, Any]:
    found = _TO.get(type(value))
    if found is None:
        raise TypeError(f"a {type(value).__name__} cannot be kept as JSON")
    name, text = found
    return {_MARK: name, "is": text(value)}


def _untagged(found: dict[str, Any]) -> Any:
    kind = found.get(_MARK)
    return found if kind is None else _FROM[kind](found["is"])
