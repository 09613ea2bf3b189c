"""What the command does to a fleet of real processes."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from distributed_breaker import CircuitBreakerRegistry, Policy, StoreUnavailable
from distributed_breaker import fleet as fleet_module
from distributed_breaker.fleet import Fleet as Outside
from distributed_breaker.store import key_of
from tests.cli.conftest import Breakers, on_terminal
from tests.faults.proxy import proxy_before
from tests.fleet.harness import CIRCUIT, Fleet
from tests.fleet.process import until

pytestmark = pytest.mark.servers("valkey")

There = tuple[str, ...]
CIRCUITS = ("web_app.cache", "web_app.http", "web_app_v2.cache")


@pytest.fixture
def sick(fleet: Fleet, client: redis.Redis) -> Fleet:
    """Two processes whose three circuits are all open."""
    fleet.start(2, circuit=CIRCUITS[0])
    for name in CIRCUITS[1:]:
        fleet.do("breaker", circuit=name)
    for name in CIRCUITS:
        until(lambda n=name: fleet.found(client, n) is not None, "it is in the store")
        assert fleet[0].do("operate", step="force_open", circuit=name) == ""
        until(lambda n=name: states(fleet, n) == {"forced_open"}, "all are open")
    return fleet


def states(fleet: Fleet, circuit: str) -> set[str]:
    return {look["state"] for look in fleet.do("look", circuit=circuit)}


# ---------------------------------------------------------------------------- reset


def test_reset_of_a_service_closes_its_circuits_in_other_processes(
    sick: Fleet, there: There, breakers: Breakers
) -> None:
    said = breakers("reset", "--service", "web_app", *there)
    assert said.code == 0
    assert said.lines == [f"{name}: forced_open -> closed" for name in CIRCUITS[:2]]
    for name in CIRCUITS[:2]:
        until(lambda n=name: states(sick, n) == {"closed"}, "closed everywhere")
    assert states(sick, "web_app_v2.cache") == {"forced_open"}


def test_reset_of_a_tripped_circuit(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    fleet.start(2)
    fleet.trip(client)
    said = breakers("reset", "--circuit", CIRCUIT, *there, "--reason", "mended", "--json")
    assert said.json["circuits"][CIRCUIT] == {
        "before": "open", "after": "closed", "changed": True, "error": None,
    }  # fmt: skip
    assert said.json["summary"] == {"total": 1, "done": 1, "failed": 0}
    fleet.until_all("closed")
    entry = fleet.log(client)[-1]
    assert entry["cause"] == "reset"
    assert f'"actor": "{getpass.getuser()}@{socket.gethostname()}"' in entry["detail"]
    assert '"reason": "mended"' in entry["detail"]
    assert fleet[0].do("attempt")["admitted"]


def test_reset_of_all(sick: Fleet, there: There, breakers: Breakers) -> None:
    said = breakers("reset", *there, "--json")
    assert set(said.json["circuits"]) == set(CIRCUITS)
    for name in CIRCUITS:
        until(lambda n=name: states(sick, n) == {"closed"}, "closed everywhere")


def test_reset_of_nothing_is_an_error(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    said = breakers("reset", *there)
    assert (said.code, said.out) == (64, "")
    assert "there is no circuit" in said.err
    fleet.start(1)
    said = breakers("reset", "--service", "pay", *there)
    assert said.code == 64
    assert said.err == "no circuit belongs to a service 'pay'; there are: payments.\n"
    said = breakers("reset", "--circuit", "pay", *there)
    assert said.code == 64
    assert said.err == "there is no circuit 'pay'; there are: payments.\n"
    assert len(fleet.log(client)) == 1, "nothing was touched"


def test_a_circuit_that_the_store_has_lost_is_made_closed(
    fleet: Fleet, client: redis.Redis, configure: Callable[..., Path], breakers: Breakers
) -> None:
    """Running processes may still remember it as open; they hear of the newer generation."""
    fleet.start(2, circuit="web_app.cache")
    fleet.trip(client, "web_app.cache")
    for process in fleet:
        process.freeze()  # or they may put it back before it is made
    client.delete(key_of(fleet.namespace, "web_app.cache"), f"cb:{fleet.namespace}:circuits")
    path = configure({"web_app": {"cache": {"failure_threshold": 7}}})
    said = breakers("reset", "--config", str(path), "--url", fleet.url)
    assert said.code == 0, said
    for process in fleet:
        process.thaw()
    until(lambda: states(fleet, "web_app.cache") == {"closed"}, "closed everywhere")
    stored = fleet.stored(client, "web_app.cache")
    assert stored.policy is not None
    assert stored.policy.failure_threshold == 7, "the file's, since the store had none"
    assert client.sismember(f"cb:{fleet.namespace}:circuits", "web_app.cache")


def test_a_circuit_that_is_switched_off_is_not_made(
    fleet: Fleet, client: redis.Redis, configure: Callable[..., Path], breakers: Breakers
) -> None:
    path = configure({"web_app": {"cache": {}}, "off": {"enabled": False, "cache": {}}})
    where = ("--config", str(path), "--url", fleet.url)
    assert breakers("reset", *where).lines == ["web_app.cache: not in the store -> closed"]
    assert breakers("reset", "--service", "off", *where).code == 64
    assert fleet.found(client, "off.cache") is None


def test_a_live_line_does_not_mix_with_what_is_printed(sick: Fleet, there: There) -> None:
    code, printed = on_terminal("reset", *there)
    assert code == 0
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", printed)
    for name in CIRCUITS:
        assert re.search(rf"[\r\n]{name}: forced_open -> closed\r\n", shown), printed


def test_the_fleets_policy_stays(
    fleet: Fleet, client: redis.Redis, configure: Callable[..., Path], breakers: Breakers
) -> None:
    fleet.start(1, circuit="web_app.cache")
    before = fleet.stored(client, "web_app.cache").policy
    path = configure({"web_app": {"cache": {"failure_threshold": 7}}}, config_version=9)
    for words in (["reset"], ["force-open", "web_app.cache"], ["release", "web_app.cache"]):
        assert breakers(*words, "--config", str(path), "--url", fleet.url).code == 0
    assert fleet.stored(client, "web_app.cache").policy == before


def test_a_partial_failure_says_which(
    sick: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    key = key_of(sick.namespace, "web_app.http")
    client.delete(key)
    client.set(key, "not a hash")
    found = breakers("status", *there, "--json").json["circuit_breakers"]["web_app.http"]
    assert (found["status"], found["cause"]) == ("degraded", "unreadable")
    assert "WRONGTYPE" in breakers("explain", "web_app.http", *there).out
    said = breakers("reset", *there)
    assert said.code == 1
    assert "web_app.cache: forced_open -> closed" in said.lines
    assert any(line.startswith("web_app.http: failed: WRONGTYPE") for line in said.lines)
    assert said.err == "1 of 3 failed: web_app.http.\n"
    until(lambda: states(sick, "web_app.cache") == {"closed"}, "the others are closed")


def test_a_store_that_goes_half_way(
    fleet: Fleet, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was carried out, what is unknown and what was not tried are told apart."""
    monkeypatch.setattr(fleet_module, "AT_ONCE", 1)
    with proxy_before(fleet.url) as proxy, Outside(proxy.url, fleet.namespace) as outside:
        steps = outside.reset(dict.fromkeys(["a", "b", "c"]))
        first = next(steps)
        assert (first.circuit, first.after, first.error) == ("a", "closed", "")
        proxy.cut("EVALSHA")  # Once: the third would be carried out.
        second, third = steps
    assert "unknown" in second.error
    assert third.error
    assert "unknown" not in third.error, "it was not tried"
    assert fleet.found(client, "c") is None


# ---------------------------------------------------------------------------- overrides


def test_overrides_and_their_end(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    fleet.start(2)
    words = ("--reason", "maintenance", "--actor", "ann", "--ttl", "60")
    assert breakers("force-open", CIRCUIT, *there, *words).code == 0
    fleet.until_all("forced_open")
    assert 0 < fleet.stored(client).duration <= 60_000
    assert '"actor": "ann"' in fleet.log(client)[-1]["detail"]
    assert breakers("release", CIRCUIT, *there).lines == [f"{CIRCUIT}: forced_open -> half_open"]
    fleet.until_all("half_open")
    assert breakers("force-closed", CIRCUIT, *there).code == 0
    fleet.until_all("forced_closed")
    assert fleet.stored(client).duration == -1
    assert breakers("release", CIRCUIT, *there).lines == [f"{CIRCUIT}: forced_closed -> closed"]
    fleet.until_all("closed")
    said = breakers("release", CIRCUIT, *there)
    assert (said.code, said.lines) == (0, [f"{CIRCUIT}: closed, nothing to release"])


@pytest.mark.parametrize("command", ["force-open", "force-closed", "release"])
def test_a_slip_of_the_keyboard_makes_no_circuit(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers, command: str
) -> None:
    fleet.start(1)
    said = breakers(command, "paymentz", *there)
    assert said.code == 64
    assert "payments" in said.err
    assert fleet.found(client, "paymentz") is None
    assert breakers(command, *there).code == 64


@pytest.mark.parametrize("ttl", ["0", "-5", "soon", "1e12", "nan"])
def test_a_ttl_that_cannot_be(fleet: Fleet, there: There, breakers: Breakers, ttl: str) -> None:
    fleet.start(1)
    said = breakers("force-open", CIRCUIT, "--ttl", ttl, *there)
    assert said.code == 64, said
    assert fleet.states() == ["closed"]


# ---------------------------------------------------------------------------- from outside


def test_outside_and_inside_see_the_same(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(2, {})
    fleet.trip(client)
    with (
        CircuitBreakerRegistry.from_url(fleet.url, fleet.namespace) as registry,
        Outside(fleet.url, fleet.namespace) as outside,
    ):
        inside, seen = registry.snapshot(timeout=10.0), outside.snapshot()
    assert set(inside) == set(seen) == {CIRCUIT}
    one, other = inside[CIRCUIT], seen[CIRCUIT]
    for name in type(one).__slots__:
        if name != "retry_after":  # Time has passed between them.
            assert getattr(one, name) == getattr(other, name), name
    assert other.ends_at is not None
    assert other.since is not None
    assert other.ends_at - other.since == pytest.approx(60.0)
    assert other.cause == "run"
    assert other.detail["error"] == "BrokenError"


def test_looking_from_outside_leaves_no_trace(fleet: Fleet, client: redis.Redis) -> None:
    fleet.start(1)
    fleet.do("succeed", count=3)
    fleet.do("flush")
    before = client.hgetall(key_of(fleet.namespace, CIRCUIT))
    with Outside(fleet.url, fleet.namespace) as outside:
        outside.snapshot()
        outside.history(CIRCUIT)
    assert client.hgetall(key_of(fleet.namespace, CIRCUIT)) == before


def test_memory_cannot_be_seen_from_outside() -> None:
    with pytest.raises(ValueError, match="one process"):
        Outside("memory://")


def test_a_step_that_was_never_sent(namespace: str) -> None:
    with Outside("redis://127.0.0.1:1/0", namespace) as outside:
        steps = outside.reset({"a": Policy()})
        with pytest.raises(StoreUnavailable, match="can't be reached") as caught:
            next(steps)
    assert "unknown" not in str(caught.value)
