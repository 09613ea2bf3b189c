"""The outbox's file: who may read it, what is synced, and what happens when it cannot be used."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distributed_breaker.fallback import outbox as module
from distributed_breaker.fallback import private_file
from distributed_breaker.fallback.outbox import Outbox, OutboxError

Make = Callable[[], Outbox]
HEADER = 100  # bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "box" / "outbox.db"


@pytest.fixture
def make(path: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make() -> Outbox:
            outbox = Outbox(path)
            stack.callback(outbox.close)
            return outbox

        yield make


@pytest.fixture
def outbox(make: Make) -> Outbox:
    return make()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KIND", module.KIND._replace(busy=0.05))


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def damage(path: Path, *, start: int = 0, length: int = HEADER) -> bytes:
    """Overwrite a part of a file; returns what it is now."""
    content = bytearray(path.read_bytes())
    content[start : start + length] = b"\xee" * length
    path.write_bytes(content)
    return bytes(content)


def payloads(outbox: Outbox) -> list[object]:
    return [entry.payload for entry in outbox.entries()]


# ---------------------------------------------------------------------------- a good file


def test_only_its_user_may_read_it(outbox: Outbox, path: Path) -> None:
    before = os.umask(0)
    try:
        outbox.add("t", "k", "secret")
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys([path.name + end for end in ("", "-wal", "-shm", ".lock")], 0o600)
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_each_commit_is_synced_unless_it_need_not_be(outbox: Outbox) -> None:
    """What synchronous=FULL means in WAL mode is SQLite's promise; that we ask for it is ours."""

    def ask(db: sqlite3.Connection) -> list[object]:
        names = ("synchronous", "journal_mode")
        return [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    outbox.add("t", "k", 1)
    assert outbox._file.read(ask) == [2, "wal"]
    assert outbox._file.write(ask, sync=False) == [1, "wal"]
    assert outbox._file.write(ask) == [2, "wal"]
    outbox._file.write(ask, sync=False)
    outbox.close()
    assert outbox._file.write(ask, sync=False) == [1, "wal"]
    outbox.close()
    assert outbox._file.write(ask) == [2, "wal"]


def test_a_relative_path_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Outbox("outbox.db")) as outbox:
        monkeypatch.chdir("/")
        outbox.add("t", "k", 1)
    assert (tmp_path / "outbox.db").exists()


def test_uids_tell_entries_of_different_files_apart(tmp_path: Path) -> None:
    uids = set()
    for name in "ab":
        with contextlib.closing(Outbox(tmp_path / name)) as outbox:
            outbox.add("t", "k", 1)
            uids |= {(entry.id, entry.uid) for entry in outbox.entries()}
    assert {number for number, _ in uids} == {1}
    assert len(uids) == 2


def test_a_file_that_somebody_removed_is_made_anew(outbox: Outbox, make: Make, path: Path) -> None:
    """Its log, which it leaves behind, is not taken for the new one's."""
    outbox.add("t", "k", "old")
    path.unlink()
    make().add("t", "k", "new")
    assert payloads(outbox) == ["new"]
    outbox.close()
    assert payloads(make()) == ["new"]


# ---------------------------------------------------------------------------- one that is of no use


def test_a_folder_in_its_place_is_told(outbox: Outbox, path: Path) -> None:
    path.mkdir(parents=True)
    for use in (lambda: outbox.add("t", "k", 1), outbox.waiting):
        with pytest.raises(OutboxError, match=f"{path} cannot be read or written.*another file"):
            use()
    stats = outbox.stats()
    assert (stats["works"], stats["topics"]) == (False, {})
    assert str(path) in stats["trouble"]
    path.rmdir()
    outbox.add("t", "k", 1)
    assert outbox.stats()["works"]


def test_another_users_file_is_refused(
    outbox: Outbox, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox.add("t", "k", 1)
    outbox.close()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(OutboxError, match=f"{path} .*no file of this user.*remove it"):
        outbox.waiting()
    monkeypatch.setattr(os, "geteuid", lambda: 0)  # who looks after services
    assert outbox.waiting() == 1


def test_a_file_in_the_place_of_its_folder_is_told(outbox: Outbox, path: Path) -> None:
    path.parent.parent.write_text("")
    with pytest.raises(OutboxError, match=f"{path} cannot be used"):
        outbox.add("t", "k", 1)


def test_a_full_disk_refuses_what_is_new_and_lets_go_what_is_old(
    outbox: Outbox, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.KIND.pragmas, "max_page_count", "20")
    small = outbox.add("t", "k", 1)
    with pytest.raises(OutboxError, match=f"{path} .*full.*make room"):
        outbox.add_many("t", [("k", "x" * 30_000)] * 3)
    assert not outbox.stats()["works"]
    assert [entry.id for entry in outbox.entries()] == [small]
    assert outbox.replay("t", lambda entry: None).delivered == 1
    outbox.add("t", "k", "x" * 30_000)
    assert outbox.stats()["works"]


def test_a_newer_schema_is_refused(outbox: Outbox, path: Path) -> None:
    outbox.add("t", "k", 1)
    outbox.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(OutboxError, match="has schema version 2, and this release knows 1"):
        outbox.add("t", "k", 1)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(outbox: Outbox, path: Path) -> None:
    path.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(OutboxError, match="another program's"):
        outbox.add("t", "k", 1)
    assert path.read_bytes() == before


def test_who_writes_too_long_is_waited_for_with_a_bound(
    impatient: None, make: Make, outbox: Outbox, path: Path
) -> None:
    outbox.add("t", "k", 1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutboxError, match="another process has been writing"):
            make().add("t", "k", 2)
        assert outbox.waiting() == 1  # Who reads waits for nobody.
        db.execute("ROLLBACK")
    outbox.add("t", "k", 2)


def test_who_opens_too_long_is_waited_for_with_a_bound(
    impatient: None, make: Make, outbox: Outbox, path: Path
) -> None:
    outbox.add("t", "k", 1)
    with open(f"{path}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for box in (outbox, make()):
            with pytest.raises(OutboxError, match="was not free"):
                box.add("t", "k", 2)
    assert make().waiting() == 1


def test_a_child_that_inherits_a_connection_in_use_refuses(outbox: Outbox, path: Path) -> None:
    """SQLite would believe in the child that it has the parent's locks."""
    outbox.add("t", "k", 1)
    outbox._file.forked()
    try:
        with pytest.raises(OutboxError, match="while this process was forked"):
            outbox.add("t", "k", 1)
    finally:
        private_file._inherited.pop().close()


# ---------------------------------------------------------------------------- a damaged one


@pytest.mark.parametrize("content", [b"no database at all " * 500, b"\0" * 8192])
def test_what_is_no_database_is_moved_aside_by_add(
    outbox: Outbox, path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(OutboxError, match=f"{path} is damaged.*recover"):
        outbox.waiting()
    assert path.read_bytes() == content
    assert not errors(caplog)
    outbox.add("t", "k", 1)
    outbox.add("t", "k", 2)
    assert payloads(outbox) == [1, 2]
    (aside,) = outbox.stats()["damaged"]
    assert Path(aside).read_bytes() == content
    assert Path(aside).name.startswith("outbox.db.damaged-")
    (error,) = errors(caplog)
    assert str(path) in error
    assert aside in error


def test_damage_in_its_midst_holds_up_neither_add_nor_replay(
    outbox: Outbox, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox.add_many("t", [("k", "x" * 1000)] * 50)
    outbox.close()
    content = damage(path, start=4096, length=path.stat().st_size - 4096)
    assert outbox.replay("t", lambda entry: None).left == 0
    (aside,) = outbox.stats()["damaged"]
    assert Path(aside).read_bytes() == content
    assert len(errors(caplog)) == 1
    assert outbox.stats()["works"]


def test_a_connection_that_is_broken_itself_condemns_no_file(outbox: Outbox) -> None:
    outbox.add("t", "k", 1)
    connections: list[sqlite3.Connection] = []

    def work(db: sqlite3.Connection) -> None:
        connections.append(db)
        if len(connections) == 1:
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error

    outbox._file.write(work, mend=True)
    assert len({id(db) for db in connections}) == 2
    assert outbox.stats()["damaged"] == []
    assert payloads(outbox) == [1]


def test_one_that_was_moved_while_it_was_written_is_written_again(
    outbox: Outbox, path: Path
) -> None:
    """Between the beginning of a transaction and its end another process moved the file."""
    outbox.add("t", "k", "old")
    moved: list[bool] = []

    def move(db: sqlite3.Connection) -> None:
        if not moved:
            moved.append(True)
            outbox._file.place.move_aside()
        db.execute(
            "INSERT INTO entries (topic, kind, key, payload, bytes, created) "
            "VALUES ('t', 'k', '', '5', 1, 0)"
        )

    outbox._file.write(move)
    assert payloads(outbox) == [5]


def test_nothing_damaged_is_ever_deleted(
    outbox: Outbox, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        outbox.add("t", "k", number)
        outbox.close()
        damage(path)
    outbox.add("t", "k", 3)
    outbox.close()
    last = damage(path)
    kept = outbox.stats()["damaged"]
    assert len(kept) == 3
    with pytest.raises(OutboxError, match=r"is damaged, and so are 3 before it: save .*damaged-"):
        outbox.add("t", "k", 4)
    assert path.read_bytes() == last
    assert outbox.stats()["damaged"] == kept
    Path(kept[0]).unlink()
    outbox.add("t", "k", 4)
    assert payloads(outbox) == [4]
    assert len(errors(caplog)) == 4


def test_its_log_goes_with_it(outbox: Outbox, make: Make, path: Path) -> None:
    """Most of what waits may be in there."""
    outbox.add("t", "k", "only in the log")
    log = Path(f"{path}-wal").read_bytes()
    assert b"only in the log" in log
    inode = Path(f"{path}-wal").stat().st_ino
    outbox._file.place.move_aside()
    (aside,) = outbox.stats()["damaged"] or [""]
    assert Path(f"{aside}-wal").stat().st_ino == inode
    with contextlib.closing(sqlite3.connect(aside)) as db:
        assert db.execute("SELECT payload FROM entries").fetchall() == [('"only in the log"',)]
