"""What a prediction comes from: the model under its circuit, and what answers when it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple

from ..permit import Permit
from ..policy import check_number
from ..sections import Ml
from .client import Client
from .ml_files import InferenceTimeout
from .ml_lane import Lane
from .ml_request import ModelOverloaded, Request
from .ml_stored import Kept, Predictions
from .ml_values import (
    Back,
    InvalidInput,
    InvalidPrediction,
    QualityWindow,
    check_shape,
    finite,
    to_tensors,
)

MISSING: Any = object()


class Prediction(NamedTuple):
    """An answer, and where it comes from.

    Attributes:
        value: the model's output, or what stands in for it.
        source: ``model``, ``cache`` (what it has answered before), ``stale`` (the same, past its
            life), ``lightweight``, or ``default``.
        version: of the model that has answered; empty for a default.
        age: seconds since it was computed.
        seconds: what the caller has waited.
        reason: why the model itself has not answered; empty if it has, or was not asked.
    """

    value: Any
    source: str
    version: str
    age: float
    seconds: float
    reason: str


class Options(NamedTuple):
    """What holds for one call.

    Attributes:
        limit: seconds that the model may take.
        timeout: seconds for everything, waiting included; None: the queue's bound counts.
        priority: those of a higher one are run first.
        default: what is returned when nothing else can answer.
    """

    limit: float
    timeout: float | None
    priority: int
    default: Any


class Wanted(Request):
    """A request, and the call that it is part of."""

    __slots__ = ("asked_at", "back", "key", "version")

    asked_at: float
    back: Back
    key: str | None
    version: str


Lighter = Generator[tuple[Lane, Request], None, Prediction]
"""Rules that have a lighter model asked, in a thread or on an event loop."""


class MlRules(Client):
    """The order in which answers are looked for."""

    section: Ml
    model: Lane
    lighter: Lane | None
    lighter_problem = ""
    counts: Counter[str]
    _sample: Any
    _stored: Predictions | None
    _window: QualityWindow | None

    # ------------------------------------------------------------------ one input

    def _predict(self, given: Any, options: Options) -> Prediction:
        wanted = self._begun(given, options)
        if isinstance(wanted, Prediction):
            return wanted
        try:
            with self.breaker.guard() as permit:
                self.model.queue.ask((wanted,))
                self._look(permit, (wanted,))
        except Exception as error:
            wanted.error = wanted.error or error
        if wanted.error is None:
            return self._of_model(wanted)
        return self._drive(self._instead(wanted, options))

    async def _predict_async(self, given: Any, options: Options) -> Prediction:
        wanted = self._begun(given, options)
        if isinstance(wanted, Prediction):
            return wanted
        try:
            async with self.breaker.guard() as permit:
                await self.model.queue.ask_async((wanted,))
                self._look(permit, (wanted,))
        except Exception as error:
            wanted.error = wanted.error or error
        if wanted.error is None:
            return self._of_model(wanted)
        return await self._drive_async(self._instead(wanted, options))

    # ------------------------------------------------------------------ many inputs

    def _predict_many(self, given: Sequence[Any], options: Options) -> list[Prediction]:
        begun = [self._begun(inputs, options) for inputs in given]
        wanted = [each for each in begun if isinstance(each, Wanted)]
        if wanted:
            try:
                with self.breaker.guard() as permit:
                    for part in self._parts(wanted, options):
                        self.model.queue.ask(part)
                    self._look(permit, wanted)
            except Exception as error:
                _blame(wanted, error)
        return [
            each
            if isinstance(each, Prediction)
            else self._of_model(each)
            if each.error is None
            else self._drive(self._instead(each, options))
            for each in begun
        ]

    async def _predict_many_async(self, given: Sequence[Any], options: Options) -> list[Prediction]:
        begun = [self._begun(inputs, options) for inputs in given]
        wanted = [each for each in begun if isinstance(each, Wanted)]
        if wanted:
            try:
                async with self.breaker.guard() as permit:
                    for part in self._parts(wanted, options):
                        await self.model.queue.ask_async(part)
                    self._look(permit, wanted)
            except Exception as error:
                _blame(wanted, error)
        return [
            each
            if isinstance(each, Prediction)
            else self._of_model(each)
            if each.error is None
            else await self._drive_async(self._instead(each, options))
            for each in begun
        ]

    def _parts(self, wanted: list[Wanted], options: Options) -> Iterator[list[Wanted]]:
        """As many at a time as fit into a run, and into the queue."""
        queue, until = self.model.queue, wanted[0].asked_at + options.limit
        at = 0
        while at < len(wanted):
            part = wanted[at : at + max(1, min(queue.room, queue.bounds.calls))]
            left = until - monotonic()
            if left <= 0.0:
                raise InferenceTimeout(f"{self.name}: the batch has not been answered in time")
            for request in part:
                request.timeout = request.limit = left
            at += len(part)
            yield part

    # ------------------------------------------------------------------ before the model

    def _begun(self, given: Any, options: Options) -> Wanted | Prediction:
        """What the model is to be asked, or a prediction that is kept.

        Raises:
            InvalidInput: it cannot be an input.
        """
        began = monotonic()
        model = self.model
        inputs, back = to_tensors(given) if model.takes_tensors else (given, None)
        wanted = Wanted(inputs, options.limit, options.timeout, options.priority)
        version = model.engine.version
        wanted.asked_at, wanted.back, wanted.key, wanted.version = began, back, None, version
        stored = self._stored
        if stored is not None and version:
            wanted.key = stored.key(version, inputs)
            kept = self._kept(wanted)
            if kept is not None:
                return self._of_kept(kept, wanted, "")
        if self._sample is None:
            self._sample = inputs
        if not model.engine.ready:
            model.engine.start()
        return wanted

    def _kept(self, wanted: Wanted, stale: bool = False) -> Kept | None:
        if wanted.key is None or self._stored is None:
            return None
        return self._stored.get(wanted.key, stale)

    def _of_kept(self, kept: Kept, wanted: Wanted, reason: str) -> Prediction:
        source = "stale" if kept.stale else "cache"
        return self._answer(kept.value, source, wanted.version, wanted, reason, kept.age)

    def _of_model(self, wanted: Wanted) -> Prediction:
        output, stored = wanted.output, self._stored
        version = self.model.engine.version
        # An output that came while the model was replaced may be either one's.
        if stored is not None and wanted.key is not None and version == wanted.version:
            stored.put(wanted.key, output)
        return self._answer(output, "model", version, wanted)

    def _answer(
        self,
        value: Any,
        source: str,
        version: str,
        wanted: Wanted,
        reason: str = "",
        age: float = 0.0,
    ) -> Prediction:
        self.counts[source] += 1
        back = wanted.back
        if back is not None and source != "default":
            value = back(value)
        return Prediction(value, source, version, age, monotonic() - wanted.asked_at, reason)

    # ------------------------------------------------------------------ outcomes

    def _look(self, permit: Permit, requests: Sequence[Request]) -> None:
        """Look at what the model has answered, and say how the call went."""
        failed: Exception | None = None
        took, asked, poor = 0, False, False
        for request in requests:
            error = request.error
            if error is None:
                try:
                    poor |= self._examine(request)
                except Exception as caught:
                    error = request.error = caught
            if isinstance(error, InvalidInput):
                continue
            asked = True
            took = max(took, request.nanoseconds)
            if error is not None:
                self.counts["failures"] += 1
                if not isinstance(error, Exception):
                    raise error
                failed = failed or error
        if failed is not None:
            permit._ended(failed, took)
        elif not asked:
            permit.ignore()
        elif poor:
            permit.slow(took / 1e9)
        else:
            permit._ended(None, took)

    def _examine(self, request: Request) -> bool:
        """Whether an output is a weak one among too many.

        Raises:
            InvalidPrediction: it is none.
            InvalidInput: it is none since the input was not fit for it.
        """
        output = request.output
        self._check(request)
        check = self.explicit.get("check")
        if check is not None and check(output) is False:
            raise InvalidPrediction("the output has not passed the check")
        window = self._window
        return window is not None and window.poor(float(self._confidence(output)))

    def _check(self, request: Request) -> None:
        section, output = self.section, request.output
        known = request.finite
        if not section.allow_non_finite and not (finite(output) if known is None else known):
            if not finite(request.inputs):
                raise InvalidInput("the input has NaN or infinite numbers, and so has the output")
            self.counts["not_finite"] += 1
            raise InvalidPrediction("the output has NaN or infinite numbers")
        if section.output_shape is not None:
            check_shape(output, section.output_shape)

    def _confidence(self, output: Any) -> Any:
        raise NotImplementedError

    # ------------------------------------------------------------------ what answers instead

    def _instead(self, wanted: Wanted, options: Options) -> Lighter:
        """What answers when the model does not, from the first time on and whatever the circuit's
        state; raises the request's error when nothing can."""
        error = wanted.error
        assert error is not None
        if isinstance(error, InvalidInput):
            raise error
        reason = f"{type(error).__name__}: {error}"[:200]
        kept = self._kept(wanted, stale=True) if self.section.enable_cached_fallback else None
        answer = None if kept is None else self._of_kept(kept, wanted, reason)
        if answer is None and self._lighter_may(error):
            answer = yield from self._of_lighter(wanted, reason)
        if answer is None:
            default = self._default(options)
            if default is MISSING:
                raise error
            answer = self._answer(default, "default", "", wanted, reason)
        self.breaker.count_fallback()
        return answer

    def _lighter_may(self, error: BaseException) -> bool:
        """A lighter model would only take more of what is wanting when resources are."""
        if self.lighter is None or not self.section.enable_lightweight_fallback:
            return False
        return not isinstance(error, ModelOverloaded) or not self.model.engine.ready

    def _of_lighter(
        self, wanted: Wanted, reason: str
    ) -> Generator[tuple[Lane, Request], None, Prediction | None]:
        lighter, inputs = self.lighter, wanted.inputs
        assert lighter is not None
        limit = wanted.limit
        try:
            if lighter.takes_tensors and not self.model.takes_tensors:
                inputs = to_tensors(inputs)[0]
            lighter.engine.start()
            request = Request(inputs, limit, limit)
            yield lighter, request
            if request.error is not None:
                raise request.error
            self._check(request)
        except Exception as error:
            self.counts["lightweight_failures"] += 1
            self.lighter_problem = f"{type(error).__name__} in the lighter model"
            return None
        self.lighter_problem = ""
        version = lighter.engine.version
        return self._answer(request.output, "lightweight", version, wanted, reason)

    def _default(self, options: Options) -> Any:
        if options.default is not MISSING:
            return options.default
        default = self.explicit.get("default", MISSING)
        if default is not MISSING or self.section.default_prediction is None:
            return default
        return self.section.default_prediction

    def _drive(self, rules: Lighter) -> Prediction:
        try:
            lane, request = next(rules)
            try:
                lane.queue.ask((request,))
            except Exception as error:
                rules.throw(error)
            next(rules)
        except StopIteration as end:
            answer: Prediction = end.value
            return answer
        raise AssertionError("one lighter model is asked once")

    async def _drive_async(self, rules: Lighter) -> Prediction:
        try:
            lane, request = next(rules)
            try:
                await lane.queue.ask_async((request,))
            except Exception as error:
                rules.throw(error)
            next(rules)
        except StopIteration as end:
            answer: Prediction = end.value
            return answer
        raise AssertionError("one lighter model is asked once")


def _blame(wanted: Sequence[Wanted], error: Exception) -> None:
    """What ended a call of many inputs is the error of those that had none and no answer."""
    for request in wanted:
        if request.error is None and not request.answered:
            request.error = error


def options_of(
    timeout: float | None, otherwise: float, total: bool, priority: int, default: Any
) -> Options:
    """What a caller says; ``total``: without a timeout, ``otherwise`` is one.

    Raises:
        ValueError, TypeError: the timeout is no positive number of seconds.
    """
    if timeout is None:
        return Options(otherwise, otherwise if total else None, priority, default)
    limit = check_number("timeout", timeout, 1e-6, 86_400.0)
    return Options(limit, limit, priority, default)
