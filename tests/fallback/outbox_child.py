"""What a process of the outbox's tests does: ``python -m tests.fallback.outbox_child <what> …``.

It says what it does in lines of standard output, and dies with the test.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from distributed_breaker.fallback.outbox import Entry, Outbox, OutboxError, Parked

BOUND = 60  # s that nothing here takes


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.alarm(BOUND)


def say(*words: object) -> None:
    print(*words, flush=True)


def add(path: str, topic: str) -> None:
    """Add until somebody puts an end to it; an id is said when ``add`` has returned."""
    outbox = Outbox(path)
    while True:
        say(outbox.add(topic, "k", {"by": os.getpid()}))


def add_some(path: str, topic: str, count: str) -> None:
    """Open the file at the same time as others."""
    say("ready")
    sys.stdin.readline()
    outbox = Outbox(path)
    say(*(outbox.add(topic, "k", number) for number in range(int(count))))


def echo(path: str) -> None:
    """Add each line that comes in."""
    outbox = Outbox(path)
    for text in sys.stdin:
        say(outbox.add("t", "k", text.strip()))


def drain(path: str, ledger: str) -> None:
    """Replay, a few at a time, until nothing waits; each delivery is a line of the ledger."""
    say("ready")
    sys.stdin.readline()
    outbox = Outbox(path)
    with open(ledger, "ab", buffering=0) as lines:
        while outbox.waiting("t"):
            outbox.replay("t", lambda e: lines.write(b"%d %d\n" % (os.getpid(), e.id)), limit=3)


def hold(path: str, lease: str) -> None:
    """Begin a delivery, and end it only when a line comes in."""

    def deliver(entry: Entry) -> None:
        say("delivering", entry.id)
        if sys.stdin.readline() == "park\n":
            raise Parked

    outcome = Outbox(path, lease=float(lease)).replay("t", deliver)
    say("busy" if outcome.busy else "done", outcome.delivered, outcome.left)


def fork(path: str, how: str) -> None:
    """Fork while a thread is adding; parent and children add what they say they have added."""
    outbox = Outbox(path)
    outbox.add("t", "k", "parent")
    stop = threading.Event()
    count = 1

    def go_on() -> None:
        nonlocal count
        while not stop.is_set():
            outbox.add("t", "k", "parent")
            count += 1

    thread = threading.Thread(target=go_on, daemon=True)
    if how == "busy":
        thread.start()
    children = [os.fork() or _child(outbox, path) for _ in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    stop.set()
    if how == "busy":
        thread.join(10)
    outbox.add("t", "k", "parent")
    say(*codes, count + 1)


def _child(outbox: Outbox, path: str) -> int:
    code = 1
    try:
        die_with_parent()
        handles = [_target(handle) for handle in Path("/proc/self/fd").iterdir()]
        if not any(target.startswith(path) for target in handles):
            for _ in range(5):
                outbox.add("t", "k", "child")
            outbox.close()
            code = 0
    finally:
        os._exit(code)


def _target(handle: Path) -> str:
    try:
        return os.readlink(handle)
    except FileNotFoundError:  # the one that listed the folder
        return ""


def full(path: str) -> None:
    """Run into the greatest size that a file may have here, and go on when there is room again."""
    outbox = Outbox(path)
    first = outbox.add("t", "k", "first")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most))
    try:
        outbox.add("t", "k", "x" * 300_000)
    except OutboxError as error:
        say(error)
    say(outbox.stats()["works"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    say(first, outbox.add("t", "k", "x" * 300_000), outbox.waiting("t"), outbox.stats()["works"])


WHAT: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (add, add_some, echo, drain, hold, fork, full)
}

if __name__ == "__main__":
    die_with_parent()
    WHAT[sys.argv[1]](*sys.argv[2:])
