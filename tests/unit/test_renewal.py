"""When the listening thread asks who belongs to a group: on stubs, by a clock of the test's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from distributed_breaker import address, cluster, nodes
from distributed_breaker.errors import StoreDown
from distributed_breaker.store import RedisStore, Subscription
from tests.unit.stub import Stub, array, bulk, packed

PRIMARY = "mymaster"


class Clock:
    """The time of the modules that know groups, in s; it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(patience: float, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (nodes, cluster):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(address, "READ_TIMEOUT", patience)
    return clock


@pytest.fixture
def pair() -> Iterator[tuple[Stub, Stub]]:
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(contextlib.closing(Stub())) for _ in range(2))
        yield first, second


@pytest.fixture
def subscribed() -> Iterator[Callable[[str], Subscription]]:
    """Subscribe to the store with this URL."""
    with contextlib.ExitStack() as stack:

        def subscribe(url: str) -> Subscription:
            store = stack.enter_context(contextlib.closing(RedisStore(url, "ns")))
            return stack.enter_context(contextlib.closing(store.subscribe()))

        yield subscribe


SUBSCRIBED = array("subscribe", "cb:0:ns", "1")


@pytest.mark.parametrize("useless", [b"", bulk("nonsense"), array("127.0.0.1", "a port")])
def test_sentinels_that_do_not_answer_are_asked_less_and_less(
    clock: Clock,
    pair: tuple[Stub, Stub],
    subscribed: Callable[[str], Subscription],
    useless: bytes,
) -> None:
    """Pushes wait while they are asked.  Once one answers, it is as before."""
    sentinel, primary = pair
    names_it = array("127.0.0.1", str(primary.port))
    sentinel.answers["SENTINEL"] = names_it
    primary.answers["SUBSCRIBE"] = SUBSCRIBED
    subscription = subscribed(f"redis+sentinel://127.0.0.1:{sentinel.port}/{PRIMARY}")

    def searches(seconds: int) -> int:
        before = len(sentinel.seen("SENTINEL"))
        for _ in range(seconds):
            clock.now += 1.0
            assert subscription.get(0.0) is None
        return len(sentinel.seen("SENTINEL")) - before

    assert searches(30) == 10
    sentinel.answers["SENTINEL"] = useless
    assert searches(60) == 4  # after 3, 8, 17 and 34 s
    assert searches(650) == 10  # not less than once in 65 s
    sentinel.answers["SENTINEL"] = names_it
    assert searches(66) > 0
    searches(3)
    assert searches(30) == 10


def test_a_subscription_on_a_replica_that_has_left(
    clock: Clock, pair: tuple[Stub, Stub], subscribed: Callable[[str], Subscription]
) -> None:
    """No command goes there, so nobody says MOVED; nor need it know itself that it has left."""
    primary, replica = pair
    members = [node_of(primary), node_of(replica)]
    primary.answers["CLUSTER"] = replica.answers["CLUSTER"] = packed([[0, 16_383, *members]])
    primary.answers["SUBSCRIBE"], replica.answers["SUBSCRIBE"] = b"", SUBSCRIBED
    subscription: Subscription | None = None
    while subscription is None:  # Which of them is asked is left to chance.
        with contextlib.suppress(StoreDown):
            subscription = subscribed(f"redis+cluster://127.0.0.1:{primary.port}")
    primary.answers["CLUSTER"] = packed([[0, 16_383, members[0]]])
    assert subscription.get(0.0) is None
    asked = len(replica.seen("CLUSTER"))
    clock.now += cluster.CENSUS + 1
    with pytest.raises(StoreDown, match="left the group"):
        subscription.get(0.0)
    assert len(replica.seen("CLUSTER")) == asked


@pytest.mark.parametrize("useless", [b"", bulk("nonsense")])
def test_a_census_without_an_answer(
    clock: Clock,
    pair: tuple[Stub, Stub],
    subscribed: Callable[[str], Subscription],
    useless: bytes,
) -> None:
    """What is known is as good as before."""
    primary, _ = pair
    primary.answers["CLUSTER"] = packed([[0, 16_383, node_of(primary)]])
    primary.answers["SUBSCRIBE"] = SUBSCRIBED
    subscription = subscribed(f"redis+cluster://127.0.0.1:{primary.port}")
    asked = len(primary.seen("CLUSTER"))
    primary.answers["CLUSTER"] = useless
    clock.now += cluster.CENSUS + 1
    assert subscription.get(0.0) is None
    assert subscription.get(0.0) is None
    assert len(primary.seen("CLUSTER")) == asked + 1


def node_of(stub: Stub) -> list[object]:
    return ["127.0.0.1", stub.port, "id"]
