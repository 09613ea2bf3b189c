"""The workers of one process: which one serves, which is loaded, and when the next one is due."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from ..workers import start_thread
from .ml_models import ModelProblem, stamp_of
from .ml_remote import RemoteError, Worker, WorkerDied
from .ml_worker import own_memory

WARMING = 60.0  # s for the first call of a worker, with the sample
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before a worker that could not be had is tried again
LEAK_PAUSE = 10.0  # s between two replacements of workers that had taken too much memory
LOOK = 1.0  # s between two looks at a worker that nobody calls

log = logging.getLogger("distributed_breaker")


class Crew:
    """The workers of one process, and the thread that looks after them.

    A worker is loaded beside the one that serves, and takes over when it is ready.

    Args:
        path: of the model's file.
        begin: a method that gives a worker which begins to load, and the sample that warms it.  Its
            owner is not held: with him the crew ends.
        tell: a method that is called when a worker has taken over, or none could be had.
        spare: keep one more ready.
    """

    def __init__(
        self,
        path: str,
        begin: Callable[[], tuple[Worker, Any]],
        tell: Callable[[], None],
        spare: bool = False,
    ) -> None:
        self.current: Worker | None = None
        self.wake = threading.Event()
        self._path = path
        self._begin, self._tell = weakref.WeakMethod(begin), weakref.WeakMethod(tell)
        self._with_spare = spare
        self._next: Worker | None = None
        self._loading: Worker | None = None
        self._leaving: list[Worker] = []
        self._outdated: set[Worker] = set()
        self._changed = threading.Condition()
        self._closed = self._abandoned = False
        self._trouble: ModelProblem | None = None
        self._failures = 0
        self._not_before = 0.0
        self._loads = self._killed = self._replaced = 0
        self._replaced_at = float("-inf")
        try:
            start_thread("circuit-breaker-model", self._look_after)
        except RuntimeError as error:
            what = f"has no process, as no thread can be started ({error})"
            self._trouble = ModelProblem(self._path, what, "let threads run (--enable-threads)")

    def problem(self) -> ModelProblem | None:
        """Why no call can be run."""
        if self.current is not None:
            return None
        return self._trouble or ModelProblem(self._path, "is being loaded", "try again soon")

    @property
    def loading(self) -> bool:
        """Whether a worker is on its way, and none is there."""
        return self.current is None and self._trouble is None and not self._closed

    def wait_ready(self, seconds: float) -> bool:
        """Wait until a call can be run, or it is known why none can be."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.current or self._trouble or self._closed, max(0.0, seconds)
            )
            return self.current is not None

    def lose(self, worker: Worker) -> None:
        """It is of no use any more."""
        with self._changed:
            self._killed += worker.overran
            self._drop(worker)
        worker.kill()
        self.wake.set()

    def reload(self) -> None:
        """All there are have the old model."""
        with self._changed:
            self._outdated.update(self._all())
            self._failures, self._not_before, self._trouble = 0, 0.0, None
        self.wake.set()

    def stats(self) -> dict[str, Any]:
        """See the engine's."""
        with self._changed:
            worker = self.current
            return {
                "pid": worker.pid if worker else None,
                "rss": own_memory(worker.pid) if worker else 0,
                "since": worker.since if worker else None,
                "restarts": max(0, self._loads - 1),
                "killed": self._killed,
                "replaced": self._replaced,
                "trouble": str(self._trouble or ""),
            }

    def close(self) -> None:
        """End all workers, and the thread."""
        with self._changed:
            self._closed = True
            workers = self._all() + self._leaving
            self.current = self._next = None
            self._changed.notify_all()
        for worker in workers:
            worker.kill()
            worker.retire()
        self.wake.set()

    def abandon(self) -> None:
        """In a forked child.  A thread that is a greenlet has come along, and must do nothing."""
        self._closed = self._abandoned = True
        for worker in self._all() + self._leaving:
            worker.abandon()

    def _all(self) -> list[Worker]:
        return [each for each in (self.current, self._next, self._loading) if each is not None]

    def _look_after(self) -> None:
        known: object = None
        while not self._closed:
            self.wake.clear()
            pause = self._round()
            news = self.current or self._trouble
            if news is not known:
                known = news
                tell = self._tell()
                if tell is not None:
                    tell()
                del tell  # which holds the owner
            self.wake.wait(pause)
        if self._abandoned:
            threading.Event().wait()  # the child's threading does not know it, so it may not end

    def _round(self) -> float:
        """Do what is to be done now; seconds until the next look."""
        with self._changed:
            for worker in (self.current, self._next):
                if worker is not None and not worker.alive():
                    self._drop(worker)
            if self._next in self._outdated and self._next is not None and self.current is not None:
                self._drop(self._next)
            if self._next is not None and self._is_stale(self.current):
                self._take_over()
            needed = self._is_stale(self.current) or (self._with_spare and self._next is None)
            pause = self._not_before - time.monotonic()
            leaving, self._leaving = self._leaving, []
        for worker in leaving:
            worker.retire()
        if not needed or self._closed:
            return LOOK
        if pause > 0:
            return min(pause, LOOK)
        self._load()
        return 0.0

    def _is_stale(self, worker: Worker | None) -> bool:
        if worker is None or worker in self._outdated:
            return True
        return worker.retires and time.monotonic() - self._replaced_at >= LEAK_PAUSE

    def _drop(self, worker: Worker) -> None:
        """Do without a worker."""
        self._leaving.append(worker)
        self._outdated.discard(worker)
        if self._next is worker:
            self._next = None
        if self.current is worker:
            self.current = None
            if self._next is not None:
                self._take_over()

    def _take_over(self) -> None:
        before, self.current, self._next = self.current, self._next, None
        if before is not None and before.retires:
            self._replaced += 1
            self._replaced_at = time.monotonic()
        if before is not None:
            self._drop(before)
        self._changed.notify_all()

    def _load(self) -> None:
        """Load one more worker, or note why that cannot be done."""
        error = self._try_to_load()
        with self._changed:
            worker, self._loading = self._loading, None
            if self._closed:
                return
            if error is None:
                self._next, self._trouble, self._failures = worker, None, 0
                self._loads += 1
                return
            if worker is not None:
                self._drop(worker)
            # A shared worker may have ended just now: then the next one is wanted at once.
            if not self._failures and isinstance(error, WorkerDied):
                self._failures = 1
                return
            pause = FIRST_PAUSE * 2 ** min(self._failures, 30)
            self._not_before = time.monotonic() + min(pause, LONGEST_PAUSE)
            self._failures += 1
            self._trouble = self._in_words(error)
            self._changed.notify_all()
        log.warning("%s", self._trouble)

    def _try_to_load(self) -> Exception | None:
        try:
            if stamp_of(self._path) is None:  # which costs less than a process that finds it out
                raise ModelProblem(self._path, "cannot be found", "look at the path")
            begin = self._begin()
            if begin is None:
                self._closed = True
                return None
            worker, sample = begin()
            del begin  # which holds the owner
            self._loading = worker
            if self._closed:
                worker.kill()
                worker.retire()
            worker.load()
            self._warm(worker, sample)
        except Exception as error:
            return error
        return None

    def _warm(self, worker: Worker, sample: Any) -> None:
        if sample is None:
            return
        try:
            worker.call(sample, WARMING)
        except (RemoteError, TypeError, ValueError) as error:
            if self.current is not None:
                raise
            log.warning("%s fails with the sample input: %s", self._path, error)

    def _in_words(self, error: Exception) -> ModelProblem:
        if isinstance(error, ModelProblem):
            return error
        what = f"has no process that could run it ({type(error).__name__}: {error})"
        return ModelProblem(self._path, what, "look at what that process has written")
