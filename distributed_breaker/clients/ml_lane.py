"""One model of a service: where it comes from, what runs it, and the calls that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..sections import Ml
from .ml_engine import ThreadEngine, Watch
from .ml_models import Loaded, ModelProblem, load_model, model_of, quantized
from .ml_queue import Queue
from .ml_request import Bounds
from .ml_values import to_tensors

MB = 1_000_000


class Source(NamedTuple):
    """Where a model comes from; the first that is said.

    Attributes:
        model: a module, or any callable.
        path: a file.
        lighter_than: another model, which is quantized.
        factory: makes the module whose weights the file has.
        safe_globals: classes that the file may hold.
        version: of ``model``; None: each process tells it from all others.
    """

    model: Any = None
    path: str | None = None
    lighter_than: Lane | None = None
    factory: Any = None
    safe_globals: tuple[Any, ...] = ()
    version: str | None = None

    def __bool__(self) -> bool:
        return not (self.model is None and self.path is None and self.lighter_than is None)


class Lane:
    """Loads a model, watches its file, and runs it for those who wait.

    Args:
        name: of the circuit, for messages.
        source: where the model comes from.
        section: the numbers.
        sample: an input to try it on; None: there is none yet.
        hold: why runs should not begin now; empty: they may.
        worker: where it runs; see ``Ml.worker``.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        section: Ml,
        sample: Callable[[], Any],
        hold: Callable[[], str],
        worker: str = "thread",
    ) -> None:
        self.name = name
        self.source = source
        self.section = section
        self.engine: Any
        if worker == "thread":
            self.engine = ThreadEngine(name, self._load, self._tensors_of(sample))
        else:
            self.engine = self._process(worker, self._tensors_of(sample))
        self._hold = hold
        self.queue = Queue(name, self.engine, bounds_of(section), self._held)
        self.queue.looks = not section.allow_non_finite
        self.loaded: Callable[[str], None] = lambda device: None
        """Told the device of each model that is loaded."""
        self.engine.told = self._told
        self._watch = Watch(self._watched, self.engine.reload)

    def _tensors_of(self, sample: Callable[[], Any]) -> Callable[[], Any]:
        def tensors() -> Any:
            given = sample()
            return given if given is None or not self.takes_tensors else to_tensors(given)[0]

        return tensors

    def _load(self) -> Loaded:
        source, device = self.source, self.section.model_device
        if source.model is not None:
            return model_of(source.model, device=device, version=source.version)
        if source.path is not None:
            return load_model(
                source.path,
                device=device,
                factory=source.factory,
                safe_globals=source.safe_globals,
                most_bytes=self.section.max_model_memory_mb * MB,
            )
        if source.lighter_than is not None:
            loaded = source.lighter_than.engine.loaded
            if loaded is None:
                raise ModelProblem(
                    self.name, "has no model that could be quantized yet", "wait for it"
                )
            return quantized(loaded)
        raise ModelProblem(
            self.name, "has no model", "say model_path in the file, or give the getter a model"
        )

    def to_quantize(self) -> Loaded:
        """The model in this process.

        Raises:
            ModelProblem: there is none, or not yet.
        """
        if self.engine.hard:
            return self._load()
        loaded: Loaded | None = self.engine.loaded
        if loaded is None:
            raise ModelProblem(self.name, "has no model that could be quantized yet", "wait for it")
        return loaded

    def _process(self, worker: str, sample: Callable[[], Any]) -> Any:
        from .ml_process import ProcessEngine

        spec, shared = self._spec(), worker == "host"
        return ProcessEngine(spec, shared=shared, most_bytes=spec.most_bytes, sample=sample)

    def _spec(self) -> Any:
        """What another process is to load."""
        from .ml_process import ModelSpec

        source, section = self.source, self.section
        if source.model is not None or source.path is None:
            raise ValueError(
                f"{self.name}: worker {section.worker!r} needs a model_path, since a process loads "
                "its model itself; a model that is an object can only run in a thread"
            )
        return ModelSpec(
            source.path,
            section.model_device,
            _importable(source.factory),
            tuple(filter(None, map(_importable, source.safe_globals))),
            section.max_model_memory_mb * MB,
        )

    def _told(self) -> None:
        if self.engine.ready:
            self.loaded(self.engine.stats()["device"])
        self.queue.nudge()

    def _watched(self) -> str | None:
        return self.source.path if self.section.reload_on_change else None

    def _held(self) -> str:
        engine = self.engine
        if engine.loading:
            return "the model is being loaded"
        return self._hold()

    @property
    def takes_tensors(self) -> bool:
        """Whether inputs are made tensors: for PyTorch's models, and not for other callables."""
        model = self.source.model
        return model is None or hasattr(model, "state_dict")

    def start(self) -> None:
        """Load the model in the background, and watch its file."""
        self._watch.start()
        self.engine.start()

    def use(self, source: Source) -> None:
        """Take another model, without a gap."""
        if source == self.source:
            return
        self.source = source
        if self.engine.hard:
            self.engine.model = self._spec()
        self.engine.reload()

    def configure(self, section: Ml) -> None:
        """Go by other numbers."""
        before, self.section = self.section, section
        self.queue.bounds = bounds_of(section)
        self.queue.looks = not section.allow_non_finite
        if section.model_device != before.model_device:
            if self.engine.hard:
                self.engine.model = self._spec()
            self.engine.reload()

    def problems(self) -> list[str]:
        """What is wrong with it."""
        problem = "" if self.engine.loading else self.engine.problem
        found = [f"model: {problem}"] if problem else []
        stuck = self.queue.stats()["stuck_threads"]
        if stuck:
            found.append(f"{stuck} threads hang in the model")
        return found

    def stats(self) -> dict[str, Any]:
        """What it is, and what it has done."""
        return {**self.engine.stats(), **self.queue.stats()}

    def forked(self) -> None:
        """A child loads nothing anew, but has none of its parent's threads."""
        self.queue.forked()
        self.engine.forked()
        self._watch.start()

    def close(self) -> None:
        """Let go of the model and of those who wait for it."""
        self._watch.stop()
        self.queue.close()
        self.engine.close()


def bounds_of(section: Ml) -> Bounds:
    """What the section says of the queue."""
    return Bounds(
        section.max_queue_size, section.queue_timeout, section.max_batch_size, section.batch_wait
    )


def _importable(thing: Any) -> str | None:
    """How another process finds a function or class."""
    if thing is None or isinstance(thing, str):
        return thing
    name = f"{thing.__module__}:{thing.__qualname__}"
    if "<" in name or thing.__module__ == "__main__":
        raise ValueError(
            f"{name} cannot be imported by the process that runs the model: put it into a module, "
            "at its top level"
        )
    return name
