"""A program that has processes of its own make calls, in each of the ways of the standard library.

The first argument is the start method; ``terminate`` tries what a pool does to its processes.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.processes.apps.usage import BOUND, act, look, note, registry


def work(count: int, flush: bool = False) -> None:
    """Make calls whose outcomes wait when it returns."""
    act(count=count)
    act(outcome="failure")
    act(count=count)
    note("child", **look())
    if flush:
        registry.flush(BOUND)


def leave(count: int) -> None:
    work(count)
    sys.exit(3)


def children(context: Any) -> None:
    """Processes that end in order; one at a time, so that the machine is not all theirs."""
    for target, ends in ((work, 0), (leave, 3)):
        child = context.Process(target=target, args=(20,))
        child.start()
        child.join(BOUND)
        assert child.exitcode == ends, child.exitcode
        act(count=2)
    with context.Pool(1, maxtasksperchild=1) as pool:
        pool.map(work, [3, 4], chunksize=1)
        pool.close()
        pool.join()
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        list(executor.map(work, [5, 6]))


def terminated(context: Any) -> None:
    """Leaving a pool's block kills its processes; what a task has flushed is not lost with them."""
    with context.Pool(2) as pool:
        pool.starmap(work, [(5, True), (6, True), (7, True)], chunksize=1)
    note("flushed")
    with context.Pool(1) as pool:
        pool.map(work, [8])


def main(method: str) -> None:
    act(count=7)  # They wait when the first child is forked.
    if method == "terminate":
        terminated(mp.get_context("fork"))
    else:
        children(mp.get_context(method))
    act(count=3)


if __name__ == "__main__":
    main(sys.argv[1])
