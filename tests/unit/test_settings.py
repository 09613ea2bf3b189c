"""Settings that change while a circuit is in use: another policy, switched off, no recovery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy
from tests.unit.clock import BRITTLE, STURDY, FakeClock, boom, fail, refused, succeed
from tests.unit.fake_store import Process, Server, accounts, wait_until
from tests.unit.ways import Way, every_way

# ---------------------------------------------------------------------------- another policy


def test_another_policy_rules_from_now_on(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=3, failure_rate=None))
    fail(breaker, 2)
    breaker.adopt(Policy(failure_threshold=4, failure_rate=None))
    fail(breaker)
    assert breaker.state == "closed", "three in a row are no longer enough"
    assert breaker.snapshot().run == 3, "what was counted stays"
    fail(breaker)
    assert breaker.state == "open"


@every_way
def test_functions_that_are_already_decorated_go_by_it(
    registry: CircuitBreakerRegistry, clock: FakeClock, way: Way
) -> None:
    breaker = registry.breaker("b", STURDY)
    guarded = breaker(lambda: clock.advance(2.0))
    guarded()
    assert breaker.snapshot().totals["slow"] == 0
    breaker.adopt(replace(STURDY, slow_call_duration=1.0))
    guarded()
    way(breaker, lambda: clock.advance(2.0))
    assert breaker.snapshot().totals["slow"] == 2
    breaker.adopt(STURDY)
    guarded()
    assert breaker.snapshot().totals["slow"] == 2


def test_an_open_circuit_stays_open_when_the_policy_changes(
    brittle: CircuitBreaker, clock: FakeClock
) -> None:
    fail(brittle)
    brittle.adopt(replace(BRITTLE, open_interval=5.0))
    assert brittle.state == "open"
    assert refused(brittle).retry_after == pytest.approx(60.0), "the interval that was begun"


def test_the_same_name_then_wants_the_new_policy(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", STURDY)
    breaker.adopt(BRITTLE)
    assert registry.breaker("b", BRITTLE) is breaker
    with pytest.raises(ValueError, match="already has another policy"):
        registry.breaker("b", STURDY)


def test_the_fleet_takes_the_policy_with_the_higher_version(start: Callable[[], Process]) -> None:
    """A rolling deploy: processes with the old file cannot put it back."""
    old, new = Policy(failure_threshold=5, version=1), Policy(failure_threshold=7, version=2)
    one, two = start().synced(old), start().synced(old)

    def in_force(breaker: CircuitBreaker) -> int:
        succeed(breaker)  # each report is answered with a policy that is news to the process
        breaker._link.flush().result(20)  # type: ignore[union-attr]
        policy = breaker.snapshot().policy
        assert policy is not None
        return policy.failure_threshold

    one.adopt(new)
    wait_until(lambda: in_force(two) == 7)
    assert one.snapshot().policy_mismatch is False
    two.adopt(replace(old, failure_threshold=6))
    wait_until(lambda: two.snapshot().policy_mismatch)
    assert in_force(one) == in_force(two) == 7
    late = start().synced(old)
    wait_until(lambda: late.snapshot().policy_mismatch)
    assert in_force(late) == 7
    two.adopt(new)
    wait_until(lambda: not two.snapshot().policy_mismatch)


def test_no_outcome_is_lost_when_the_policy_changes(start: Callable[[], Process]) -> None:
    process = start()
    breaker = process.synced(STURDY)
    guarded = breaker(lambda: None)
    for version in range(20):
        for _ in range(50):
            guarded()
        breaker.adopt(replace(STURDY, version=version))
    process.registry.flush(20)
    assert accounts(breaker)["flushed"] == 1_000
    assert breaker.snapshot().totals["calls"] == 1_000


# ---------------------------------------------------------------------------- switched off


@every_way
def test_a_circuit_that_is_off_lets_all_pass_and_counts_nothing(
    registry: CircuitBreakerRegistry, way: Way
) -> None:
    breaker = registry.breaker("b", BRITTLE, disabled=True)
    for _ in range(3):
        fail(breaker)
        way(breaker, lambda: None)
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.source) == ("closed", "disabled")
    assert snapshot.totals["calls"] == 0
    assert breaker.conservation()["recorded"] == 0


def test_switched_off_while_open_and_on_again(brittle: CircuitBreaker, clock: FakeClock) -> None:
    fail(brittle)
    brittle.switch(on=False)
    succeed(brittle, 3)
    fail(brittle, 3)
    brittle.switch(on=True)
    assert refused(brittle).retry_after == pytest.approx(60.0), "nothing has changed meanwhile"
    assert brittle.snapshot().totals["calls"] == 1


def test_a_circuit_that_is_off_asks_the_store_nothing(
    start: Callable[[], Process], fake_server: Server
) -> None:
    process = start()
    breaker = process.registry.breaker("b", BRITTLE, disabled=True)
    fail(breaker, 3)
    process.registry.flush(20)
    assert process.registry.snapshot()["b"].source == "disabled"
    assert fake_server.circuits == {}
    breaker.switch(on=True)
    fail(breaker)
    wait_until(lambda: breaker.snapshot().shared_state == "open")
    breaker.switch(on=False)
    succeed(breaker)
    process.registry.flush(20)
    breaker.switch(on=True)
    assert refused(breaker).source == "shared"


# ---------------------------------------------------------------------------- no recovery


def test_without_recovery_an_operator_must_reset(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("b", replace(BRITTLE, auto_recovery=False))
    fail(breaker)
    clock.advance(10_000.0)
    refusal = refused(breaker)
    assert (refusal.state, refusal.retry_after) == ("open", 0.0)
    assert "an operator must reset it" in refusal.reason
    breaker.reset()
    succeed(breaker)


def test_without_recovery_a_health_check_closes_nothing(
    registry: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    breaker = registry.breaker("b", replace(BRITTLE, auto_recovery=False))
    breaker.health_check(lambda: None)
    fail(breaker)
    clock.advance(10_000.0)
    assert breaker._shadow.decide(clock.ms, by_check=True).action == "refuse"


def test_without_recovery_in_a_fleet_and_without_its_store(
    start: Callable[[], Process], clock: FakeClock
) -> None:
    breaker = start().synced(replace(BRITTLE, quorum=1, auto_recovery=False))
    with pytest.raises(Exception, match="the dependency"):
        breaker.call(boom)
    wait_until(lambda: breaker.snapshot().shared_state == "open")
    clock.advance(10_000.0)
    assert "an operator must reset it" in refused(breaker).reason
    breaker.degrade()
    clock.advance(10_000.0)
    assert "an operator must reset it" in refused(breaker).reason
    breaker.heal()
    breaker.reset()
    succeed(breaker)
