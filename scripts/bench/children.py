"""Processes that measure: started, spoken to over pipes, bounded in time, and ended for sure."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

# What forked processes find imported; what is not installed is passed over.
PRELOADED = (
    "scripts.bench.__main__",
    "aiobreaker.storage.redis",
    "circuitbreaker",
    "interlock.integrations.redis",
    "nopanic_redis",
    "purgatory",
    "pybreaker",
)
ANSWER = 60.0  # s that a process may take for an answer, on a machine with other work


class Silence(RuntimeError):
    """A process has not answered in time, or has ended."""


@contextlib.contextmanager
def children(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *, fresh: bool = False
) -> Iterator[list[Connection]]:
    """One process for each tuple of arguments; the last argument of each is its pipe.

    ``fresh`` ones are interpreters of their own, which have imported nothing but what they use;
    the others are forked from a process that has imported all, which is faster.
    """
    context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(list(PRELOADED))
    pipes: list[Connection] = []
    processes = []
    try:
        for given in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=_quietly, args=(target, *given, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _quietly(target: Callable[..., None], *given: Any) -> None:
    """Log nothing: that servers are away and circuits open is what is wanted here."""
    logging.disable()
    with contextlib.suppress(EOFError, BrokenPipeError):  # The parent has gone.
        target(*given)


def hear(pipe: Connection, seconds: float = ANSWER) -> Any:
    """The next answer. Raises Silence."""
    if not pipe.poll(seconds):
        raise Silence(f"no answer within {seconds:g} s")
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise Silence("the process has ended") from None


def ask(pipe: Connection, question: Any, seconds: float = ANSWER) -> Any:
    """Say something and hear the answer. Raises Silence."""
    pipe.send(question)
    return hear(pipe, seconds)
