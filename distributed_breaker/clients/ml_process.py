"""A model in a process of its own, which can be killed: workers that come, go and take over.

A call that overruns its deadline is over at that moment, whatever the model does: a worker of this
process's own is killed, and the next one is loaded at once.  A worker that is shared on the host
(``ml_host``) is not killed by one of those who use it.  It ends by itself when the call that runs
in it has taken twice its time, or a second more than that if this is longer; those whose calls only
waited there ask the next worker once more.  That is safe, for a prediction changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

from ..fallback.forks import follow_forks
from ..process import OwnLock, before_uwsgi_forks, follow_process
from .ml_crew import Crew
from .ml_files import InferenceTimeout, ModelProblem
from .ml_remote import Left, ModelSpec, RemoteError, Worker, WorkerDied

__all__ = ["InferenceTimeout", "ModelSpec", "ProcessEngine", "RemoteError", "WorkerDied"]


class ProcessEngine:
    """Runs a model in another process; for one calling thread at a time.

    A forked child has workers of its own, which begin to load when it first asks.

    Args:
        model: what to load.
        shared: use one worker for all processes of this user's on the host that name the same
            model; otherwise this process has its own.
        most_bytes: of memory that the model may take in its process beside what PyTorch takes
            (resident, and not shared with others); a worker that grows beyond that is replaced
            between two calls, once the next one is ready.  A model that needs more from the start
            is let be.
        spare: keep a second worker ready, which takes over at once when one is killed; it takes
            as much memory again.  A shared worker has none.
        sample: gives the input with which each new worker is warmed, or None; one that fails with
            it does not take over from one that serves.
    """

    fork_locks: ClassVar[tuple[tuple[int, str], ...]] = ((60, "_starting"),)
    _starting = OwnLock()
    _lock = OwnLock()

    hard = True

    def __init__(
        self,
        model: ModelSpec,
        *,
        shared: bool = False,
        most_bytes: int | None = None,
        spare: bool = False,
        sample: Callable[[], Any] = lambda: None,
    ) -> None:
        self.model = model
        self.shared = shared
        self.most_bytes = most_bytes
        self.spare = spare and not shared
        self.sample = sample
        self.told: Callable[[], object] = lambda: None
        """Called when a worker has taken over, or none could be had."""
        self._crew: Crew | None = None
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
    def loading(self) -> bool:
        """Whether there will be a model, and there is none yet."""
        crew = self._own_crew()
        return crew is not None and crew.loading

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
        """Wait until a call would be run, or the reason is known why not; whether it would."""
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
            # It only waited in a worker that has ended.  Once is enough: a second time tells more.
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
        except Left:
            return self._run(inputs, seconds)
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
        """What is known of the model and of the workers, without asking them: ready, version, kind,
        device, bytes, load_seconds, and

        pid; rss: bytes of memory that it has for itself; since: when it was ready, in s since 1970,
        or None; restarts: after the first start; killed: because of an overrun deadline; replaced:
        after growing too large; shared; trouble: why the last one could not be had, or "".
        """
        crew = self._own_crew()
        about = dict(self.about)
        known = {name: about[name] for name in ("version", "kind", "device", "bytes") if about}
        if about:
            known["load_seconds"] = round(about["seconds"], 3)
        workers = crew.stats() if crew is not None else {}
        return {"ready": bool(about), **known, "shared": self.shared, **workers}

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

    def _own_crew(self) -> Crew | None:
        crew = self._crew
        if crew is not None or self._closed:
            return crew
        with self._lock:
            if self._crew is None and not self._closed:
                self._crew = Crew(self.model.path, self._begin, self._tell, self.spare)
            return self._crew

    def _begin(self) -> tuple[Worker, Any]:
        """One more worker, which begins to load; and what warms it."""
        with self._starting:
            return Worker(self.model, self.shared, self.most_bytes), self.sample()

    def _tell(self) -> None:
        self.told()
