"""What every framework's guarded views are asked, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from distributed_breaker import CircuitBreaker, State
from tests.integrations.conftest import BROWSER
from tests.unit.clock import FakeClock


class Got(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]  # by names in small letters
    body: str


Ask = Callable[[str, dict[str, str]], Got]


def the_callers_own_mistakes_do_not_count(ask: Ask, breaker: CircuitBreaker, paths: Any) -> None:
    """These paths answer with a status below 500."""
    for path in paths:
        assert 400 <= ask(path, {}).status < 500
    assert breaker.state is State.CLOSED
    # They are calls that ended well, whichever way the view says it.
    totals = breaker.snapshot().totals
    assert (totals["calls"], totals["failures"], totals["ignored"]) == (len(paths), 0, 0)


def a_failure_opens_it(ask: Ask, breaker: CircuitBreaker, path: str, status: int = 500) -> None:
    assert ask(path, {}).status == status
    assert breaker.state is State.OPEN


def a_refusal_is_answered(ask: Ask, path: str, clock: FakeClock) -> None:
    """The circuit has just opened: its interval is 60 s, of which the clock takes a little."""
    clock.advance(0.25)
    got = ask(path, {"Accept": "application/json"})
    assert (got.status, got.headers["retry-after"]) == (503, "60")
    assert got.headers["cache-control"] == "no-store"
    assert "Accept" in got.headers["vary"]
    assert got.headers["content-type"] == "application/json"
    assert json.loads(got.body) == {"error": "service_unavailable", "retry_after": 60}
    text = ask(path, {"Accept": BROWSER})
    assert (text.status, text.headers["retry-after"]) == (503, "60")
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.body == "Service unavailable. Try again in 60 s.\n"
    for said in (got, text):
        assert "secret" not in str(said.headers) + said.body


def it_closes_again(ask: Ask, breaker: CircuitBreaker, path: str, clock: FakeClock) -> None:
    clock.advance(60)
    assert ask(path, {}).status == 200
    assert breaker.state is State.CLOSED
