"""Getting alerts to their channels: at once where nothing can fail, else through a durable outbox,
out of which they are sent until they have arrived or are too old.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from os.path import exists
from pathlib import Path
from typing import Any

from ..alert_keys import Alerts
from ..clients.waiting import outbox_of
from ..fallback.outbox import Entry, OutboxError, Replayed
from .alert_channels import ChannelError, DeliveryError, Send, sender
from .ticking import Ticker

ATTEMPTS = 1_000_000  # an alert is dropped for its age, not for its failures
LEASE = 10.0  # s that a delivery may take beside its channel's timeout, such as for the host's name
LATE = 60.0  # s after which an alert says that it comes late
RETRY = 1.0  # s between looks while something waits
LOOK = 5.0  # s between looks for what other processes of the host have left
MOST, LONGEST = 100, 20.0  # alerts, and seconds, of one channel at a time

log = logging.getLogger("distributed_breaker")


class Delivery:
    """The channels of one process, and its host's outbox for them.

    Args:
        namespace: of the fleet.
        settings: what the configuration says.
        environ: the variables that ``${NAME}`` stands for; None: the process's.
    """

    def __init__(
        self, namespace: str, settings: Alerts, environ: Mapping[str, str] | None = None
    ) -> None:
        self._settings = settings
        self._outbox = outbox_of(
            f"alerts.{namespace}",
            settings.outbox_path,
            most_entries=10_000,
            most_bytes=64 * 2**20,
            attempts=ATTEMPTS,
            lease=LEASE + max((c.timeout for c in settings.channels.values()), default=0.0),
        )
        self._send: dict[str, Send] = {}
        self._said: dict[str, str] = {}
        for name, channel in settings.channels.items():
            try:
                self._send[name] = sender(name, channel, environ)
            except ChannelError as error:
                log.error("alerts: the channel %s is not used: %s", name, error)
        self._ticker = Ticker("circuit-breaker-alerting", self._tick)

    @property
    def folder(self) -> Path:
        """Where the outbox lies."""
        return Path(self._outbox.path).parent

    def start(self) -> None:
        """Begin to send what waits."""
        self._ticker.start()

    def put(self, channel: str, alert: Mapping[str, Any]) -> None:
        """Have an alert sent; it is durable when this returns, if it can be."""
        send = self._send.get(channel)
        if send is None:
            return
        if self._settings.channels[channel].type == "log":
            _now(send, alert)
            return
        try:
            self._outbox.add(channel, "alert", dict(alert), key=alert["incident"])
        except OutboxError as error:
            # Nothing is lost yet: it is tried once.
            log.error("alerts: %s", error)
            try:
                _now(send, alert)
            except DeliveryError as failed:
                log.error("alerts: lost for %s, which %s: %s", channel, failed, alert["title"])
            return
        self._ticker.wake()

    def _tick(self) -> float:
        again = LOOK
        with suppress(OutboxError):
            if not exists(self._outbox.path) or not self._outbox.waiting():
                return LOOK
        for channel, send in self._send.items():
            try:
                done = self._replay(channel, send)
            except OutboxError as error:
                self._say(channel, str(error))
                continue
            self._say(channel, done.error)
            if done.left:
                again = min(again, RETRY)
        with suppress(OutboxError):
            self._drop_what_nobody_takes()
        return again

    def _drop_what_nobody_takes(self) -> None:
        """Old alerts for channels that the configuration no longer has must not fill the file."""
        for topic, found in self._outbox.stats()["topics"].items():
            if topic not in self._send and (found["oldest"] or 0) > self._settings.expire_after:
                count = self._outbox.purge(topic=topic)
                log.error("alerts: %d dropped, since there is no channel %s any more", count, topic)

    def _replay(self, channel: str, send: Send) -> Replayed:
        def deliver(entry: Entry) -> None:
            age = time.time() - entry.created
            alert: Any = entry.payload
            if age > self._settings.expire_after:
                log.error("alerts: dropped for %s after %.0f s: %s", channel, age, alert["title"])
                return
            _now(send, alert, entry.uid, age)

        return self._outbox.replay(channel, deliver, limit=MOST, seconds=LONGEST)

    def _say(self, channel: str, problem: str) -> None:
        """Once for each problem, and when it is over."""
        before = self._said.get(channel, "")
        if problem and problem != before:
            log.warning("alerts for %s wait: %s", channel, problem)
        elif before and not problem:
            log.info("alerts for %s are delivered again", channel)
        self._said[channel] = problem

    def close(self) -> None:
        """Try once more, for a second at most; what waits then is sent by other processes of the
        host, or by the next one."""
        self._ticker.close(once_more=True)
        self._outbox.close()

    def forked(self) -> None:
        """A child has a thread of its own."""
        self._ticker.forked()


def _now(send: Send, alert: Mapping[str, Any], uid: str = "", age: float = 0.0) -> None:
    own = {"id": uid or uuid.uuid4().hex, "sent_at": time.time(), "age": round(age, 3)}
    send({**alert, **own, "late": age > LATE})


def attempt(
    name: str, settings: Alerts, alert: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> str:
    """Send an alert through a channel now, and say what went wrong; empty: nothing."""
    try:
        _now(sender(name, settings.channels[name], environ), alert)
    except (ChannelError, DeliveryError) as error:
        return str(error)
    return ""
