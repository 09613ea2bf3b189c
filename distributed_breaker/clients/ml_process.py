"""A model in a process of its own, which can be killed: workers that come, go and take over.

A call that overruns its deadline is over at that moment, whatever the model does: a worker of this
process's own is killed, and the next one is loaded at once.  A worker that is shared on the host
(``ml_host``) is not killed by one of those who use it.  It ends by itself when the call that runs
in it has taken twice its time, or a second more than that if this is longer; those whose calls only
waited there ask the next worker once more.  That is safe, for a prediction changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Any, ClassVar

from ..fallback.forks import follow_forks
from ..process import OwnLock, before_uwsgi_forks, follow_process
from ..workers import start_thread
from .ml_models import ModelProblem, stamp_of
from .ml_remote import InferenceTimeout, ModelSpec, RemoteError, Worker, WorkerDied
from .ml_worker import own_memory

__all__ = ["InferenceTimeout", "ModelSpec", "ProcessEngine", "RemoteError", "WorkerDied"]

WARMING = 60.0  # s for the first call of a worker, with the sample
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before a worker that could not be had is tried again
LEAK_PAUSE = 10.0  # s between two replacements of workers that had taken too much memory
LOOK = 1.0  # s between two looks at a worker that nobody calls

log = logging.getLogger("distributed_breaker")


class ProcessEngine:
    """Runs a model in another process; for one calling thread at a time.

    A forked child has workers of its own, which begin to load when it first asks.

    Args:
        model: what to load.
        shared: use one worker for all processes of this user's on the host that name the same
            model; otherwise this process has its own.
        most_bytes: of memory that a worker may have for itself (resident, and not shared with
            others); one that grows beyond that is replaced between two calls, once the next one
            is ready.  A model that needs more from the start is let be.
        spare: keep a second worker ready, which takes over at once when one is killed; it takes
            as much memory again.  A shared worker has none.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((60, "_starting"),)
    _starting = OwnLock()
    _lock = OwnLock()

    def __init__(
        self,
        model: ModelSpec,
        *,
        shared: bool = False,
        most_bytes: int | None = None,
        spare: bool = False,
    ) -> None:
        self.model = model
        self.shared = shared
        self.most_bytes = most_bytes
        self.spare = spare and not shared
        self.sample: Any = None
        """An input with which each new worker is warmed; one that fails with it does not take over
        from one that serves."""
        self._crew: _Crew | None = None
        self._closed = False
        follow_process(self)
        follow_forks(self)

    def __del__(self) -> None:
        crew = vars(self).get("_crew")
        if crew is not None:
            crew.close()

    def start(self) -> None:
        """Begin to load in the background.  Where processes are forked later on, nothing is done:
        each of them begins when it first asks."""
        if not before_uwsgi_forks():
            self._own_crew()

    @property
    def ready(self) -> bool:
        """Whether a call would be run."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Why a call could not be run; empty if it could."""
        crew = self._own_crew()
        problem = crew.problem() if crew is not None else self._closing()
        return str(problem or "")

    @property
    def version(self) -> str:
        """Of the model that serves; empty while there is none."""
        return str(self.about.get("version", ""))

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the model that serves: version, kind, bytes, device, seconds, torch,
        stamp, as in ``ml_models.Loaded``.  Empty while there is none."""
        crew = self._own_crew()
        worker = crew.current if crew is not None else None
        return worker.about if worker is not None else {}

    def wait_ready(self, seconds: float) -> bool:
        """Wait until a call would be run; whether it would."""
        crew = self._own_crew()
        return crew is not None and crew.wait_ready(seconds)

    def run(self, inputs: Any, seconds: float) -> Any:
        """What the model makes of the inputs.  It does not wait for a model that is being loaded.

        Args:
            inputs: a tree of tensors and plain values, see ``ml_tensors``.
            seconds: that it may take in all.

        Returns:
            A tree of the same sort, which is the caller's own; its tensors are on the CPU.

        Raises:
            ModelProblem: there is no model, or not yet.
            InferenceTimeout: the time is over.
            WorkerDied: the model has killed its process, or it was killed.
            RemoteError: the model has raised an error.
            TypeError, ValueError: the inputs cannot be sent.
        """
        deadline = time.monotonic() + seconds
        try:
            return self._run(inputs, seconds)
        except WorkerDied as error:
            # It only waited in a worker that has ended.  Once is enough: the next one has room.
            if error.begun or not self.wait_ready(deadline - time.monotonic()):
                raise
        return self._run(inputs, deadline - time.monotonic())

    def _run(self, inputs: Any, seconds: float) -> Any:
        crew = self._own_crew()
        if crew is None:
            raise self._closing()
        worker = crew.current
        if worker is None:
            raise crew.problem() or ModelProblem(self.model.path, "is being loaded", "try again")
        try:
            return worker.call(inputs, seconds)
        finally:
            if not worker.usable:
                crew.lose(worker)
            elif worker.retires:
                crew.wake.set()

    def reload(self) -> None:
        """The model's file has changed: load it, and let it take over when it is ready.

        Until then the present worker serves, also if the new file turns out to be broken.
        """
        crew = self._own_crew()
        if crew is not None:
            crew.reload()

    def stats(self) -> dict[str, Any]:
        """What is known of the workers, without asking them.

        pid; rss: bytes of memory that it has for itself; since: when it was ready, in s since 1970,
        or None; restarts: after the first start; killed: because of an overrun deadline; replaced:
        after growing too large; shared; trouble: why the last one could not be had, or "".
        """
        crew = self._own_crew()
        return {"shared": self.shared, **(crew.stats() if crew is not None else {})}

    def close(self) -> None:
        """End this process's workers, also in the midst of a call.  Safe to call twice."""
        with self._lock:
            self._closed = True
            crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()

    def forked(self, clean: bool = True) -> None:
        """In the child: what there is belongs to the parent."""
        for name in ("_starting", "_lock"):
            vars(self).pop(name, None)
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.abandon()

    def _closing(self) -> ModelProblem:
        return ModelProblem(self.model.path, "is not run any more", "make another client")

    def _own_crew(self) -> _Crew | None:
        crew = self._crew
        if crew is not None or self._closed:
            return crew
        with self._lock:
            if self._crew is None and not self._closed:
                self._crew = _Crew(self)
            return self._crew


class _Crew:
    """The workers of one process, and the thread that looks after them.

    A worker is loaded beside the one that serves, and takes over when it is ready.
    """

    def __init__(self, engine: ProcessEngine) -> None:
        self.current: Worker | None = None
        self.wake = threading.Event()
        self._engine = weakref.ref(engine)
        self._path = engine.model.path
        self._with_spare = engine.spare
        self._next: Worker | None = None
        self._loading: Worker | None = None
        self._leaving: list[Worker] = []
        self._outdated: set[Worker] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._trouble: ModelProblem | None = None
        self._failures = 0
        self._not_before = 0.0
        self._loaded = self._killed = self._replaced = 0
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

    def wait_ready(self, seconds: float) -> bool:
        """Wait until a call can be run."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.current, max(0.0, seconds))
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
            self._failures, self._not_before = 0, 0.0
        self.wake.set()

    def stats(self) -> dict[str, Any]:
        """See the engine's."""
        with self._changed:
            worker = self.current
            return {
                "pid": worker.pid if worker else None,
                "rss": own_memory(worker.pid) if worker else 0,
                "since": worker.since if worker else None,
                "restarts": max(0, self._loaded - 1),
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
        """In a forked child, which has no other thread."""
        for worker in self._all():
            worker.abandon()

    def _all(self) -> list[Worker]:
        return [each for each in (self.current, self._next, self._loading) if each is not None]

    def _look_after(self) -> None:
        while not self._closed:
            self.wake.clear()
            self.wake.wait(self._round())

    def _round(self) -> float:
        """Do what is to be done now; seconds until the next look."""
        with self._changed:
            leaving = [
                each for each in (self.current, self._next)
                if each is not None and not each.alive()
            ]  # fmt: skip
            if self._next in self._outdated and self._next is not None:
                leaving.append(self._next)
            for worker in leaving:
                self._drop(worker)
            if self._next is not None and self._is_stale(self.current):
                leaving += [self.current] if self.current is not None else []
                self._take_over()
            needed = self._is_stale(self.current) or (self._with_spare and self._next is None)
            pause = self._not_before - time.monotonic()
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
        engine = self._engine()
        if engine is None:
            return
        worker: Worker | None = None
        failed: Exception | None = None
        try:
            if stamp_of(self._path) is None:  # which costs less than a process that finds it out
                raise ModelProblem(self._path, "cannot be found", "look at the path")
            with engine._starting:
                worker = self._loading = Worker(engine.model, engine.shared, engine.most_bytes)
            sample = engine.sample
            del engine  # nobody else may hold it, and then it is to go
            if not self._closed:
                worker.load()
                self._warm(worker, sample)
        except Exception as error:
            failed = error
        with self._changed:
            self._loading = None
            self._trouble = None if failed is None else self._in_words(failed)
            if failed is None and worker is not None and not self._closed:
                self._next, worker = worker, None
                self._failures = 0
                self._loaded += 1
            elif not self._closed:
                log.warning("%s", self._trouble)
                # A shared worker may have ended just now: then the next one is wanted at once.
                passing = not self._failures and isinstance(failed, WorkerDied)
                pause = 0.0 if passing else FIRST_PAUSE * 2 ** min(self._failures, 30)
                self._not_before = time.monotonic() + min(pause, LONGEST_PAUSE)
                self._failures += 1
            if worker is not None:
                self._outdated.discard(worker)
        if worker is not None:
            worker.kill()
            worker.retire()

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
