"""A plain script, which makes calls and ends: ``python -m … <how>``."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from typing import Any

from tests.processes.apps.usage import BOUND, act, breakers, note


def waits() -> None:
    """Until Ctrl-C, or whatever else ends it."""
    act(count=40)
    note("ready")
    try:
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        pass


def exits_by_signal() -> None:
    """With the handler that a script needs to end in order by SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    waits()


def listens() -> None:
    """The last thing that happens is a transition, and its listener is slow."""
    ending = threading.Event()
    atexit.register(ending.set)  # Before the library's, which was registered before it.

    def listener(change: Any) -> None:
        ending.wait(BOUND)
        time.sleep(0.3)
        note("heard late", new=change.new)

    breakers["payments"].on_transition(listener)
    act(circuit="payments", count=5, outcome="failure")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
