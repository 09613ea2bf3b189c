"""What lies in an outbox's file: its tables, entries as rows, their texts and payloads."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from .file_errors import FileError
from .private_file import Kind

JsonValue: TypeAlias = "dict[str, JsonValue] | list[JsonValue] | str | int | float | bool | None"

# The counts stand beside the lease, kept by triggers: no question about them reads the entries.
SCHEMA = """
CREATE TABLE file (uid TEXT NOT NULL);
INSERT INTO file VALUES (lower(hex(randomblob(8))));
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, payload TEXT NOT NULL,
    bytes INTEGER NOT NULL, created REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    parked INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT ''
);
CREATE INDEX by_order ON entries (topic, parked, id);
CREATE INDEX by_key ON entries (topic, key, id) WHERE parked = 0;
CREATE TABLE topics (
    topic TEXT PRIMARY KEY, waiting INTEGER NOT NULL DEFAULT 0,
    parked INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
    owner TEXT NOT NULL DEFAULT '', until REAL NOT NULL DEFAULT 0, lease REAL NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TRIGGER added AFTER INSERT ON entries BEGIN
    INSERT OR IGNORE INTO topics (topic) VALUES (new.topic);
    UPDATE topics SET waiting = waiting + 1, bytes = bytes + new.bytes WHERE topic = new.topic;
END;
CREATE TRIGGER removed AFTER DELETE ON entries BEGIN
    UPDATE topics SET waiting = waiting - (old.parked = 0), parked = parked - old.parked,
        bytes = bytes - old.bytes WHERE topic = old.topic;
END;
CREATE TRIGGER moved AFTER UPDATE OF parked ON entries WHEN old.parked != new.parked BEGIN
    UPDATE topics SET waiting = waiting + old.parked - new.parked,
        parked = parked + new.parked - old.parked WHERE topic = new.topic;
END
"""


class OutboxError(FileError):
    """The outbox cannot be written or read.  The message names the file and the remedy.

    What was to be written is not to be relied on: after a failing disk it may be there or not.
    """


class OutboxFull(OutboxError):
    """There is no room for more.  The message names the bound, and how many wait."""


KIND = Kind(
    name="the outbox",
    error=OutboxError,
    schema=SCHEMA,
    version=1,
    application=0x44424F58,
    pragmas={
        # They change something on macOS only, where an fsync alone does not reach the disk.
        "fullfsync": "ON",
        "checkpoint_fullfsync": "ON",
        "journal_size_limit": 16 * 2**20,
    },
    busy=2.0,
    cache=False,
)
SELECT = """
SELECT id, topic, kind, key, payload, created, attempts, parked, error,
    (SELECT uid FROM file) || '-' || id FROM entries
"""


class Item(NamedTuple):
    """What ``add_many`` adds; plain tuples will do."""

    kind: str
    payload: JsonValue
    key: str = ""


class Entry(NamedTuple):
    """One thing that waits."""

    id: int
    """Its place: topics are delivered in this order.  Another file has the same numbers."""
    topic: str
    kind: str
    key: str
    payload: JsonValue
    created: float
    """Seconds since 1970."""
    attempts: int
    """Deliveries that failed, or whose process did not come back within its lease."""
    parked: bool
    error: str
    """Of the last attempt."""
    uid: str
    """The idempotency key: the same in every delivery of this entry, and of no other one, be it
    of another host or of a file that took the place of a damaged one."""


def encoded(kind: str, payload: JsonValue) -> str:
    """The payload as JSON that gives it back unchanged."""
    place = f"the payload of kind {kind!r}"
    try:
        text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
        same = json.loads(text) == payload
    except TypeError as error:
        raise TypeError(f"{place} is not JSON ({error}): convert it first") from None
    except UnicodeEncodeError:
        raise ValueError(f"{place} holds text with lone surrogates: encode it first") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply: flatten it") from None
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}): convert it first") from None
    if not same:
        raise TypeError(
            f"{place} would come back changed: use only dicts with text as keys, lists, text, "
            f"numbers, True, False and None"
        )
    return text


def entry_of(row: tuple[Any, ...]) -> Entry:
    """An entry from what ``SELECT`` gives; OutboxError: its payload cannot be read."""
    entry = Entry(*row)
    try:
        return entry._replace(payload=json.loads(row[4]), parked=bool(entry.parked))
    except (ValueError, RecursionError):
        raise OutboxError(
            f"the payload of the outbox's entry {entry.id} cannot be read: purge it by its id"
        ) from None


def chosen(ids: Iterable[int] | None, topic: str | None) -> tuple[str, list[object]]:
    """The condition that chooses entries, with its parameters."""
    condition, values = "1", list[object]()
    if ids is not None:
        condition += " AND id IN (SELECT value FROM json_each(?))"
        values.append(json.dumps([operator.index(number) for number in ids]))
    if topic is not None:
        condition += " AND topic = ?"
        values.append(topic)
    return condition, values


def checked(name: str, text: str, least: int, most: int) -> str:
    """Return a text that can be stored, or raise TypeError or ValueError naming it."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be text and is {type(text).__name__}")
    if not least <= len(text) <= most:
        raise ValueError(f"{name} has {len(text)} characters: use {least} to {most}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds lone surrogates: encode it first") from None
    return text
