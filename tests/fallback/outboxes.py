"""Outboxes on one file and one clock, and how the tests use them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from distributed_breaker.fallback.outbox import Entry, Outbox, Parked, Replayed
from tests.unit.clock import FakeClock

LEASE = 30.0
NOTHING = Replayed(0, 0, 0, False, "", 0.0)

Make = Callable[..., Outbox]


@contextlib.contextmanager
def outboxes(path: Path, clock: FakeClock) -> Iterator[Make]:
    """Makes other processes' outboxes on the same file: to SQLite and the leases they are that."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Outbox:
            options = {"now": clock, "chance": lambda: 0.0, "lease": LEASE} | options
            outbox = Outbox(path, **options)
            stack.callback(outbox.close)
            return outbox

        yield make


def park(entry: Entry) -> NoReturn:
    raise Parked("no such account")


def interrupt(entry: Entry) -> NoReturn:
    raise KeyboardInterrupt


def fill(outbox: Outbox, count: int = 3, topic: str = "t") -> list[int]:
    return outbox.add_many(topic, [("k", number) for number in range(count)])


def ids(outbox: Outbox, **options: Any) -> list[int]:
    return [entry.id for entry in outbox.entries(**options)]


def delivered(outbox: Outbox, topic: str = "t", **options: Any) -> list[int]:
    """Replay, and say what was delivered."""
    entries: list[Entry] = []
    outbox.replay(topic, entries.append, **options)
    return [entry.id for entry in entries]
