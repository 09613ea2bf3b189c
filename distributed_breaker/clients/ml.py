"""A service's model under its circuit: an answer in time, from the best that can give one.

The model answers, or what it has answered before, or a lighter model, or a default; each prediction
says which it was.  The order of these stands in ``ml_rules.py``, how calls wait and are run
together in ``ml_queue.py``, where a model comes from and runs in ``ml_lane.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..process import follow_process
from ..sections import Ml
from .ml_files import InferenceTimeout
from .ml_lane import Lane, Source
from .ml_models import ModelProblem, load_input
from .ml_request import ModelOverloaded, Request
from .ml_resources import SHARED, Limits
from .ml_rules import MISSING, MlRules, Options, Prediction, options_of
from .ml_stored import Predictions
from .ml_values import InvalidInput, InvalidPrediction, QualityWindow, confidence, to_tensors

__all__ = [
    "InferenceTimeout",
    "InvalidInput",
    "InvalidPrediction",
    "MlClient",
    "ModelOverloaded",
    "ModelProblem",
    "Prediction",
]

_OURS = frozenset(
    {"model_path", "model", "version", "factory", "safe_globals", "fallback_model",
     "fallback_model_path", "fallback_factory", "default", "check", "confidence", "shared"}
)  # fmt: skip


class MlClient(MlRules):
    """A service's model.

    What the getter may be given, each of which beats the file:

    Args:
        model_path: the model's file.
        model: a ``torch.nn.Module`` or any callable, instead of a file.
        version: of ``model``, so that predictions can be shared with other processes.
        factory: makes the module whose weights the file has, or ``package.module:function``.
        safe_globals: classes that a file with a whole module may hold.
        fallback_model, fallback_model_path, fallback_factory: the same of a lighter model.
        default: what is answered when nothing else can.
        check: called with each output; False or an error makes it a failure.
        confidence: how sure an output is (0 to 1), instead of its greatest share after a softmax.
        shared: a cache with ``get`` and ``set``, for ``share_predictions``.
    """

    section: Ml

    def _begin(self) -> None:
        section = self.section
        self.counts: Counter[str] = Counter()
        self._device = ""
        self._sample: Any = None
        self._health_problem = ""
        self._worker = section.worker
        self._closed = False
        self._stored: Predictions | None = None
        self._window: QualityWindow | None = None
        self._take_numbers()
        self.model = Lane(
            self.name, self._source(), section, self._warmup, self._over, section.worker
        )
        self.model.loaded = self._look_at
        self.lighter: Lane | None = None
        self._take_lighter()
        if section.warmup_on_start:
            self.warm()
        self._look_at("cpu")
        self.breaker.health_check(self._well, section.health_check_interval)
        follow_process(self)

    def _take_numbers(self) -> None:
        """What is made of the section's numbers and lasts."""
        section = self.section
        kept = self._stored
        if not section.cache_predictions:
            self._stored = None
        elif kept is None or not _same_bounds(kept.section, section):
            self._stored = Predictions(section)
        if self._stored is not None:
            self._stored.section = section
            self._stored.shared = self.explicit.get("shared") if section.share_predictions else None
        least, window = section.minimum_confidence, self._window
        if least is None:
            self._window = None
        else:
            wanted = section.confidence_window, least, section.low_confidence_rate
            self._window = window if window and window.numbers == wanted else QualityWindow(*wanted)
        self._limits = Limits(
            section.max_cpu_usage, section.max_memory_usage, section.max_gpu_memory_usage
        )

    def _source(self) -> Source:
        said, section = self.explicit, self.section
        model = said.get("model")
        return Source(
            model,
            None if model is not None else said.get("model_path") or section.model_path,
            None,
            said.get("factory") or section.model_factory,
            tuple(said.get("safe_globals") or section.safe_globals),
            said.get("version"),
        )

    def _lighter_source(self) -> Source:
        said, section = self.explicit, self.section
        factory = said.get("fallback_factory") or section.fallback_model_factory
        model = said.get("fallback_model")
        path = said.get("fallback_model_path") or section.fallback_model_path
        quantize = section.quantize_fallback and model is None and path is None
        return Source(
            model,
            None if model is not None else path,
            self.model if quantize else None,
            factory or said.get("factory") or section.model_factory,
            tuple(said.get("safe_globals") or section.safe_globals),
        )

    def _take_lighter(self) -> None:
        source = self._lighter_source()
        if self.lighter is not None and not source:
            self.lighter.close()
            self.lighter = None
        elif self.lighter is not None:
            self.lighter.use(source)
        elif source:
            name = f"{self.name} (lighter model)"
            self.lighter = Lane(name, source, self.section, self._warmup, str)
            if self.section.warmup_on_start:
                self.lighter.start()

    def use(self, **explicit: Any) -> None:
        """Take what a later caller of the getter says; see the class.

        Raises:
            TypeError: an argument that the getter does not have.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        wrong = given.keys() - _OURS
        if wrong:
            raise TypeError(f"{self.name}: unknown argument {min(wrong)!r}; see MlClient")
        if any(_differ(value, self.explicit.get(name)) for name, value in given.items()):
            super().use(**given)
            if hasattr(self, "model"):
                self._take_numbers()
                self.model.use(self._source())
                self._take_lighter()

    def configure(self, section: Any) -> None:
        """The file has changed."""
        interval = self.section.health_check_interval
        super().configure(section)
        if section.health_check_interval != interval:
            self.breaker.health_check(self._well, section.health_check_interval)
        self._take_numbers()
        self.model.configure(section)
        self.model.use(self._source())
        if self.lighter is not None:
            self.lighter.configure(section)
        self._take_lighter()

    def warm(self) -> None:
        """Load the models in the background and try them; done at the start by itself."""
        self.model.start()

    # ------------------------------------------------------------------ predictions

    def predict(
        self,
        inputs: Any,
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> Any:
        """What the model gives for an input, or what answers instead.

        Args:
            inputs: what the model takes: a tensor, an array, nested lists of numbers, or a
                dictionary, list or tuple of tensors; a callable that is no PyTorch model takes
                anything.  The output has the input's kind.
            timeout: seconds for the model, waiting included; None: ``inference_timeout`` for the
                model and ``queue_timeout`` for waiting.
            priority: calls of a higher one are run first, and are not the ones refused when the
                queue is full.
            default: what is returned when nothing else can answer, instead of an error.

        Raises:
            CircuitBreakerOpenException: the circuit is open, or (``ModelOverloaded``) the model has
                no time, and nothing could answer instead.
            InferenceTimeout: the model has not answered in time, and nothing could instead.
            InvalidPrediction, ModelProblem: its output is none; there is no model.
            InvalidInput: it cannot be an input, which counts as nothing.
            Exception: what the model raises.
        """
        return self._predict(inputs, self._options(timeout, priority, default)).value

    def predict_with_info(
        self,
        inputs: Any,
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> Prediction:
        """As ``predict``; says also what has answered, how old that is, and how long it took."""
        return self._predict(inputs, self._options(timeout, priority, default))

    async def predict_async(
        self,
        inputs: Any,
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> Any:
        """As ``predict``, without blocking the event loop."""
        options = self._options(timeout, priority, default)
        return (await self._predict_async(inputs, options)).value

    async def predict_with_info_async(
        self,
        inputs: Any,
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> Prediction:
        """As ``predict_with_info``, without blocking the event loop."""
        return await self._predict_async(inputs, self._options(timeout, priority, default))

    def _options(self, timeout: float | None, priority: int, default: Any) -> Options:
        return options_of(timeout, self.section.inference_timeout, False, priority, default)

    def predict_batch(
        self,
        inputs: Sequence[Any],
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> list[Any]:
        """What the model gives for each of some inputs: one call for the circuit.

        Args:
            inputs: each as ``predict`` takes it; those that can be are run together.
            timeout: seconds for all of them; None: ``batch_inference_timeout``.
            priority, default: as of ``predict``.

        Raises:
            Exception: as ``predict``, for the first input that nothing could answer.
        """
        found = self.predict_batch_with_info(inputs, timeout, priority=priority, default=default)
        return [prediction.value for prediction in found]

    def predict_batch_with_info(
        self,
        inputs: Sequence[Any],
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> list[Prediction]:
        """As ``predict_batch``; says of each also what has answered."""
        return self._predict_many(inputs, self._batch_options(timeout, priority, default))

    async def predict_batch_async(
        self,
        inputs: Sequence[Any],
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> list[Any]:
        """As ``predict_batch``, without blocking the event loop."""
        options = self._batch_options(timeout, priority, default)
        return [each.value for each in await self._predict_many_async(inputs, options)]

    async def predict_batch_with_info_async(
        self,
        inputs: Sequence[Any],
        timeout: float | None = None,
        *,
        priority: int = 0,
        default: Any = MISSING,
    ) -> list[Prediction]:
        """As ``predict_batch_with_info``, without blocking the event loop."""
        options = self._batch_options(timeout, priority, default)
        return await self._predict_many_async(inputs, options)

    def _batch_options(self, timeout: float | None, priority: int, default: Any) -> Options:
        return options_of(timeout, self.section.batch_inference_timeout, True, priority, default)

    # ------------------------------------------------------------------ the model's state

    def _look_at(self, device: str) -> None:
        """Have what is in use looked at, the GPU's memory included if the model is on one."""
        if self._closed or device == self._device:
            return
        before, self._device = self._device, device
        SHARED.join(device)
        if before:
            SHARED.leave(before)

    def _over(self) -> str:
        """Why calls are put off."""
        return SHARED.usage.over(self._limits) or ""

    def _confidence(self, output: Any) -> Any:
        of = self.explicit.get("confidence")
        return confidence(output) if of is None else of(output)

    def _warmup(self) -> Any:
        """An input to try a model on: a real one, or what the file says."""
        if self._sample is not None:
            return self._sample
        section = self.section
        if section.warmup_input is not None:
            return load_input(section.warmup_input)
        if section.warmup_shape is not None:
            import torch

            return torch.zeros(section.warmup_shape)
        return None

    def _well(self) -> None:
        """The health check: whether the model can answer; the probe of an open circuit."""
        self._health_problem = "the health check has not passed"
        sample = self._warmup()
        if sample is None:
            self._health_problem = ""
            raise ModelProblem(
                self.name, "has no input to be tried on yet", "say warmup_input, or wait for one"
            )
        if self.model.takes_tensors:
            sample = to_tensors(sample)[0]
        limit = self.section.inference_timeout
        request = Request(sample, limit, limit)
        self.model.engine.start()
        self.model.queue.ask([request])
        if request.error is not None:
            raise request.error
        self._examine(request)
        self._health_problem = ""

    def problems(self) -> list[str]:
        """See ``Client.problems``."""
        found = self.model.problems()
        if self.lighter is not None:
            found += [f"lighter {each}" for each in self.lighter.problems()]
        if self.section.worker != self._worker:
            # Where it runs is settled at the start: calls wait in its queue.
            found.append("worker has changed in the file: restart this process")
        found += filter(None, (self.lighter_problem, self._health_problem, self._over()))
        return [*found, *SHARED.usage.problems]

    def stats(self) -> dict[str, Any]:
        """See ``Client.stats``."""
        lighter, usage = self.lighter, SHARED.usage
        return {
            "answers": dict(self.counts),
            "model": self.model.stats(),
            "lighter_model": None if lighter is None else lighter.stats(),
            "predictions": None if self._stored is None else self._stored.stats(),
            "weak_share": None if self._window is None else self._window.share,
            "resources": {
                "cpu_percent": usage.cpu,
                "memory_percent": usage.memory,
                "gpu_memory_percent": usage.gpu_memory,
                "rss_bytes": usage.rss,
            },
        }

    def forked(self) -> None:
        """A child has none of its parent's threads."""
        if not self._closed:
            self.model.forked()
            if self.lighter is not None:
                self.lighter.forked()

    def close(self) -> None:
        """Let go of the models; calls that wait are told."""
        self._closed = True
        self.model.close()
        if self.lighter is not None:
            self.lighter.close()
        device, self._device = self._device, ""
        if device:
            SHARED.leave(device)


def _same_bounds(one: Ml, other: Ml) -> bool:
    return (one.prediction_cache_size, one.prediction_cache_bytes) == (
        other.prediction_cache_size,
        other.prediction_cache_bytes,
    )


def _differ(one: Any, other: Any) -> bool:
    """Whether two arguments are not the same; what is no text is only the same as itself."""
    return one is not other and not (isinstance(one, str) and one == other)
