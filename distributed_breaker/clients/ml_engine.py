"""A model in this process: loaded in the background, warmed, and replaced when its file changes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ..process import OwnLock
from ..workers import start_thread
from .ml_models import Loaded, ModelProblem, stamp_of

LOOK_EVERY = 1.0  # s between two looks at a file
SOON, MOST = 1.0, 60.0  # s after which loading is tried again: twice as many each time

log = logging.getLogger("distributed_breaker")


class ThreadEngine:
    """Runs a model in the thread that asks.

    Args:
        name: of the circuit, for messages.
        load: makes it.
        sample: an input to try it on before it is used; None: there is none yet.
    """

    hard = False
    _lock = OwnLock()

    def __init__(
        self, name: str, load: Callable[[], Loaded], sample: Callable[[], Any] = lambda: None
    ) -> None:
        self.name = name
        self._load = load
        self._sample = sample
        self.told: Callable[[], object] = lambda: None
        """Called when loading has ended."""
        self._loading = self._outdated = False
        self._again_at, self._pause = 0.0, SOON
        self.loaded: Loaded | None = None
        self._error: ModelProblem | None = None
        self.version = ""
        """Of the model in use; empty: there is none."""
        self.problem = ""
        """Why the newest state of the file is not in use; empty: it is."""
        self.loaded_at: float | None = None
        self.warmed = False
        self.reloads = 0

    def forked(self) -> None:
        """A child has the model, and none of its parent's threads."""
        vars(self).pop("_lock", None)
        self._loading = False
        self._again_at = 0.0

    @property
    def ready(self) -> bool:
        """Whether there is a model to run."""
        return self.loaded is not None

    @property
    def loading(self) -> bool:
        """Whether there will be a model, and there is none yet."""
        return self.loaded is None and not self.problem

    def start(self) -> None:
        """Load it in the background, unless that is done or under way, or was in vain just now."""
        if self.loaded is None and not self._loading and time.monotonic() >= self._again_at:
            self.reload()

    def reload(self) -> None:
        """Load it anew in the background; the one before answers until then."""
        with self._lock:
            if self._loading:
                self._outdated = True  # what is being loaded may be what was there before
                return
            self._loading = True
        try:
            start_thread("circuit-breaker-model-load", self._keep_loading)
        except RuntimeError:
            self._keep_loading()  # where no thread can be started, the caller waits

    def _keep_loading(self) -> None:
        again = True
        while again:
            self._outdated = False
            self._try()
            with self._lock:
                again = self._loading = self._outdated
            self.told()

    def _try(self) -> None:
        try:
            loaded = self._load()
            sample = self._sample()
            if sample is not None:
                loaded.call(sample)
        except Exception as error:
            self._failed(error)
        else:
            if self.loaded is not None:
                self.reloads += 1
                log.info("%s: model %s is in use", self.name, loaded.version)
            self.warmed = sample is not None
            # In this order: who sees the same version before and after a run has had its model.
            self.version = loaded.version
            self.loaded = loaded
            self.loaded_at, self.problem = time.time(), ""
            self._again_at, self._pause = 0.0, SOON

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, ModelProblem):
            what = f"ends with {type(error).__name__} when it is tried"
            error = ModelProblem(self.name, what, "look at the model and at warmup_input")
        self._error, problem = error, str(error)
        if problem != self.problem:
            log.error("%s: %s", self.name, problem)
        self.problem = problem
        self._again_at = time.monotonic() + self._pause
        self._pause = min(MOST, self._pause * 2)

    def run(self, inputs: Any, seconds: float) -> Any:
        """The model's output.

        Raises:
            ModelProblem: there is no model.
        """
        loaded = self.loaded
        if loaded is None:
            self.start()
            raise self._error or ModelProblem(self.name, "is not loaded yet", "wait for it")
        output = loaded.call(inputs)
        self.warmed = True
        return output

    def stats(self) -> dict[str, Any]:
        """What is known of the model."""
        loaded = self.loaded
        known = {} if loaded is None else {
            "version": loaded.version, "kind": loaded.kind, "device": loaded.device,
            "bytes": loaded.bytes, "load_seconds": round(loaded.seconds, 3),
        }  # fmt: skip
        return {
            "ready": self.ready,
            "warmed": self.warmed,
            "loaded_at": self.loaded_at,
            "reloads": self.reloads,
            **known,
        }

    def close(self) -> None:
        """Let go of the model."""
        self.loaded = None
        self._again_at = float("inf")


class Watch:
    """Calls back when a file has changed and then stayed the same for a look.

    Args:
        path: the file, asked for at each look; None: there is none now.
        changed: called in this object's thread.
    """

    def __init__(self, path: Callable[[], str | None], changed: Callable[[], None]) -> None:
        self._path = path
        self._changed = changed
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        self._stopping = stopping = threading.Event()
        seen = self._look()
        # Where no thread can be started, the file is read at the start only.
        with contextlib.suppress(RuntimeError):
            start_thread("circuit-breaker-model-file", lambda: self._keep_looking(stopping, seen))

    def _look(self) -> Any:
        path = self._path()
        return path, None if path is None else stamp_of(path)

    def _keep_looking(self, stopping: threading.Event, used: Any) -> None:
        before = used
        while not stopping.wait(LOOK_EVERY):
            now = self._look()
            # A file that is still being written is left alone.
            if now != used and now == before and now[1] is not None:
                used = now
                try:
                    self._changed()
                except Exception:
                    log.exception("a changed model cannot be loaded")
            before = now

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
