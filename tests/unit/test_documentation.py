"""What the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.test_bug_list import docstrings_of

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "lua" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"([\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))
    assert [f"{path}::{name}" for path, name in named if name not in docstrings_of(path)] == []


def test_the_page_on_correctness_names_tests() -> None:
    text = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    assert len(set(re.findall(r"[\w/]+\.py::\w+", text))) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
