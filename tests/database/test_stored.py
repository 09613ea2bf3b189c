"""Results that are kept: what they are made of, and which of them are still right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.clients.database_statements import names_of, targets_of
from distributed_breaker.clients.database_stored import Asked, StoredReads

CATS = Asked("SELECT name FROM cats WHERE id = %(id)s", {"id": 1}, "postgresql")
ROWS: list[dict[str, Any]] = [{"name": "Tom"}]

Start = Callable[[], StoredReads]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start()``: what another process of the host would have."""
    with ExitStack() as stack:

        def start() -> StoredReads:
            made = StoredReads(tmp_path / "reads", fresh=60, stale=600)
            stack.callback(made.close)
            return made

        yield start


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j])
def test_what_has_no_text_is_not_kept(start: Start, value: Any) -> None:
    stored = start()
    stored.keep(CATS, [{"name": value}], time.time())
    assert stored.find(CATS) is None
    asked = CATS._replace(params={"id": value})
    stored.keep(asked, ROWS, time.time())
    assert stored.find(asked) is None


def test_a_result_is_found_by_statement_and_parameters(start: Start) -> None:
    stored, rows = start(), [{"n": Decimal("1.50"), "at": datetime(2026, 1, 2), "on": date.max}]
    stored.keep(CATS, rows, time.time() - 5)
    found = stored.find(CATS)
    assert found == rows
    assert found is not None
    assert found.stale
    assert 5 <= (found.age or 0) < 20
    assert stored.find(CATS._replace(params={"id": 2})) is None
    assert stored.find(CATS._replace(text=CATS.text + " ")) is None
    stored.keep(CATS, ROWS, time.time() - 1000)
    assert stored.find(CATS) == rows, "what was read later counts"


def test_it_is_as_old_as_it_may_be(start: Start) -> None:
    stored = start()
    stored.keep(CATS, ROWS, time.time() - 601)
    assert stored.find(CATS) is None


def test_a_result_is_kept_again_after_a_second_or_a_write(start: Start) -> None:
    stored, then = start(), time.time() - 60
    assert stored.wants("query", then)
    assert not stored.wants("query", then + 0.9)
    assert stored.wants("another", then)
    assert stored.wants("query", then + 1.0)
    stored.wrote({"CATS"})
    assert stored.wants("query", then + 1.1)
    assert stored.wants(["no hash"], then)
    for number in range(3_000):
        stored.wants(number, then)
    assert len(stored._recent) <= 1_000


def test_what_is_too_large_is_not_kept(start: Start) -> None:
    stored = start()
    stored.keep(CATS, [{"name": "x" * 2**20}], time.time())
    assert stored.find(CATS) is None


def test_a_write_to_a_table_makes_its_results_wrong_in_all_processes(start: Start) -> None:
    one, two = start(), start()
    one.keep(CATS, ROWS, time.time() - 1)
    one.close()
    two = start()
    assert two.find(CATS) == ROWS, "they share the disk"
    two.wrote(targets_of("UPDATE dogs SET name = 'Rex'", "postgresql"))
    assert two.find(CATS) == ROWS
    start().wrote(targets_of("INSERT INTO app.cats VALUES (1)", "postgresql"))
    assert two.find(CATS) is None
    two.keep(CATS, ROWS, time.time() - 1)
    assert two.find(CATS) is None, "it was read before the write had ended"
    two.keep(CATS, ROWS, time.time())
    assert two.find(CATS) == ROWS
    start().wrote(targets_of("CALL change_everything()", "postgresql"))
    assert two.find(CATS) is None


def test_marks_are_kept_where_there_is_no_disk(start: Start, tmp_path: Path) -> None:
    (tmp_path / "reads").mkdir()
    (tmp_path / "reads" / "written").write_text("in the way")
    stored = start()
    stored.keep(CATS, ROWS, time.time() - 1)
    assert stored.find(CATS) == ROWS
    stored.wrote({"CATS"})
    assert stored.find(CATS) is None


def test_marks_are_few(start: Start, tmp_path: Path) -> None:
    stored = start()
    for number in range(2_000):
        stored.wrote({f"T{number}"})
    assert len(os.listdir(tmp_path / "reads" / "written")) <= 257


def test_keys_are_the_same_in_every_process() -> None:
    ask = (
        "from distributed_breaker.clients.database_stored import Asked\n"
        "print(Asked('SELECT 1', {'b': {'y': 1, 'x': {2}.pop()}, 'a': 'ü'}, 'sqlite').key)"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", ask], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("INSERT INTO cats (id) VALUES (:id) ON CONFLICT DO NOTHING", {"CATS"}),
        ("UPDATE app.cats c SET name = 'dogs' WHERE id IN (SELECT id FROM dogs)", {"CATS"}),
        ('DELETE FROM ONLY "Cats" USING dogs', {"CATS"}),
        ("TRUNCATE TABLE cats, app.dogs", {"CATS", "DOGS"}),
        ("WITH new AS (INSERT INTO cats VALUES (1) RETURNING id) SELECT * FROM new", {"CATS"}),
        ("INSERT OR REPLACE INTO cats VALUES (1)", {"CATS"}),
        ("DROP TABLE IF EXISTS cats", {"CATS"}),
        ("INSERT INTO cats VALUES (1); DELETE FROM dogs", {"CATS", "DOGS"}),
        ("CALL change()", None),
        ("SELECT change()", None),
        ("it's cut", None),
    ],
)
def test_what_a_write_changes(text: str, targets: set[str] | None) -> None:
    assert targets_of(text, "postgresql") == targets


def test_what_a_read_may_depend_on() -> None:
    text = "SELECT c.id FROM app.cats c JOIN \"Dogs\" ON c.id = %(id)s WHERE name = 'mice'"
    names = names_of(text, "postgresql")
    assert names is not None
    assert {"CATS", "DOGS"} <= names
    assert "MICE" not in names
