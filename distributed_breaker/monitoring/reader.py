"""The one reader of a process: whoever looks, and however many, the fleet is asked by it alone.

It asks when somebody wants to know and what is kept is older than a second, and every second while
a dashboard is open.  Its thread starts when it is wanted and ends when nobody looks any more.  A
lost store is waited for once: whoever comes then gets what is known, and what is wrong with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..errors import StoreUnavailable
from ..fleet import Fleet
from ..process import uwsgi_without_threads
from ..snapshot import Change
from ..workers import start_thread
from . import report
from .live import SHOWN, Live, Watcher
from .presence import processes
from .source import Source
from .view import View

FRESH = 1.0  # s for which what was read is as good as new
PATIENCE = 10.0  # s that a caller waits for a look; where nobody answers, it ends much sooner
LOST = 3.0  # s for which a lost store is taken for lost without waiting for it again
LINGER = 10.0  # s for which a dashboard is taken to be still open
SHARE = 10  # times the work of a look until the next one: it never uses more of a core
HISTORY = 50  # transitions of one circuit that the store keeps
KEPT = 256  # things beside the circuits that are kept of one moment

T = TypeVar("T")

log = logging.getLogger("distributed_breaker")


class Reader:
    """Looks at one fleet for everybody in this process.  All methods may be called by any thread.

    Args:
        source: where it looks.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._changed = threading.Condition(threading.Lock())  # never held while anything waits
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._view: View | None = None
        # When looks began, in s of the monotonic clock: that of the view, and the newest one.
        self._asked_at = self._began = float("-inf")
        self._changed_at = float("-inf")  # what was seen before is no longer so
        self._seen: View | None = None  # the last one with the store's word
        self._kept: tuple[View | None, dict[str, Any]] = None, {}
        self._wanted = False
        self._watched_at = float("-inf")
        self._pause = FRESH
        self._closed = False
        self.live = Live()

    # ------------------------------------------------------------------ asking

    def view(self) -> View:
        """What is known now, at most a second old; or else that, and why, the store is lost."""
        self.source.fleet()  # Where there is none, whoever asks hears why.
        now = time.monotonic()
        with self._changed:
            view, oldest = self._view, max(now - self._pause, self._changed_at)
            if view is not None and self._asked_at > oldest:
                return view
            # Whoever comes while somebody looks waits for the same look.
            running = self._began > oldest or self._want()
            if view is not None and view.lost and now - self._asked_at < LOST:
                return view
            while running and self._asked_at <= oldest and not self._closed:
                left = now + PATIENCE - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._view is not None and self._asked_at > oldest:
                return self._view
        if not running:
            return self._step()
        return self._view_of("the store does not answer in time")

    @property
    def has_seen(self) -> bool:
        """Whether the store has ever answered."""
        return self._seen is not None

    def refresh(self) -> None:
        """Forget that what is known is new: something was changed."""
        with self._changed:
            self._changed_at = time.monotonic()
            self._want()

    def once(self, view: View, what: str, make: Callable[[], T]) -> T:
        """What is made of one view is made once, whoever wants it how often."""
        with self._changed:
            if self._kept[0] is not view:
                self._kept = view, {}
            kept = self._kept[1]
        if what in kept:
            found: T = kept[what]
            return found
        made = make()
        if len(kept) < KEPT:
            kept[what] = made
        return made

    def timeline(self) -> list[dict[str, Any]]:
        """The last transitions of all circuits, newest first."""
        view = self.view()
        with self._changed:
            if self.live.known or view.lost:
                return self.live.timeline
        return self.once(view, "timeline", lambda: self._timeline(view))

    def history(self, circuit: str) -> list[dict[str, Any]]:
        """The last transitions of one circuit, newest first; none while the store is lost."""
        view = self.view()
        found = self.once(view, f"history {circuit}", lambda: self._logged(view, [circuit]))
        return [{key: entry[key] for key in entry if key != "circuit"} for entry in found]

    def processes(self) -> list[dict[str, Any]]:
        """What the processes of the fleet say of themselves; only this one while the store can't be
        asked."""
        view, fleet = self.view(), self.source.fleet()
        if view.lost or not isinstance(fleet, Fleet):
            own = self.source.presence()
            return [] if own is None else [own.document()]
        return self.once(view, "processes", lambda: processes(fleet))

    def watch(self, *, short: bool = False) -> Watcher:
        """Somebody opens a dashboard: all that is there, and unless ``short`` then what changes."""
        with self._changed:
            self._watched_at = now = time.monotonic()
            watcher = self.live.join(short, newer_than=now - self._pause - FRESH)
            running = self._want() if watcher.fresh else self._start()
            self._changed.notify_all()  # The thread may be asleep until its next look.
        if not running:
            self._step()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """It is closed."""
        with self._changed:
            self.live.leave(watcher)

    # ------------------------------------------------------------------ looking

    def _want(self) -> bool:
        """Have the thread look.  Returns whether there can be one."""
        self._wanted = True
        self._changed.notify_all()
        return self._start()

    def _start(self) -> bool:
        if self._closed:
            return False
        if self._thread is None:
            if uwsgi_without_threads():
                return False
            try:
                self._thread = start_thread("circuit-breaker-reader", self._run)
            except RuntimeError:
                return False
        return True

    def _run(self) -> None:
        while self._wait():
            try:
                self._step()
            except Exception:
                log.exception("the circuits can't be looked at")

    def _wait(self) -> bool:
        """Wait until it is time to look; False: it is time to end."""
        with self._changed:
            ends = time.monotonic() + LINGER
            while not self._closed:
                now = time.monotonic()
                if self._wanted:
                    return True
                watched = self._watched(now)
                if watched and now >= self._began + self._pause:
                    return True
                if not watched and now >= ends:
                    break
                self._changed.wait((self._began + self._pause if watched else ends) - now)
            self._thread = None
            return False

    def _watched(self, now: float) -> bool:
        return bool(self.live.watchers) or now - self._watched_at < LINGER

    def _step(self) -> View:
        """Look once, and tell those who watch."""
        with self._looking:
            asked, worked = time.monotonic(), time.thread_time()
            with self._changed:
                self._wanted, self._began = False, asked
            view = self._look()
            with self._changed:
                watched = self._watched(asked)
            telling = None
            if watched:
                changes = self._changes(view) if self.live.known else self._timeline(view)
                telling = self.live.prepare(view, changes, asked)
            with self._changed:
                if not view.lost:
                    self._seen = view
                self._view, self._asked_at = view, asked
                self._pause = max(FRESH, SHARE * (time.thread_time() - worked))
                if telling is not None:
                    self.live.tell(telling)
                else:
                    self.live.forget()
                self._changed.notify_all()
            return view

    def _look(self) -> View:
        try:
            return self._view_of("", self.source.fleet().snapshot())
        except StoreUnavailable as error:
            return self._view_of(str(error))

    def _view_of(self, lost: str, snapshots: Any = None) -> View:
        source, seen, own = self.source, self._seen, self.source.own()
        if snapshots is None:
            snapshots = {**(seen.snapshots if seen else {}), **own}
        configured, setting = source.configured(), source.setting()
        return View(time.time(), snapshots, configured, setting, own, source, lost)

    # ------------------------------------------------------------------ transitions

    def _timeline(self, view: View) -> list[dict[str, Any]]:
        """The newest of all that is kept, as many as are shown."""
        return self._logged(view, view.snapshots)[:SHOWN]

    def _changes(self, view: View) -> list[dict[str, Any]]:
        """What has happened since the last look, newest first."""
        before = self._seen.snapshots if self._seen else {}
        changed = [
            name
            for name, s in view.snapshots.items()
            if s.generation and (name not in before or before[name].generation != s.generation)
        ]

        def is_new(name: str, entry: Change) -> bool:
            known = before.get(name)
            if known is None:
                return True
            return entry.generation > known.generation or entry.at > (known.since or 0.0)

        return self._logged(view, changed, is_new)

    def _logged(
        self,
        view: View,
        circuits: Iterable[str],
        wanted: Callable[[str, Change], bool] = lambda name, entry: True,
    ) -> list[dict[str, Any]]:
        """The transitions of circuits, newest first.

        A transition among the newest belongs to a circuit whose last one is among them, too, so
        the logs of as many circuits as are shown transitions are enough.
        """
        held = {name: view.snapshots[name] for name in circuits if name in view.snapshots}
        since = {name: s.since or 0.0 for name, s in held.items()}
        newest = sorted(since, key=lambda name: since[name], reverse=True)[:SHOWN]
        if view.lost or not newest:
            return []
        try:
            found = self.source.fleet().histories(newest, HISTORY)
        except StoreUnavailable:
            return []
        entries = [(n, e) for n, entries in found.items() for e in entries if wanted(n, e)]
        entries.sort(key=lambda pair: (pair[1].at, pair[1].generation), reverse=True)
        return [{"circuit": name, **report.change(entry)} for name, entry in entries]

    # ------------------------------------------------------------------ the process

    def close(self) -> None:
        """End all streams, and the thread."""
        with self._changed:
            self._closed = True
            self.live.end()
            self._changed.notify_all()
        self.source.close()
