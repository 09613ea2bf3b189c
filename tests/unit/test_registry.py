"""Name → breaker: URLs, names, policies, bounds."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy, StoreUnavailable
from distributed_breaker import registry as registry_module
from tests.unit.clock import BRITTLE, Boom, FakeClock, boom, fail, refused, succeed

SCHEMES = [
    "redis://", "rediss://", "unix://", "redis+sentinel://", "redis+cluster://", "memory://",
]  # fmt: skip


# ---------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url",
    [
        "memory://",
        "redis://localhost:6379/0",
        "redis://localhost",
        "redis://:secret@localhost:6379/15",
        "redis://user:secret@[::1]:6379/0",
        "rediss://localhost:6380/0",
        "unix:///run/redis.sock",
        "unix:///run/redis.sock?db=3",
        "redis+sentinel://host:26379,host2:26379/mymaster/0",
        "redis+sentinel://user:secret@host/mymaster",
        "rediss+sentinel://host/mymaster",
        "redis+cluster://host:7000,host2:7001",
        "rediss+cluster://user:secret@host",
    ],
)
def test_making_a_registry_connects_to_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread"))
    monkeypatch.setattr("socket.socket", lambda *_: pytest.fail("a socket"))
    registry = CircuitBreakerRegistry.from_url(url, "nightscan")
    assert registry.namespace == "nightscan"
    assert "secret" not in repr(registry)


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "localhost:6379", "http://localhost", "postgresql://localhost/0", "redis",
     "redis+tls://localhost", "memcached://localhost", "file:///tmp/x", "//localhost"],
)  # fmt: skip
def test_an_unknown_scheme_is_refused_and_the_known_ones_named(url: str) -> None:
    with pytest.raises(ValueError, match="scheme") as caught:
        CircuitBreakerRegistry.from_url(url)
    for scheme in SCHEMES:
        assert scheme in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host:notaport/0",
        "redis://host:99999/0",
        "redis://host:6379/abc",
        "redis://host:6379/0/1",
        "redis://host/0?db=abc",
        "redis://host/0?socket_timeout=abc",
        "redis://[::1/0",
        "unix:///run/redis.sock?db=abc",
        "redis+sentinel://host:26379",
        "redis+sentinel://host:26379/mymaster/abc",
        "redis+sentinel://:26379/mymaster",
        "redis+sentinel:///mymaster/0",
        "redis+sentinel://host:notaport/mymaster/0",
        "redis+cluster://",
        "redis+cluster://host:99999",
        "redis+cluster://host:7000/3",
    ],
)
def test_a_malformed_url_is_refused_at_once(url: str) -> None:
    """Not in a background thread, where nobody sees it."""
    with pytest.raises(ValueError, match=r"."):
        CircuitBreakerRegistry.from_url(url)


@pytest.mark.parametrize("url", [None, 5, b"redis://localhost/0", Path("/run/redis.sock")])
def test_what_is_no_text_is_refused(url: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"URL.*{type(url).__name__}"):
        CircuitBreakerRegistry.from_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:hunter2@host",
        "redis://user:hunter2@host/abc",
        "redis://user:hunt/er2@host/0",
        "redis://user:hunt#er2@host/0/1",
        "redis://user:hunt?er2@host/0/1",
        "redis://:hunter2@host/0/1?password=hunter2",
        "redis+sentinel://user:hunter2@host:26379",
        "redis+sentinel://user:hunt/er2@host:26379/mymaster/abc",
        "redis+sentinel://user:hunter2@/mymaster",
        "redis+cluster://user:hunter2@",
        "redis://user:hunter2@host:notaport/0",
        "redis://user:hunter2@host/0?db=abc",
        "redis://user:hunter2@[::1/0",
    ],
)
def test_no_message_holds_a_password(url: str) -> None:
    """Not even a part of one that has a character which should have been escaped."""
    with pytest.raises(ValueError, match=r".") as caught:
        CircuitBreakerRegistry.from_url(url)
    error: BaseException | None = caught.value
    while error is not None:
        for part in ("hunt", "er2"):
            assert part not in str(error).replace("over", "")
        error = error.__cause__


@pytest.mark.parametrize("namespace", ["", "a:b", "a b", "é", "a" * 65, "a{b}", None, 5])
@pytest.mark.parametrize("url", ["memory://", "redis://localhost"])
def test_a_bad_namespace_is_refused(url: str, namespace: Any) -> None:
    with pytest.raises(ValueError, match="namespace"):
        CircuitBreakerRegistry.from_url(url, namespace=namespace)


def test_the_default_namespace() -> None:
    assert CircuitBreakerRegistry.from_url("memory://").namespace == "default"


def test_namespaces_and_registries_share_nothing_in_memory() -> None:
    """The same circuit name in two namespaces is two circuits."""
    one = CircuitBreakerRegistry.from_url("memory://", "one").breaker("b", BRITTLE)
    two = CircuitBreakerRegistry.from_url("memory://", "two").breaker("b", BRITTLE)
    fail(one)
    assert (one.state, two.state) == ("open", "closed")


# ---------------------------------------------------------------------------- names, policies


def test_the_same_name_is_the_same_object(registry: CircuitBreakerRegistry) -> None:
    policy = Policy(failure_threshold=3)
    breaker = registry.breaker("b", policy)
    assert isinstance(breaker, CircuitBreaker)
    assert registry.breaker("b") is breaker
    assert registry.breaker("b", Policy(failure_threshold=3)) is breaker
    assert registry.breaker("c", policy) is not breaker


def test_another_policy_for_the_same_name_is_refused(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", Policy(failure_threshold=3))
    with pytest.raises(ValueError, match=r"'b'.*failure_threshold=3"):
        registry.breaker("b", Policy(failure_threshold=4))
    assert registry.breaker("b") is breaker
    assert breaker.policy.failure_threshold == 3


def test_local_settings_are_part_of_the_policy(registry: CircuitBreakerRegistry) -> None:
    registry.breaker("b", Policy(record=(Boom,)))
    with pytest.raises(ValueError, match="another policy"):
        registry.breaker("b", Policy(ignore=(Boom,)))


def test_without_a_policy_the_defaults_rule(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")
    assert breaker.policy == Policy()
    fail(breaker, 5)
    assert breaker.state == "open"


@pytest.mark.parametrize("policy", [5, "fast", {"failure_threshold": 3}, Policy], ids=repr)
def test_what_is_no_policy_is_refused(registry: CircuitBreakerRegistry, policy: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="olicy"):
        registry.breaker("b", policy)
    assert registry.snapshot() == {}


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a{b}", "-a", ".a", "é", "a" * 129, "a\n", "a\0", "a,b", None, 5]
)
def test_a_bad_name_is_refused(registry: CircuitBreakerRegistry, name: Any) -> None:
    with pytest.raises(ValueError, match="circuit name") as caught:
        registry.breaker(name)
    assert repr(name) in str(caught.value)
    assert registry.snapshot() == {}


def test_names_differ_in_case(registry: CircuitBreakerRegistry) -> None:
    assert registry.breaker("b") is not registry.breaker("B")


def test_many_threads_get_one_object(registry: CircuitBreakerRegistry) -> None:
    """A former implementation gave 19 objects to 32 threads."""
    for round_ in range(20):
        barrier = threading.Barrier(32)

        def get(_: int, name: str = f"b{round_}", barrier: threading.Barrier = barrier) -> object:
            barrier.wait(20)
            return registry.breaker(name, BRITTLE)

        with ThreadPoolExecutor(32) as pool:
            assert len(set(map(id, pool.map(get, range(32))))) == 1
    assert len(registry.snapshot()) == 20


# ---------------------------------------------------------------------------- bounded


@pytest.fixture
def small(
    monkeypatch: pytest.MonkeyPatch, registry: CircuitBreakerRegistry
) -> CircuitBreakerRegistry:
    monkeypatch.setattr(registry_module, "MAX_BREAKERS", 10)
    return registry


def test_the_bound_is_ten_thousand() -> None:
    assert registry_module.MAX_BREAKERS == 10_000


def test_breakers_that_nobody_holds_make_room(small: CircuitBreakerRegistry) -> None:
    held = [small.breaker(f"held{i}") for i in range(3)]
    first = weakref.ref(small.breaker("first"))
    for i in range(50):
        small.breaker(f"b{i}")
    gc.collect()
    assert first() is None
    assert len(small.snapshot()) <= 10
    for i, breaker in enumerate(held):
        assert small.breaker(f"held{i}") is breaker


def test_when_all_are_held_another_one_is_refused(small: CircuitBreakerRegistry) -> None:
    held = [small.breaker(f"b{i}") for i in range(10)]
    with pytest.raises(ValueError, match=r"10 breakers.*in use"):
        small.breaker("one.more")
    assert small.breaker("b3") is held[3]
    held.pop()
    assert small.breaker("one.more")


def test_what_protects_a_function_is_held(small: CircuitBreakerRegistry) -> None:
    """By the function: its breaker must stay the circuit's only one."""
    protected = small.breaker("mine", BRITTLE)(boom)
    for i in range(30):
        small.breaker(f"b{i}")
    with pytest.raises(Boom):
        protected()
    assert small.breaker("mine").state == "open"


def test_a_call_in_flight_holds_its_breaker(small: CircuitBreakerRegistry) -> None:
    def make_many() -> None:
        for i in range(30):
            small.breaker(f"b{i}")
        raise Boom

    with pytest.raises(Boom):
        small.breaker("mine", BRITTLE).call(make_many)
    assert small.breaker("mine").state == "open"


def test_a_circuit_that_is_not_closed_is_not_forgotten(
    small: CircuitBreakerRegistry, clock: FakeClock
) -> None:
    """``memory://`` keeps its state nowhere else: forgetting it would silently close it."""
    fail(small.breaker("sick", BRITTLE))
    small.breaker("forced").force_open(actor="me")
    for i in range(30):
        small.breaker(f"b{i}")
    assert small.breaker("sick").state == "open"
    assert small.breaker("forced").state == "forced_open"


def test_listeners_are_not_forgotten(small: CircuitBreakerRegistry) -> None:
    heard: list[object] = []
    small.breaker("mine", BRITTLE).on_transition(heard.append)
    for i in range(30):
        small.breaker(f"b{i}")
    fail(small.breaker("mine", BRITTLE))
    small.flush(5.0)
    assert len(heard) == 1


# ---------------------------------------------------------------------------- all circuits


def test_the_snapshot_of_all_circuits(registry: CircuitBreakerRegistry) -> None:
    fail(registry.breaker("b", BRITTLE))
    registry.breaker("a")
    snapshots = registry.snapshot()
    assert list(snapshots) == ["a", "b"]
    assert [s.state for s in snapshots.values()] == ["closed", "open"]
    assert [s.circuit for s in snapshots.values()] == ["a", "b"]


def test_flush_waits_for_listeners(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", BRITTLE)
    go_on = threading.Event()
    heard: list[object] = []

    def listener(transition: object) -> None:
        assert go_on.wait(20)
        heard.append(transition)

    breaker.on_transition(listener)
    fail(breaker)
    with pytest.raises(StoreUnavailable, match="listeners"):
        registry.flush(timeout=0.01)
    go_on.set()
    registry.flush(timeout=10.0)
    assert len(heard) == 1


def test_close_twice_and_go_on(registry: CircuitBreakerRegistry, clock: FakeClock) -> None:
    breaker = registry.breaker("b", BRITTLE)
    succeed(breaker)
    registry.close()
    registry.close()
    fail(breaker)
    refused(breaker)
    clock.advance(60.0)
    succeed(breaker)
    assert breaker.state == "closed"
    assert registry.breaker("new", BRITTLE).call(int) == 0
    assert breaker.snapshot().local["recorded"] == 3


def test_a_registry_is_a_context_manager() -> None:
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        breaker = registry.breaker("b", BRITTLE)
    succeed(breaker)
    with pytest.raises(Boom), registry:
        breaker.call(boom)
    refused(breaker)
