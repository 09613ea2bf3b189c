"""Examines a store, and what the fleet keeps in it: what is wrong, and what to do about it.

Everything is tried with the user's own rights and changes nothing that a process would notice.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from ..address import READ_TIMEOUT
from ..errors import StoreError
from ..fleet import Fleet
from ..nodes import Command
from ..policy import Numbers, Policy
from ..snapshot import Snapshot
from ..store import key_of, names_key, script, sha
from .report import Configured

CLOCK = 1.0  # s of difference that people would notice when they compare logs
SLOW = READ_TIMEOUT / 5  # s of a PING after which the bounded waits begin to hurt
PINGS = 5

# What lua/README.md, section 14, says of each right that is missing.
STEPS = "no step can be carried out: every process decides alone"
PUSHES = "transitions of others are heard by polls only, within 2 s"
LOOKS = "the fleet can't be looked at with this user"
MISSING = {
    "evalsha": STEPS,
    "script|load": STEPS,
    "hmget": STEPS,
    "hset": STEPS,
    "time": STEPS,
    "publish": PUSHES,
    "subscribe": PUSHES,
    "ping": PUSHES,
    "xadd": "no history is kept",
    "pexpire": "circuits that nobody uses any more stay for ever",
    "persist": "an override without an end is forgotten after seven days",
    "hget": "syncs are sent instead of polls, which costs more",
    "hgetall": LOOKS,
    "smembers": LOOKS,
    "xrevrange": "the history can't be read with this user",
    "sadd": "circuits work, but are not listed",
}


class Verdict(StrEnum):
    """What a finding means, the best first; ``UNKNOWN`` could not be looked at, and says so."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """One thing that was looked at: what was found, and what to do (empty when all is well)."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(
    fleet: Fleet, snapshots: Mapping[str, Snapshot] | None, configured: Mapping[str, Configured]
) -> Iterator[Finding]:
    """All findings, one after the other as they are made.

    Args:
        fleet: the store.
        snapshots: what it holds; None when the user may not see it.
        configured: what the configuration says; empty when there is none.

    Raises:
        StoreUnavailable: the store has gone meanwhile.
    """
    yield _version(fleet)
    yield _latency(fleet)
    yield _clock(fleet)
    yield _script(fleet)
    yield from _rights(fleet, snapshots or {})
    if snapshots is None:
        yield Finding("policies", Verdict.UNKNOWN, LOOKS, "see the rights")
    else:
        yield from _policies(snapshots, configured)
    yield from _server(fleet)


def unreachable(problem: str) -> Finding:
    """The one finding where the store cannot be asked."""
    for sign, advice in (
        ("WRONGPASS", "check user and password in the URL"),
        ("NOAUTH", "the server wants a password: put it into the URL"),
        ("NOPERM", "give the user the rights in lua/README.md, section 14"),
        ("CBANSWER", "something else than Redis answers there: check host and port"),
        ("does not answer", "see whether the server hangs, or a firewall drops packets"),
        ("", "see whether the server runs, and whether host and port are right"),
    ):
        if sign in problem:
            return Finding("server", Verdict.PROBLEM, problem, advice)
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------- the server


def _ask(fleet: Fleet, *words: str) -> Any:
    (answer,) = fleet.examine([Command("", words)])
    return answer


def _version(fleet: Fleet) -> Finding:
    hello = _ask(fleet, "HELLO")
    if isinstance(hello, list):
        hello = dict(zip(hello[::2], hello[1::2], strict=False))
    if not isinstance(hello, dict):
        return Finding("server", Verdict.UNKNOWN, f"{fleet.place} answers; version unknown")
    kind = f"{hello.get('server', 'server')} {hello.get('version', '?')}"
    mode, role = hello.get("mode", "?"), hello.get("role", "?")
    found = f"{kind} at {fleet.place} ({mode}, {role})"
    if role in ("replica", "slave") and mode != "cluster":
        advice = "this is a replica, which takes no step: give the address of its primary"
        return Finding("server", Verdict.PROBLEM, found, advice)
    return Finding("server", Verdict.OK, found)


def _latency(fleet: Fleet) -> Finding:
    took = []
    for _ in range(PINGS):
        start = time.perf_counter()
        _ask(fleet, "PING")  # A refusal takes as long.
        took.append(time.perf_counter() - start)
    middle = statistics.median(took)
    found = f"PING takes {middle * 1000:.1f} ms (median of {PINGS}, longest {max(took) * 1000:.1f})"
    if middle < SLOW:
        return Finding("latency", Verdict.OK, found)
    advice = (
        f"answers later than {READ_TIMEOUT * 1000:.0f} ms count as a lost store: use one nearer "
        f"to the processes, and see SLOWLOG and CPU there"
    )
    return Finding("latency", Verdict.WARNING, found, advice)


def _clock(fleet: Fleet) -> Finding:
    before = time.time()
    answer = _ask(fleet, "TIME")
    here = (before + time.time()) / 2
    if isinstance(answer, StoreError):
        return Finding("clock", Verdict.UNKNOWN, f"TIME is refused: {answer}", "see the rights")
    ahead = int(answer[0]) + int(answer[1]) / 1e6 - here
    found = f"the server's clock is {abs(ahead):.3f} s {'ahead' if ahead > 0 else 'behind'}"
    if abs(ahead) < CLOCK:
        return Finding("clock", Verdict.OK, found)
    advice = (
        "circuits don't mind (deadlines are kept as what remains), but times shown here and in "
        "logs do: let both machines follow NTP"
    )
    return Finding("clock", Verdict.WARNING, found, advice)


def _script(fleet: Fleet) -> Finding:
    answer = _ask(fleet, "SCRIPT", "LOAD", script())
    if answer == sha():
        return Finding("script", Verdict.OK, f"the script is loaded ({sha()[:8]})")
    advice = "give the user +script|load and +evalsha (see the rights)"
    return Finding("script", Verdict.PROBLEM, f"the script can't be loaded: {answer}", advice)


def _server(fleet: Fleet) -> Iterator[Finding]:
    """What the user must have +info for; a least-privilege user has not."""
    answer = _ask(fleet, "INFO")
    if isinstance(answer, StoreError):
        advice = (
            "let somebody with +info run this: maxmemory-policy should be noeviction, and "
            "persistence or a replica should outlive a restart"
        )
        found = "this user may not see them (INFO)"
        yield Finding("eviction, persistence, replication", Verdict.UNKNOWN, found, advice)
        return
    info = _info(answer)
    yield _eviction(info)
    yield _persistence(info)
    yield _replication(info)


def _info(answer: Any) -> dict[str, str]:
    if isinstance(answer, dict):
        return {str(name): str(value) for name, value in answer.items()}
    return dict(re.findall(r"^(\w+):(.*?)\r?$", str(answer), re.MULTILINE))


def _eviction(info: dict[str, str]) -> Finding:
    policy, limit = info.get("maxmemory_policy", "?"), info.get("maxmemory", "0")
    found = f"maxmemory-policy {policy}, maxmemory {info.get('maxmemory_human', limit)}"
    if policy == "noeviction" or limit == "0":
        return Finding("eviction", Verdict.OK, found)
    advice = (
        "circuits may be evicted, and come back only as far as running processes remember them: "
        "use noeviction, or a server of their own"
    )
    return Finding("eviction", Verdict.WARNING, found, advice)


def _persistence(info: dict[str, str]) -> Finding:
    aof = info.get("aof_enabled") == "1"
    failed = (
        info.get("rdb_last_bgsave_status") == "err" or info.get("aof_last_write_status") == "err"
    )
    saved = int(info.get("rdb_last_save_time", "0"))
    found = "append-only file on" if aof else "append-only file off"
    found += f", last snapshot {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(saved))}"
    if failed:
        advice = (
            "the last write to disk failed: look for space and rights where the server keeps it"
        )
        return Finding("persistence", Verdict.PROBLEM, found, advice)
    advice = ""
    if not aof:
        advice = (
            "after a restart running processes put open circuits back; totals and overrides that "
            "no process has heard of are lost: appendonly yes keeps them"
        )
    return Finding("persistence", Verdict.OK, found, advice)


def _replication(info: dict[str, str]) -> Finding:
    role, replicas = info.get("role", "?"), info.get("connected_slaves", "0")
    found = f"{'primary' if role == 'master' else 'replica'}, {replicas} replicas connected"
    link = info.get("master_link_status", "?")
    # In a cluster any node may have been asked, and steps go to the right one by themselves.
    if role == "master" or (info.get("cluster_enabled") == "1" and link == "up"):
        return Finding("replication", Verdict.OK, found)
    advice = "circuits are only changed on the primary: give its address, or the Sentinels'"
    return Finding("replication", Verdict.PROBLEM, f"{found}, link {link}", advice)


# ---------------------------------------------------------------------------- rights


def _rights(fleet: Fleet, snapshots: Mapping[str, Snapshot]) -> Iterator[Finding]:
    """Try each right of lua/README.md, section 14, in a way that changes nothing.

    Servers look at rights first, so a command that then fails of something else was permitted: an
    impossible number of keys, a missing value, a key that is not there.  (ACL DRYRUN would need a
    right of its own, which such a user does not have.)
    """
    key = key_of(fleet.namespace, "doctor.nothing")  # No circuit of this name is ever made.
    names = names_key(fleet.namespace)
    tried = {
        "evalsha": Command("", ("EVALSHA", sha(), "-1")),
        "script|load": Command("", ("SCRIPT", "LOAD", script())),
        "hmget": Command(key, ("HMGET", key, "h")),
        "hset": Command(key, ("HSET", key, "h", "v", "no value follows")),
        "time": Command("", ("TIME",)),
        # Processes take no notice of a circuit that they don't hold.
        "publish": Command("", ("PUBLISH", fleet.channel, "doctor.nothing")),
        "xadd": Command(key, ("XADD", key, "*", "f", "v", "no value follows")),
        "pexpire": Command(key, ("PEXPIRE", key, "1")),
        "persist": Command(key, ("PERSIST", key)),
        "hget": Command(key, ("HGET", key, "h")),
        "hgetall": Command(key, ("HGETALL", key)),
        "smembers": Command(names, ("SMEMBERS", names)),
        "xrevrange": Command(key, ("XREVRANGE", key, "+", "-", "COUNT", "1")),
        "ping": Command("", ("PING",)),
    }
    if snapshots:
        # It is there already.
        tried["sadd"] = Command(names, ("SADD", names, next(iter(snapshots))))
    answers = dict(zip(tried, fleet.examine(list(tried.values())), strict=True))
    answers["subscribe"] = _subscribed(fleet)
    for right, loss in MISSING.items():
        if right in answers:
            yield _right(right, loss, answers[right])
        else:
            found = "not tried, since no circuit of the store is known"
            yield Finding(f"right {right}", Verdict.UNKNOWN, found)


def _subscribed(fleet: Fleet) -> StoreError | None:
    try:
        fleet.hear()
    except StoreError as error:
        return error
    return None


def _right(right: str, loss: str, answer: Any) -> Finding:
    denied = isinstance(answer, StoreError) and "NOPERM" in str(answer)[:30]
    if not denied:
        return Finding(f"right {right}", Verdict.OK, "granted")
    verdict = Verdict.PROBLEM if loss == STEPS else Verdict.WARNING
    what = "&cb:* and " if right in ("publish", "subscribe") else "~cb:* and "
    needs = "" if right in ("time", "ping", "script|load") else what
    return Finding(f"right {right}", verdict, f"denied: {loss}", f"grant {needs}+{right}")


# ---------------------------------------------------------------------------- policies


def _policies(
    snapshots: Mapping[str, Snapshot], configured: Mapping[str, Configured]
) -> Iterator[Finding]:
    """Where the fleet's policy is not the file's."""
    if not configured:
        yield Finding("policies", Verdict.UNKNOWN, "there is no configuration to compare with")
        return
    compared = different = 0
    for name, wanted in configured.items():
        held = snapshots[name].policy if name in snapshots else None
        if held is None or not wanted.enabled:
            continue
        compared += 1
        differences = compare(held, wanted.policy)
        if differences:
            different += 1
            yield _mismatch(name, differences, held.version, wanted.policy.version)
    if not compared:
        yield Finding(
            "policies", Verdict.UNKNOWN, "the store holds no circuit of the configuration"
        )
    elif not different:
        found = f"the policies of {compared} circuits are the configuration's"
        yield Finding("policies", Verdict.OK, found)


def _mismatch(name: str, differences: dict[str, tuple[Any, Any]], held: int, file: int) -> Finding:
    words = [f"{field} is {a}, in the file {b}" for field, (a, b) in differences.items()]
    if held > file:
        advice = (
            f"the fleet has version {held}, this file {file}: bring this file up to date (or set "
            f"its config_version higher, to go back)"
        )
    else:
        advice = (
            "processes with another file, or the old one, are running: restart them, or raise "
            "config_version so that theirs can't come back"
        )
    return Finding(f"policy {name}", Verdict.WARNING, "; ".join(words), advice)


def compare(held: Policy, wanted: Policy) -> dict[str, tuple[Any, Any]]:
    """The shared numbers that differ, each as (held, wanted), in seconds and shares."""
    one, other = (Policy().with_numbers(policy.numbers) for policy in (held, wanted))
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in Numbers._fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
