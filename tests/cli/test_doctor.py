"""What the doctor finds on real servers, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker.monitoring import doctor
from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.cli.conftest import Breakers, Said
from tests.faults.test_rights import LOOKS, NEEDED, PASSWORD, RIGHTS, USER, grant, url_of
from tests.fleet.harness import CIRCUIT, Fleet, client_of
from tests.fleet.process import until

There = tuple[str, ...]


def verdicts(said: Said) -> dict[str, str]:
    return {finding["check"]: finding["verdict"] for finding in said.json["findings"]}


def finding(said: Said, check: str) -> dict[str, Any]:
    found: dict[str, Any] = next(f for f in said.json["findings"] if f["check"] == check)
    return found


def test_a_healthy_store(fleet: Fleet, there: There, breakers: Breakers) -> None:
    fleet.start(1)
    said = breakers("doctor", *there, "--json")
    assert (said.code, said.json["verdict"]) == (0, "ok"), said.out
    found = verdicts(said)
    assert {
        "server",
        "latency",
        "clock",
        "script",
        "eviction",
        "persistence",
        "replication",
    } <= set(found)
    assert set(found.values()) <= {"ok", "unknown"}
    lines = breakers("doctor", *there).lines
    assert any(line.startswith("ok server: ") for line in lines)


def test_it_knows_all_rights_and_what_they_are_for() -> None:
    assert set(doctor.MISSING) == set(RIGHTS)
    assert {right for right, loss in doctor.MISSING.items() if loss == doctor.STEPS} == NEEDED


@pytest.mark.parametrize("right", ["", *RIGHTS])
def test_rights_one_by_one(
    own_server: Callable[..., Server],
    fleet_of: Callable[[str], Fleet],
    breakers: Breakers,
    right: str,
) -> None:
    server = own_server()
    fleet = fleet_of(server.url)
    fleet.start(1)
    with client_of(server) as client:
        until(lambda: client.smembers(f"cb:{fleet.namespace}:circuits"), "its name is known")
        grant(client, without=right)
        said = breakers("doctor", "--url", url_of(server), "--namespace", fleet.namespace, "--json")
    denied = [check for check, v in verdicts(said).items() if v in ("warning", "problem")]
    wanted = [f"right {right}"] if right else []
    if right == "script|load":
        wanted = ["script", *wanted]
    assert denied == wanted
    assert said.code == (0 if not right else 1 if right in NEEDED else 2)
    if right:
        assert finding(said, f"right {right}")["advice"].endswith(f"+{right}")
    tried = [
        check for check, v in verdicts(said).items() if check.startswith("right") and v == "ok"
    ]
    # Without these the names of circuits are not known, and so no name can be added once more.
    unseen = 1 if right in LOOKS - {"xrevrange"} else 0
    if right == "time":
        unseen = 1
    assert len(tried) == len(RIGHTS) - bool(right) - unseen


@pytest.mark.servers("valkey", "redis8")
def test_nothing_is_changed(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    """Neither on an empty store nor beside running processes."""
    assert breakers("doctor", *there).code == 0
    keys: Any = client.keys(f"*{fleet.namespace}*")
    assert keys == []
    fleet.start(2)
    until(lambda: len(client.keys(f"*{fleet.namespace}*")) == 3, "circuit, log and name are there")
    before = client.hgetall(key_of(fleet.namespace, CIRCUIT))
    assert breakers("doctor", *there).code == 0
    assert client.hgetall(key_of(fleet.namespace, CIRCUIT)) == before
    assert len(client.keys(f"*{fleet.namespace}*")) == 3
    assert not any(line["level"] in ("WARNING", "ERROR") for p in fleet for line in p.do("logs"))


@pytest.mark.servers("valkey")
def test_policies_that_are_not_the_files(
    fleet: Fleet, client: redis.Redis, configure: Callable[..., Path], breakers: Breakers
) -> None:
    fleet.start(1, {"failure_threshold": 4, "version": 2}, circuit="web_app.cache")
    until(lambda: client.smembers(f"cb:{fleet.namespace}:circuits"), "its name is known")
    same = {"failure_rate": None, "open_interval_max": None, "jitter": 0.0, "failure_threshold": 4}

    def examined(version: int, **values: Any) -> Said:
        sections = {"web_app": {"cache": {**same, **values}}}
        path = str(configure(sections, config_version=version))
        return breakers("doctor", "--config", path, "--url", fleet.url, "--json")

    assert verdicts(examined(2))["policies"] == "ok"
    said = examined(1, failure_threshold=9)
    assert said.code == 2
    found = finding(said, "policy web_app.cache")
    assert found["verdict"] == "warning"
    assert "failure_threshold is 4, in the file 9" in found["found"]
    assert "bring this file up to date" in found["advice"]
    assert "are running" in finding(examined(3), "policy web_app.cache")["advice"]
    path = str(configure({"web_app": {"cache": {**same, "failure_threshold": 9}}}))
    said = breakers("config", "diff", "--config", path, "--url", fleet.url, "--json")
    assert said.code == 1
    assert said.json["differences"] == {
        "web_app.cache.failure_threshold": {"file": 9, "fleet": 4},
        "web_app.cache.version": {"file": 0, "fleet": 2},
    }


@pytest.mark.servers("valkey")
def test_eviction_and_a_replica(own_server: Callable[..., Server], breakers: Breakers) -> None:
    server = own_server(args=["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"])
    said = breakers("doctor", "--url", server.url, "--json")
    assert said.code == 2
    assert "noeviction" in finding(said, "eviction")["advice"]
    replica = own_server(args=["--replicaof", "127.0.0.1 1"])
    said = breakers("doctor", "--url", replica.url, "--json")
    assert said.code == 1
    assert verdicts(said)["server"] == verdicts(said)["replication"] == "problem"
    assert "primary" in finding(said, "server")["advice"]


@pytest.mark.servers("valkey")
def test_a_store_that_cannot_be_asked(server: Server, breakers: Breakers) -> None:
    nobody = "redis://127.0.0.1:1/0"
    said = breakers("doctor", "--url", nobody, "--json")
    assert (said.code, said.json["verdict"]) == (3, "unreachable")
    assert "host and port" in finding(said, "server")["advice"]
    wrong = url_of(server).replace(PASSWORD, "wrong")
    said = breakers("doctor", "--url", wrong)
    assert said.code == 3
    assert "user and password" in said.err
    assert USER not in said.err


@pytest.mark.servers("valkey")
def test_a_clock_that_differs(
    there: There, breakers: Breakers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.time, "time", lambda: 1_000_000_000.0)
    said = breakers("doctor", *there, "--json")
    assert said.code == 2
    assert "ahead" in finding(said, "clock")["found"]
    assert "NTP" in finding(said, "clock")["advice"]
