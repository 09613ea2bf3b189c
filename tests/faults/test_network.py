"""What networks do: connections that are reset after a step was carried out, black holes, delays.

Here the proxy listens on a port, where a broken connection is one that was reset.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import redis

from scripts.servers import Server
from tests.faults.proxy import Proxy, proxy_before
from tests.fleet.harness import PATIENT, Fleet, until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")

# What the server cannot notice is the same on all of them.
ONE = pytest.mark.servers("valkey")

LASTING = {"failure_threshold": 100_000}


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy that resets connections."""
    with proxy_before(server.url, tcp=True) as proxy:
        yield proxy


def recovers(fleet: Fleet) -> None:
    def closed() -> bool:
        fleet.do("attempt")
        return set(fleet.states()) == {"closed"}

    until(closed, "recovery")


@pytest.mark.parametrize("what", ["report", "acquire", "settle", "override", "reset"])
def test_a_reset_after_the_step_was_carried_out(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, what: str
) -> None:
    """At most once: nobody knows what became of it, so it is not sent again; a settle is, and
    counts once (S5).  A permit that was granted to nobody is given back (R2)."""
    policy = {"open_interval": 0.2, "success_threshold": 2, "permit_lease": 600.0}
    fleet.adjust |= PATIENT
    cut, _ = fleet.start(1, policy, url=proxy.url) + fleet.start(1, policy)
    fleet.do("succeed")
    fleet.do("flush")
    if what in ("acquire", "settle"):
        fleet.trip(client)
    if what == "settle":
        until(lambda: cut.do("begin", name="p", how="guard")["admitted"], "a probe")
    rule = proxy.cut(what, times=2)
    if what == "report":
        cut.do("fail", count=3)
    elif what == "acquire":
        until(lambda: cut.do("attempt") and rule.hits, "an acquire")
    elif what == "settle":
        assert cut.do("finish", name="p") == "returned"
    else:
        step = "force_open" if what == "override" else "reset"
        assert cut.do("operate", step=step).startswith("StoreUnavailable: ")
    until(lambda: rule.hits, "the reset")
    proxy.clear()
    fleet.until_agreed(client)
    if what in ("acquire", "settle"):
        recovers(fleet)
    sums = fleet.audit(client)
    if what == "report":
        assert fleet.totals(client)["calls"] == sums["recorded"]  # It was carried out.
    if what == "settle":
        assert sums["dropped"] == 1  # Its process cannot know that the first one was counted.
        assert fleet.totals(client)["calls"] == sums["recorded"]
    assert fleet.states() == ["forced_open" if what == "override" else "closed"] * 2


def test_resets_and_flushed_scripts_together(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """A step that is sent again because its script was gone, and whose answer then gets lost, is
    still carried out at most once."""
    fleet.start(2, LASTING, url=proxy.url, READ_TIMEOUT=10.0)
    fleet.start(1, LASTING, READ_TIMEOUT=10.0)
    fleet.do("hammer", threads=1, outcome="failure", pause=0.01)
    for number in range(8):
        rule = proxy.cut("report")
        rule.after = number % 2  # What is cut has not found its script, or was carried out.
        client.script_flush()
        until(lambda r=rule: r.hits, "a reset")
        until(lambda: not any(look["degraded"] for look in fleet.do("look")), "they are back")
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    fleet.until_agreed(client)
    assert fleet.audit(client)["dropped"] > 0


def test_a_script_that_cannot_be_loaded_because_the_connection_breaks(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    fleet.start(1, LASTING, url=proxy.url)
    fleet.do("flush")
    for _ in range(3):
        rule = proxy.cut("SCRIPT")
        client.script_flush()
        fleet.do("fail")
        until(lambda r=rule: r.hits, "it loads the script")
        fleet.until_agreed(client)
    fleet.audit(client)
    assert fleet.states() == ["closed"]


@ONE
@pytest.mark.parametrize("how", ["pushes", "SUBSCRIBE"])
def test_a_black_hole_for_the_subscription_alone(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, how: str
) -> None:
    """Commands are answered, so nobody is degraded; the poll brings what pushes do not."""
    if how == "SUBSCRIBE":
        proxy.swallow(how)
    deaf, other = fleet.start(1, {}, url=proxy.url, POLL=300) + fleet.start(1, {})
    if how == "pushes":
        until(lambda: proxy.seen["SUBSCRIBE"], "it subscribes")
        proxy.silent = True
    for step, state in (("force_open", "forced_open"), ("reset", "closed")):
        assert other.do("operate", step=step) == ""
        fleet.until_all(state)
    until(lambda: proxy.seen["SUBSCRIBE"] >= 2, "it subscribes again")
    assert deaf.do("look")["down"] == ""
    proxy.silent = False
    proxy.clear()
    fleet.audit(client)


@ONE
def test_a_black_hole_for_everything(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    """Connections are accepted and nothing is ever answered: nothing was carried out, so what was
    under way is lost for good, and what came later is not."""
    fleet.start(2, LASTING, url=proxy.url)
    fleet.do("flush")
    proxy.swallow("*")
    fleet.do("fail", count=3)
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "degraded")
    fleet.do("succeed", count=50)
    assert fleet.do("waits") == [[], []]
    (newcomer,) = fleet.start(1, blank=True)
    (said,) = fleet.open([newcomer], LASTING, url=proxy.url, first="attempt")
    assert said["admitted"]
    assert said["took"] < 0.3 + 2.0
    proxy.clear()
    proxy.reset()
    fleet.until_agreed(client)
    sums = fleet.audit(client)
    assert fleet.totals(client)["calls"] == sums["flushed"]


@ONE
def test_answers_that_come_just_in_time_or_just_too_late(
    fleet: Fleet, client: redis.Redis, proxy: Proxy
) -> None:
    """Around the read timeout, where the answer to a step that was given up may still arrive."""
    fleet.start(2, LASTING, url=proxy.url, READ_TIMEOUT=0.1)
    fleet.do("hammer", threads=1, outcome="failure", pause=0.01)
    draw = random.Random(1)
    for _ in range(20):
        proxy.lag = draw.uniform(0.08, 0.12)
        seen = proxy.seen["TIME"] + proxy.seen["report"]
        until(lambda n=seen: proxy.seen["TIME"] + proxy.seen["report"] > n, "it is asked")
    proxy.lag = 0.0
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    fleet.until_agreed(client)
    sums = fleet.audit(client)
    assert sums["flushed"] > 0
    # All that was lost had been carried out, and was not sent again.
    assert fleet.totals(client)["calls"] == sums["recorded"]


@ONE
def test_a_far_away_store(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    """Every step takes long: circuits trip, recover and are never degraded."""
    slow = {"READ_TIMEOUT": 10.0, "FIRST_ANSWER": 10.0}
    fleet.start(2, {"open_interval": 0.3}, url=proxy.url, **slow)
    proxy.latency = proxy.lag = 0.06
    fleet.do("hammer", threads=2, outcome="failure")
    until(lambda: fleet.totals(client)["half_opens"] >= 2, "probes fail")
    fleet.do("rest")
    recovers(fleet)
    assert not any(look["degraded"] for look in fleet.do("look"))
    fleet.audit(client)


@ONE
@pytest.mark.parametrize("fault", ["none", "cut", "black hole"])
def test_many_circuits_in_one_pipeline_over_a_slow_network(
    fleet: Fleet, client: redis.Redis, proxy: Proxy, fault: str
) -> None:
    """They are under way together; when it breaks in their midst, each has its own account."""
    names = [f"c{number}" for number in range(200)]
    fleet.start(1, LASTING, url=proxy.url, SLOW_FLUSH=600_000)
    for name in names:
        fleet.do("breaker", circuit=name, policy=LASTING)
    fleet.do("flush")
    proxy.latency = proxy.lag = 0.05
    for name in names:
        fleet.do("succeed", circuit=name, count=2)
    if fault == "none":
        fleet.do("flush")
    else:
        rule = proxy.cut("report") if fault == "cut" else proxy.swallow("report", times=1)
        rule.after = 100
        with pytest.raises(AssertionError, match="StoreUnavailable"):
            fleet.do("flush")
        assert rule.hits == 1
    proxy.clear()
    proxy.latency = proxy.lag = 0.0
    fleet.until_agreed(client, names[-1])
    dropped = sum(fleet.audit(client, name)["dropped"] for name in names)
    counted = sum(fleet.totals(client, name)["calls"] for name in names)
    assert (dropped, counted) == (0, 400) if fault == "none" else dropped == 400
    assert 0 < counted <= 400  # Those before the fault were carried out.


@ONE
def test_a_store_that_comes_and_goes(fleet: Fleet, client: redis.Redis, proxy: Proxy) -> None:
    """Refused connections, again and again, while an open circuit's probes are due."""
    policy = {"open_interval": 0.15, "success_threshold": 2}
    fleet.start(2, policy, url=proxy.url)
    fleet.trip(client)
    fleet.do("hammer", threads=1, hold=0.01, outcome="failure")
    for _ in range(6):
        proxy.refuse()
        until(lambda: all(look["degraded"] for look in fleet.do("look")), "degraded")
        proxy.connect()
        until(lambda: not any(look["degraded"] for look in fleet.do("look")), "they are back")
    fleet.do("rest")
    recovers(fleet)
    fleet.until_agreed(client)
    fleet.audit(client)


@ONE
def test_a_reset_is_what_the_client_sees(server: Server, proxy: Proxy) -> None:
    """The proxy itself: behind a port it resets, and does not merely end, a connection."""
    with Server.external(proxy.url).client(protocol=2) as through:
        assert through.ping()
        proxy.cut("ECHO")
        with pytest.raises(redis.ConnectionError, match="reset"):
            through.echo("x")
        assert through.ping()
