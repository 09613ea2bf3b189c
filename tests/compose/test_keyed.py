"""Circuits by key: their names, and that there are never too many."""

from __future__ import annotations

import pytest

from distributed_breaker import CircuitBreakerRegistry, Policy
from distributed_breaker.compose import KeyedCircuits
from tests.unit.clock import BRITTLE, fail


def test_each_key_has_a_circuit_of_its_own(registry: CircuitBreakerRegistry) -> None:
    tenants = KeyedCircuits(registry, "payments", BRITTLE)
    fail(tenants.breaker("acme"))
    assert tenants.breaker("acme").state == "open"
    assert tenants.breaker("other").state == "closed"
    assert tenants.breaker("acme") is registry.breaker("payments.acme")
    assert tenants.breaker("acme").policy == BRITTLE
    with pytest.raises(ValueError, match=r"payments\.no way"):
        tenants.breaker("no way")
    assert len(tenants) == 2


def test_the_one_that_was_not_asked_for_longest_is_forgotten(
    registry: CircuitBreakerRegistry,
) -> None:
    tenants = KeyedCircuits(registry, "t", most=2)
    for key in ("a", "b", "a", "c"):
        tenants.breaker(key)
    assert len(tenants) == 2
    assert sorted(registry._breakers) == ["t.a", "t.c"], "the registry has forgotten it, too"


def test_circuits_in_trouble_or_in_use_are_kept(registry: CircuitBreakerRegistry) -> None:
    tenants = KeyedCircuits(registry, "t", BRITTLE, most=2)
    fail(tenants.breaker("broken"))
    used = tenants.breaker("used")
    assert tenants.breaker("further") is registry.breaker("t"), "shared by all further ones"
    assert tenants.breaker("broken").state == "open"
    assert tenants.breaker("used") is used
    del used
    assert tenants.breaker("further").name == "t.further"
    assert len(tenants) == 2


def test_circuits_of_calls_that_went_well_are_forgotten(registry: CircuitBreakerRegistry) -> None:
    tenants = KeyedCircuits(registry, "t", Policy(), most=10)
    for i in range(1_000):
        assert tenants.breaker(f"k{i}").call(lambda: 1) == 1
        registry.flush()
    assert len(registry._breakers) == 10


@pytest.mark.parametrize("bad", [{"most": 0}, {"name": "no way"}])
def test_what_cannot_be(bad: dict[str, object], registry: CircuitBreakerRegistry) -> None:
    with pytest.raises(ValueError, match=r"most=0|no way"):
        KeyedCircuits(registry, **{"name": "t", **bad})
