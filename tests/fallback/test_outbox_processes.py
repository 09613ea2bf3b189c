"""The outbox among real processes that add, replay, fork, freeze and are killed."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distributed_breaker.fallback.outbox import Entry, Outbox
from tests.fleet.process import ROOT
from tests.unit.clock import wait_until

BOUND = 30  # s

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "box" / "outbox.db"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a child; those that are left are killed."""
    with contextlib.ExitStack() as stack:

        def start(*args: object) -> subprocess.Popen[str]:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.fallback.outbox_child", *map(str, args)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def line(child: subprocess.Popen[str]) -> str:
    """The next line that a child says; it has a bound on its life, so this has one, too."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str], words: str = "go") -> None:
    assert child.stdin is not None
    child.stdin.write(words + "\n")
    child.stdin.flush()


def all_ready(children: list[subprocess.Popen[str]]) -> None:
    for child in children:
        assert line(child) == "ready"
    for child in children:
        tell(child)


def sound(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as db:
        (count,) = db.execute("SELECT total(waiting) FROM topics").fetchone()
        (real,) = db.execute("SELECT count(*) FROM entries WHERE parked = 0").fetchone()
        return bool(db.execute("PRAGMA integrity_check").fetchone() == ("ok",) and count == real)


def test_what_add_returned_for_survives_kill_9(start: Start, path: Path) -> None:
    returned: list[int] = []
    for _ in range(3):
        children = [start("add", path, "t"), start("add", path, "u")]
        for child in children:
            returned += [int(line(child)) for _ in range(10)]
        for child in children:
            child.kill()
            assert child.stdout is not None
            # Also what it said between our last look and its end.
            returned += [int(said) for said in child.stdout if said.endswith("\n")]
    assert len(set(returned)) == len(returned) >= 60
    with contextlib.closing(Outbox(path)) as outbox:
        there = {entry.id for entry in outbox.entries(limit=10_000)}
        assert set(returned) <= there
        # At most one of each child was there before add could return.
        assert len(there) <= len(returned) + 6
    assert sound(path)


def test_processes_that_open_a_new_file_at_once_lose_nothing(start: Start, path: Path) -> None:
    children = [start("add_some", path, "t", 5) for _ in range(4)]
    all_ready(children)
    ids = [int(number) for child in children for number in line(child).split()]
    assert sorted(ids) == list(range(1, 21))
    assert {child.wait(BOUND) for child in children} == {0}
    assert sound(path)


def test_two_processes_deliver_each_entry_once_and_in_order(
    start: Start, path: Path, tmp_path: Path
) -> None:
    with contextlib.closing(Outbox(path)) as outbox:
        ids = outbox.add_many("t", [("k", number) for number in range(60)])
    ledger = tmp_path / "ledger"
    children = [start("drain", path, ledger) for _ in range(2)]
    all_ready(children)
    assert {child.wait(BOUND) for child in children} == {0}
    lines = [text.split() for text in ledger.read_text().splitlines()]
    assert [int(number) for _, number in lines] == ids
    assert sound(path)


def test_what_a_killed_process_was_delivering_is_delivered_again(start: Start, path: Path) -> None:
    with contextlib.closing(Outbox(path)) as outbox:
        first, second, *ids = outbox.add_many("t", [("k", number) for number in range(4)])
        (before, _) = outbox.entries(after=second)
        child = start("hold", path, 30)
        for number in (first, second):
            assert line(child) == f"delivering {number}"
            tell(child)
        assert line(child) == f"delivering {ids[0]}"
        assert outbox.replay("t", lambda entry: None).busy
        child.kill()
        child.wait(BOUND)
        assert outbox.replay("t", lambda entry: None).busy  # Nobody can tell death from slowness.
    delivered: list[Entry] = []
    later = Outbox(path, now=lambda: time.time() + 31)
    with contextlib.closing(later):
        assert later.replay("t", delivered.append).left == 0
    assert [entry.id for entry in delivered] == ids
    assert delivered[0].uid == before.uid
    assert delivered[0].attempts == 1
    assert "died" in delivered[0].error


def test_a_frozen_process_that_lost_its_lease_deletes_nothing(start: Start, path: Path) -> None:
    with contextlib.closing(Outbox(path)) as outbox:
        (first, second) = outbox.add_many("t", [("k", 1), ("k", 2)])
        child = start("hold", path, 0.2)
        assert line(child) == f"delivering {first}"
        child.send_signal(signal.SIGSTOP)
        tell(child)

        def fail(entry: Entry) -> None:
            raise ConnectionError

        wait_until(lambda: outbox.replay("t", fail).error.startswith("ConnectionError"), BOUND)
        child.send_signal(signal.SIGCONT)
        assert line(child) == "busy 0 2"
        assert [entry.id for entry in outbox.entries()] == [first, second]


def test_others_go_on_in_the_file_that_takes_the_place_of_a_damaged_one(
    start: Start, path: Path
) -> None:
    """They have the old one open, and neither add to it any more nor harm the new one's log."""
    child, other = start("echo", path), start("echo", path)
    with contextlib.closing(Outbox(path)) as outbox:
        for process in (child, other):
            tell(process, "old")
            line(process)
        outbox._file.read(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
    with path.open("r+b") as file:
        file.write(b"no database")
    with contextlib.closing(Outbox(path)) as outbox:
        outbox.add("t", "k", "1")
        for process, text in ((child, "2"), (other, "3"), (child, "4")):
            tell(process, text)
            line(process)
        outbox.add("t", "k", "5")
        (aside,) = outbox.stats()["damaged"]
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(BOUND) == 0
        tell(other, "6")
        line(other)
        other.kill()
        assert [entry.payload for entry in outbox.entries()] == list("123456")
    assert Path(aside).read_bytes().startswith(b"no database")
    assert sound(path)


def test_a_removed_file_takes_its_log_with_it(start: Start, path: Path) -> None:
    """Another process still has both open, and the memory that goes with them."""
    child = start("echo", path)
    for _ in range(3):
        tell(child, "old")
        line(child)
    path.unlink()
    with contextlib.closing(Outbox(path)) as outbox:
        for number in range(3):
            outbox.add("t", "k", f"new {number}")
        tell(child, "2")
        line(child)
        outbox.add("t", "k", "3")
        expected = ["new 0", "new 1", "new 2", "2", "3"]
        assert [entry.payload for entry in outbox.entries()] == expected
    assert sound(path)


@pytest.mark.parametrize("how", ["quiet", "busy"])
def test_a_fork_shares_no_connection(start: Start, path: Path, how: str) -> None:
    child = start("fork", path, how)
    *codes, parents = map(int, line(child).split())
    assert codes == [0, 0, 0]
    assert child.wait(BOUND) == 0
    with contextlib.closing(Outbox(path)) as outbox:
        payloads = [entry.payload for entry in outbox.entries(limit=10_000)]
    assert payloads.count("child") == 15
    assert payloads.count("parent") == parents
    assert sound(path)


def test_a_write_that_fails_is_told_and_undone(start: Start, path: Path) -> None:
    """At a limit of the system's own, by which write() fails."""
    child = start("full", path)
    error = line(child)
    assert str(path) in error
    assert "disk is full" in error
    assert line(child) == "False"
    assert line(child) == "1 2 2 True"
    assert child.wait(BOUND) == 0
    assert sound(path)
