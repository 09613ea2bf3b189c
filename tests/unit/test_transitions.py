"""Listeners hear transitions in order, from one thread, and break nothing."""

from __future__ import annotations

import threading

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, State, Transition
from tests.unit.clock import BRITTLE, FakeClock, fail, make_due, succeed, wait_until


class Listener:
    def __init__(self, breaker: CircuitBreaker) -> None:
        self.heard: list[Transition] = []
        self.threads: set[threading.Thread] = set()
        breaker.on_transition(self)

    def __call__(self, transition: Transition) -> None:
        self.threads.add(threading.current_thread())
        self.heard.append(transition)

    def steps(self) -> list[tuple[str, str, str, str]]:
        return [(t.old.value, t.new.value, t.source, t.cause) for t in self.heard]


def test_transitions_are_heard_in_order(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock
) -> None:
    listener = Listener(brittle)
    make_due(brittle, clock)
    fail(brittle)  # a probe
    clock.advance(60.0)
    succeed(brittle)
    brittle.force_open()
    brittle.release()
    succeed(brittle)
    brittle.force_closed()
    brittle.reset()
    registry.flush(5.0)
    assert listener.steps() == [
        ("closed", "open", "shared", "run"),
        ("open", "half_open", "shared", "due"),
        ("half_open", "open", "shared", "probe"),
        ("open", "half_open", "shared", "due"),
        ("half_open", "closed", "shared", "recovered"),
        ("closed", "forced_open", "override", "forced_open"),
        ("forced_open", "half_open", "shared", "released"),
        ("half_open", "closed", "shared", "recovered"),
        ("closed", "forced_closed", "override", "forced_closed"),
        ("forced_closed", "closed", "shared", "reset"),
    ]
    generations = [t.generation for t in listener.heard]
    assert generations == sorted(set(generations))
    assert {t.circuit for t in listener.heard} == {"brittle"}
    assert all(isinstance(t.old, State) and isinstance(t.new, State) for t in listener.heard)


def test_listeners_run_in_one_thread_of_their_own(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    listeners = [Listener(registry.breaker(name, BRITTLE)) for name in ("a", "b", "c")]
    for name in ("a", "b", "c"):
        fail(registry.breaker(name))
    registry.flush(5.0)
    threads = set().union(*(listener.threads for listener in listeners))
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_transitions_without_calls_are_heard(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, clock: FakeClock
) -> None:
    brittle.force_closed(ttl=5.0)
    listener = Listener(brittle)
    clock.advance(5.0)
    assert brittle.state == "closed"
    registry.flush(5.0)
    assert listener.steps() == [("forced_closed", "closed", "shared", "expired")]


def test_a_raising_listener_breaks_nothing(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_: Transition) -> None:
        raise RuntimeError("a listener's own defect")

    brittle.on_transition(bad)
    listener = Listener(brittle)
    fail(brittle)
    brittle.reset()
    registry.flush(5.0)
    assert len(listener.heard) == 2
    assert "a listener's own defect" in caplog.text


def test_a_listener_that_ends_its_thread_ends_no_other(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    def bad(_: Transition) -> None:
        raise SystemExit

    brittle.on_transition(bad)
    listener = Listener(brittle)
    for _ in range(3):
        fail(brittle)
        brittle.reset()
    registry.flush(5.0)
    assert len(listener.heard) == 6


def test_a_listener_may_use_the_breaker(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    heard: list[object] = []

    def listener(transition: Transition) -> None:
        heard.append((transition.new, brittle.state, brittle.snapshot().state))
        if transition.new is State.OPEN:
            brittle.reset(actor="listener")

    brittle.on_transition(listener)
    fail(brittle)
    wait_until(lambda: len(heard) == 2)
    assert brittle.state == "closed"


def test_a_call_never_waits_for_a_listener(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    """Its queue is bounded: what does not fit is dropped and counted, and order is kept."""
    go_on = threading.Event()
    heard: list[int] = []

    def slow(transition: Transition) -> None:
        assert go_on.wait(20)
        heard.append(transition.generation)

    brittle.on_transition(slow)
    for _ in range(800):
        fail(brittle)
        brittle.reset()
    assert not heard
    go_on.set()
    registry.flush(20.0)
    assert 1000 <= len(heard) < 1600
    assert heard == sorted(heard)
    assert len(heard) + registry._dispatcher.dropped == 1600
