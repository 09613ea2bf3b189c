"""A client's thread: looks after what waits, soon while something does, and seldom else."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Protocol

from ..workers import start_thread

SOON, LATER = 0.1, 1.0  # s between two rounds: while something waits, and else

log = logging.getLogger("distributed_breaker")


class Cared(Protocol):
    """Who is looked after."""

    def _round(self) -> bool:
        """Do what there is to do; whether another round is to follow soon."""


class Caretaker:
    """Makes rounds until it is closed, or nobody holds the client any more."""

    def __init__(self, client: Cared) -> None:
        self._client = weakref.ref(client)
        self._wake = threading.Event()
        self._ended = False
        try:
            self._thread: threading.Thread | None = start_thread("circuit-breaker-care", self._run)
        except RuntimeError:
            self._thread = None

    def wake(self) -> None:
        self._wake.set()

    def _run(self) -> None:
        soon = True
        while not self._ended:
            client = self._client()
            if client is None:
                return
            try:
                soon = client._round()
            except Exception:
                log.exception("a caretaker goes on after a defect")
            del client
            self._wake.clear()
            # What is put wakes it; rounds are not made more often than that, whatever comes.
            time.sleep(SOON)
            self._wake.wait(0 if soon else LATER)

    def close(self) -> None:
        self._ended = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
