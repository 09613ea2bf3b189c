"""Starting the command, using it wrongly, and what its page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.cli.app import app
from scripts.servers import Server
from tests.cli.conftest import ROOT, Breakers
from tests.fleet.harness import Fleet

PAGE = ROOT / "docs" / "command.md"
COMMANDS = (
    "status metrics monitor explain reset force-open force-closed release doctor config".split()
)


@pytest.mark.parametrize(
    "words",
    [
        "", "nonsense", "status --nonsense", "status extra", "explain", "reset --ttl 5",
        "monitor --interval often", "config", "config nonsense", "status --url ftp://host",
        "status --url memory://", "status --url redis://host --namespace a:b",
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_64(breakers: Breakers, words: str) -> None:
    said = breakers(*words.split())
    assert said.code == 64
    assert said.err or "Usage" in said.out


@pytest.mark.parametrize("words", ["--help", *(f"{name} --help" for name in COMMANDS)])
def test_help(breakers: Breakers, words: str) -> None:
    said = breakers(*words.split())
    assert said.code == 0
    assert "Usage" in said.out


def test_the_script_runs_without_an_installation() -> None:
    """-I and -S leave out what an installation would add; the libraries are lent."""
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys, runpy; sys.path += {libraries!r}; sys.argv = ['x', 'status', '--url', "
        f"'redis://127.0.0.1:1/0']; runpy.run_path('scripts/manage_circuit_breakers.py', "
        f"run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONUTF8": "1"}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("Redis at redis://127.0.0.1:1/0 can't be reached")


def test_the_installed_command_is_this_one() -> None:
    project: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"breakers": "distributed_breaker.cli:main"}


def test_completion() -> None:
    code = "from distributed_breaker.cli.app import app; app(prog_name='breakers')"
    words = {"_BREAKERS_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "breakers sta"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **words, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["status"]


def test_the_page_shows_every_command_and_option(breakers: Breakers) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"breakers {name}" in text, name
    options: set[str] = set()
    for group in (app, *(info.typer_instance for info in app.registered_groups)):
        assert group is not None
        for info in group.registered_commands:
            assert info.callback is not None
            for kind in info.callback.__annotations__.values():
                for meta in getattr(kind, "__metadata__", ()):
                    options.update(p for p in meta.param_decls or () if p.startswith("--"))
    assert [option for option in sorted(options) if option not in text] == []


def shown_commands() -> list[list[str]]:
    """Every command that the page shows."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    starts = ("breakers ", "python scripts/manage_circuit_breakers.py ")
    return [
        shlex.split(line.removeprefix(start).split(" | ")[0])
        for line in lines
        for start in starts
        if line.startswith(start) and "--install-completion" not in line
    ]


@pytest.fixture
def shop(server: Server, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has the shipped configuration, with the test's namespace and server."""
    folder = Path("config")
    folder.mkdir()
    for source in (ROOT / "config").glob("circuit_breakers*.json"):
        values = json.loads(source.read_text("utf-8"))
        if "settings" in values:
            values["settings"]["namespace"] = namespace
        (folder / source.name).write_text(json.dumps(values))
    monkeypatch.setenv("CIRCUIT_BREAKER_REDIS_URL", server.url)
    monkeypatch.setenv("ENVIRONMENT", "production")


@pytest.mark.servers("valkey")
@pytest.mark.usefixtures("shop")
@pytest.mark.timeout(300)
def test_every_command_that_the_page_shows(breakers: Breakers) -> None:
    commands = shown_commands()
    assert len(commands) > 20
    for words in commands:
        endless = words[0] == "monitor" and "--count" not in words
        said = breakers(*words, *(["--count", "1"] if endless else []))
        assert said.code in (0, 1, 2), (words, said)
        assert said.out, words


@pytest.mark.servers("valkey")
@pytest.mark.usefixtures("shop")
def test_json_has_the_keys_that_the_page_shows(fleet: Fleet, breakers: Breakers) -> None:
    fleet.start(1, {}, circuit="web_app.cache")
    fleet[0].fail_until_refused()
    fleet.do("flush")
    sections = re.split(r"\n## ", PAGE.read_text("utf-8"))
    compared = 0
    for section in sections:
        name = section.split("\n")[0]
        blocks = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
        for block in blocks:
            words = [name, "web_app.cache"] if name == "explain" else [name]
            found, shown = breakers(*words, "--json").json, json.loads(block)
            if name == "explain":
                assert set(shown) <= set(found)
                shown, found = shown["history"][0], found["history"][0]
            assert set(shown) == set(found), name
            for key, value in shown.items():
                if isinstance(value, dict) and key != "detail":
                    for inner in set(value) & set(found[key]):
                        a, b = value[inner], found[key][inner]
                        if isinstance(a, dict) and isinstance(b, dict):
                            assert set(a) == set(b), (name, inner)
            compared += 1
    assert compared == 5


def test_the_guides_commands_are_shown() -> None:
    """They run in test_every_command_that_the_page_shows."""
    shown = shown_commands()
    for words in (
        ["status"], ["metrics"], ["reset"], ["reset", "--service", "web_app"],
        ["monitor", "--interval", "30"],
    ):  # fmt: skip
        assert words in shown


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; from distributed_breaker.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert "pip install 'distributed-breaker[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
