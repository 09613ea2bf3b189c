"""Two faults at the same moment, where each alone is harmless."""

from __future__ import annotations

import pytest
import redis

from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.faults.proxy import Proxy
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet, until

# What the servers do by themselves is tried on all of them elsewhere; here it is our own doing
# that is tried.
pytestmark = pytest.mark.servers("valkey")

LASTING = {"failure_threshold": 100_000}
PROBING = {"open_interval": 0.2, "success_threshold": 2, "permit_lease": 600.0}


def degraded(fleet: Fleet) -> None:
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")


def closes(fleet: Fleet) -> None:
    def closed() -> bool:
        fleet.do("attempt")
        return {(look["state"], look["shared"]) for look in fleet.do("look")} == {
            ("closed", "closed")
        }

    until(closed, "recovery")


def test_the_key_goes_while_a_settle_is_on_its_way(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """It was carried out, its answer is lost, the key is lost, and then it is sent once more."""
    fleet.adjust |= PATIENT
    fleet.start(2, PROBING, url=proxy.url)
    fleet.trip(client)
    until(lambda: fleet[0].do("begin", name="p", how="guard")["admitted"], "a probe")
    proxy.refuse()
    degraded(fleet)
    assert fleet[0].do("finish", name="p") == "returned"
    client.delete(key_of(fleet.namespace, CIRCUIT))
    client.script_flush()
    proxy.connect()
    fleet.until_agreed(client)
    assert fleet.stored(client).successes == 0
    closes(fleet)
    fleet.audit(client, kept=False)


def test_the_store_is_emptied_while_all_are_cut_off_from_it(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Whoever comes first makes the circuit anew; what the others know is at least as protective,
    and nobody lets a call through in between."""
    knowing = fleet.start(3, {}, url=proxy.url)
    fleet.trip(client)
    proxy.refuse()
    degraded(fleet)
    client.flushall()
    client.script_flush()
    fleet.do("hammer", threads=1)
    (newcomer,) = fleet.start(1, blank=True)
    (said,) = fleet.open([newcomer], {}, first="attempt")
    assert said["admitted"]
    assert fleet.stored(client).state == "closed"
    proxy.connect()
    fleet.until_agreed(client)
    fleet.do("rest", knowing)
    assert fleet.states() == ["open"] * 4
    assert {call["pid"] for call in fleet.calls("enter")} == {newcomer.pid}
    fleet.audit(client, kept=False)


def test_an_override_that_is_set_and_released_while_some_are_cut_off(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """They come back with knowledge that is older than the store's, and take the store's."""
    cut = fleet.start(2, {}, url=proxy.url)
    (operator,) = fleet.start(1, {})
    fleet.trip(client)
    assert operator.do("operate", step="force_open") == ""
    fleet.until_all("forced_open")
    proxy.refuse()
    until(lambda: all(look["degraded"] for look in fleet.do("look", cut)), "degraded")
    assert operator.do("operate", step="reset") == ""
    assert operator.do("look")["state"] == "closed"
    assert fleet.states(cut) == ["forced_open"] * 2
    client.client_kill_filter(_type="pubsub")
    proxy.latency = 0.05
    proxy.connect()
    fleet.until_agreed(client)
    assert fleet.states() == ["closed"] * 3
    fleet.audit(client)


def one_process_with_four_circuits(fleet: Fleet, proxy: Proxy) -> list[str]:
    """Whose outcomes go out in one pipeline, when they are flushed and not before."""
    names = ["a", "b", "c", "d"]
    fleet.start(1, LASTING, url=proxy.url, SLOW_FLUSH=600_000, POLL=600_000, **PATIENT)
    for name in names:
        fleet.do("breaker", circuit=name, policy=LASTING)
    fleet.do("flush")
    return names


@pytest.mark.parametrize("text", ["OOM command not allowed", "READONLY You can't write", "BUSY x"])
def test_a_part_of_a_pipeline_is_refused(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, text: str
) -> None:
    """Some circuits' steps were carried out and others' were not, in one and the same pipeline."""
    names = one_process_with_four_circuits(fleet, proxy)
    rule = proxy.fail("report", text, times=1)
    for _ in range(3):
        for name in names:
            fleet.do("succeed", circuit=name, count=2)
    rule.after = 2
    with pytest.raises(AssertionError, match="StoreUnavailable"):
        fleet.do("flush")
    assert rule.hits == 1
    for name in names:
        fleet.until_agreed(client, name)
        sums = fleet.audit(client, name)
        assert sums["recorded"] == 6


def test_scripts_that_are_flushed_in_the_midst_of_a_pipeline(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Only the steps that did not find their script are sent again; the others were carried out."""
    names = one_process_with_four_circuits(fleet, proxy)
    for _ in range(3):
        for name in names:
            fleet.do("succeed", circuit=name, count=2)
        rule = proxy.fail("report", "NOSCRIPT No matching script.", times=1)
        rule.after = 2
        fleet.do("flush")
        assert rule.hits == 1
    assert not fleet[0].do("look")["degraded"]
    for name in names:
        assert fleet.audit(client, name) == {
            "recorded": 6, "flushed": 6, "dropped": 0, "pending": 0,
        }  # fmt: skip
        assert fleet.totals(client, name)["calls"] == 6


def test_a_probe_whose_process_freezes_while_the_store_restarts_empty(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """When it wakes up, nothing that it knows is true any more, and its outcome decides nothing."""
    sleeper, *others = fleet.start(3, PROBING | {"success_threshold": 1})
    fleet.trip(client)
    until(lambda: sleeper.do("begin", name="p", how="guard")["admitted"], "a probe")
    fleet.until_all("half_open")
    sleeper.freeze()
    broken_server.restart(empty=True)
    until(lambda: fleet.found(client) is not None, "the others make it again")

    def closed() -> bool:
        fleet.do("attempt", others)
        return {look["shared"] for look in fleet.do("look", others)} == {"closed"}

    until(closed, "the others recover")
    assert fleet.do("operate", others, step="reset") == ["", ""]
    sleeper.thaw()
    assert sleeper.do("finish", name="p", outcome="failure") == "BrokenError"
    fleet.until_agreed(client)
    fleet.audit(client, kept=False)
    assert fleet.stored(client).state == "closed"
    assert fleet.stored(client).run == 0
    assert fleet.totals(client)["trips"] == 0


def test_a_full_server_whose_answers_get_lost(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Refusals, resets and flushed scripts in turn, under load."""
    fleet.start(3, LASTING, url=proxy.url)
    fleet.do("hammer", threads=1, outcome="failure", pause=0.005)
    for number in range(9):
        if number % 3 == 0:
            rule = proxy.fail("report", "OOM command not allowed", times=2)
        else:
            rule = proxy.cut("report", times=2)
        client.script_flush()
        until(lambda r=rule: r.hits == 2, "both faults")
        until(lambda: not any(look["degraded"] for look in fleet.do("look")), "they are back")
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    fleet.until_agreed(client)
    fleet.audit(client)
    assert fleet.states() == ["closed"] * 3


def test_a_flood_of_pushes(fleet: Fleet, client: redis.Redis) -> None:
    """Old news, strangers' news and nonsense in masses: what is true is still heard of."""
    fleet.start(2, {})
    channel = f"cb:0:{fleet.namespace}"
    until(lambda: client.publish(channel, "") == 2, "both subscribe")
    old = client.hget(key_of(fleet.namespace, CIRCUIT), "h")
    fleet.trip(client)
    with client.pipeline(transaction=False) as pipe:
        for number in range(3000):
            pipe.publish(channel, f"{CIRCUIT} {old}")
            pipe.publish(channel, f"stranger{number} {old}")
            pipe.publish(channel, f"{CIRCUIT} nonsense")
        pipe.execute()
    assert fleet[0].do("operate", step="force_open") == ""
    fleet.until_all("forced_open")
    assert not any(look["degraded"] for look in fleet.do("look"))
    fleet.audit(client)
