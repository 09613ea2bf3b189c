"""A user that lacks a right: said once, loudly; degraded where it must be; never raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from scripts.servers import Server
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet, Process, client_of, until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")
ADJUST = PATIENT

# What lua/README.md (section 14) tells people to grant.
RIGHTS = (
    "evalsha script|load hmget hset time publish xadd pexpire persist hget hgetall sadd smembers "
    "xrevrange subscribe ping"
).split()
USER, PASSWORD = "breaker", "pa55-w0rd"

QUICK = {"POLL": 300, "SLOW_FLUSH": 300}

# Without these no step can be carried out.
NEEDED = {"evalsha", "script|load", "hmget", "hset", "time"}
# They serve people who look at the fleet; the caller is told.
LOOKS = {"hgetall", "smembers", "xrevrange"}


def grant(client: redis.Redis, without: str = "", keys: str = "~cb:*", push: str = "&cb:*") -> None:
    rights = [f"+{right}" for right in RIGHTS if right != without]
    client.execute_command(
        "ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", keys, push, "-@all", *rights
    )


def url_of(server: Server) -> str:
    return server.url.replace("unix://", f"unix://{USER}:{PASSWORD}@")


@pytest.fixture
def limited(
    broken_server: Server, fleet_of: Callable[[str], Fleet]
) -> Iterator[tuple[Fleet, redis.Redis]]:
    """A fleet whose user has the granted rights, and a client that may do everything."""
    with client_of(broken_server) as client:
        yield fleet_of(url_of(broken_server)), client


def errors(process: Process) -> list[str]:
    return [line["text"] for line in process.do("logs") if line["level"] == "ERROR"]


def trips(fleet: Fleet) -> None:
    fleet.do("succeed", count=3)
    fleet.do("flush")  # Otherwise one's successes might arrive among the other's failures.
    fleet.do("fail", count=5)
    fleet.until_all("open")


def works_through(fleet: Fleet) -> None:
    """All that a fleet does in a day."""
    trips(fleet)
    assert fleet[0].do("operate", step="force_open") == ""
    fleet.until_all("forced_open")
    assert fleet[0].do("operate", step="release") == ""
    fleet.until_all("half_open")
    for number in (0, 1, 0):
        until(lambda n=number: fleet[n].do("attempt")["admitted"], "a probe")
    fleet.until_all("closed")


def test_the_granted_rights_are_enough(limited: tuple[Fleet, redis.Redis]) -> None:
    fleet, client = limited
    grant(client)
    fleet.start(2, {})
    works_through(fleet)
    assert fleet[0].do("fleet_snapshot") == {CIRCUIT: "closed"}
    assert fleet[0].do("snapshot")["fleet"]
    assert [errors(process) for process in fleet] == [[], []]
    assert client.sismember(f"cb:{fleet.namespace}:circuits", CIRCUIT)
    assert client.acl_log() == []


@pytest.mark.parametrize("right", RIGHTS)
def test_without_one_of_them(limited: tuple[Fleet, redis.Redis], right: str) -> None:
    fleet, client = limited
    grant(client, without=right)
    process, other = fleet.start(2, blank=True, **QUICK)
    said = fleet.open([process, other], {}, first="attempt")
    assert all(s["admitted"] for s in said)
    if right in NEEDED:
        until(lambda: all(look["degraded"] for look in fleet.do("look")), "both are degraded")
        for p in fleet:
            assert p.do("succeed", count=10) == {"admitted": 10, "rejected": 0}
            assert p.fail_until_refused() >= 5
            assert p.do("attempt")["source"] == "shadow"
        until(lambda: refused(client) >= 4, "attempts to return")
    else:
        fleet.until_agreed(client)
        # Without pushes each transition costs a poll.
        (trips if right in {"publish", "subscribe"} else works_through)(fleet)
        # Whoever looks at the fleet is told; the calls of all others are not concerned.
        for _ in range(3):
            process.do("fleet_snapshot")
            process.do("snapshot")
        assert not any(look["degraded"] for look in fleet.do("look"))
        assert process.do("operate", step="force_open") == ""
        fleet.until_all("forced_open")
    lines = errors(process)
    if right not in LOOKS:
        lines = lines or until(lambda: errors(process), "it is said")
        assert any(word in lines[0] for word in ("NOPERM", "CBREFUSED", right))
    # A missing TIME has two faces: inside the script and in polls.
    assert len(lines) <= (2 if right == "time" else 1), lines
    assert PASSWORD not in "".join(lines)
    grant(client)
    until(lambda: not any(look["degraded"] for look in fleet.do("look")), "the right was given")
    fleet.until_agreed(client)


def refused(client: redis.Redis) -> int:
    """How often the server has refused a command."""
    log: Any = client.acl_log()
    return sum(int(entry["count"]) for entry in log)


@pytest.mark.parametrize("right", ["hset", "evalsha"])
def test_a_right_that_is_taken_away_while_in_use(
    limited: tuple[Fleet, redis.Redis], right: str
) -> None:
    """A circuit that exists already answers a sync without writing: returning and being refused
    must not alternate, and nothing that was recorded may get lost by it."""
    fleet, client = limited
    grant(client)
    fleet.start(2, {"failure_threshold": 100_000})
    fleet.do("succeed", count=3)
    fleet.do("flush")
    fleet.do("logs")
    grant(client, without=right)
    client.client_kill_filter(_type="pubsub")
    fleet.do("hammer", threads=1, outcome="failure", pause=0.02)
    fleet.do("operate", step="force_closed", ttl=60)
    until(lambda: refused(client) >= 12, "it was refused again and again")
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    for process in fleet:
        assert len(errors(process)) <= 1
    grant(client)
    until(lambda: not any(look["degraded"] for look in fleet.do("look")), "the right was given")
    fleet.do("flush")
    accounts = fleet.do("conservation")
    assert all(a["recorded"] == a["flushed"] + a["dropped"] for a in accounts)
    # Some batches were refused; each refusal costs what was in it, so there must be few.
    assert all(a["dropped"] <= 20 for a in accounts), accounts


@pytest.mark.parametrize("what", ["keys", "channel"])
def test_other_keys_and_channels(limited: tuple[Fleet, redis.Redis], what: str) -> None:
    fleet, client = limited
    if what == "keys":
        grant(client, keys="~other:*")
    else:
        grant(client, push="&other:*")
    fleet.start(2, {}, synced=False, **QUICK)
    assert fleet.do("succeed", count=5) == [{"admitted": 5, "rejected": 0}] * 2
    if what == "keys":
        until(lambda: all(look["degraded"] for look in fleet.do("look")), "both are degraded")
    else:
        trips(fleet)
    for process in fleet:  # Publishing and subscribing are refused each on its own.
        assert len(errors(process)) <= 2
    grant(client)
    fleet.until_agreed(client)


def test_a_password_that_is_wrong(broken_server: Server, fleet_of: Callable[[str], Fleet]) -> None:
    with client_of(broken_server) as client:
        grant(client)
        client.execute_command("ACL", "SETUSER", USER, "resetpass", ">another")
        fleet = fleet_of(url_of(broken_server))
        (process,) = fleet.start(1, blank=True)
        (said,) = fleet.open([process], {}, first="attempt")
        assert said["admitted"]
        assert process.fail_until_refused() >= 5
        assert process.do("look")["down"] in ("WRONGPASS", "NOAUTH")
        until(lambda: refused(client) >= 3, "attempts to return")
        lines = errors(process)
        assert len(lines) == 1
        assert PASSWORD not in lines[0]
        grant(client)
        until(lambda: not process.do("look")["degraded"], "the password was mended")


def test_a_user_is_deleted_while_in_use(limited: tuple[Fleet, redis.Redis]) -> None:
    fleet, client = limited
    grant(client)
    fleet.start(2, {})
    fleet.do("succeed")
    fleet.do("flush")
    client.execute_command("ACL", "DELUSER", USER)
    fleet.do("fail")
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "both are degraded")
    assert fleet.do("succeed", count=5) == [{"admitted": 5, "rejected": 0}] * 2
    grant(client)
    fleet.until_agreed(client)


def test_a_password_that_is_rotated_while_in_use(limited: tuple[Fleet, redis.Redis]) -> None:
    """Connections that were let in go on; new ones are refused, which is said once, loudly.  What
    was open stays open, and when the password is right again, all come back."""
    fleet, client = limited
    grant(client)
    fleet.start(3, {})
    fleet.do("breaker", circuit="calm", policy=None)
    fleet.do("succeed", circuit="calm")
    fleet.trip(client)
    fleet.do("flush")
    client.execute_command("ACL", "SETUSER", USER, "resetpass", ">another")
    fleet.do("succeed", circuit="calm")
    fleet.do("flush")
    assert not any(look["degraded"] for look in fleet.do("look"))
    client.client_kill_filter(_type="normal", skipme=True)
    client.client_kill_filter(_type="pubsub")
    fleet.do("hammer", threads=1)
    until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")
    assert fleet.do("succeed", circuit="calm") == [{"admitted": 1, "rejected": 0}] * 3
    assert fleet.states() == ["open"] * 3
    until(lambda: refused(client) >= 12, "attempts to return")
    client.execute_command("ACL", "SETUSER", USER, f">{PASSWORD}")
    for circuit in (CIRCUIT, "calm"):
        fleet.until_agreed(client, circuit)
    done = fleet.do("rest")
    assert not any(said.get("admitted") for said in done)
    for process in fleet:
        lines = errors(process)
        assert len(lines) == 1, lines
        assert "WRONGPASS" in lines[0] or "NOAUTH" in lines[0]
        assert PASSWORD not in lines[0]
    for circuit in (CIRCUIT, "calm"):
        fleet.audit(client, circuit)
