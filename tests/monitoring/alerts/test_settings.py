"""settings.alerts: what is refused, and where; and that nobody sees a channel's URL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distributed_breaker.alert_keys import Alerts, Channel, Rule
from distributed_breaker.cli.app import app
from distributed_breaker.config import ConfigurationError, load
from distributed_breaker.monitoring.alert_channels import ChannelError, sender
from tests.monitoring.alerts.receiver import Receiver

SECRET = "s3cret"
URL = f"https://hooks.example/services/{SECRET}"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**alerts: Any) -> Path:
        path = tmp_path / "breakers.json"
        path.write_text(json.dumps({"settings": {"alerts": alerts}}))
        return path

    return write


def hook(**more: Any) -> dict[str, Any]:
    return {"channels": {"ops": {"type": "webhook", "url": URL, **more}}}


@pytest.mark.parametrize(
    ("alerts", "where", "what"),
    [
        (hook(urll="x"), "channels.ops.urll", "did you mean 'url'"),
        ({"channel": {}}, "alerts.channel", "did you mean 'channels'"),
        ({"rules": {"r": {"chanels": None}}}, "rules.r.chanels", "did you mean 'channels'"),
        (hook(url="ftp://host/x"), "channels.ops.url", "must begin with http"),
        (hook(url=f"https://ann:{SECRET}@host/"), "channels.ops.url", "Authorization header"),
        (hook(url="${A B}"), "channels.ops.url", "must begin with http"),
        (hook(headers={"a b": "c"}), "channels.ops.headers.a b", "pattern"),
        (hook(headers={"a": "c\n"}), "channels.ops.headers.a", "pattern"),
        (hook(timeout=31), "channels.ops.timeout", "less than or equal to 30"),
        (hook(command=["x"]), "channels.ops", "type webhook has no command"),
        ({"channels": {"ops": {"type": "slack"}}}, "channels.ops", "type slack needs a url"),
        ({"channels": {"c": {"type": "command"}}}, "channels.c", "needs a command"),
        ({"channels": {"l": {"type": "log", "url": URL}}}, "channels.l", "has no url"),
        ({"channels": {"l": {"type": "mail"}}}, "channels.l.type", "'webhook', 'slack'"),
        ({"rules": {"r": {"channels": ["ops"]}}}, "alerts", "names 'ops', which is no channel"),
        ({"rules": {"r": {"on": ["opened"]}}}, "rules.r.on.0", "'open'"),
        ({"rules": {"r": {"title": "$circit"}}}, "rules.r.title", "has no field $circit"),
        ({"rules": {"r": {"text": "100 $ more"}}}, "rules.r.text", "begins no field"),
        ({"fallback_share": 0}, "alerts.fallback_share", "greater than 0"),
    ],
)
def test_what_cannot_be_used(write: Write, alerts: dict[str, Any], where: str, what: str) -> None:
    path = write(**alerts)
    with pytest.raises(ConfigurationError) as caught:
        load(path, environ={})
    assert f"{path}: settings." in str(caught.value)
    assert where in str(caught.value)
    assert what in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value.problems)


def test_the_defaults_tell_nobody() -> None:
    assert Alerts().channels == {}
    assert Alerts().rules == {"all": Rule()}


def test_urls_and_headers_are_hidden_and_variables_are_not(write: Write) -> None:
    headers = {"Authorization": f"Bearer {SECRET}", "X-Key": "${KEY}"}
    path = write(
        channels={
            "ops": {"type": "webhook", "url": URL, "headers": headers},
            "chat": {"type": "slack", "url": "${SLACK}"},
        }
    )
    for words in (["show"], ["show", "--json"], ["validate"]):
        said = CliRunner().invoke(app, ["config", *words, "--config", str(path)])
        assert said.exit_code == 0
        assert SECRET not in said.output
    shown = CliRunner().invoke(app, ["config", "show", "--config", str(path)]).output
    assert 'channels.ops.url = "***"' in shown
    assert 'channels.ops.headers.Authorization = "***"' in shown
    assert 'channels.ops.headers.X-Key = "${KEY}"' in shown
    assert 'channels.chat.url = "${SLACK}"' in shown
    assert SECRET not in repr(load(path, environ={}).configuration)


def test_variables_that_are_missing_or_wrong() -> None:
    channel = Channel(type="webhook", url="${HOOK}", headers={"Key": "a ${KEY}"})
    with pytest.raises(ChannelError, match=r"channels\.ops\.url: the variable HOOK is not set"):
        sender("ops", channel, {"HOOK": "", "KEY": SECRET})
    with pytest.raises(ChannelError, match=r"headers\.Key: the variable KEY is not set"):
        sender("ops", channel, {"HOOK": URL})
    for wrong in (SECRET, f"ftp://h/{SECRET}", f"https://h:x/{SECRET}", f"https://h/ {SECRET}",
                  f"https://ann:{SECRET}@h/"):  # fmt: skip
        with pytest.raises(ChannelError, match="make no URL") as caught:
            sender("ops", channel, {"HOOK": wrong, "KEY": SECRET})
        assert SECRET not in str(caught.value)
    assert sender("ops", channel, {"HOOK": URL, "KEY": SECRET})


def test_alerts_test(
    write: Write, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", receiver.url)
    path = write(
        channels={
            "works": {"type": "webhook", "url": "${HOOK}"},
            "chat": {"type": "slack", "url": "${HOOK}"},
            "unset": {"type": "webhook", "url": "${UNSET_VARIABLE}"},
            "away": {"type": "webhook", "url": f"http://127.0.0.1:1/{SECRET}"},
            "slow": {"type": "command", "command": ["sh", "-c", "sleep 600; :"], "timeout": 0.2},
            "false": {"type": "command", "command": ["false"]},
            "none": {"type": "command", "command": [str(tmp_path / "none")]},
            "run": {"type": "command", "command": ["sh", "-c", f"cat > {tmp_path}/told"]},
            "log": {"type": "log"},
        }
    )
    said = CliRunner().invoke(app, ["alerts", "test", "--config", str(path)])
    assert said.exit_code == 1
    assert SECRET not in said.output
    lines = dict(line.split(": ", 1) for line in said.stdout.splitlines())
    assert lines["away (webhook)"] == "failed: cannot be reached: Connection refused"
    assert "the variable UNSET_VARIABLE is not set" in lines["unset (webhook)"]
    assert lines["slow (command)"] == "failed: has not ended within 0.2 s"
    assert lines["false (command)"] == "failed: ended with 1"
    assert lines["none (command)"] == "failed: cannot be started: No such file or directory"
    for name in ("works (webhook)", "chat (slack)", "run (command)", "log (log)"):
        assert lines[name].startswith("delivered in ")
    assert receiver.got[0]["kind"] == "test"
    assert "this is a test" in receiver.got[1]["text"]
    assert json.loads((tmp_path / "told").read_text())["event"] == "firing"

    one = ["alerts", "test", "--config", str(path), "--json", "--channel"]
    found = CliRunner().invoke(app, [*one, "works"])
    assert found.exit_code == 0
    assert json.loads(found.stdout)["channels"]["works"]["delivered"] is True
    assert CliRunner().invoke(app, [*one, "nobody"]).exit_code == 64
    none = write()
    assert CliRunner().invoke(app, ["alerts", "test", "--config", str(none)]).exit_code == 64
