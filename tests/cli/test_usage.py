"""Starting the command, using it wrongly, and what its page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from distributed_breaker.cli import app
from tests.cli.conftest import ROOT, Breakers

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


def test_completion(breakers: Breakers) -> None:
    said = breakers("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert said.code in (0, 1, 64)  # Which shell it is can't be told here.
    words = {"_BREAKERS_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": "breakers sta"}
    done = subprocess.run(
        [sys.executable, "-c", "from distributed_breaker.cli import app; app(prog_name='breakers')"],
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
    """Every command that the page shows, without ``$``."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line.removeprefix("$ ") for line in lines]
    starts = ("breakers ", "python scripts/manage_circuit_breakers.py ")
    found = []
    for line in lines:
        for begin in starts:
            if line.startswith(begin):
                found.append(shlex.split(line.removeprefix(begin).split(" | ")[0]))
    return found
