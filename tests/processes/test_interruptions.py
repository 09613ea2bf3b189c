"""A signal handler that raises: Celery's soft time limit, Ctrl-C, how gunicorn aborts a worker.

Python runs handlers where a function is entered or a call has returned.  Here each of these places
within a guarded call is tried once.  Whatever else is lost, no lock may stay taken.
"""

from __future__ import annotations

import contextvars
import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest

import distributed_breaker
from distributed_breaker import (
    CircuitBreaker,
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)

PACKAGE = os.path.dirname(distributed_breaker.__file__)


# A probe has thousands, nearly all of them later, within the machine, which knows of no locks.
MOST = 150


class SoftTimeLimitExceeded(Exception):
    """As Celery's."""


class BrokenError(Exception):
    """The dependency does not work."""


def fail() -> None:
    raise BrokenError


def interrupted(call: Callable[[], object], place: int) -> bool:
    """Whether a call was interrupted, which has at least as many places."""
    left = place

    def at_each(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and PACKAGE in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                raise SoftTimeLimitExceeded

    gc.disable()  # What is collected meanwhile is not what is looked at.
    sys.setprofile(at_each)
    try:
        call()
    except (BrokenError, CircuitBreakerOpenException, SoftTimeLimitExceeded):
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return left <= 0


def failing(breaker: CircuitBreaker) -> None:
    breaker.call(fail)


def succeeding(breaker: CircuitBreaker) -> None:
    breaker.call(int)


def guarded(breaker: CircuitBreaker) -> None:
    with breaker.guard() as call:
        call.failure()


def new_breaker(threshold: int, due: bool) -> CircuitBreaker:
    """A breaker that is closed, or open and due for a probe."""
    now = 0.0
    registry = CircuitBreakerRegistry.from_url("memory://", clock=lambda: now)
    policy = Policy(failure_threshold=threshold, success_threshold=1, jitter=0.0)
    breaker = registry.breaker("interrupted", policy)
    if due:
        breaker.acquire().failure()
        assert breaker.state == "open"
        now += policy.open_interval
    return breaker


@pytest.mark.timeout(20)  # A lock that stays taken may stop the very call that left it.
@pytest.mark.parametrize("what", [failing, succeeding, guarded])
@pytest.mark.parametrize(
    ("threshold", "due"), [(5, False), (1, False), (1, True)], ids=["closed", "trips", "probe"]
)
def test_no_lock_stays_taken(
    what: Callable[[CircuitBreaker], None], threshold: int, due: bool
) -> None:
    gc.collect()
    for place in range(1, MOST):
        breaker = new_breaker(threshold, due)
        # What it leaves in the context is gone with the context of a thread or task.
        call = partial(contextvars.copy_context().run, what, breaker)
        if not interrupted(call, place):
            break
        assert not breaker._lock.locked(), f"at place {place}"
    assert place > 1
