"""The rules of an HTTP client: what an attempt says, when there is another, what answers else.

Each is written once, as a generator; see ``driving.py``.  They run below requests' sessions and
httpx's clients, in the adapter or transport, so that a session of the user's has them, too.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..fallback.outbox import OutboxError
from ..permit import Permit
from ..policy import Outcome
from .backoff import backoff
from .driving import Aside, Pause, Rules
from .http_answers import RATE_LIMITED, InvalidRequest, check_answer, is_secret, outcome_of
from .http_answers import retry_after as retry_after_of
from .http_base import IDEMPOTENT, MISSING, Act, Answer, Call, HttpBase
from .http_stored import SAFE, waiting

MARK = "X-Circuit-Breaker"  # the header of what the service has not answered itself

log = logging.getLogger("distributed_breaker")


class BadStatus(Exception):
    """What the circuit's record says of an answer that counts as a failure."""


class HttpRules(HttpBase):
    """What adapters and transports carry out."""

    def _exchange(self, wire: Any, call: Call) -> Rules[Any]:
        """One request, with all its attempts."""
        options = call.options
        breaker = self._main if options.of_client else self.circuit_of(call.url)
        self.counts.add("requests")
        if options.queue and self.section.enable_request_queue and (yield from self._some_wait()):
            return (yield from self._let_wait(wire, call, breaker))
        last: Answer | None = None
        attempt = 0
        while True:
            try:
                permit = yield Act(lambda w: w.admit(breaker))
            except CircuitBreakerOpenException as refused:
                if last is not None:
                    return (yield from self._ended(wire, call, breaker, last))
                return (yield from self._instead(wire, call, breaker, refused))
            except wire.known as failed:  # injected: faults.py
                last = Answer(None, failed, Outcome.FAILURE, True, None)
            else:
                last = yield from self._attempt(wire, call, permit)
            attempt += 1
            if last.outcome is Outcome.SUCCESS and last.error is None:
                return last.response
            wait = self._wait_for_another(call, breaker, last, attempt)
            if wait is None:
                return (yield from self._ended(wire, call, breaker, last))
            response = last.response
            if response is not None:
                yield Act(drop_of(response))
            yield Pause(wait)

    # ------------------------------------------------------------------ one attempt

    def _attempt(self, wire: Any, call: Call, permit: Permit) -> Rules[Answer]:
        """Send it once; every attempt is an outcome of its own."""
        options, section = call.options, self.section
        connect, read = self.timeouts(options, permit)
        limit = options.max_size or section.max_response_size
        self.counts.add("attempts")
        begun = time.monotonic()
        response = None
        try:
            response = yield Act(lambda w: w.send(call, connect, read, limit))
            status = response.status_code
            outcome = self._outcome(status, options.expected)
            if options.streamed:
                if outcome is Outcome.SUCCESS:
                    return (yield from self._streamed(wire, call, permit, response, limit))
                yield Act(lambda w: w.read(call, response, limit))
            self._valid(wire, call, response)
        except BaseException as error:
            if not isinstance(error, Exception):
                permit._ended(error)  # cancelled or interrupted
                raise
            self.took(time.monotonic() - begun)
            return self._failed(wire, permit, error)
        self.took(time.monotonic() - begun)
        wait = retry_after_of(call.heard) if outcome is not Outcome.SUCCESS else None
        if outcome is Outcome.SUCCESS:
            permit.success()
            if section.enable_cached_response_fallback and options.cache:
                self._stored.keep(call, status, response.content, section.stale_ttl)
        elif wait is not None and status in RATE_LIMITED:
            # The service is well, and says for how long the whole fleet is to leave it alone.
            self.counts.add("rate_limited")
            permit.ignore(open_for=wait)
        elif outcome is Outcome.FAILURE:
            permit.failure(BadStatus(f"it answered {status}"))
        else:
            permit.ignore()
        again = status in section.retry_on_status
        return Answer(response, None, outcome, again, wait)

    def _outcome(self, status: int, expected: Any) -> Outcome:
        judged = None if self.judge is None else self.judge(status)
        if judged is not None:
            return judged
        return outcome_of(status, expected or self.section.expected_status_codes)

    def _valid(self, wire: Any, call: Call, response: Any) -> None:
        options = call.options
        fault = check_answer(
            response, options.validate, json=self.section.validate_response_json,
            content_types=options.content_types,
        )  # fmt: skip
        if fault:
            self.counts.add("invalid")
            raise wire.invalid(call, response, f"the answer to {self._shown(call)}: {fault}")

    def _failed(self, wire: Any, permit: Permit, error: Exception) -> Answer:
        outcome = wire.outcome(error)
        if outcome is Outcome.FAILURE:
            permit.failure(error)
        else:
            permit.ignore()
        return Answer(None, error, outcome, wire.repeatable(error), None)

    def _streamed(
        self, wire: Any, call: Call, permit: Permit, response: Any, limit: int
    ) -> Rules[Answer]:
        """The outcome comes at the end of the body, wherever it is read."""

        def ended(error: BaseException | None, whole: bool, size: int) -> None:
            self.counts.add("bytes", size)
            if error is not None and wire.outcome(error) is Outcome.FAILURE:
                permit.failure(error)
            elif error is None and whole:
                permit.success()
            else:
                permit.ignore()

        fault = check_answer(response, None, json=False, content_types=call.options.content_types)
        if fault:
            yield Act(lambda w: w.drop(response))
            raise wire.invalid(call, response, f"the answer to {self._shown(call)}: {fault}")
        response = yield Act(lambda w: w.follow(call, response, limit, ended))
        return Answer(response, None, Outcome.SUCCESS, False, None)

    # ------------------------------------------------------------------ another attempt

    def _wait_for_another(
        self, call: Call, breaker: CircuitBreaker, last: Answer, attempt: int
    ) -> float | None:
        """Seconds until the next attempt; None: there is none."""
        options, section = call.options, self.section
        if options.plain or not options.retry or attempt > section.max_retries:
            return None
        if not (last.repeatable and call.repeatable and last.outcome is Outcome.FAILURE):
            return None
        if call.method not in IDEMPOTENT and not call.headers.get("idempotency-key"):
            return None
        wait = backoff(attempt, section.backoff_factor, section.total_timeout)
        wait = max(wait, last.wait or 0.0)
        if options.deadline is not None and time.monotonic() + wait >= options.deadline:
            return None
        if breaker.refusing or not self.may_retry():
            return None
        return wait

    # ------------------------------------------------------------------ instead of an answer

    def _ended(self, wire: Any, call: Call, breaker: CircuitBreaker, last: Answer) -> Rules[Any]:
        """The last attempt is what there is, unless its circuit is open now."""
        failed = last.outcome is Outcome.FAILURE
        if failed and not call.options.plain:
            if call.options.queue and self.section.enable_request_queue:
                return (yield from self._let_wait(wire, call, breaker))
            if call.method in SAFE and breaker.refusing:
                found = self._kept(wire, call, breaker)
                if found is not None:
                    return found
        if last.error is not None:
            raise last.error
        return last.response

    def _instead(
        self, wire: Any, call: Call, breaker: CircuitBreaker, refused: Exception
    ) -> Rules[Any]:
        """Nothing was sent."""
        options, section = call.options, self.section
        if options.plain:
            raise refused
        if options.queue and section.enable_request_queue:
            return (yield from self._let_wait(wire, call, breaker))
        found = self._kept(wire, call, breaker)
        if found is not None:
            return found
        default = section.default_response if options.default is MISSING else options.default
        if default is None or not options.use_default:
            raise refused
        self.fell_back("defaults", breaker)
        headers = [("Content-Type", "application/json"), (MARK, "default")]
        response = wire.make(call, 200, headers, json.dumps(default).encode())
        response.fallback = "default"
        return response

    def _kept(self, wire: Any, call: Call, breaker: CircuitBreaker) -> Any:
        """The stored answer, which says that it is one; None: there is none."""
        options = call.options
        if not (self.section.enable_cached_response_fallback and options.cache):
            return None
        if call.method not in SAFE:
            return None
        kept = self._stored.find(call)
        if kept is None:
            return None
        self.fell_back("served_stale", breaker)
        headers = [*kept.headers, ("Age", str(int(kept.age))), (MARK, "stale")]
        response = wire.make(call, kept.status, headers, kept.body)
        response.stale, response.fallback = True, "stale"
        return response

    # ------------------------------------------------------------------ what waits

    def _some_wait(self) -> Rules[bool]:
        """What came first goes first: while some wait, the others wait behind them."""

        def look() -> bool:
            try:
                return self._queue.possible and self._queue.count() > 0
            except OutboxError:
                return False

        waits: bool = yield Aside(look)
        return waits

    def _let_wait(self, wire: Any, call: Call, breaker: CircuitBreaker) -> Rules[Any]:
        self.may_wait(call)
        key = call.headers.get("idempotency-key") or str(uuid.uuid4())
        item = (call.method, waiting(call, key, self.headers), key)
        add: Callable[[], None] = lambda: self._queue.add_many([item])  # noqa: E731
        yield Aside(add)
        self.fell_back("queued", breaker)
        headers = [("Content-Type", "application/json"), (MARK, "queued"), ("Idempotency-Key", key)]
        response = wire.make(call, 202, headers, json.dumps({"queued": key}).encode())
        response.fallback = "queued"
        return response

    def may_wait(self, call: Call) -> None:
        """Raise InvalidRequest if a request could not be sent later as it is now."""
        if call.body is None and call.headers.get("transfer-encoding"):
            raise InvalidRequest("a body that can be read only once cannot wait: give it as bytes")
        own = {name.lower() for name in self.headers}
        for name in call.headers:
            usual = name == "authorization" and self.auth is not None
            if is_secret(name) and name not in own and not usual:
                raise InvalidRequest(
                    f"a request with the credential {name.title()} of its own cannot wait, since "
                    f"no credential is kept on disk: set it in the client's headers or auth"
                )


def drop_of(response: Any) -> Callable[[Any], Any]:
    return lambda wire: wire.drop(response)
