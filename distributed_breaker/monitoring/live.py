"""What open dashboards are told: everything at first, then what changes, each event made once.

No I/O and no clock: the reader says what there is, and when.  It also takes care that ``tell``,
``join`` and ``end`` are never carried out at the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from . import report
from .tiles import Traffics, tile
from .view import View, as_json

AGAIN = 60.0  # s after which everybody is told everything again
SHOWN = 200  # transitions
QUEUE = 32  # that wait for one client; one that is slower is cut off
HEARTBEAT = 15.0  # s without an event after which a comment shows that the line is alive
RETRY = b"retry: 2000\n\n"
BEAT = b":\n\n"


def event(kind: str, document: Any) -> bytes:
    """One server-sent event."""
    return b"event: %s\ndata: %s\n" % (kind.encode(), as_json(document))


class Watcher:
    """One open dashboard.  Iterating gives what is to be sent; it ends when it is cut off.

    Args:
        short: it ends after its first event, and the browser comes again: for servers that have no
            thread to spare for somebody who only watches.

    Attributes:
        fresh: it has been told nothing yet.
        ended: nothing more will come, beside what is queued.
        notify: called when there is something to send, by any thread.
    """

    def __init__(self, short: bool = False) -> None:
        self.fresh = True
        self._short = short
        self.notify: Callable[[], object] = lambda: None
        self._events: deque[bytes] = deque([RETRY])
        self._told = False
        self._changed = threading.Condition(threading.Lock())
        self.ended = False

    def put(self, data: bytes) -> None:
        """Queue an event; if there are too many already, the client is cut off."""
        with self._changed:
            if len(self._events) >= QUEUE:
                self._events.clear()
                self.ended = True
            elif not self.ended:
                self._told = True
                self._events.append(data)
            self._changed.notify_all()
        self.notify()

    def end(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._events.clear()
            self.ended = True
            self._changed.notify_all()
        self.notify()

    def taken(self) -> list[bytes]:
        """What is to be sent now, without waiting."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
            self.ended |= self._short and self._told
            return events

    def __iter__(self) -> Iterator[bytes]:
        while True:
            events = self.taken()
            if events:
                yield b"".join(events)
                continue
            with self._changed:
                if self.ended:
                    return
                if not self._events:
                    self._changed.wait(HEARTBEAT)
                waited_in_vain = not self._events and not self.ended
            if waited_in_vain:
                yield BEAT


@dataclass(frozen=True)
class Told:
    """What everybody who watches knows."""

    view: View
    tiles: Mapping[str, Mapping[str, Any]]
    timeline: list[dict[str, Any]]
    admin: bool

    @property
    def state(self) -> dict[str, Any]:
        """How all is together."""
        return {
            "store": self.view.store,
            "overall_status": self.view.fleet_health["overall_status"],
        }

    @cached_property
    def whole(self) -> bytes:
        """Everything, in one event."""
        return event("fleet", {
            "at": report.iso(self.view.at),
            **self.state,
            "admin": self.admin,
            "environment": self.view.setting.environment,
            "namespace": self.view.setting.namespace,
            "tiles": list(self.tiles.values()),
            "timeline": self.timeline,
        })  # fmt: skip

    def news(self, changes: list[dict[str, Any]], before: Told) -> bytes:
        """What is new, in one piece, so that a cascade of transitions fills nobody's queue."""
        news = [event("transition", change) for change in reversed(changes)]
        changed = [tile for name, tile in self.tiles.items() if before.tiles.get(name) != tile]
        gone = [name for name in before.tiles if name not in self.tiles]
        if changed or gone or self.state != before.state:
            at = {"at": report.iso(self.view.at)}
            news.append(event("tiles", {**at, **self.state, "tiles": changed, "gone": gone}))
        return b"".join(news)


class Live:
    """What is told to all watchers.

    Attributes:
        admin: whether somebody may step in.
        watchers: those that are told.
        known: whether the timeline has all that was kept of transitions.
    """

    def __init__(self) -> None:
        self.admin = False
        self.watchers: set[Watcher] = set()
        self.known = False
        self._traffics = Traffics()
        self._told: Told | None = None
        self._told_at = float("-inf")
        self._again_at = float("-inf")

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """The last transitions that were told, newest first."""
        return self._told.timeline if self._told is not None else []

    def forget(self) -> None:
        """Nobody was told of the last look, so the next one begins anew."""
        self._told, self.known = None, False

    def join(self, short: bool, newer_than: float) -> Watcher:
        """A new watcher.  What was told is told to it at once, if that was later than this."""
        watcher = Watcher(short)
        if self._told is not None and self._told_at > newer_than:
            watcher.fresh = False
            watcher.put(self._told.whole)
        self.watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It has gone."""
        watcher.end()
        self.watchers.discard(watcher)

    def prepare(self, view: View, changes: list[dict[str, Any]], now: float) -> Telling:
        """Make what is to be told.  This takes its time, and changes nothing that anybody sees.

        Args:
            view: what is known now.
            changes: transitions since the last time, newest first; all of them unless ``known``.
            now: seconds of a clock that only goes on.
        """
        health = view.fleet_health["circuit_breakers"]
        metrics = view.fleet_metrics["circuit_breakers"]
        if not view.lost:
            self._traffics.add(now, metrics)
        tiles = {
            name: tile(name, found, metrics[name], self._traffics.of(name))
            for name, found in health.items()
        }
        timeline = [*changes, *(self.timeline if self.known else [])][:SHOWN]
        told, before = Told(view, tiles, timeline, self.admin), self._told
        begins = not self.known and not view.lost
        again = before is None or begins or now - self._again_at >= AGAIN
        if again or any(watcher.fresh for watcher in list(self.watchers)):
            told.whole  # noqa: B018 - it is made here, and not while others wait
        news = told.news([] if begins else changes, before) if before is not None else b""
        return Telling(told, news, again, now)

    def tell(self, telling: Telling) -> None:
        """Tell it everybody."""
        told, news, again, now = telling
        self._told, self._told_at = told, now
        self.known |= not told.view.lost
        if again:
            self._again_at = now
        for watcher in list(self.watchers):
            if watcher.ended:
                self.watchers.discard(watcher)
                continue
            if news and not watcher.fresh:
                watcher.put(news)
            if again or watcher.fresh:
                watcher.fresh = False
                watcher.put(told.whole)

    def end(self) -> None:
        """Nobody is told anything any more."""
        for watcher in list(self.watchers):
            self.leave(watcher)


class Telling(NamedTuple):
    """What is to be told: the news to those who know what was before, or everything again."""

    told: Told
    news: bytes
    again: bool
    at: float
