"""The commands that look at the configuration file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed_breaker import config
from tests.cli.conftest import ROOT, Breakers

SHIPPED = str(ROOT / "config" / "circuit_breakers.json")


def test_show_says_where_each_value_came_from(
    configure: Callable[..., Path], breakers: Breakers
) -> None:
    path = configure({"web_app": {"cache": {"timeout": 7}}}, "c.json", default_failure_threshold=9)
    overlay = path.with_name("c.staging.json")
    overlay.write_text(json.dumps({"services": {"web_app": {"cache": {"timeout": 8}}}}))
    words = ("config", "show", "--config", str(path))
    base = breakers(*words, "--json").json["values"]
    merged = breakers(*words, "-e", "staging", "--json").json
    timeout = "services.web_app.cache.timeout"
    assert base[timeout] == {"value": 7, "source": str(path)}
    assert merged["values"][timeout] == {"value": 8, "source": str(overlay)}
    assert merged["files"] == [str(path), str(overlay)]
    assert merged["environment"] == "staging"
    threshold = merged["values"]["services.web_app.cache.failure_threshold"]
    assert threshold == {"value": 9, "source": "settings.default_failure_threshold"}
    assert merged["values"]["settings.default_timeout"]["source"] == "default"
    lines = breakers(*words, "-e", "staging").lines
    assert any(line.startswith(f"{timeout} = 8") and str(overlay) in line for line in lines)
    found = breakers(*words, "--json", CIRCUIT_BREAKERS_ENABLED="false").json["values"]
    assert found["settings.enabled"] == {"value": False, "source": "CIRCUIT_BREAKERS_ENABLED"}


def test_secrets_are_hidden(configure: Callable[..., Path], breakers: Breakers) -> None:
    services = {"web_app": {"cache": {"redis_password": "hunter2"}}}
    path = str(configure(services, redis_url="redis://ann:hunter2@host/0"))
    other = str(configure(services, "o.json", redis_url="redis://ann:hunter3@host/0"))
    for words in (["show"], ["show", "--json"], ["diff", other], ["validate"]):
        said = breakers("config", *words, "--config", path)
        assert "hunter" not in said.out + said.err, words


def test_validate(configure: Callable[..., Path], breakers: Breakers) -> None:
    good = str(configure({"web_app": {"cache": {}}}, "good.json"))
    said = breakers("config", "validate", good)
    assert (said.code, said.err) == (0, "")
    assert "1 services, 1 circuits" in said.out
    bad = str(configure({"web_app": {"cache": {"timeot": 1}}}, "bad.json", default_timeout=-1))
    said = breakers("config", "validate", bad)
    assert (said.code, said.out) == (1, "")
    assert "services.web_app.cache.timeot" in said.err
    assert "settings.default_timeout" in said.err
    found = breakers("config", "validate", "--config", bad, "--json")
    assert (found.code, found.json["valid"]) == (1, False)
    assert {problem["path"] for problem in found.json["problems"]} == {
        "services.web_app.cache.timeot", "settings.default_timeout",
    }  # fmt: skip
    assert set(found.json["problems"][0]) == {"file", "path", "value", "message"}
    for words in (["show"], ["diff", good]):
        assert breakers("config", *words, "--config", bad).code in (1, 64)


def test_schema(breakers: Breakers) -> None:
    assert breakers("config", "schema").json == config.schema()


def test_diff_of_files_and_environments(configure: Callable[..., Path], breakers: Breakers) -> None:
    one = str(configure({"web_app": {"cache": {"timeout": 7}}}, "one.json"))
    two = str(configure({"web_app": {"cache": {"timeout": 8}}}, "two.json"))
    said = breakers("config", "diff", two, "--config", one)
    assert said.code == 1
    assert said.lines == ["services.web_app.cache.timeout: here 7.0, there 8.0"]
    said = breakers("config", "diff", one, "--config", one)
    assert (said.code, said.lines) == (0, ["No difference."])
    said = breakers("config", "diff", "--against", "staging", "--config", SHIPPED, "--json")
    assert said.code == 1
    assert said.json["differences"]["settings.environment"]["there"] == "staging"
    assert breakers("config", "diff").code == 64


@pytest.mark.parametrize("words", [["show"], ["validate"]])
def test_no_file(breakers: Breakers, words: list[str]) -> None:
    said = breakers("config", *words)
    assert said.code == 1
    assert "no such file" in said.err
