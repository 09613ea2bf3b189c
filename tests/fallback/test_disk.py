"""The disk tier: one file, shared by processes, that bounds itself and survives what may happen."""

from __future__ import annotations

import logging
import os
import random
import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from distributed_breaker.fallback import disk as disk_module
from distributed_breaker.fallback.disk import MARK_LIFE, DiskError, DiskTier
from distributed_breaker.fallback.memory import Entry
from tests.fallback.settings import (
    BOUND,
    MIB,
    check_file,
    data_of,
    disk_tier,
    entry,
    hear,
    program,
    tell,
)
from tests.unit.clock import FakeClock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


@pytest.fixture
def disk(folder: Path, clock: FakeClock) -> Iterator[DiskTier]:
    with closing(disk_tier(folder, clock)) as tier:
        yield tier


def put(tier: DiskTier, key: str, new: Entry) -> None:
    tier.put_many([(key, new)])


# ---------------------------------------------------------------------------- entries


def test_what_is_put_is_served_for_its_life(disk: DiskTier, clock: FakeClock) -> None:
    new = entry(clock, ttl=10.0, stale=20.0)
    put(disk, "a", new)
    clock.advance(9.5)
    assert disk.get("a") == (new, "disk", False, 9.5)
    clock.advance(0.5)
    assert disk.get("a") is None
    assert disk.get("a", stale=True) == (new, "disk", True, 10.0)
    clock.advance(10.0)
    assert disk.get("a", stale=True) is None
    stats = disk.stats()
    assert (stats["hits"], stats["stale"], stats["misses"]) == (1, 1, 2)


def test_a_fresh_life_beyond_the_stale_one_counts_for_nothing(
    disk: DiskTier, clock: FakeClock
) -> None:
    put(disk, "a", entry(clock, ttl=100.0, stale=10.0))
    clock.advance(10.0)
    assert disk.get("a") is None


def test_many_at_once(disk: DiskTier, clock: FakeClock) -> None:
    pairs = [(f"k{n}", entry(clock, b"%d" % n)) for n in range(1_200)]
    disk.put_many(pairs[:500])
    disk.put_many(pairs[500:])
    found = disk.get_many([f"k{n}" for n in range(1_300)])
    assert {key: hit.entry for key, hit in found.items()} == dict(pairs)
    assert disk.stats()["items"] == 1_200
    assert disk.stats()["misses"] == 100


@pytest.mark.parametrize("key", ["", "ключ", "a\0b", "a\0c", "\ud800", "k" * 5_000, "'; --"])
def test_any_text_is_a_key(disk: DiskTier, clock: FakeClock, key: str) -> None:
    put(disk, key, entry(clock, b"1"))
    assert data_of(disk, key) == b"1"
    assert disk.get(key + "x") is None
    disk.delete_many({key: clock()})
    assert disk.get(key) is None


def test_an_older_one_never_overwrites_a_newer_one(disk: DiskTier, clock: FakeClock) -> None:
    old = entry(clock, b"old")
    clock.advance(1.0)
    put(disk, "a", entry(clock, b"new"))
    put(disk, "a", old)
    assert data_of(disk, "a") == b"new"
    put(disk, "a", entry(clock, b"as new"))
    assert data_of(disk, "a") == b"as new"


def test_one_from_a_clock_that_was_wrong_can_be_overwritten(
    disk: DiskTier, clock: FakeClock
) -> None:
    put(disk, "a", entry(clock, b"future")._replace(written=clock() + 3_600.0))
    put(disk, "a", entry(clock, b"now"))
    assert data_of(disk, "a") == b"now"


def test_a_deletion_wins_over_what_was_written_before(disk: DiskTier, clock: FakeClock) -> None:
    old = entry(clock, b"old")
    clock.advance(1.0)
    disk.delete_many({"a": clock()})
    put(disk, "a", old)
    assert disk.get("a", stale=True) is None
    clock.advance(1.0)
    put(disk, "a", entry(clock, b"new"))
    assert data_of(disk, "a") == b"new"


def test_a_deletions_mark_goes_when_its_time_has_passed(disk: DiskTier, clock: FakeClock) -> None:
    disk.delete_many({"a": clock()})
    assert disk.stats()["bytes"] > 0
    clock.advance(MARK_LIFE)
    disk.put_many([])
    stats = disk.stats()
    assert (stats["bytes"], stats["expired"]) == (0, 0)


def test_clear_wins_over_what_was_written_before(disk: DiskTier, clock: FakeClock) -> None:
    old = entry(clock, b"old")
    put(disk, "a", old)
    clock.advance(1.0)
    disk.clear()
    put(disk, "b", old)
    put(disk, "c", entry(clock))
    assert list(disk.get_many("abc")) == ["c"]
    assert disk.stats()["items"] == 1
    disk.close()
    check_file(disk.path)


def test_what_has_expired_is_removed_with_the_next_write(disk: DiskTier, clock: FakeClock) -> None:
    for n in range(10):
        put(disk, f"k{n}", entry(clock, ttl=1.0, stale=2.0))
    clock.advance(2.0)
    put(disk, "a", entry(clock))
    stats = disk.stats()
    assert (stats["items"], stats["expired"], stats["evictions"]) == (1, 10, 0)


# ---------------------------------------------------------------------------- bounds


def test_the_least_recently_used_goes_first(folder: Path, clock: FakeClock) -> None:
    with closing(disk_tier(folder, clock, MIB)) as disk:
        for n in range(9):
            put(disk, f"k{n}", entry(clock, b"x" * 100_000, stale=100_000.0, ttl=100_000.0))
            clock.advance(61.0)
        assert disk.get("k0") is not None
        assert disk.touched
        disk.put_many([])
        assert not disk.touched
        for n in range(9, 14):
            put(disk, f"k{n}", entry(clock, b"x" * 100_000))
        left = disk.get_many([f"k{n}" for n in range(14)])
        assert "k0" in left
        assert {"k1", "k2", "k3"}.isdisjoint(left)
        assert {f"k{n}" for n in range(9, 14)} <= set(left)
        assert disk.stats()["evictions"] == 14 - len(left)


def test_a_use_is_noted_once_a_minute_and_not_by_the_read(disk: DiskTier, clock: FakeClock) -> None:
    put(disk, "a", entry(clock))
    clock.advance(60.0)
    disk.get("a", stale=True)
    assert not disk.touched
    clock.advance(0.1)
    disk.get("a", stale=True)
    assert disk.touched
    disk.put_many([])
    disk.get("a", stale=True)
    assert not disk.touched


def test_too_large_an_entry_is_passed_over(folder: Path, clock: FakeClock) -> None:
    with closing(disk_tier(folder, clock, MIB)) as disk:
        large = entry(clock, b"x" * (MIB // 8))
        assert not disk.takes("a", large)
        disk.put_many([("a", large), ("b", entry(clock))])
        assert list(disk.get_many("ab")) == ["b"]


@pytest.mark.parametrize("largest", [300, 30_000])
def test_the_file_keeps_its_bound(folder: Path, clock: FakeClock, largest: int) -> None:
    """Many times its bound is written, in sizes that fill pages badly."""
    rnd = random.Random(largest)
    most = MIB
    written = highest = 0
    with closing(disk_tier(folder, clock, most)) as disk:
        while written < 8 * most:
            batch: list[tuple[str, Entry]] = []
            left = disk.batch_bytes
            while left > 0 and len(batch) < 500:
                new = entry(clock, rnd.randbytes(rnd.randrange(largest)))
                batch.append((f"key:{rnd.randrange(100_000)}", new))
                left -= len(new.data) + 200
            disk.put_many(batch)
            if rnd.random() < 0.1:
                disk.delete_many({key: clock() for key, _ in batch[:50]})
            written += disk.batch_bytes - left
            clock.advance(0.01)
            highest = max(highest, sum(f.stat().st_size for f in folder.iterdir()))
            assert disk.path.stat().st_size <= 1.3 * most
        stats = disk.stats()
        assert 0.5 * most < stats["bytes"] <= most
        assert stats["evictions"] > 0
    check_file(disk.path)
    assert highest <= 1.8 * most  # with the log and its index


def test_a_file_becomes_smaller_with_its_bound_and_when_cleared(
    folder: Path, clock: FakeClock
) -> None:
    with closing(disk_tier(folder, clock, 8 * MIB)) as disk:
        for n in range(80):
            put(disk, f"k{n}", entry(clock, b"x" * 90_000))
        disk.close()
        assert disk.path.stat().st_size > 6 * MIB
    with closing(disk_tier(folder, clock, 2 * MIB)) as disk:
        for _ in range(20):
            put(disk, "a", entry(clock))
        assert disk.stats()["bytes"] <= 2 * MIB
        disk.close()
        assert disk.path.stat().st_size <= 1.3 * 2 * MIB
        disk.clear()
        for _ in range(20):
            disk.put_many([])
        disk.close()
        assert disk.path.stat().st_size < 256 * 1024


def test_too_small_a_bound_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="most_bytes is 1000"):
        DiskTier(folder, most_bytes=1_000)


# ---------------------------------------------------------------------------- trouble


def test_the_folder_and_the_file_are_private(disk: DiskTier, clock: FakeClock) -> None:
    put(disk, "a", entry(clock))
    assert stat.S_IMODE(disk.folder.stat().st_mode) == 0o700
    for name in ("cache.db", "cache.db-wal", "cache.db.lock"):
        assert stat.S_IMODE((disk.folder / name).stat().st_mode) == 0o600


def test_a_folder_in_which_others_may_write_is_refused(disk: DiskTier, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(DiskError, match="chmod go-w"):
        disk.get("a")
    assert not disk.path.exists()


def test_a_folder_that_is_a_file(disk: DiskTier, folder: Path, clock: FakeClock) -> None:
    folder.parent.mkdir()
    folder.write_text("")
    with pytest.raises(DiskError, match=str(folder)):
        disk.get("a")
    folder.unlink()
    put(disk, "a", entry(clock))
    assert data_of(disk, "a") == b'"v"'


def test_a_link_to_elsewhere_is_not_followed(disk: DiskTier, folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    disk.path.symlink_to(elsewhere)
    with pytest.raises(DiskError, match="remove it"):
        disk.get("a")
    assert elsewhere.stat().st_size == 0


@pytest.mark.parametrize("content", [b"no database at all" * 1_000, b"SQLite format 3\0" * 99])
def test_a_damaged_file_is_made_anew(
    disk: DiskTier, clock: FakeClock, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    disk.folder.mkdir(parents=True, mode=0o700)
    disk.path.write_bytes(content)
    (disk.folder / "cache.db-wal").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING, "distributed_breaker"):
        assert disk.get("a") is None
        put(disk, "a", entry(clock))
    assert data_of(disk, "a") == b'"v"'
    assert disk.stats()["renewals"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_damage_that_shows_only_later(disk: DiskTier, clock: FakeClock) -> None:
    """The pages are overwritten while the file is in use, by another process."""
    for n in range(200):
        put(disk, f"k{n}", entry(clock, b"x" * 1_000))
    disk.close()
    source = """
with open(sys.argv[1], "r+b") as file:
    size = file.seek(0, 2)
    file.seek(8192)
    file.write(b"\\xff" * (size - 8192))
say()
"""
    with program(source, disk.path) as process:
        hear(process)
    for n in range(200):
        disk.get(f"k{n}")
    put(disk, "a", entry(clock))
    assert data_of(disk, "a") == b'"v"'
    assert disk.stats()["renewals"] == 1


@pytest.mark.parametrize("version", [0, 7])
def test_another_schema_is_made_anew(disk: DiskTier, clock: FakeClock, version: int) -> None:
    disk.folder.mkdir(parents=True, mode=0o700)
    other = sqlite3.connect(disk.path)
    other.execute("CREATE TABLE entries (something)")
    other.execute(f"PRAGMA user_version = {version}")
    other.close()
    put(disk, "a", entry(clock))
    assert data_of(disk, "a") == b'"v"'
    assert disk.stats()["renewals"] == 1


def test_a_missing_table_is_damage(disk: DiskTier, clock: FakeClock) -> None:
    put(disk, "a", entry(clock))
    other = sqlite3.connect(disk.path)
    other.execute("DROP TABLE entries")
    other.close()
    assert disk.get("a") is None
    put(disk, "a", entry(clock))
    assert data_of(disk, "a") == b'"v"'


def test_what_is_broken_again_at_once_is_trouble(disk: DiskTier, clock: FakeClock) -> None:
    put(disk, "a", entry(clock))
    disk.close()
    disk.path.write_bytes(b"no database at all" * 1_000)
    assert disk.get("a") is None
    disk.close()
    disk.path.write_bytes(b"no database at all" * 1_000)
    with pytest.raises(DiskError, match="made anew only just now"):
        disk.get("a")


def test_a_file_that_was_removed_is_made_anew(disk: DiskTier, clock: FakeClock) -> None:
    put(disk, "a", entry(clock))
    shutil.rmtree(disk.folder)
    assert disk.get("a") is None
    put(disk, "a", entry(clock))
    assert data_of(disk, "a") == b'"v"'
    assert disk.path.exists()


def test_two_see_the_same_file_after_one_has_made_it_anew(
    disk: DiskTier, folder: Path, clock: FakeClock
) -> None:
    with closing(disk_tier(folder, clock)) as other:
        put(disk, "a", entry(clock))
        assert data_of(other, "a") == b'"v"'
        disk._writes.replace(lambda db: None)
        put(disk, "b", entry(clock, b"2"))
        assert data_of(other, "b") == b"2"
        put(other, "c", entry(clock, b"3"))
        assert data_of(disk, "c") == b"3"
    disk.close()
    check_file(disk.path)


def small_disk(folder: Path, clock: FakeClock, pages: int) -> DiskTier:
    """Its disk is full at so many pages."""
    disk = DiskTier(folder, most_bytes=MIB, now=clock)
    disk._kind.pragmas["max_page_count"] = pages
    return disk


def test_a_full_disk(folder: Path, clock: FakeClock) -> None:
    with closing(small_disk(folder, clock, 13)) as disk:
        put(disk, "a", entry(clock))
        with pytest.raises(DiskError, match="full"):
            put(disk, "b", entry(clock, b"x" * 100_000))
        assert disk.get("b") is None
        put(disk, "c", entry(clock))
        disk._kind.pragmas["max_page_count"] = 300
        disk.close()
        put(disk, "b", entry(clock, b"x" * 100_000))
        assert data_of(disk, "b") == b"x" * 100_000
    check_file(disk.path)


def test_a_full_file_makes_room(folder: Path, clock: FakeClock) -> None:
    """SQLite refuses to grow the file before the tier's own bounds say anything."""
    with closing(small_disk(folder, clock, 40)) as disk:
        for n in range(50):
            put(disk, f"k{n}", entry(clock, b"x" * 10_000))
        assert data_of(disk, "k49") is not None
    check_file(disk.path)


def test_one_that_is_locked_for_too_long(
    disk: DiskTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(disk, "a", entry(clock))
    with closing(sqlite3.connect(disk.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DiskError, match="locked"):
            put(disk, "b", entry(clock))
        assert data_of(disk, "a") == b'"v"'
        other.execute("ROLLBACK")
    put(disk, "b", entry(clock))
    assert data_of(disk, "b") == b'"v"'


def test_an_interruption_leaves_no_transaction_open(
    disk: DiskTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(disk, "a", entry(clock))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "_give_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put(disk, "b", entry(clock))
    assert disk.get("b") is None
    put(disk, "c", entry(clock))
    assert data_of(disk, "a") == data_of(disk, "c") == b'"v"'


# ---------------------------------------------------------------------------- processes

WRITER = """
folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
disk = DiskTier(folder, most_bytes=1 << 24)
say()
hear()
for n in range(count):
    data = json.dumps([name, n]).encode()
    for tries_left in range(39, -1, -1):
        try:
            disk.put_many([(f"key:{n % 50}", Entry(data, 1e9 + n, 9e9, 9e9))])
            break
        except DiskError as error:  # the other one was halted in its transaction
            if "was not free" not in str(error) or not tries_left:
                raise
disk.close()
say()
"""


def test_two_processes_share_it_and_the_newest_wins(folder: Path) -> None:
    """Both write the same versions of the same keys, one of them also from the end on."""
    disk = DiskTier(folder, most_bytes=16 * MIB)
    with ExitStack() as stack, closing(disk):
        writers = [stack.enter_context(program(WRITER, folder, name, 1_000)) for name in "ab"]
        for writer in writers:
            hear(writer)
        for writer in writers:
            tell(writer)
        latest = dict.fromkeys(range(50), 0.0)
        ends = [threading.Thread(target=hear, args=(writer,)) for writer in writers]
        for end in ends:
            end.start()
        while any(end.is_alive() for end in ends):
            for key, hit in disk.get_many([f"key:{n}" for n in range(50)]).items():
                number = int(key[4:])
                assert hit.entry.written >= latest[number]
                latest[number] = hit.entry.written
        for end in ends:
            end.join(BOUND)
        found = disk.get_many([f"key:{n}" for n in range(50)])
        assert {k: h.entry.written for k, h in found.items()} == {
            f"key:{n}": 1e9 + 950 + n for n in range(50)
        }
        assert disk.stats()["items"] == 50
    check_file(disk.path)


def test_an_older_one_from_another_process_never_overwrites(folder: Path) -> None:
    source = """
disk = DiskTier(sys.argv[1], most_bytes=1 << 24)
old = Entry(b"old", time.time(), 9e9, 9e9)
say()
hear()
disk.put_many([("put", old), ("deleted", old)])
say()
"""
    disk = DiskTier(folder, most_bytes=16 * MIB)
    with program(source, folder) as other, closing(disk):
        hear(other)
        now = disk._now()
        put(disk, "put", Entry(b"new", now, 9e9, 9e9))
        disk.delete_many({"deleted": now})
        tell(other)
        hear(other)
        assert data_of(disk, "put") == b"new"
        assert disk.get("deleted") is None


def test_a_killed_writer_leaves_a_whole_file(folder: Path) -> None:
    source = """
disk = DiskTier(sys.argv[1], most_bytes=1 << 21)
n = 0
while True:
    entries = [(f"key:{n}:{i}", Entry(b"x" * 1000, time.time(), 9e9, 9e9)) for i in range(100)]
    disk.put_many(entries)
    n += 1
    say(n)
"""
    for kill_after in (1, 30, 60):
        with program(source, folder) as writer:
            while hear(writer) < kill_after:
                pass
            writer.kill()
            writer.wait(BOUND)
        with closing(DiskTier(folder, most_bytes=2 * MIB)) as disk:
            last = [f"key:{kill_after - 1}:{i}" for i in range(100)]
            assert len(disk.get_many(last)) == 100
            put(disk, "a", Entry(b"1", disk._now(), 9e9, 9e9))
            assert disk.stats()["renewals"] == 0
        check_file(disk.path)


FORK = """
import threading
disk = DiskTier(sys.argv[1], most_bytes=1 << 24)
def put(key):
    disk.put_many([(key, Entry(b"1", time.time(), 9e9, 9e9))])
def busy():
    n = 0
    while not ended.is_set():
        put(f"busy:{n % 100}")
        disk.get(f"busy:{n % 7}")
        n += 1
put("before")
ended = threading.Event()
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for n in range(20):
    child = os.fork()
    if not child:
        connections = [line._connection for line in (disk._reads, disk._writes)]
        assert connections == [None, None], connections
        assert disk.get("before") is not None
        put(f"child:{n}")
        disk.close()
        # Half of them leave in order, so that what came along is finalized.
        os._exit(0) if n % 2 else sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
ended.set()
for thread in threads:
    thread.join()
assert disk.get("before") is not None
found = disk.get_many([f"child:{n}" for n in range(20)])
say([len(found), disk.stats()["renewals"]])
disk.close()
"""


def test_forks_while_threads_are_at_work(folder: Path) -> None:
    # sys.exit in a child waits for no threads: it has none but its own.
    with program(FORK, folder) as process:
        assert hear(process) == [20, 0]
        assert process.wait(BOUND) == 0
    check_file(folder / "cache.db")


def test_threads_leave_the_totals_right(disk: DiskTier, clock: FakeClock) -> None:
    def work(number: int) -> None:
        rnd = random.Random(number)
        for _ in range(100):
            key = f"k{rnd.randrange(30)}"
            way = rnd.random()
            if way < 0.6:
                put(disk, key, entry(clock, b"x" * rnd.randrange(5_000)))
            elif way < 0.9:
                disk.get(key)
            else:
                disk.delete_many({key: clock()})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    disk.close()
    check_file(disk.path)
    assert sorted(os.listdir(disk.folder)) == ["cache.db", "cache.db.lock"]
