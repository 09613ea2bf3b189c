"""The configuration file, its overlay and the environment: what comes out, and what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import Policy
from distributed_breaker.alert_keys import Alerts, Channel, Rule
from distributed_breaker.config import ConfigurationError, load, schema, shown
from distributed_breaker.sections import KINDS, SECTIONS, Service, Settings
from scripts import keys

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config" / "circuit_breakers.json"
Write = Callable[..., Path]

GUIDE = """{
  "settings": {
    "enabled": true,
    "monitoring_enabled": true,
    "default_failure_threshold": 5,
    "default_timeout": 60.0,
    "environment": "production"
  },
  "services": {
    "web_app": {
      "enabled": true,
      "database": {
        "read_timeout": 2.0,
        "write_timeout": 5.0,
        "failure_threshold": 3
      },
      "cache": {
        "redis_host": "localhost",
        "redis_port": 6379,
        "enable_memory_fallback": true
      }
    }
  }
}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the file, or with ``overlay`` the one of an environment."""

    def write(values: Any, overlay: str = "") -> Path:
        name = f"breakers.{overlay}.json" if overlay else "breakers.json"
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / "breakers.json"

    return write


def problems(path: Path, **arguments: Any) -> list[tuple[str, str]]:
    """What is wrong, as (path, message)."""
    arguments.setdefault("environ", {})
    with pytest.raises(ConfigurationError) as caught:
        load(path, **arguments)
    return [(p.path, p.message) for p in caught.value.problems]


# ---------------------------------------------------------------------------- what comes out


def test_the_guides_file_loads_byte_for_byte(write: Write) -> None:
    loaded = load(write(GUIDE), environ={})
    values = loaded.configuration
    database = values.services["web_app"].database
    assert database is not None
    assert (database.read_timeout, database.write_timeout) == (2.0, 5.0)
    assert (database.failure_threshold, database.timeout, database.success_threshold) == (3, 60, 3)
    assert list(values.circuits()) == [
        "web_app.database.read",
        "web_app.database.write",
        "web_app.cache",
    ]
    assert values.redis_url == "redis://localhost:6379/0"


def test_the_shipped_file_has_all_services_with_their_parts() -> None:
    values = load(SHIPPED, environ={}).configuration
    parts = {
        name: [kind for kind in KINDS if getattr(service, kind) is not None]
        for name, service in values.services.items()
    }
    assert parts == {
        "web_app": ["database", "cache", "http"],
        "api_v1": ["database", "cache", "http", "ml"],
        "celery_workers": ["database", "cache", "http", "ml"],
        "ml_prediction": ["cache", "ml"],
        "notification_service": ["database", "http"],
    }
    http = values.services["celery_workers"].http
    assert http is not None
    assert (http.connect_timeout, http.read_timeout, http.total_timeout) == (3, 30, 60)
    assert (http.failure_threshold, http.timeout, http.max_retries) == (3, 180, 3)
    assert http.of_type("ml_api").base_url == "http://localhost:8002"
    assert http.of_type("ml_api").timeout == 180, "a type has what its section says"
    ml = values.services["ml_prediction"].ml
    assert ml is not None
    assert (ml.failure_threshold, ml.timeout, ml.inference_timeout) == (2, 300, 30)


@pytest.mark.parametrize("environment", ["development", "staging", "production"])
def test_every_shipped_environment_loads(environment: str) -> None:
    loaded = load(SHIPPED, environment=environment, environ={})
    assert loaded.configuration.settings.environment == environment
    assert len(loaded.files) == (1 if environment == "production" else 2)


def test_the_shipped_schema_is_current() -> None:
    assert keys.SCHEMA.read_text("utf-8") == keys.schema_text(), "run: python -m scripts.keys"
    assert json.loads(keys.schema_text()) == schema()


def test_the_documented_keys_are_current() -> None:
    text = keys.DOCUMENT.read_text("utf-8")
    assert text == keys.document_text(text), "run: python -m scripts.keys"


def test_what_is_dumped_loads_back(write: Write) -> None:
    values = load(SHIPPED, environ={}).configuration
    again = load(write(values.model_dump(mode="json", by_alias=True)), environ={}).configuration
    assert again == values


def test_every_circuit_key_reaches_the_policy(write: Write) -> None:
    section = {
        "failure_threshold": 7, "timeout": 8.0, "success_threshold": 9, "failure_rate": 0.25,
        "window": 30.0, "minimum_calls": 11, "slow_call_duration": 1.5, "slow_call_rate": 0.75,
        "open_interval_max": 80.0, "backoff_multiplier": 3.0, "jitter": 0.2,
        "half_open_permits": 4, "permit_lease": 12.0, "quorum": 3,
    }  # fmt: skip
    settings = {"config_version": 6, "auto_recovery": False}
    path = write({"settings": settings, "services": {"s": {"ml": section}}})
    policy = load(path, environ={}).configuration.circuits()["s.ml"].policy
    own = dict(section, open_interval=section["timeout"], version=6, auto_recovery=False)
    del own["timeout"]
    assert policy == Policy(**own)
    assert all(own[key] != getattr(Policy(), key) for key in own)


# ---------------------------------------------------------------------------- precedence


def test_each_source_beats_those_before_it(write: Write) -> None:
    """Six sources: the defaults, settings.default_…, the file, the overlay, the environment, the
    caller."""

    def timeout(**arguments: Any) -> tuple[float, str]:
        arguments.setdefault("environ", {})
        loaded = load(path, **arguments)
        cache = loaded.configuration.services["s"].cache
        assert cache is not None
        key = "services.s.cache.redis_port"
        return (cache.redis_port, loaded.sources[key])

    path = write({"services": {"s": {"cache": {}}}})
    assert timeout() == (6379, "default")
    path = write({"services": {"s": {"cache": {"redis_port": 1}}}})
    assert timeout() == (1, str(path))
    write({"services": {"s": {"cache": {"redis_port": 2}}}}, overlay="staging")
    assert timeout(environment="staging") == (2, str(path.with_name("breakers.staging.json")))
    assert timeout(environ={"ENVIRONMENT": "staging"})[0] == 2
    environ = {"ENVIRONMENT": "staging", "REDIS_PORT": "3"}
    assert timeout(environ=environ) == (3, "REDIS_PORT")
    overrides = {"services": {"s": {"cache": {"redis_port": 4}}}}
    assert timeout(environ=environ, overrides=overrides) == (4, "argument")


def test_the_defaults_of_the_settings_speak_where_a_section_is_silent(write: Write) -> None:
    settings = {"default_failure_threshold": 6, "default_timeout": 7.0}
    settings["default_success_threshold"] = 8
    sections = {"http": {"timeout": 9.0}, "ml": {"failure_threshold": 4}, "database": {}}
    loaded = load(write({"settings": settings, "services": {"s": sections}}), environ={})
    service = loaded.configuration.services["s"]
    assert service.http is not None
    assert service.ml is not None
    found = [
        (c.failure_threshold, c.timeout, c.success_threshold) for c in (service.http, service.ml)
    ]
    assert found == [(6, 9.0, 8), (4, 7.0, 8)]
    assert loaded.sources["services.s.database.timeout"] == "settings.default_timeout"
    assert loaded.sources["services.s.http.timeout"].endswith("breakers.json")
    overlay = {"settings": {"default_timeout": 1.0}}
    write(overlay, overlay="test")
    changed = load(write({"settings": settings, "services": {"s": sections}}), environ={},
                   environment="test")  # fmt: skip
    database = changed.configuration.services["s"].database
    assert database is not None
    assert database.timeout == 1.0


def test_the_files_own_environment_chooses_the_overlay(write: Write) -> None:
    path = write({"settings": {"environment": "blue"}})
    write({"settings": {"namespace": "sky"}}, overlay="blue")
    write({"settings": {"namespace": "grass"}}, overlay="green")
    assert load(path, environ={}).configuration.settings.namespace == "sky"
    green = load(path, environ={"ENVIRONMENT": "green"}).configuration.settings
    assert (green.namespace, green.environment) == ("grass", "green")
    sky = load(path, environ={"ENVIRONMENT": "green"}, environment="blue").configuration.settings
    assert (sky.namespace, sky.environment) == ("sky", "blue")


def test_an_overlay_merges_objects_and_replaces_lists(write: Write) -> None:
    base = {"http": {"retry_on_status": [500, 502], "max_retries": 1}, "ml": {}}
    path = write({"services": {"s": base}})
    write({"services": {"s": {"http": {"retry_on_status": [503]}, "ml": None}}}, overlay="x")
    service = load(path, environ={}, environment="x").configuration.services["s"]
    assert service.http is not None
    assert (service.http.retry_on_status, service.http.max_retries) == ([503], 1)
    assert service.ml is None


@pytest.mark.parametrize(
    ("text", "on"),
    [("true", True), ("1", True), ("False", False), ("0", False), ("off", False), ("YES", True)],
)
def test_the_environment_switches_all_off_and_on(write: Write, text: str, on: bool) -> None:
    path = write({"settings": {"enabled": not on}, "services": {"s": {"ml": {}}}})
    loaded = load(path, environ={"CIRCUIT_BREAKERS_ENABLED": text})
    assert loaded.configuration.circuits()["s.ml"].enabled is on


def test_the_environment_names_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKER_CONFIG", str(write(GUIDE)))
    assert list(load().configuration.services) == ["web_app"]


REDIS = [
    ({"REDIS_HOST": "h"}, "redis://h:1/2", "redis://h:1/2"),
    ({"REDIS_HOST": "h", "REDIS_PORT": "7"}, "redis://h:7/2", "redis://h:7/2"),
    ({"REDIS_PASSWORD": "a@/b"}, "redis://:a%40%2Fb@file:1/2", "redis://:a%40%2Fb@file:1/2"),
    ({"REDIS_URL": "redis://u:1/3", "REDIS_HOST": "h"}, "redis://u:1/3", "redis://u:1/3"),
    (
        {"CIRCUIT_BREAKER_REDIS_URL": "redis://c:1/4", "REDIS_HOST": "h"},
        "redis://c:1/4",
        "redis://h:1/2",
    ),
    ({"CIRCUIT_BREAKER_REDIS_URL": "redis://c:1/4"}, "redis://c:1/4", "redis://file:1/2"),
    ({"REDIS_PORT": "7"}, "redis://file:7/2", "redis://file:7/2"),
    ({"REDIS_HOST": ""}, "redis://file:1/2", "redis://file:1/2"),
]


@pytest.mark.parametrize(("environ", "circuits", "cache"), REDIS)
def test_where_redis_is(write: Write, environ: dict[str, str], circuits: str, cache: str) -> None:
    section = {"redis_host": "file", "redis_port": 1, "redis_db": 2}
    values = load(write({"services": {"s": {"cache": section}}}), environ=environ).configuration
    assert values.redis_url == circuits
    found = values.services["s"].cache
    assert found is not None
    assert found.address == cache


def test_where_redis_is_without_caches(write: Write) -> None:
    path = write({"settings": {"redis_url": "redis://file:1/2"}, "services": {"s": {"ml": {}}}})
    environ = {"REDIS_HOST": "h", "REDIS_PORT": "7", "REDIS_PASSWORD": "a@/b"}
    assert load(path, environ=environ).configuration.redis_url == "redis://:a%40%2Fb@h:7/0"
    assert load(path, environ={}).configuration.redis_url == "redis://file:1/2"


def test_the_environment_beats_a_url_in_the_file(write: Write) -> None:
    path = write({"services": {"s": {"cache": {"redis_url": "redis://file:1/0"}}}})
    found = load(path, environ={"REDIS_HOST": "h"}).configuration.services["s"].cache
    assert found is not None
    assert found.address == "redis://h:6379/0"


def test_the_environment_names_the_model(write: Write) -> None:
    path = write({"services": {"a": {"ml": {"model_path": "/old"}}, "b": {"ml": {}, "http": {}}}})
    loaded = load(path, environ={"MODEL_PATH": "/new"})
    models = [
        service.ml and service.ml.model_path for service in loaded.configuration.services.values()
    ]
    assert models == ["/new", "/new"]
    assert loaded.sources["services.a.ml.model_path"] == "MODEL_PATH"


# ---------------------------------------------------------------------------- what is wrong


def test_five_mistakes_are_five_problems(write: Write) -> None:
    path = write({
        "settings": {"default_timeout": -1},
        "services": {
            "web_app": {"http": {"max_retry": 3, "connect_timeout": "2"}, "databse": {}},
            "api_v1": {"ml": {"failure_threshold": 0}},
        },
    })  # fmt: skip
    found = problems(path)
    assert [path for path, _ in found] == [
        "settings.default_timeout",
        "services.web_app.http.connect_timeout",
        "services.web_app.http.max_retry",
        "services.web_app.databse",
        "services.api_v1.ml.failure_threshold",
    ]
    said = dict(found)
    assert said["services.web_app.http.max_retry"] == "unknown key; did you mean 'max_retries'?"
    assert said["services.web_app.databse"] == "unknown key; did you mean 'database'?"
    assert said["services.web_app.http.connect_timeout"].endswith("not '2'")


def test_mistakes_below_service_types_are_problems_of_their_own(write: Write) -> None:
    types = {"pay": {"timout": 3, "max_retries": "x"}, "mail": {"open_interval_max": 1}}
    found = problems(write({"services": {"web": {"http": {"service_types": types}}}}))
    below = "services.web.http.service_types."
    assert [path.removeprefix(below) for path, _ in found] == [
        "pay.max_retries", "pay.timout", "mail",
    ]  # fmt: skip
    assert dict(found)[below + "pay.timout"] == "unknown key; did you mean 'timeout'?"


def test_a_problem_names_the_file_that_has_it(write: Write) -> None:
    path = write({"services": {"s": {"http": {"max_retries": -1}}}})
    write({"services": {"s": {"http": {"read_timeout": 0}}}}, overlay="x")
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ={"REDIS_PORT": "many", "ENVIRONMENT": "x"},
             overrides={"services": {"s": {"cache": {}}}})  # fmt: skip
    files = {p.path: Path(p.file).name for p in caught.value.problems}
    assert files["services.s.http.max_retries"] == "breakers.json"
    assert files["services.s.http.read_timeout"] == "breakers.x.json"
    assert "breakers.json: services.s.http.max_retries:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"settings": {"enabled": true, "enabled": false}}', "has a key twice: enabled"),
        ('{"settings": {"default_timeout": NaN}}', "is not JSON: NaN"),
        ('{"services": []}', "dictionary"),
        ('{"services": {"s": 3}}', "dictionary"),
        ('{"services": {"s": {"ml": true}}}', "dictionary"),
        ('{"services": {"a.b": {}}}', "a name has"),
        ('{"settings": {"namespace": "a b"}}', "is not allowed"),
        ('{"settings": {"redis_url": "http://x"}}', "unknown scheme"),
        ('{"settings": {"environment": "../x"}}', "letters, digits"),
        ('{"services": {"s": {"http": {"base_url": "/x"}}}}', "http://"),
        ('{"services": {"s": {"ml": {"half_open_permits": 9}}}}', "half_open_permits"),
        ('{"services": {"s": {"ml": {"open_interval_max": 9}}}}', "open_interval_max"),
        ('{"services": {"a": {"cache": {}}, "b": {"cache": {"redis_port": 1}}}}', "several Redis"),
        ('{"version": 1}', "unknown key"),
    ],
)  # fmt: skip
def test_what_cannot_be_used(write: Write, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        load(write(text), environ={})


def test_where_json_is_broken(write: Write) -> None:
    with pytest.raises(ConfigurationError, match=r"breakers\.json:3:1: is not JSON"):
        load(write('{\n"a": 1,\n}'), environ={})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.json: there is no such file"):
        load(tmp_path / "none.json", environ={})


def test_secrets_are_never_shown(write: Write) -> None:
    section = {"redis_password": 5, "redis_url": "redis://:hunter2@h:port/0"}
    with pytest.raises(ConfigurationError) as caught:
        load(write({"services": {"s": {"cache": section}}}), environ={})
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.problems)
    assert shown("services.s.cache.redis_password", "hunter2") == "***"
    assert shown("settings.redis_url", "redis://:hunter2@h:1/0") == "redis://h:1/0"
    assert shown("services.s.http.max_retries", 3) == 3
    good = load(write({"services": {"s": {"cache": {"redis_password": "hunter2"}}}}), environ={})
    assert "hunter2" not in repr(good.configuration)


def test_every_key_has_a_description() -> None:
    def keys(model: Any) -> list[str]:
        return [name for name, field in model.model_fields.items() if not field.description]

    for model in (*SECTIONS.values(), Settings, Alerts, Channel, Rule, Service):
        assert keys(model) == []
