"""Admitting the calls that one attribute does not admit: first calls, probes, rejections.

The rules are written once, as a generator of futures to wait for; ``admit`` drives it by blocking,
``admit_async`` without blocking the event loop.  Every wait is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, cast

from . import model
from .errors import StoreUnavailable
from .link import Link
from .model import Reply
from .permit import Lease, Permit, rides
from .session import FIRST_ANSWER, Request
from .shadow import Decision

if TYPE_CHECKING:
    from .breaker import CircuitBreaker

MARGIN = 20  # R1: a probe starts only while more than 1/20 of its lease is left
MOST_ROUNDS = 8  # a circuit that changes its mind faster than this is not worth calling

# (future, whether it is this caller's own, so that giving up on it cancels it)
Wait = tuple[Future[Any], bool]


def admit(breaker: CircuitBreaker, *, by_check: bool = False) -> Permit:
    """A permit for one call, or CircuitBreakerOpenException."""
    admission = _admission(breaker, by_check)
    try:
        future, owned = next(admission)
        while True:
            future, owned = admission.send(wait(future, owned))
    except StopIteration as end:
        return cast(Permit, end.value)
    finally:
        admission.close()


async def admit_async(breaker: CircuitBreaker) -> Permit:
    """The same without blocking the event loop."""
    admission = _admission(breaker, False)
    try:
        future, owned = next(admission)
        while True:
            future, owned = admission.send(await wait_async(future, owned))
    except StopIteration as end:
        return cast(Permit, end.value)
    finally:
        admission.close()


def _admission(breaker: CircuitBreaker, by_check: bool) -> Generator[Wait, Any, Permit]:
    """Yields what to wait for, for at most FIRST_ANSWER seconds, and is sent the result, or None
    when it did not come in time or failed."""
    if rides(breaker):
        return Permit()._begin(breaker, None)
    waited = False
    for _ in range(MOST_ROUNDS):
        decision = breaker.decide(by_check=by_check)
        era = breaker._current
        if decision.action == "admit":
            if era is not None:
                return Permit()._begin(breaker, era)
        elif decision.action == "refuse":
            raise breaker.refusal(decision)
        elif decision.action == "probe":
            token = breaker.new_token()
            decision, local, shared = breaker.acquire_locally(token)
            if decision.action == "probe":
                return Permit()._begin(
                    breaker, None, Lease(token, local, shared, breaker._shadow.reporter)
                )
            if decision.action == "refuse":
                raise breaker.refusal(decision)
        elif decision.action == "ask":
            permit = yield from _ask(breaker, decision)
            if permit is not None:
                return permit
        else:
            link = cast(Link, breaker._link)
            if waited or link.impatient or link.down or not link.ensure_started():
                link.missed_first_answer(breaker)
            else:
                waited = True
                yield breaker.first_answer, False
    raise breaker.refusal(decision._replace(reason="the circuit keeps changing"))


def _ask(breaker: CircuitBreaker, decision: Decision) -> Generator[Wait, Any, Permit | None]:
    """Ask the store for a permit; None when somebody else must decide again."""
    link = cast(Link, breaker._link)
    token = breaker.new_token()
    future = link.submit(Request("acquire", breaker, {"op": "acquire", "token": token}))
    try:
        answer = yield future, True
    except GeneratorExit:
        # The wait was cancelled or interrupted.  The link gives back what nobody has taken; an
        # answer that is there already counts as taken.
        if not future.cancel():
            link.submit(Request("cancel", breaker, {"op": "cancel", "token": token}))
        raise
    if answer is None:
        if breaker.degraded:
            return None
        # R2: an acquire that times out is a rejection; the link cancels it when it can.
        raise breaker.refusal(decision._replace(reason="the store did not answer in time"))
    reply, sent = cast(tuple[Reply, int], answer)
    if reply.verdict == "go":
        return None
    if reply.verdict == "grant":
        until = sent + reply.value - reply.value // MARGIN
        if breaker._clock.ms() < until:
            header = model.load_header(reply.header)
            lease = Lease(token, None, (header.v, header.nonce), breaker._shadow.reporter, until)
            return Permit()._begin(breaker, None, lease)
        # R1: a grant that was delayed on its way is dead on arrival.
        link.submit(Request("cancel", breaker, {"op": "cancel", "token": token}))
    raise breaker.refusal(breaker.decide_again(decision))


def wait(future: Future[Any], owned: bool) -> Any:
    """The future's result within FIRST_ANSWER seconds, else None."""
    try:
        return future.result(FIRST_ANSWER)
    except FutureTimeout:
        return given_up(future, owned)
    except StoreUnavailable:
        return None


def given_up(future: Future[Any], owned: bool) -> Any:
    """What there is when the time is over.  An answer at the last moment is taken: the session
    believes that it was delivered."""
    return _answer(future) if owned and not future.cancel() else None


async def wait_async(future: Future[Any], owned: bool) -> Any:
    """The same without blocking the event loop.

    Not by ``asyncio.wait_for``, which on Python 3.11 forgets a cancellation that comes together
    with the answer: the task would go on as if nobody had cancelled it.
    """
    waiting = asyncio.wrap_future(future)
    try:
        async with asyncio.timeout(FIRST_ANSWER):
            return await (waiting if owned else asyncio.shield(waiting))
    except TimeoutError:
        return given_up(future, owned)
    except StoreUnavailable:
        return None


def _answer(done: Future[Any]) -> Any:
    return None if done.cancelled() or done.exception() is not None else done.result()


def result(future: Future[Any], timeout: float) -> Any:
    """An answer that an operator waits for; StoreUnavailable when none comes in time."""
    try:
        return future.result(timeout)
    except FutureTimeout:
        future.cancel()
        raise _too_late(timeout) from None


async def result_async(future: Future[Any], timeout: float) -> Any:
    """The same without blocking the event loop."""
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        raise _too_late(timeout) from None


def _too_late(timeout: float) -> StoreUnavailable:
    return StoreUnavailable(
        f"no answer from the store within {timeout:g} s: it is unknown whether it was carried out"
    )
