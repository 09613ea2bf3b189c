"""What all web frameworks have in common: a guarded view, and the answer to a refused request.

No framework is imported here; each says how it tells a status, and how it sends an answer.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..permit import Permit

View = TypeVar("View", bound=Callable[..., Any])

STATUS = 503
MAX_RANGES = 32  # of an Accept header that are looked at


class Answer(NamedTuple):
    """What a refused request gets: status 503, and this."""

    headers: dict[str, str]
    body: str
    content_type: str


def answer(refusal: CircuitBreakerOpenException, accept: str) -> Answer:
    """The answer to a request whose work was refused.

    It says nothing of circuits, hosts and reasons: these are for the log.  ``Retry-After`` is
    rounded up to whole seconds, and left out when the time is unknown.

    Args:
        refusal: what was raised.
        accept: the request's ``Accept`` header; empty: there is none.
    """
    seconds = math.ceil(refusal.retry_after)
    headers = {"Cache-Control": "no-store", "Vary": "Accept"}
    if seconds > 0:
        headers["Retry-After"] = str(seconds)
    if _prefers_text(accept):
        later = f"Try again in {seconds} s." if seconds > 0 else "Try again later."
        return Answer(headers, f"Service unavailable. {later}\n", "text/plain; charset=utf-8")
    found = {"error": "service_unavailable", "retry_after": seconds if seconds > 0 else None}
    return Answer(headers, json.dumps(found), "application/json")


def _prefers_text(accept: str) -> bool:
    """Whether text is wanted more than JSON, which is what a client gets that does not care."""
    text = as_json = any_kind = 0.0
    for part in accept.lower().split(",")[:MAX_RANGES]:
        kind, *parameters = (word.strip() for word in part.split(";"))
        quality = _quality(parameters)
        if kind.startswith("text/"):
            text = max(text, quality)
        elif kind == "application/json" or kind.endswith("+json"):
            as_json = max(as_json, quality)
        elif kind in ("*/*", "application/*"):
            any_kind = max(any_kind, quality)
    return text > max(as_json, any_kind)


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def protected(
    breaker: CircuitBreaker,
    view: View,
    finished: Callable[[Any], tuple[Any, int]],
    status_of: Callable[[Exception], int | None],
) -> View:
    """Guard a view, or a coroutine function.

    A status of 500 and more is a failure; a lower one is not, whether it is returned or raised.

    Args:
        breaker: the circuit.
        view: what is called for a request.
        finished: makes a response of what the view returned, and tells its status.
        status_of: the status that an error stands for; None: it is just an error.

    Raises:
        TypeError: ``breaker`` is none, or the view is none.
    """
    if not isinstance(breaker, CircuitBreaker):
        raise TypeError(
            f"protect takes a circuit breaker, not {breaker!r}: write @protect(breaker), "
            f"with what registry.breaker(name) gives"
        )
    if not callable(view):
        raise TypeError(f"{view!r} is no view: write @protect(breaker) below the route's decorator")

    def judge(call: Permit, error: Exception) -> None:
        status = status_of(error)
        if status is not None and status < 500:
            call.success()

    def end(call: Permit, returned: Any) -> Any:
        response, status = finished(returned)
        if status >= 500:
            call.failure()
        return response

    @functools.wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with breaker.guard() as call:
            try:
                returned = view(*args, **kwargs)
            except Exception as error:
                judge(call, error)
                raise
            return end(call, returned)

    @functools.wraps(view)
    async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
        async with breaker.guard() as call:
            try:
                returned = await view(*args, **kwargs)
            except Exception as error:
                judge(call, error)
                raise
            return end(call, returned)

    made: Any = guarded_coroutine if inspect.iscoroutinefunction(view) else guarded
    return made  # type: ignore[no-any-return]
