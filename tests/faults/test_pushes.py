"""Pushes that get lost, and how soon everybody knows all the same."""

from __future__ import annotations

import pytest
import redis

from distributed_breaker.errors import StoreDown
from tests.faults.proxy import Proxy
from tests.fleet.harness import PATIENT, Fleet, until
from tests.unit.test_session import ByHand

pytestmark = pytest.mark.servers("valkey")
ADJUST = PATIENT

# What depends on the server most runs on all of them; the rest is decided by the processes.
ALL = pytest.mark.servers("valkey", "redis8", "redis")


def subscribers(fleet: Fleet, client: redis.Redis) -> int:
    """How many hear the pushes.  Valkey 9.1 answers PUBSUB NUMSUB with nonsense for 8 and more, so
    an empty push, which nobody minds, counts them."""
    return int(client.publish(f"cb:0:{fleet.namespace}", ""))


def test_a_transition_reaches_everybody_by_push(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(8, {})
    until(lambda: subscribers(fleet, client) == 8, "all subscribe")
    assert fleet[0].do("operate", step="force_open") == ""
    until(lambda: fleet.states() == ["forced_open"] * 8, "the push", 1.5)


@ALL
def test_killed_subscriptions_come_back_and_what_was_missed_is_read(
    fleet: Fleet, client: redis.Redis
) -> None:
    """R9: whoever subscribes again has missed something."""
    fleet.start(4, {})
    until(lambda: subscribers(fleet, client) == 4, "all subscribe")
    for step, state in (("force_open", "forced_open"), ("reset", "closed")) * 2:
        with client.pipeline(transaction=False) as pipe:
            pipe.client_kill_filter(_type="pubsub")
            pipe.client_kill_filter(_type="pubsub")
            pipe.execute()
        assert fleet[0].do("operate", step=step) == ""
        fleet.until_all(state)
    until(lambda: subscribers(fleet, client) == 4, "all subscribe again")
    assert not any(look["degraded"] for look in fleet.do("look"))
    logged = [line for lines in fleet.do("logs") for line in lines if line["level"] == "ERROR"]
    assert logged == []


def test_what_happened_before_the_subscription_is_read(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """R9: between the first sync and the subscription there is a gap."""
    held = proxy.hold("SUBSCRIBE", times=1)
    (late,) = fleet.start(1, {}, url=proxy.url, POLL=600_000)
    (other,) = fleet.start(1, {})
    until(lambda: held.hits, "it is about to subscribe")
    assert other.do("operate", step="force_open") == ""
    assert late.do("look")["state"] == "closed"
    held.release()
    until(lambda: late.do("look")["state"] == "forced_open", "it is read")


def test_a_push_that_vanishes_is_healed_by_the_poll(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """The subscription lives, PING is answered, and still nothing arrives."""
    deaf, other = fleet.start(1, {}, url=proxy.url, POLL=300, SLOW_FLUSH=300) + fleet.start(1, {})
    until(lambda: subscribers(fleet, client) == 2, "both subscribe")
    proxy.swallow_pushes = True
    assert other.do("operate", step="force_open") == ""
    assert other.do("look")["state"] == "forced_open"
    until(lambda: deaf.do("look")["state"] == "forced_open", "the poll")
    assert proxy.seen["SUBSCRIBE"] == 1
    assert other.do("operate", step="reset") == ""
    until(lambda: deaf.do("look")["state"] == "closed", "the poll")
    other.do("fail", count=5)
    until(lambda: deaf.do("look")["shared"] == "open", "the poll")


def test_a_subscription_that_falls_silent_is_renewed(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    deaf, other = fleet.start(1, {}, url=proxy.url) + fleet.start(1, {})
    until(lambda: subscribers(fleet, client) == 2, "both subscribe")
    proxy.silent = True
    assert other.do("operate", step="force_open") == ""
    until(lambda: deaf.do("look")["state"] == "forced_open", "it is heard of")
    until(lambda: proxy.seen["SUBSCRIBE"] >= 2, "it subscribes again")
    proxy.silent = False
    assert other.do("operate", step="reset") == ""
    until(lambda: deaf.do("look")["state"] == "closed", "it is heard of")
    assert not deaf.do("look")["degraded"]


@pytest.mark.parametrize("text", ["", "nonsense", "1 2 3", "9 1 x open 1 1 0 0 - 1", "1 1 x open"])
def test_nonsense_on_the_channel_harms_nobody(fleet: Fleet, client: redis.Redis, text: str) -> None:
    fleet.start(2, {})
    until(lambda: subscribers(fleet, client) == 2, "both subscribe")
    client.publish(f"cb:0:{fleet.namespace}", f"payments {text}")
    client.publish(f"cb:0:{fleet.namespace}", "")
    client.publish(f"cb:0:{fleet.namespace}", b"\xff\xfe payments")
    assert fleet[0].do("operate", step="force_open") == ""
    until(lambda: fleet.states() == ["forced_open"] * 2, "pushes are still heard", 1.5)
    assert not any(look["degraded"] for look in fleet.do("look"))


def test_an_old_push_changes_nothing(fleet: Fleet, client: redis.Redis) -> None:
    """C1: a mirror's generation never falls; a push that was delayed is old news."""
    fleet.start(2, {})
    until(lambda: subscribers(fleet, client) == 2, "both subscribe")
    closed = client.hget(f"cb:{{{fleet.namespace}:payments}}", "h")
    fleet.trip(client)
    before = fleet.stored(client)
    for _ in range(3):
        client.publish(f"cb:0:{fleet.namespace}", f"payments {closed}")
    fleet.do("flush")
    fleet.do("flush")
    assert fleet.states() == ["open"] * 2
    assert (fleet.stored(client).v, fleet.stored(client).state) == (before.v, "open")


def test_a_refusal_is_said_once_though_the_listening_thread_is_faster(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a busy machine the listener may fail twice before the sender has looked once."""
    session = ByHand()
    session.go_round()
    refused = StoreDown("WRONGPASS", "invalid username-password pair")
    session.subscription_lost(refused)
    session.subscription_lost(refused)
    for _ in range(2):  # A poll that is refused is followed by a sync, which has the last word.
        session.go_round(lambda ask: refused)
    assert session.down == "WRONGPASS"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
