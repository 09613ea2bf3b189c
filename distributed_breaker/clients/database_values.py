"""Rows, and values of rows and parameters as JSON, from which they come back as they were."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from ..fallback.outbox import JsonValue


class Rows(list[dict[str, Any]]):
    """The rows of a read, as dictionaries by their columns' names.

    Attributes:
        stale: they were read earlier, since the database could not be asked now.
        age: seconds since then; None: they were read now.
    """

    stale = False
    age: float | None = None


class NotKept(TypeError):
    """A value of a kind that has no text here.  The message names the remedy, and no value."""


_MICROSECOND = datetime.timedelta(microseconds=1)

# By its type: the tag, and how a value becomes text and comes back.
_TAGS: dict[type, tuple[str, Callable[[Any], str], Callable[[str], Any]]] = {
    bytes: (
        "bytes",
        lambda value: base64.b64encode(value).decode(),
        lambda text: base64.b64decode(text, validate=True),
    ),
    datetime.datetime: ("datetime", lambda v: v.isoformat(), datetime.datetime.fromisoformat),
    datetime.date: ("date", lambda v: v.isoformat(), datetime.date.fromisoformat),
    datetime.time: ("time", lambda v: v.isoformat(), datetime.time.fromisoformat),
    datetime.timedelta: (
        "timedelta",
        lambda value: str(value // _MICROSECOND),
        lambda text: int(text) * _MICROSECOND,
    ),
    decimal.Decimal: ("decimal", str, decimal.Decimal),
    uuid.UUID: ("uuid", str, uuid.UUID),
    float: ("float", repr, float),  # only those that JSON has no word for
}
_BACK = {tag: back for tag, _, back in _TAGS.values()}


def encode(value: Any) -> JsonValue:
    """A value as JSON that gives it back.

    Raises:
        NotKept: it is of a kind that cannot be kept.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        # What a driver makes of one depends on what it has been told of the type.
        raise _unknown(value, "give its value, or a column of SQLAlchemy's type Enum")
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float) and value - value == 0:
        return float(value)
    if isinstance(value, list):
        return [encode(one) for one in value]
    if isinstance(value, tuple):
        return {"": "tuple", "of": [encode(one) for one in value]}
    if isinstance(value, Mapping):
        pairs: list[JsonValue] = [[encode(key), encode(one)] for key, one in value.items()]
        return {"": "dict", "of": pairs}
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    for kind, (tag, there, back) in _TAGS.items():
        if isinstance(value, kind):
            text = there(value)
            try:
                back(text)  # a subclass may have words of its own
            except (ValueError, ArithmeticError):
                break
            return {"": tag, "of": text}
    raise _unknown(value, "give it as text, a number, bytes, a date or the like")


def _unknown(value: Any, remedy: str) -> NotKept:
    return NotKept(f"is a {type(value).__name__}, which cannot be kept on disk: {remedy}")


def decode(value: JsonValue) -> Any:
    """The value that ``encode`` was given.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError: it is none of ``encode``'s.
    """
    if isinstance(value, list):
        return [decode(one) for one in value]
    if not isinstance(value, dict):
        return value
    tag, of = value[""], value["of"]
    if tag == "tuple":
        return tuple(decode(one) for one in _list(of))
    if tag == "dict":
        return {decode(key): decode(one) for key, one in map(_list, _list(of))}
    return _BACK[str(tag)](str(of))


def _list(value: JsonValue) -> list[JsonValue]:
    if not isinstance(value, list):
        raise TypeError(f"a list is expected, not a {type(value).__name__}")
    return value
