"""Many threads through one breaker: how many calls they make, and whether all failures count."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from scripts.servers import Server

from .figures import Row, Spread, Topic
from .setting import Setting
from .subjects import Guarded, Ours, Rules, Subject, boom, using

COUNTS = (1, 4, 16)
CALLS, FAILING = 16_000, 1_600  # calls of all threads together, without I/O
ASKING, ASKING_FAILING = 96, 48  # where each call asks the server
METHOD = (
    "Threads of one process share one breaker and start together; they make 16,000 calls in all "
    "(96 where each asks the server), through the library's decorator. What is lost is the "
    "difference between the failures that were raised through the breaker and those that it has "
    "counted, by 16 threads; ours is asked for the store's totals."
)
LIMITS = (
    "interlock-cb counts a window, and with Redis forgets what another process's state replaces: "
    "its losses are counted in memory only.",
    "nopanic-redis tells no count of failures.",
    "purgatory with Redis is asyncio only, and not measured with threads.",
)
NO_THREADS = ("purgatory + Redis",)


def run(setting: Setting) -> Topic:
    """Let 1, 4 and 16 threads call, all libraries in turn."""
    kinds: list[type[Subject]] = [Ours, *setting.in_memory, *setting.shared]
    kinds = [kind for kind in kinds if kind.title not in NO_THREADS]
    made: dict[tuple[str, int], list[float]] = {}
    lost: dict[str, list[float]] = {}
    with Server.start(setting.server) as server, contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(using(kind, server.url)) for kind in kinds]
        guards = [subject.guard("threads") for subject in subjects]
        for number in range(setting.count(1, 9)):
            for subject, guarded in zip(subjects, guards, strict=True):
                calls = ASKING if _asks(subject) else CALLS
                for threads in COUNTS:
                    rate = calls / together(threads, calls, _decorated(guarded))
                    made.setdefault((subject.title, threads), []).append(rate)
            for subject in subjects:
                missed = _lost(subject, f"failing-{number}")
                if missed is not None:
                    lost.setdefault(subject.title, []).append(missed)
    rows = [
        Row(
            f"{threads} thread{'s' * (threads > 1)}",
            "calls/s",
            Spread.of(made[Ours.title, threads]),
            {k.title: Spread.of(made[k.title, threads]) for k in kinds if k is not Ours},
            more_is_better=True,
        )
        for threads in COUNTS
    ]
    theirs = {title: Spread.of(v) for title, v in lost.items() if title != Ours.title}
    rows.append(Row("failures lost, 16 threads", "", Spread.of(lost[Ours.title]), theirs))
    drawn = [row.name for row in rows[:3]]
    return Topic("threads", "Threads of one process", METHOD, rows, LIMITS, drawn)


def _decorated(guarded: Guarded) -> Callable[[], object]:
    """What a user calls; all that are measured here have a decorator."""
    function: Any = guarded.names["guarded"]
    return cast(Callable[[], object], function)


def _asks(subject: Subject) -> bool:
    return subject.shared and subject.title not in (Ours.title, "interlock-cb + Redis")


def _lost(subject: Subject, name: str) -> float | None:
    """How many of the failures that 16 threads raise are not counted; None if it can't be told."""
    if subject.title == "interlock-cb + Redis":
        return None
    guarded: Guarded = subject.guard(name, Rules(failures=1_000_000, window=FAILING))
    if guarded.failures is None:
        return None
    calls = ASKING_FAILING if _asks(subject) else FAILING

    def fail() -> None:
        with contextlib.suppress(Exception):
            guarded.call(boom)

    together(COUNTS[-1], calls, fail)
    return float(calls - guarded.failures())


def together(threads: int, calls: int, call: Callable[[], object]) -> float:
    """Have threads make so many calls in all; the seconds from their common start to the last."""
    barrier = threading.Barrier(threads + 1)

    def caller() -> None:
        barrier.wait()
        for _ in range(calls // threads):
            call()

    workers = [threading.Thread(target=caller, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start
