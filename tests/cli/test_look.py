"""What the command shows of a fleet of real processes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from scripts.servers import Server
from tests.cli.conftest import Breakers, on_terminal, start
from tests.fleet.harness import CIRCUIT, Fleet
from tests.fleet.process import BOUND, until

pytestmark = pytest.mark.servers("valkey")

There = tuple[str, ...]


@pytest.fixture
def open_fleet(fleet: Fleet, client: redis.Redis) -> Fleet:
    fleet.start(2)
    fleet.do("succeed")
    fleet.do("flush")  # From now on both count as active.
    fleet.trip(client)
    return fleet


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://127.0.0.1:{probe.getsockname()[1]}/0"


# ---------------------------------------------------------------------------- status


def test_the_exit_codes_of_status(
    fleet: Fleet, client: redis.Redis, there: There, nobody: str, breakers: Breakers
) -> None:
    fleet.start(2)
    said = breakers("status", *there)
    assert (said.code, said.lines[0].split()[1]) == (0, "healthy")
    fleet.trip(client)
    said = breakers("status", *there)
    assert (said.code, said.lines[0].split()[1]) == (1, "unhealthy")
    assert breakers("release", CIRCUIT, *there).code == 0  # It is not forced: nothing happens.
    breakers("force-open", CIRCUIT, *there)
    breakers("release", CIRCUIT, *there)
    said = breakers("status", *there)
    assert (said.code, said.lines[0].split()[1]) == (2, "degraded")
    said = breakers("status", "--url", nobody)
    assert (said.code, said.out) == (3, "")


def test_a_dead_redis_is_one_clear_sentence(nobody: str, breakers: Breakers) -> None:
    for words in (
        ["status"], ["metrics"], ["reset"], ["monitor"], ["explain", "a"], ["force-open", "a"],
        ["force-closed", "a"], ["release", "a"],
    ):  # fmt: skip
        said = breakers(*words, "--url", nobody)
        assert (said.code, said.out) == (3, ""), words
        assert re.fullmatch(
            r"Redis at redis://127\.0\.0\.1:\d+/0 can't be reached: .*\.\n", said.err
        )
        as_json = breakers(*words, "--url", nobody, "--json")
        assert (as_json.code, as_json.err) == (3, said.err)
        assert as_json.json["error"] in said.err


def test_a_redis_that_hangs(own_server: Callable[..., Server], breakers: Breakers) -> None:
    server = own_server()
    server.pause()
    said = breakers("status", "--url", server.url)
    server.resume()
    assert said.code == 3
    assert "does not answer in time" in said.err


def test_no_password_is_shown(server: Server, breakers: Breakers) -> None:
    url = server.url.replace("unix://", "unix://ann:hunter2@")
    for words in (["status"], ["doctor"], ["doctor", "--json"]):
        said = breakers(*words, "--url", url)
        assert said.code == 3
        assert "hunter2" not in said.out + said.err


def test_status_in_a_pipe_is_plain(open_fleet: Fleet, there: There, breakers: Breakers) -> None:
    said = breakers("status", *there)
    summary, line = said.lines
    assert said.out.isascii()
    assert summary.split()[2:] == ["total=1", "healthy=0", "degraded=0", "unhealthy=1"]
    _, name, state, status, *facts = line.split()
    assert (name, state, status) == (CIRCUIT, "open", "unhealthy")
    assert {fact.partition("=")[0] for fact in facts} >= {"fleet", "since", "next", "cause"}
    assert "BrokenError" in line


def test_status_as_json(open_fleet: Fleet, there: There, breakers: Breakers) -> None:
    found = breakers("status", *there, "--json").json
    circuit = found["circuit_breakers"][CIRCUIT]
    assert (found["overall_status"], circuit["state"]) == ("unhealthy", "open")
    assert circuit["since"] < circuit["next_attempt_time"]
    assert circuit["last_trip"]["cause"] == "run"
    assert circuit["last_trip"]["detail"]["error"] == "BrokenError"


def test_circuits_that_only_the_configuration_knows(
    server: Server, configure: Callable[..., Path], breakers: Breakers
) -> None:
    path = configure({"web_app": {"cache": {}}, "off": {"enabled": False, "cache": {}}})
    where = ("--config", str(path), "--url", server.url)
    said = breakers("status", *where)
    assert said.code == 0
    assert [line.split()[1:3] for line in said.lines[1:]] == [
        ["off.cache", "disabled"], ["web_app.cache", "closed"],
    ]  # fmt: skip
    assert "called=never" in said.lines[2]


def test_a_service_is_matched_exactly(
    server: Server, configure: Callable[..., Path], breakers: Breakers
) -> None:
    path = configure({"web_app": {"cache": {}, "http": {}}, "web_app_v2": {"cache": {}}})
    where = ("--config", str(path), "--url", server.url, "--json")
    found = breakers("status", "--service", "web_app", *where).json
    assert set(found["circuit_breakers"]) == {"web_app.cache", "web_app.http"}
    found = breakers("metrics", "--circuit", "web_app_v2.cache", *where).json
    assert set(found["circuit_breakers"]) == {"web_app_v2.cache"}
    for words, known in (
        (("--service", "web"), ["web_app", "web_app_v2"]),
        (("--circuit", "web_app"), ["web_app.cache", "web_app.http", "web_app_v2.cache"]),
    ):
        said = breakers("status", *words, *where)
        assert (said.code, said.json["known"]) == (64, known)
        assert all(name in said.err for name in known)
    assert breakers("status", "-s", "a", "-c", "b", *where).code == 64


# ---------------------------------------------------------------------------- where Redis is


def test_options_beat_the_environment_and_that_the_file(
    server: Server, configure: Callable[..., Path], nobody: str, breakers: Breakers
) -> None:
    path = str(configure({}, redis_url=nobody))
    there = {"CIRCUIT_BREAKER_REDIS_URL": server.url}
    assert breakers("status", "--config", path).code == 3
    assert breakers("status", "--config", path, **there).code == 0
    assert breakers("status", CIRCUIT_BREAKER_CONFIG=path, **there).code == 0
    assert breakers("status", "--config", path, "--url", nobody, **there).code == 3
    assert breakers("status", **there).code == 0
    assert breakers("status", REDIS_HOST="127.0.0.1", REDIS_PORT="1").code == 3
    said = breakers("status")
    assert said.code == 64
    assert "--url" in said.err


def test_a_broken_file_keeps_nobody_from_looking(
    server: Server, namespace: str, configure: Callable[..., Path], breakers: Breakers
) -> None:
    path = str(configure({}, enabld=True))
    said = breakers("status", "--config", path, "--url", server.url)
    assert (said.code, said.out) == (64, ""), "an empty namespace would have looked healthy"
    where = ("--config", path, "--url", server.url, "--namespace", namespace)
    said = breakers("status", "--json", *where)
    assert said.code == 0
    assert "enabld" in said.json["configuration"]["problem"]
    assert "enabld" in said.err


# ---------------------------------------------------------------------------- metrics


def test_metrics_of_a_fleet(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    fleet.start(2)
    fleet.do("succeed", count=20)
    fleet.do("flush")
    fleet.trip(client)
    fleet.do("attempt")
    fleet.do("flush")
    said = breakers("metrics", *there, "--json")
    assert said.code == 0, "metrics are no judgement"
    circuit = said.json["circuit_breakers"][CIRCUIT]
    assert circuit["successful_requests"] == 40
    assert circuit["rejected_requests"] >= 2
    assert circuit["total_requests"] == circuit["rejected_requests"] + fleet.totals(client)["calls"]
    assert circuit["state_transitions"]["to_open"] == 1
    assert 0 < circuit["p50_response_time"] <= circuit["p99_response_time"]
    assert said.json["manager_info"]["total_circuits"] == 1
    (line,) = breakers("metrics", *there).lines
    assert f" {CIRCUIT} state=open " in line
    assert "successful_requests=40" in line


# ---------------------------------------------------------------------------- explain


def test_explain_an_open_circuit(open_fleet: Fleet, there: There, breakers: Breakers) -> None:
    said = breakers("explain", CIRCUIT, *there)
    assert said.code == 1
    for part in (
        f"{CIRCUIT} is open since", "bad outcomes in a row (run)", "BrokenError",
        "active processes: 2", "The next probe is allowed at", "Last errors:", "Reporters:",
        "History, newest first:", "closed -> open  run",
    ):  # fmt: skip
        assert part in said.out, part
    found = breakers("explain", CIRCUIT, *there, "--json").json
    assert found["last_trip"]["reporters"] == 2
    assert found["last_trip"]["window"]["failures"] >= 5
    assert found["policy"]["failure_threshold"] == 5
    assert [entry["to"] for entry in found["history"]] == ["open", "closed"]
    assert found["errors"][0]["detail"]["error"] == "BrokenError"


def test_explain_an_override(open_fleet: Fleet, there: There, breakers: Breakers) -> None:
    words = ("--reason", "moving house", "--actor", "ann")
    breakers("force-open", CIRCUIT, *there, *words, "--ttl", "60")
    said = breakers("explain", CIRCUIT, *there)
    assert said.code == 1
    assert "an operator forced it open (forced_open): ann: moving house" in said.out
    assert "The override ends at" in said.out
    breakers("force-closed", CIRCUIT, *there)
    said = breakers("explain", CIRCUIT, *there)
    assert said.code == 2
    assert "until an operator releases it" in said.out
    breakers("reset", "--circuit", CIRCUIT, *there)
    said = breakers("explain", CIRCUIT, *there)
    assert said.code == 0
    assert "is closed since" in said.out


def test_explain_what_is_not_there(fleet: Fleet, there: There, breakers: Breakers) -> None:
    fleet.start(1)
    said = breakers("explain", "paymentz", *there)
    assert said.code == 64
    assert said.err == "there is no circuit 'paymentz'; there are: payments.\n"


def test_nobody_commands_a_terminal_through_the_store(
    fleet: Fleet, there: There, breakers: Breakers
) -> None:
    fleet.start(1)
    evil = "\x1b]0;owned\x07\x1b[2J\nfake line"
    breakers("force-open", CIRCUIT, *there, "--reason", evil)
    for words in (["status"], ["explain", CIRCUIT], ["monitor", "-n", "1"]):
        said = breakers(*words, *there)
        assert "\x1b" not in said.out
        assert "\nfake line" not in said.out
        assert "fake line" in said.out


# ---------------------------------------------------------------------------- monitor


def test_monitor_in_a_pipe(open_fleet: Fleet, there: There, breakers: Breakers) -> None:
    said = breakers("monitor", "--interval", "0.1", "--count", "2", *there)
    assert said.code == 1
    assert [line.split()[1] for line in said.lines] == ["unhealthy", CIRCUIT] * 2
    lines = breakers("monitor", "-i", "0.1", "-n", "2", "--json", *there).lines
    assert [json.loads(line)["overall_status"] for line in lines] == ["unhealthy"] * 2
    assert breakers("monitor", "--interval", "0", *there).code == 64


def lines_of(process: subprocess.Popen[str], seen: list[str]) -> Callable[[], list[str]]:
    """What a process has printed so far, without waiting."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)

    def read() -> list[str]:
        while select.select([pipe], [], [], 0)[0] and (part := os.read(pipe, 65_536)):
            seen.append(part.decode())
        return "".join(seen).splitlines()

    return read


def test_monitor_sees_changes_and_outages_until_ctrl_c(
    own_server: Callable[..., Server], namespace: str, fleet_of: Callable[[str], Fleet]
) -> None:
    server = own_server()
    fleet = fleet_of(server.url)
    fleet.start(1)
    words = ("--url", server.url, "--namespace", namespace, "--interval", "0.1")
    with start("monitor", *words) as process:
        read = lines_of(process, [])
        until(lambda: any(f" {CIRCUIT} closed healthy" in line for line in read()), "closed")
        assert fleet[0].do("operate", step="force_open") == ""
        until(lambda: any(f" {CIRCUIT} forced_open unhealthy" in x for x in read()), "forced")
        server.kill()
        until(lambda: any("shadow=deciding" in line for line in read()), "the store is gone")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=BOUND)
    assert (process.returncode, errors) == (0, "")


# ---------------------------------------------------------------------------- on a terminal


def test_status_on_a_terminal(open_fleet: Fleet, there: There) -> None:
    code, printed = on_terminal("status", *there)
    assert code == 1
    assert "🔴" in printed
    assert re.search(r"\x1b\[[\d;]*31m", printed), "red"
    code, printed = on_terminal("status", *there, NO_COLOR="1")
    assert "🔴" in printed
    assert not re.search(r"\x1b\[[\d;]*3[1-7]m", printed)


def test_monitor_on_a_terminal_is_live_and_ends_cleanly(open_fleet: Fleet, there: There) -> None:
    code, printed = on_terminal("monitor", "--interval", "60", *there, interrupt=CIRCUIT)
    assert code == 0
    assert "next probe" in printed
    assert "Traceback" not in printed
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l"), "the cursor is back"


def test_other_commands_on_a_terminal(open_fleet: Fleet, there: There) -> None:
    for words in (["metrics"], ["doctor"], ["explain", CIRCUIT], ["reset"]):
        code, printed = on_terminal(*words, *there)
        assert code in (0, 1), printed
        assert "Traceback" not in printed


def shape(value: Any) -> Any:
    """The keys of a JSON value, without the names of circuits."""
    if isinstance(value, dict):
        return {k if k != CIRCUIT else "*": shape(v) for k, v in value.items()}
    return None


def test_json_has_the_same_shape_whatever_the_state(
    fleet: Fleet, client: redis.Redis, there: There, breakers: Breakers
) -> None:
    """Programs find each key always; only evidence comes and goes."""
    fleet.start(2)
    words = (["status"], ["metrics"], ["explain", CIRCUIT])
    before = [breakers(*w, *there, "--json").json for w in words]
    fleet.trip(client)
    after = [breakers(*w, *there, "--json").json for w in words]
    for old, new in zip(before, after, strict=True):
        for found in (old, new):
            circuit = found.get("circuit_breakers", {CIRCUIT: found})[CIRCUIT]
            circuit.pop("last_trip", None)
            circuit.pop("detail", None)
        assert shape(old) == shape(new)
