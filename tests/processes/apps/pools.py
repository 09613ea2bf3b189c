"""Scripts that share work among processes of ``multiprocessing``: ``python -m … <how> <what>``.

``how`` is a start method; ``what`` names a function below.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.processes.apps.usage import BOUND, act, look, note, registry, use_before_forks


def work(_: int = 0) -> int:
    """What each process does: some calls, the last of which wait to be reported."""
    act(count=20)
    act(count=1, outcome="failure")
    note("worked", reporter=look()["reporter"])
    return os.getpid()


def processes(context: Any) -> None:
    """Processes that end by themselves, by sys.exit and by an error."""
    started = [context.Process(target=target) for target in (work, leave, work)]
    for process in started:
        process.start()
    for process in started:
        process.join(BOUND)


def leave() -> None:
    work()
    sys.exit(3)


def pool(context: Any) -> None:
    """Workers that are replaced after some tasks, and end in order."""
    with context.Pool(2, maxtasksperchild=2) as workers:
        workers.map(work, range(8), chunksize=1)
        workers.close()
        workers.join()


def executor(context: Any) -> None:
    with ProcessPoolExecutor(2, mp_context=context) as workers:
        list(workers.map(work, range(8)))


def terminated(context: Any) -> None:
    """As ``with Pool()`` ends: by SIGTERM, without a chance to say anything."""
    with context.Pool(2) as workers:
        workers.map(work, range(8), chunksize=1)


def flushing(_: int) -> None:
    work()
    registry.flush(BOUND)


def flushed(context: Any) -> None:
    """What a terminated worker has flushed before is not lost."""
    with context.Pool(2) as workers:
        workers.map(flushing, range(8), chunksize=1)


def traffic(context: Any) -> None:
    """Processes that are started while threads of this one make calls."""
    busy = threading.Event()

    def hammer() -> None:
        while not busy.is_set():
            act(count=1)
            act(count=1, outcome="failure")
            time.sleep(0.001)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    processes(context)
    busy.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    method, scenario = sys.argv[1:]
    use_before_forks()
    globals()[scenario](multiprocessing.get_context(method))
    note("done", threads=[thread.name for thread in threading.enumerate()])
