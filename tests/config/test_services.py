"""From a configuration to clients and circuits, and changes of the file while they are in use."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.config import ConfigurationError
from distributed_breaker.services import Services, UnknownService, current, initialize, shut_down
from scripts.servers import Server
from tests.unit.clock import wait_until

BASE: dict[str, Any] = {
    "settings": {"redis_url": "memory://", "config_version": 1, "default_failure_threshold": 3},
    "services": {
        "web_app": {
            "database": {},
            "cache": {"timeout": 5.0},
            "http": {"service_types": {"a": {}}},
        },
        "web_app_v2": {"cache": {}},
        "ml_prediction": {"ml": {}},
    },
}


class File:
    """A configuration file that a test changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(json.dumps(BASE))
        self.write()

    def set(self, dotted: str, value: Any) -> None:
        *keys, last = dotted.split(".")
        into = self.values
        for key in keys:
            into = into[key]
        into[last] = value
        self.write()

    def write(self, text: str = "") -> None:
        """As deployments do it: a new file takes the place of the old one."""
        new = self.path.with_suffix(".new")
        new.write_text(text or json.dumps(self.values), "utf-8")
        os.replace(new, self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "breakers.json")


@pytest.fixture
def made() -> Iterator[list[Services]]:
    made: list[Services] = []
    yield made
    for services in made:
        services.close()


@pytest.fixture
def start(file: File, made: list[Services]) -> Callable[..., Services]:
    """Another process that has loaded the file, as far as one process can stand for several."""

    def start(**arguments: Any) -> Services:
        arguments.setdefault("environ", {})
        made.append(Services(file.path, **arguments))
        return made[-1]

    return start


def lose() -> None:
    """What counts for every kind of client."""
    raise redis.ConnectionError("lost")


def fail(client: Any, times: int) -> None:
    for _ in range(times):
        with pytest.raises(redis.ConnectionError):
            client.call(lose)


# ---------------------------------------------------------------------------- clients


def test_the_same_part_is_the_same_object_from_many_threads(start: Callable[..., Services]) -> None:
    services, barrier = start(), threading.Barrier(32)
    found: list[int] = []

    def get() -> None:
        barrier.wait()
        for part in ("", "a", "b"):
            found.append(id(services.client("http", "web_app", part)))

    threads = [threading.Thread(target=get) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 96
    assert len(set(found)) == 3


def test_what_circuits_the_parts_have(start: Callable[..., Services]) -> None:
    services = start()
    names = {
        client.name: [circuit.name for circuit in client.circuits.values()]
        for client in (
            services.client("database", "web_app"),
            services.client("cache", "web_app"),
            services.client("http", "web_app", "a"),
            services.client("ml", "ml_prediction"),
        )
    }
    assert names == {
        "web_app.database": ["web_app.database.read", "web_app.database.write"],
        "web_app.cache": ["web_app.cache"],
        "web_app.http.a": ["web_app.http.a"],
        "ml_prediction.ml": ["ml_prediction.ml"],
    }


def test_a_client_guards(start: Callable[..., Services]) -> None:
    client = start().client("cache", "web_app")
    assert client.call(str, 5) == "5"
    fail(client, 3)
    with pytest.raises(CircuitBreakerOpenException) as caught, client.guard():
        pass
    assert caught.value.circuit == "web_app.cache"
    assert 4.9 < caught.value.retry_after <= 5.6, "the section's timeout"


async def test_a_client_guards_coroutines(start: Callable[..., Services]) -> None:
    async def fine() -> str:
        return "fine"

    assert await start().client("ml", "ml_prediction").call_async(fine) == "fine"


def test_what_a_later_caller_says_is_honoured(start: Callable[..., Services]) -> None:
    services = start()
    client = services.client("http", "web_app")
    services.client("http", "web_app", base_url="http://one")
    assert client.explicit == {"base_url": "http://one"}
    services.client("http", "web_app", base_url=None)
    assert client.explicit == {"base_url": "http://one"}
    services.client("http", "web_app", base_url="http://two")
    assert client.explicit == {"base_url": "http://two"}


def test_an_unknown_service_is_told_the_known_ones(start: Callable[..., Services]) -> None:
    with pytest.raises(UnknownService, match=r"'web'.* web_app, web_app_v2, ml_prediction"):
        start().client("cache", "web")
    with pytest.raises(UnknownService, match=r"'ml_prediction' has no section 'http' .*only ml"):
        start().client("http", "ml_prediction")


@pytest.mark.parametrize("how", ["variable", "setting", "service"])
def test_switched_off_everything_passes(
    start: Callable[..., Services], file: File, how: str
) -> None:
    if how == "setting":
        file.set("settings.enabled", False)
    elif how == "service":
        file.set("services.web_app.enabled", False)
    environ = {"CIRCUIT_BREAKERS_ENABLED": "false"} if how == "variable" else {}
    services = start(environ=environ)
    client = services.client("cache", "web_app")
    fail(client, 10)
    assert client.call(str, 5) == "5"
    assert client.breaker.snapshot().source == "disabled"
    other = services.client("cache", "web_app_v2").breaker.snapshot().source
    assert other == ("shared" if how == "service" else "disabled")


# ---------------------------------------------------------------------------- changes


def test_a_change_of_the_file_is_in_force_without_losing_anything(
    start: Callable[..., Services], file: File
) -> None:
    services = start()
    client = services.client("cache", "web_app")
    fail(client, 2)
    file.set("services.web_app.cache.failure_threshold", 4)
    wait_until(lambda: client.section.failure_threshold == 4)
    fail(client, 1)
    assert client.breaker.state == "closed"
    fail(client, 1)
    assert client.breaker.state == "open"
    file.set("services.web_app.cache.failure_threshold", 9)
    wait_until(lambda: client.section.failure_threshold == 9)
    assert client.breaker.state == "open"
    assert services.client("cache", "web_app") is client


def test_a_file_that_cannot_be_used_changes_nothing_and_is_said_once(
    start: Callable[..., Services], file: File, caplog: pytest.LogCaptureFixture
) -> None:
    services = start()
    before = services.configuration
    file.write("{")
    wait_until(lambda: services.status.problem)
    assert "is not JSON" in services.status.problem
    assert services.configuration is before
    assert services.reload() is False
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    file.set("settings.config_version", 2)
    wait_until(lambda: services.status.version == 2)
    assert services.status.problem == ""


def test_an_overlay_that_appears_and_goes_is_noticed(
    start: Callable[..., Services], file: File
) -> None:
    services = start(environment="x")
    overlay = file.path.with_name("breakers.x.json")
    overlay.write_text('{"settings": {"config_version": 7}}', "utf-8")
    wait_until(lambda: services.status.version == 7)
    assert services.status.files == (str(file.path), str(overlay))
    overlay.unlink()
    wait_until(lambda: services.status.version == 1)


def test_switched_off_and_on_while_in_use(start: Callable[..., Services], file: File) -> None:
    client = start().client("cache", "web_app")
    fail(client, 3)
    assert client.breaker.state == "open"
    file.set("settings.enabled", False)
    wait_until(lambda: client.breaker.disabled)
    assert client.call(str, 5) == "5"
    file.set("settings.enabled", True)
    wait_until(lambda: not client.breaker.disabled)
    assert client.breaker.state == "open"


def test_a_section_that_is_gone_stays_in_use(
    start: Callable[..., Services], file: File, caplog: pytest.LogCaptureFixture
) -> None:
    services = start()
    client = services.client("ml", "ml_prediction")
    del file.values["services"]["ml_prediction"]
    file.set("settings.config_version", 2)
    wait_until(lambda: "ml_prediction.ml is gone from the configuration" in caplog.text)
    assert services.status.version == 2
    assert client.call(str, 5) == "5"


def test_a_reload_under_load_loses_no_outcome(start: Callable[..., Services], file: File) -> None:
    services = start()
    client, done = services.client("cache", "web_app"), threading.Event()
    made = [0] * 4

    def work(number: int) -> None:
        while not done.is_set():
            client.call(int)
            made[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for version in range(2, 22):
        file.values["services"]["web_app"]["cache"]["slow_call_duration"] = 60.0 + version
        file.set("settings.config_version", version)
        assert services.reload()
        assert services.status.version == version
    done.set()
    for thread in threads:
        thread.join()
    assert client.breaker.snapshot().totals["calls"] == sum(made)


# ---------------------------------------------------------------------------- a fleet


@pytest.mark.servers("valkey")
def test_the_higher_version_wins_and_old_processes_cannot_put_it_back(
    start: Callable[..., Services], file: File, server: Server
) -> None:
    """A rolling deploy, over a real server."""
    file.set("settings.redis_url", server.url)
    file.set("settings.namespace", f"rolling{time.time_ns()}")
    overlay = file.path.with_name("breakers.new.json")
    overlay.write_text('{"settings": {"config_version": 2, "default_failure_threshold": 7}}')
    old = start().client("cache", "web_app_v2")
    assert old.call(str, 5) == "5"

    def in_force(client: Any) -> int:
        client.call(int)
        client.breaker._link.flush().result(5)
        policy = client.breaker.snapshot().policy
        return int(policy.failure_threshold)

    assert in_force(old) == 3
    new = start(environment="new").client("cache", "web_app_v2")
    assert in_force(new) == 7
    wait_until(lambda: in_force(old) == 7)
    late = start().client("cache", "web_app_v2")
    assert in_force(late) == 7
    assert in_force(new) == 7
    assert late.breaker.snapshot().policy_mismatch is True
    assert new.breaker.snapshot().policy_mismatch is False


# ---------------------------------------------------------------------------- the getters' own


def test_the_getters_load_when_they_are_first_wanted(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut_down()
    monkeypatch.setenv("CIRCUIT_BREAKER_CONFIG", str(file.path))
    try:
        assert current() is current()
        assert current().configuration.settings.config_version == 1
        first = current()
        assert initialize(file.path) is current()
        assert current() is not first
        with pytest.raises(ConfigurationError):
            initialize(file.path.with_name("none.json"))
        assert current().configuration.settings.config_version == 1, "nothing has changed"
    finally:
        shut_down()


def test_a_forked_child_goes_on_looking(start: Callable[..., Services], file: File) -> None:
    services = start()
    client = services.client("cache", "web_app")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writing, b"ready")
            deadline = time.monotonic() + 20
            while client.section.failure_threshold != 8 and time.monotonic() < deadline:
                time.sleep(0.01)
            code = 0 if client.section.failure_threshold == 8 else 2
        finally:
            os._exit(code)
    assert os.read(reading, 5) == b"ready"
    file.set("services.web_app.cache.failure_threshold", 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_circuit_without_its_client(file: File, start: Callable[..., Services]) -> None:
    """It follows the file, and is the client's when that is made."""
    services = start()
    circuit = services.circuit("web_app.cache")
    assert services.circuit("web_app.cache") is circuit
    assert circuit.policy.open_interval == 5.0
    file.set("services.web_app.cache.timeout", 7.0)
    assert services.reload()
    assert circuit.policy.open_interval == 7.0
    assert services.client("cache", "web_app").breaker is circuit
    with pytest.raises(UnknownService, match=r"no circuit 'web_app\.mail': .*web_app\.cache"):
        services.circuit("web_app.mail")
