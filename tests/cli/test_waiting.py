"""outbox list, replay, purge: on files that clients have written while Redis was away."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed_breaker.fallback.outbox import Outbox
from distributed_breaker.services import Services
from scripts.servers import Server
from tests.cache.conftest import settings
from tests.cli.conftest import Breakers

pytestmark = pytest.mark.servers("valkey")
NAME = "api.cache"


@pytest.fixture
def cache_server(own_server: Callable[..., Server]) -> Server:
    return own_server(args=["--appendonly", "yes"])


@pytest.fixture
def file(cache_server: Server, tmp_path: Path) -> Path:
    """Of a service with three changes that wait; nobody looks after them any more."""
    file = tmp_path / "breakers.json"
    file.write_text(json.dumps(settings(cache_server, tmp_path, timeout=60)))
    services = Services(file, environ={})
    client = services.client("cache", "api")
    cache_server.kill()
    client.set("secret", "value")  # type: ignore[attr-defined]
    client.increment("list", 2)  # type: ignore[attr-defined]
    client.set("other", 1)  # type: ignore[attr-defined]
    services.close()
    return file


def test_list(file: Path, breakers: Breakers) -> None:
    said = breakers("outbox", "list", "--config", str(file))
    assert said.code == 0
    assert said.lines[0].startswith(f"{NAME}: 3 wait, 0 parked (")
    assert len(said.lines) == 4
    assert "nightscan:secret waits attempts=0" in said.out
    assert "value" not in said.out
    found = breakers("outbox", "list", "--config", str(file), "--json").json["outboxes"][NAME]
    assert [entry["kind"] for entry in found["entries"]] == ["set", "increment", "set"]
    assert found["waiting"] == 3
    assert "value" not in json.dumps(found)
    few = breakers("outbox", "list", "--config", str(file), "--limit", "1", "--json").json
    assert len(few["outboxes"][NAME]["entries"]) == 1


def test_replay(file: Path, breakers: Breakers, cache_server: Server) -> None:
    said = breakers("outbox", "replay", "--config", str(file))
    assert (said.code, said.out) == (1, f"{NAME}: 0 carried out, 3 still wait\n")
    cache_server.restart(empty=False)
    with cache_server.client(decode_responses=True) as raw:
        raw.lpush("nightscan:list", 1)
        said = breakers("outbox", "replay", "--config", str(file), "--service", "api", "--json")
        assert said.code == 0, said
        assert said.json == {"outboxes": {NAME: {"carried_out": 2, "waiting": 0}}}
        assert raw.mget("nightscan:secret", "nightscan:other") == ['"value"', "1"]
        listed = breakers("outbox", "list", "--config", str(file), "--parked")
        assert "increment nightscan:list parked" in listed.out
        assert "WRONGTYPE" in listed.out
        raw.delete("nightscan:list")
        assert breakers("outbox", "replay", "--config", str(file), "--parked").code == 0
        assert raw.get("nightscan:list") == "2"


def test_replay_needs_only_the_packages_of_what_waits(
    file: Path, breakers: Breakers, cache_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned: a service with a database ended it where SQLAlchemy is not installed."""
    content = json.loads(file.read_text())
    path = str(file.parent / "writes.db")
    content["services"]["api"]["database"] = {"url": "sqlite:///x.db", "outbox_path": path}
    file.write_text(json.dumps(content))
    cache_server.restart(empty=False)
    monkeypatch.setitem(sys.modules, "distributed_breaker.clients.database", None)
    said = breakers("outbox", "replay", "--config", str(file))
    assert said.code == 0, said
    assert "api.database: 0 carried out, 0 still wait" in said.out
    with contextlib.closing(Outbox(path)) as outbox:
        outbox.add("api.database", "write", {})
    said = breakers("outbox", "replay", "--config", str(file))
    assert said.code == 64
    assert "api.database: a database needs the package" in said.err


@pytest.mark.parametrize(("words", "left"), [(["--all"], 0), (["--id", "1"], 2), (["--parked"], 3)])
def test_purge(file: Path, breakers: Breakers, words: list[str], left: int) -> None:
    said = breakers("outbox", "purge", "--config", str(file), "--service", "api", *words)
    assert (said.code, said.out) == (0, f"{NAME}: {3 - left} thrown away\n")
    listed = breakers("outbox", "list", "--config", str(file), "--json").json
    assert listed["outboxes"][NAME]["waiting"] == left


def test_wrong_usage(file: Path, breakers: Breakers) -> None:
    assert breakers("outbox", "purge", "--config", str(file), "--service", "api").code == 64
    assert breakers("outbox", "purge", "--config", str(file), "--all").code == 64
    said = breakers("outbox", "list", "--config", str(file), "--service", "nobody")
    assert said.code == 64
    assert "there are: api" in said.err


def test_a_file_that_cannot_be_read(file: Path, breakers: Breakers, tmp_path: Path) -> None:
    outbox = tmp_path / "outbox.db"
    for path in tmp_path.glob("outbox.db*"):
        path.unlink()
    outbox.mkdir()
    said = breakers("outbox", "list", "--config", str(file))
    assert said.code == 1
    assert str(outbox) in said.err


def test_nothing_has_ever_waited(cache_server: Server, breakers: Breakers, tmp_path: Path) -> None:
    file = tmp_path / "breakers.json"
    file.write_text(json.dumps(settings(cache_server, tmp_path / "new")))
    said = breakers("outbox", "list", "--config", str(file))
    assert said.code == 0
    assert "0 wait, 0 parked" in said.out
    assert breakers("outbox", "replay", "--config", str(file)).code == 0
