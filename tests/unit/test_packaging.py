"""The script reaches the user in every way of installing: sdist, wheel and editable install.

Everything is built from a copy of the tree, without build isolation and so without a network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "distributed_breaker/lua/breaker.lua"
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "lua",
    "distributed_breaker",
    "circuit_breaker_config.py",
    "pytest_distributed_breaker.py",
)

# Printed by a fresh interpreter: where the installed script is, and its text.
READ = """
from importlib.resources import files
script = files("distributed_breaker") / "lua" / "breaker.lua"
print(script)
print(script.read_text(encoding="utf-8"), end="")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built, with the symlink as it is committed."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, copy / name)
    assert (copy / "distributed_breaker" / "lua").is_symlink()
    return copy


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read_installed(python: str | Path, *paths: str | Path, cwd: Path) -> tuple[Path, str]:
    """Read the script as an application would, with this environment's libraries in reach."""
    libraries = sysconfig.get_path("purelib")
    search = os.pathsep.join([*map(str, paths), libraries])
    output = run(python, "-P", "-c", READ, cwd=cwd, PYTHONPATH=search, PYTHONUTF8="1")
    where, _, text = output.partition("\n")
    return Path(where), text


def script_text() -> str:
    return (ROOT / "lua" / "breaker.lua").read_text(encoding="utf-8")


def test_sdist_and_wheel_carry_the_script(tree: Path, tmp_path: Path) -> None:
    """The wheel is built from the sdist here, so the sdist is complete."""
    out = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "-o", out, tree, cwd=tmp_path)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        top = sdist.name.removesuffix(".tar.gz")
        for name in (f"{top}/{SCRIPT}", f"{top}/lua/breaker.lua"):
            member = archive.extractfile(name)
            assert member is not None
            assert member.read().decode() == script_text()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(SCRIPT).decode() == script_text()
        names = archive.namelist()
    assert "distributed_breaker/py.typed" in names
    assert "distributed_breaker/monitoring/schema.json" in names
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    modules = {"circuit_breaker_config.py", "pytest_distributed_breaker.py"}
    assert tops == {"distributed_breaker", *modules}, "and no other names"


def test_an_installed_wheel_finds_the_script(tree: Path, tmp_path: Path) -> None:
    """The wheel is built from the tree here, as `pip install .` does."""
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", "--target", target, tree, cwd=tmp_path)
    where, text = read_installed(sys.executable, target, cwd=tmp_path)
    assert where == target / SCRIPT
    assert text == script_text()


def test_an_editable_install_finds_the_script(tree: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    # The new environment is empty, so it is lent the build backend of this one.
    libraries = sysconfig.get_path("purelib")
    build = ["--no-index", "--no-build-isolation", "--editable", tree]
    run(*pip, *build, cwd=tmp_path, PYTHONPATH=libraries)
    where, text = read_installed(python, cwd=tmp_path)
    assert where == tree / SCRIPT
    assert text == script_text()
