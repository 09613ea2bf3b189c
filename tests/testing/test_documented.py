"""The tests that docs/testing.md shows pass."""

from __future__ import annotations

import inspect

import pytest

from distributed_breaker.faults import SWITCH
from tests import snippets

PAGE = snippets.DOCS / "testing.md"
SHOWN = snippets.run(PAGE, {})
TESTS = {name: value for name, value in SHOWN.items() if name.startswith("test_")}


def test_it_shows_tests() -> None:
    assert len(TESTS) >= 3
    assert SWITCH in PAGE.read_text("utf-8")


@pytest.mark.parametrize("name", TESTS)
def test_what_it_shows(name: str, request: pytest.FixtureRequest) -> None:
    fixtures = inspect.signature(TESTS[name]).parameters
    TESTS[name](**{fixture: request.getfixturevalue(fixture) for fixture in fixtures})
