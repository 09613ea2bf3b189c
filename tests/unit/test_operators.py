"""What operators do to a circuit: forced states, their ttl, release and reset."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerOpenException
from tests.unit.clock import Boom, FakeClock, boom, fail, make_due, refused, succeed


def operate(breaker: CircuitBreaker, what: str, **more: Any) -> None:
    getattr(breaker, what)(actor="ann", reason="maintenance", **more)


def test_forced_open_refuses_everything_until_released(
    clock: FakeClock, brittle: CircuitBreaker
) -> None:
    operate(brittle, "force_open")
    for _ in range(3):
        error = refused(brittle)
        assert (error.state, error.source, error.retry_after) == ("forced_open", "override", 0.0)
        clock.advance(1_000_000.0)
    operate(brittle, "release")
    assert brittle.state == "half_open", "never straight to closed"
    succeed(brittle)
    assert brittle.state == "closed"


def test_forced_closed_admits_everything_and_still_records(brittle: CircuitBreaker) -> None:
    operate(brittle, "force_closed")
    fail(brittle, 20)
    brittle.acquire().failure(open_for=100.0)
    snapshot = brittle.snapshot()
    assert (snapshot.state, snapshot.shared_state, snapshot.source) == (
        "forced_closed", "forced_closed", "override",
    )  # fmt: skip
    assert snapshot.window == (21, 21, 0)
    operate(brittle, "release")
    assert brittle.state == "closed"
    assert brittle.snapshot().window == (0, 0, 0)
    fail(brittle)
    assert brittle.state == "open"


def test_forced_open_ends_with_its_ttl(clock: FakeClock, brittle: CircuitBreaker) -> None:
    operate(brittle, "force_open", ttl=100.0)
    clock.advance(30.0)
    assert refused(brittle).retry_after == 70.0
    clock.advance(69.999)
    refused(brittle)
    clock.advance(0.001)
    assert brittle.state == "half_open"
    succeed(brittle)
    assert brittle.state == "closed"


def test_an_expired_forced_open_lets_a_probe_through_unasked(
    clock: FakeClock, brittle: CircuitBreaker
) -> None:
    operate(brittle, "force_open", ttl=100.0)
    refused(brittle)
    clock.advance(100.0)
    fail(brittle)  # admitted, and as a probe it counts
    assert brittle.state == "open"


def test_forced_closed_ends_with_its_ttl(clock: FakeClock, brittle: CircuitBreaker) -> None:
    operate(brittle, "force_closed", ttl=5.0)
    fail(brittle)
    clock.advance(4.999)
    assert brittle.state == "forced_closed"
    clock.advance(0.001)
    assert brittle.state == "closed"
    fail(brittle)
    assert brittle.state == "open"


def test_an_expired_forced_closed_protects_again_unasked(
    clock: FakeClock, brittle: CircuitBreaker
) -> None:
    """The first outcome after the end tells that it is over, and so may itself count as late."""
    operate(brittle, "force_closed", ttl=5.0)
    clock.advance(5.0)
    fail(brittle)
    with suppress(Boom, CircuitBreakerOpenException):
        brittle.call(boom)
    refused(brittle)


STATES: dict[str, Callable[[CircuitBreaker, FakeClock], object]] = {
    "closed": lambda breaker, clock: None,
    "open": lambda breaker, clock: fail(breaker),
    "half_open": lambda breaker, clock: (make_due(breaker, clock), breaker.acquire()),
    "forced_open": lambda breaker, clock: operate(breaker, "force_open"),
    "forced_closed": lambda breaker, clock: operate(breaker, "force_closed"),
}


@pytest.mark.parametrize(
    ("what", "leads"),
    [
        ("force_open", dict.fromkeys(STATES, "forced_open")),
        ("force_closed", dict.fromkeys(STATES, "forced_closed")),
        ("reset", dict.fromkeys(STATES, "closed")),
        (
            "release",
            {
                "closed": "closed",
                "open": "open",
                "half_open": "half_open",
                "forced_open": "half_open",
                "forced_closed": "closed",
            },
        ),
    ],
)
@pytest.mark.parametrize("state", STATES)
def test_operators_steps_from_every_state(
    brittle: CircuitBreaker, clock: FakeClock, what: str, leads: dict[str, str], state: str
) -> None:
    STATES[state](brittle, clock)
    assert brittle.state == state
    operate(brittle, what)
    assert brittle.state == leads[state]


@pytest.mark.parametrize("kind", ["force_open", "force_closed"])
@pytest.mark.parametrize(
    "ttl", [0, -1, 0.0001, 31_536_001, float("nan"), float("inf"), "5"], ids=repr
)
def test_a_bad_ttl_is_refused_and_changes_nothing(
    brittle: CircuitBreaker, kind: str, ttl: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match="ttl") as caught:
        operate(brittle, kind, ttl=ttl)
    assert repr(ttl) in str(caught.value)
    assert brittle.state == "closed"


@pytest.mark.parametrize("ttl", [0.001, 1, 31_536_000])
def test_a_good_ttl_is_kept(brittle: CircuitBreaker, ttl: float) -> None:
    operate(brittle, "force_open", ttl=ttl)
    assert brittle.snapshot().retry_after == ttl


def test_a_later_override_replaces_the_earlier(brittle: CircuitBreaker, clock: FakeClock) -> None:
    operate(brittle, "force_open", ttl=5.0)
    operate(brittle, "force_open")
    clock.advance(10.0)
    refused(brittle)
    operate(brittle, "force_closed", ttl=5.0)
    succeed(brittle)
    clock.advance(5.0)
    assert brittle.state == "closed"


def test_actor_and_reason_may_be_any_text(brittle: CircuitBreaker) -> None:
    for text in ("", "a b", "é" * 500, "\udcff", "\n\0", '"}{', "x" * 10_000):
        brittle.force_open(actor=text, reason=text)
        brittle.release(actor=text, reason=text)
        brittle.reset(actor=text, reason=text)
    assert brittle.state == "closed"


def test_operators_words_are_keywords(brittle: CircuitBreaker) -> None:
    """So that actor and reason are never mixed up."""
    for method in (brittle.reset, brittle.force_open, brittle.force_closed, brittle.release):
        with pytest.raises(TypeError):
            method("ann")  # type: ignore[call-arg]
