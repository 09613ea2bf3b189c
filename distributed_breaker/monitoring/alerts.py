"""Alerts: telling people, once for the whole fleet, when something is wrong and when it is over.

One process of the fleet evaluates at a time.  What is worth an alert stands in ``alert_rules.py``,
what it says in ``alert_texts.py``, how many go out in ``alert_limits.py``, how the fleet agrees in
``alert_book.py``, the way to people in ``alert_delivery.py`` and ``alert_channels.py``.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..alert_keys import Alerts as Settings
from ..breaker import host_name
from ..errors import StoreError, StoreUnavailable
from ..registry import CircuitBreakerRegistry
from .alert_book import Book, OwnBook
from .alert_delivery import Delivery
from .alert_limits import Limiter, wanted
from .alert_rules import Event, Incident, Watcher
from .alert_texts import Setting, document
from .host_mark import HostMark
from .presence import Store, mismatched
from .ticking import Ticker

CANDIDATE = 5.0  # s between a process's looks whether it should be the one that evaluates
LONGEST_LOOK = 10.0  # s that a look may take; there may be ten thousand circuits
RESTS = 4  # times as long as a look has taken, in which there is none, however much happens
WHILE_LOST = 1.0  # s between its looks whether the store is back

log = logging.getLogger("distributed_breaker")


class Alerts:
    """Evaluates, and sends, in the background.

    Args:
        store: the fleet: a registry, or a ``Fleet`` of its own.
        settings: ``settings.alerts``.
        environment: for the alerts' texts.
        processes: the processes of the fleet, see ``presence.processes``; None: not known, so
            nothing is said of policies.
        shared: False for circuits at memory://, of which only this process knows.
        environ: the variables that ``${NAME}`` stands for; None: the process's.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        environment: str = "",
        processes: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
        shared: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._setting = Setting(store.namespace, environment, host_name())
        self._processes = processes
        self._make_book = Book if shared else OwnBook
        self._delivery = Delivery(store.namespace, settings, environ)
        self._mark = HostMark(self._delivery.folder, store.namespace)
        self._ticker = Ticker("circuit-breaker-alerts", self._tick)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._book = self._make_book(self._store)
        self._watcher: Watcher | None = None  # while this process is the one that evaluates
        self._limiter = Limiter()
        self._rests_until = 0.0
        self._lost_since: float | None = None
        self._lost: Event | None = None  # what this process has told of the store
        self._problem = ""

    def start(self) -> None:
        """Begin, in threads of its own."""
        self._delivery.start()
        self._ticker.start()

    def hear(self, _: object) -> None:
        """A circuit has made a transition: look soon, if looking is up to this process."""
        if self._watcher is not None:
            self._ticker.wake()

    def close(self) -> None:
        """Leave it to another process.  Alerts that were held back go out as digests; what can't be
        sent within a second waits on this host.  Safe to call twice."""
        self._ticker.close()
        with suppress(Exception):
            self._send_digests(all_of_them=True)
        if self._watcher is not None:
            self._watcher = None
            with suppress(StoreUnavailable, StoreError):
                self._book.resign()
        self._delivery.close()

    def forked(self) -> None:
        """A child begins anew, as another process."""
        self._begin_anew()
        self._delivery.forked()
        self._ticker.forked()

    # ------------------------------------------------------------------ one look

    def _tick(self) -> float:
        rest = self._rests_until - time.monotonic()
        if rest > 0:
            return rest
        try:
            self._round()
            self._problem = ""
        except (StoreUnavailable, StoreError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.error("alerts: %s; for the rights that they need see docs/alerts.md", error)
        self._send_digests()
        if self._lost_since is not None:
            return WHILE_LOST
        every = self._settings.evaluate_every
        return every if self._watcher is not None else CANDIDATE * random.uniform(0.8, 1.2)

    def _round(self) -> None:
        """Look, if looking is up to this process."""
        try:
            leads = self._book.lead()
        except StoreUnavailable:
            self._store_is_away()
            return
        self._store_is_there()
        self._watcher = (self._watcher or Watcher()) if leads else None
        if self._watcher is None:
            return
        begin = time.monotonic()
        try:
            self._look(self._watcher)
        finally:
            self._rests_until = time.monotonic() + RESTS * (time.monotonic() - begin)

    def _look(self, watcher: Watcher) -> None:
        now, store = time.time(), self._store
        if isinstance(store, CircuitBreakerRegistry):
            snapshots = store.snapshot(LONGEST_LOOK)
        else:
            snapshots = store.snapshot()
        histories = self._book.histories(watcher.changed(snapshots, now))
        others = None if self._processes is None else mismatched(self._processes())
        events = watcher.events(
            snapshots, histories, self._book.incidents(), others, self._settings, now
        )
        # All of them first: a circuit of which something could not be told is looked at again.
        for event in list(events):
            if not self._told(event):
                watcher.forget(event.circuit)

    def _told(self, event: Event) -> bool:
        """Tell an event, unless it was told; False if another process may be doing that."""
        if not event.over and not any(wanted(r, event) for r in self._settings.rules.values()):
            return True
        claim = self._book.claim(event)
        if claim == "mine":
            self._tell(event)
        if claim != "other":
            self._book.told(event)
        return claim != "other"

    def _tell(self, event: Event) -> None:
        now = time.time()
        for name, rule in self._settings.rules.items():
            if not wanted(rule, event):
                continue
            alert = document(event, name, rule, self._setting)
            for channel in self._settings.channels if rule.channels is None else rule.channels:
                if self._limiter.passes(channel, rule, alert, now):
                    self._delivery.put(channel, alert)

    def _send_digests(self, *, all_of_them: bool = False) -> None:
        digests = self._limiter.digests(
            self._settings.rules, self._setting, time.time(), all_of_them=all_of_them
        )
        for channel, alert in list(digests):
            self._delivery.put(channel, alert)

    # ------------------------------------------------------------------ the store

    def _store_is_away(self) -> None:
        """Tell it, once for this host and at most once by this process."""
        now = time.time()
        self._watcher = None
        if self._lost_since is None:
            self._lost_since = now
        elif self._lost is not None:
            self._mark.keep()
        if self._lost is None and now - self._lost_since >= self._settings.store_lost_after:
            began = int(self._lost_since)
            self._lost = Event("store_lost", "", began, False, now, {"state": "unreachable"})
            if self._mark.take(began):
                self._tell(self._lost)

    def _store_is_there(self) -> None:
        lost, self._lost, self._lost_since = self._lost, None, None
        began = None if lost is None else self._mark.give_back(lost.number)
        if lost is not None and began is not None:
            incident = Incident(began, float(began))
            self._tell(lost._replace(over=True, at=time.time(), incident=incident))
