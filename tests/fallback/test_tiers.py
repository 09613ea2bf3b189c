"""Memory and disk behind one face."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.fallback import write_behind
from distributed_breaker.fallback.disk import MARK_LIFE, DiskError, DiskTier
from distributed_breaker.fallback.memory import OVERHEAD, Entry, size_of
from distributed_breaker.fallback.tiers import Tiers
from distributed_breaker.fallback.trouble import RETRY, TROUBLES
from tests.fallback.settings import (
    BOUND,
    MIB,
    check_file,
    data_of,
    disk_tier,
    entry,
    hear,
    make,
    program,
    tell,
)
from tests.unit.clock import FakeClock, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def tiers(folder: Path, clock: FakeClock) -> Iterator[Tiers]:
    """Memory for three entries."""
    with closing(make(clock, Flaky(folder, clock), most_items=3)) as tiers:
        yield tiers


@pytest.fixture
def other(folder: Path, clock: FakeClock) -> Iterator[DiskTier]:
    """The disk as another process would see it."""
    with closing(disk_tier(folder, clock)) as disk:
        yield disk


class Flaky(DiskTier):
    """A disk tier that a test can break; ``broken`` says for what."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        super().__init__(folder, most_bytes=16 * MIB, now=clock)
        self.broken: set[str] = set()
        self.asked = 0

    def _try(self, what: str) -> None:
        self.asked += 1
        if what in self.broken:
            raise DiskError(f"broken for {what}")

    def get_many(self, *arguments: Any) -> Any:
        self._try("reads")
        return super().get_many(*arguments)

    def put_many(self, *arguments: Any) -> Any:
        self._try("writes")
        return super().put_many(*arguments)

    def delete_many(self, *arguments: Any) -> Any:
        self._try("writes")
        return super().delete_many(*arguments)

    def clear(self, *arguments: Any) -> Any:
        self._try("writes")
        return super().clear(*arguments)


def flaky(tiers: Tiers) -> Flaky:
    disk = tiers._behind.disk
    assert isinstance(disk, Flaky)
    return disk


def forget_memory(tiers: Tiers) -> None:
    """As a process that has just begun: what is on disk stays."""
    tiers.flush()
    tiers._memory.clear()
    tiers._saved.clear()


def assert_queue_is_counted(tiers: Tiers) -> None:
    behind = tiers._behind
    assert behind is not None
    assert behind._dirty_bytes == sum(size_of(*pair) for pair in behind._dirty.items())


# ---------------------------------------------------------------------------- one face


def test_memory_answers_first(tiers: Tiers, clock: FakeClock) -> None:
    new = entry(clock)
    tiers.put("a", new)
    assert tiers.get("a") == (new, "memory", False, 0.0)
    assert flaky(tiers).asked == 0


def test_what_memory_has_not_comes_from_disk_and_is_held_again(
    tiers: Tiers, clock: FakeClock
) -> None:
    new = entry(clock)
    tiers.put("a", new)
    forget_memory(tiers)
    assert tiers.get("a") == (new, "disk", False, 0.0)
    assert tiers.get("a") == (new, "memory", False, 0.0)
    stats = tiers.stats()
    assert (stats["memory"]["hits"], stats["memory"]["misses"], stats["disk"]["hits"]) == (1, 1, 1)


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_stale_ones_are_served_only_when_asked_for_and_for_their_time(
    tiers: Tiers, clock: FakeClock, tier: str
) -> None:
    tiers.put("a", entry(clock, ttl=10.0, stale=20.0))
    if tier == "disk":
        forget_memory(tiers)
    clock.advance(10.0)
    assert tiers.get("a") is None
    hit = tiers.get("a", stale=True)
    assert hit is not None
    assert (hit.tier, hit.stale, hit.age) == (tier, True, 10.0)
    clock.advance(10.0)
    assert tiers.get("a", stale=True) is None
    assert tiers.get_many(["a"], stale=True) == {}


def test_a_fresher_one_of_another_process_replaces_a_stale_one(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    tiers.put("a", entry(clock, b"1", ttl=10.0))
    tiers.flush()
    clock.advance(10.0)
    other.put_many([("a", entry(clock, b"2"))])
    assert data_of(tiers, "a", stale=True) == b"1"
    assert data_of(tiers, "a") == b"2"
    assert data_of(tiers, "a", stale=True) == b"2"


def test_an_older_one_of_another_process_is_not_served_for_it(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    """Its life is longer than that of the newer one, which is not on disk yet."""
    other.put_many([("a", entry(clock, b"1", ttl=100.0))])
    clock.advance(1.0)
    tiers.put("a", entry(clock, b"2", ttl=10.0))
    clock.advance(10.0)
    assert tiers.get("a") is None
    for key in "bcd":
        tiers.put(key, entry(clock))
    assert tiers.get("a") is None
    assert data_of(tiers, "a", stale=True) == b"2"


def test_many_from_everywhere(tiers: Tiers, clock: FakeClock) -> None:
    tiers.put_many([("disk", entry(clock)), ("both", entry(clock))])
    forget_memory(tiers)
    tiers.put_many([("memory", entry(clock)), ("both", entry(clock))])
    found = tiers.get_many(["memory", "disk", "both", "none", "none"])
    assert {k: hit.tier for k, hit in found.items()} == {
        "memory": "memory",
        "both": "memory",
        "disk": "disk",
    }


def test_without_a_disk(clock: FakeClock) -> None:
    tiers = make(clock, most_items=2)
    for key in "abc":
        tiers.put(key, entry(clock), durable=True)
    assert tiers.get("a") is None
    assert data_of(tiers, "c") == b'"v"'
    tiers.put("large", entry(clock, b"x" * MIB))
    tiers.delete("c")
    tiers.clear()
    tiers.flush()
    stats = tiers.stats()
    assert stats["disk"] is None
    assert (stats["memory"]["evictions"], stats["demotions"], stats["dropped"]) == (1, 0, 1)
    tiers.close()


def test_the_newest_is_kept_whatever_the_order(tiers: Tiers, clock: FakeClock) -> None:
    old = entry(clock, b"old")
    clock.advance(1.0)
    tiers.put("a", entry(clock, b"new"))
    tiers.put("a", old)
    assert data_of(tiers, "a") == b"new"
    forget_memory(tiers)
    assert data_of(tiers, "a") == b"new"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": "text"}, TypeError),
        ({"fresh_until": float("nan")}, ValueError),
        ({"written": float("nan")}, ValueError),
        ({"stale_until": 0.0}, ValueError),
        ({"written": "yesterday"}, TypeError),
    ],
)
def test_what_is_no_entry_is_refused(
    tiers: Tiers, clock: FakeClock, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiers.put("a", entry(clock)._replace(**change))
    assert tiers.get("a", stale=True) is None


def test_a_bad_write_behind_is_refused() -> None:
    with pytest.raises(ValueError, match="write_behind is 0"):
        Tiers(most_items=1, most_bytes=1, write_behind=0)


# ---------------------------------------------------------------------------- the way to disk


def test_the_thread_writes_behind(folder: Path, other: DiskTier, clock: FakeClock) -> None:
    with closing(make(clock, disk_tier(folder, clock), write_behind=0.01)) as tiers:
        for n in range(3):
            tiers.put(f"k{n}", entry(clock))
            wait_until(lambda n=n: other.get(f"k{n}"))
        wait_until(lambda: not tiers._behind._dirty)
    assert not [t for t in threading.enumerate() if t.name == "circuit-breaker-disk-tier"]


def test_much_is_written_at_once(tiers: Tiers, other: DiskTier, clock: FakeClock) -> None:
    """This thread would write only after an hour otherwise."""
    tiers.put_many([(f"k{n}", entry(clock)) for n in range(600)])
    wait_until(lambda: other.stats()["items"] == 600)


def test_durable_is_on_disk_before_put_returns(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    tiers.put("a", entry(clock), durable=True)
    assert data_of(other, "a") == b'"v"'
    assert not tiers._behind._dirty
    tiers.put_many([(f"k{n}", entry(clock)) for n in range(700)], durable=True)
    assert other.stats()["items"] == 701


def test_close_writes_what_is_left(tiers: Tiers, other: DiskTier, clock: FakeClock) -> None:
    tiers.put_many([(f"k{n}", entry(clock)) for n in range(3)])
    tiers.close()
    assert len(other.get_many(["k0", "k1", "k2"])) == 3
    tiers.close()
    assert data_of(tiers, "k2") == b'"v"'
    tiers.put("late", entry(clock))
    tiers.delete("k2")
    tiers.flush()
    assert other.get("late") is None
    assert tiers.stats()["disk"]["works"]


def test_who_has_no_place_in_memory_is_demoted(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    for key in "abcd":
        tiers.put(key, entry(clock, key.encode()))
    assert flaky(tiers).asked == 0
    hit = tiers.get("a")  # it still waits to be written
    assert hit is not None
    assert hit.tier == "memory"
    assert tiers.stats()["demotions"] == 2  # a went for d, and b for a
    tiers.flush()
    assert {k: h.entry.data for k, h in other.get_many("abcd").items()} == {
        key: key.encode() for key in "abcd"
    }
    assert tiers.stats()["dropped"] == 0


def test_a_demoted_one_that_is_on_disk_only_tells_that_it_was_used(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    """Written again it would come back although another process has deleted it."""
    tiers.put("a", entry(clock))
    tiers.flush()
    clock.advance(MARK_LIFE / 2)
    other.delete_many({"a": clock()})
    for key in "bcd":
        tiers.put(key, entry(clock))
    assert "a" not in tiers._behind._dirty
    assert flaky(tiers).touched
    clock.advance(MARK_LIFE)
    tiers.flush()
    assert tiers.get("a", stale=True) is None


def test_expired_ones_are_not_demoted(tiers: Tiers, other: DiskTier, clock: FakeClock) -> None:
    for key in "abc":
        tiers.put(key, entry(clock, ttl=1.0, stale=1.0))
    clock.advance(1.0)
    for key in "def":
        tiers.put(key, entry(clock))
    tiers.flush()
    assert other.stats()["items"] == 3
    assert tiers.stats()["demotions"] == 0
    assert tiers.stats()["dropped"] == 0
    assert tiers._behind._dirty_bytes == 0


def test_a_large_one_goes_to_disk_only(tiers: Tiers, other: DiskTier, clock: FakeClock) -> None:
    tiers.put("a", entry(clock, b"small"))
    clock.advance(1.0)
    large = entry(clock, b"x" * (MIB // 8))
    tiers.put("a", large)
    assert data_of(other, "a") == large.data
    for _ in range(2):
        hit = tiers.get("a")
        assert hit is not None
        assert (hit.tier, hit.entry) == ("disk", large)
    assert tiers.stats()["memory"]["items"] == 0


def test_one_that_is_too_large_for_both_leaves_no_older_one(folder: Path, clock: FakeClock) -> None:
    with closing(make(clock, disk_tier(folder, clock, MIB), most_bytes=8 * MIB)) as tiers:
        tiers.put("a", entry(clock, b"old"), durable=True)
        clock.advance(1.0)
        tiers.put("a", entry(clock, b"x" * (MIB // 2)))  # memory takes it
        assert data_of(tiers, "a") == b"x" * (MIB // 2)
        forget_memory(tiers)
        assert tiers.get("a") is None
        tiers.put("b", entry(clock, b"old"), durable=True)
        clock.advance(1.0)
        tiers.put("b", entry(clock, b"x" * (2 * MIB)))
        assert tiers.get("b") is None
        assert tiers.stats()["dropped"] == 1


def test_the_queue_is_bounded_and_the_oldest_go(
    tiers: Tiers, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "MOST_DIRTY", 5)
    flaky(tiers).broken = {"writes"}
    for n in range(20):
        tiers.put(f"k{n}", entry(clock))
        assert len(tiers._behind._dirty) <= 5
    assert tiers.stats()["dropped"] == 15
    assert list(tiers._behind._dirty) == [f"k{n}" for n in range(15, 20)]


def test_the_queues_bytes_are_bounded(folder: Path, clock: FakeClock) -> None:
    disk = Flaky(folder, clock)
    disk.broken = {"writes"}
    with closing(make(clock, disk, most_bytes=100_000)) as tiers:
        for n in range(100):
            tiers.put(f"k{n}", entry(clock, b"x" * 10_000))
            assert tiers._behind._dirty_bytes == sum(
                size_of(*pair) for pair in tiers._behind._dirty.items()
            )
            assert tiers._behind._dirty_bytes <= 100_000
        assert tiers.stats()["dropped"] > 80


# ---------------------------------------------------------------------------- deletions


def test_delete_forgets_everywhere(tiers: Tiers, other: DiskTier, clock: FakeClock) -> None:
    tiers.put("a", entry(clock), durable=True)
    tiers.put("b", entry(clock))
    tiers.delete_many(["a", "b", "c"])
    assert other.get("a") is None
    assert tiers.get_many("abc", stale=True) == {}
    forget_memory(tiers)
    assert tiers.get_many("abc", stale=True) == {}
    assert not tiers._behind._debts


def test_delete_beats_a_queued_put_and_a_later_put_beats_it(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    """All at the same moment: the order is this process's own."""
    tiers.put("a", entry(clock, b"1"))
    tiers.delete("a")
    tiers.flush()
    assert other.get("a") is None
    tiers.put("a", entry(clock, b"2"))
    tiers.flush()
    assert data_of(other, "a") == b"2"


def test_delete_waits_for_what_is_being_written(
    tiers: Tiers, other: DiskTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch has been taken and is not committed when the value is deleted, the same moment."""
    disk = flaky(tiers)
    taken, go_on = threading.Event(), threading.Event()
    put_many = disk.put_many

    def slow(*arguments: Any) -> None:
        taken.set()
        go_on.wait(BOUND)
        put_many(*arguments)

    monkeypatch.setattr(disk, "put_many", slow)
    tiers.put("a", entry(clock))
    with ThreadPoolExecutor(2) as pool:
        flush = pool.submit(tiers.flush)
        assert taken.wait(BOUND)
        delete = pool.submit(tiers.delete, "a")
        assert not delete.done()
        go_on.set()
        flush.result(BOUND)
        delete.result(BOUND)
    assert other.get("a") is None
    assert tiers.get("a") is None


def test_a_deletion_during_a_long_write_is_remembered(
    tiers: Tiers, other: DiskTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "PATIENCE", 0.01)
    tiers.put("a", entry(clock), durable=True)
    with tiers._behind._writing:
        tiers.delete("a")
        assert data_of(other, "a") == b'"v"'
        assert tiers.get("a", stale=True) is None
    tiers.flush()
    assert other.get("a") is None
    assert not tiers._behind._debts


def test_what_was_read_before_a_deletion_does_not_come_back(
    tiers: Tiers, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value has been read from disk when it is deleted, and not yet put into memory."""
    tiers.put("a", entry(clock))
    forget_memory(tiers)
    disk = flaky(tiers)
    get_many = disk.get_many

    def slow(*arguments: Any) -> Any:
        found = get_many(*arguments)
        tiers.delete("a")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(disk, "get_many", slow)
        assert tiers.get("a") is not None  # it was there when it was read
    assert tiers.get("a") is None


def test_what_was_read_before_a_put_does_not_replace_it(
    tiers: Tiers, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers.put("a", entry(clock, b"1"))
    forget_memory(tiers)
    disk = flaky(tiers)
    get_many = disk.get_many

    def slow(*arguments: Any) -> Any:
        found = get_many(*arguments)
        clock.advance(1.0)
        tiers.put("a", entry(clock, b"2"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(disk, "get_many", slow)
        tiers.get("a")
    assert data_of(tiers, "a") == b"2"


def test_a_deletion_while_the_disk_is_in_trouble_is_made_up_for(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    tiers.put_many([("a", entry(clock)), ("b", entry(clock))], durable=True)
    forget_memory(tiers)
    flaky(tiers).broken = {"writes"}
    clock.advance(1.0)
    tiers.delete("a")
    assert data_of(other, "a") == b'"v"'  # it is there, and can be read
    assert tiers.get("a", stale=True) is None
    assert data_of(tiers, "b") == b'"v"'
    flaky(tiers).broken = set()
    clock.advance(1.0)
    tiers.put("a", entry(clock, b"2"))
    tiers.flush()
    assert data_of(other, "a") == b"2"
    assert not tiers._behind._debts


def test_too_many_deletions_in_trouble_become_one_of_everything(
    tiers: Tiers, other: DiskTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "MOST_DEBTS", 5)
    tiers.put_many([(f"k{n}", entry(clock)) for n in range(20)], durable=True)
    forget_memory(tiers)
    flaky(tiers).broken = {"writes"}
    clock.advance(1.0)
    for n in range(10):
        tiers.delete(f"k{n}")
        assert len(tiers._behind._debts) <= 5
    assert tiers.get_many([f"k{n}" for n in range(20)]) == {}
    flaky(tiers).broken = set()
    clock.advance(RETRY)
    tiers.put("new", entry(clock))
    tiers.flush()
    assert list(other.get_many([*(f"k{n}" for n in range(20)), "new"])) == ["new"]
    forget_memory(tiers)
    assert data_of(tiers, "new") == b'"v"'


def test_clear(tiers: Tiers, other: DiskTier, clock: FakeClock) -> None:
    other.put_many([("other", entry(clock))])
    tiers.put("a", entry(clock), durable=True)
    tiers.put("b", entry(clock))
    clock.advance(1.0)
    tiers.clear()
    tiers.flush()
    assert tiers.get_many(["other", "a", "b"]) == {}
    assert other.stats()["items"] == 0


# ---------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("what", ["reads", "writes"])
def test_trouble_reaches_nobody_and_ends_by_itself(
    tiers: Tiers, other: DiskTier, clock: FakeClock, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk = flaky(tiers)
    disk.broken = {what}
    with caplog.at_level(logging.WARNING, "distributed_breaker"):
        for n in range(10):
            tiers.put("a", entry(clock))
            tiers.put(f"k{n}", entry(clock), durable=True)
            tiers.get("none")
            tiers.delete("none")
            tiers.flush()
        assert data_of(tiers, "a") == b'"v"'
        stats = tiers.stats()["disk"]
        assert (stats["works"], stats["error"]) == (False, f"broken for {what}")
        assert len(caplog.records) == 1
        before = disk.asked
        if what == "writes":
            tiers.flush()
            assert disk.asked == before  # it is left alone
        disk.broken = set()
        clock.advance(RETRY)
        tiers.put("b", entry(clock))
        tiers.flush()
        tiers.get("none")
    assert data_of(other, "b") == b'"v"'
    assert tiers.stats()["disk"]["works"]
    assert tiers.stats()["disk"]["error"] == ""
    assert len(caplog.records) == 2


def test_the_disk_in_trouble_is_asked_by_one_at_a_time(tiers: Tiers, clock: FakeClock) -> None:
    disk = flaky(tiers)
    disk.broken = {"reads"}
    for _ in range(TROUBLES + 5):
        tiers.get("none")
    assert disk.asked == TROUBLES
    clock.advance(RETRY)
    for _ in range(5):
        tiers.get("none")
    assert disk.asked == TROUBLES + 1


def test_after_a_long_trouble_what_waited_is_dropped(
    tiers: Tiers, other: DiskTier, clock: FakeClock
) -> None:
    """Another process may have deleted it, and the mark of that may be gone."""
    flaky(tiers).broken = {"writes"}
    tiers.put("a", entry(clock, stale=10_000.0, ttl=10_000.0))
    tiers.flush()
    tiers.delete("none")  # waits, too, and shows first that the disk works again
    flaky(tiers).broken = set()
    clock.advance(MARK_LIFE + 1.0)
    tiers.flush()
    for key in "bcd":  # nor is it demoted later
        tiers.put(key, entry(clock))
    tiers.flush()
    assert list(other.get_many("abcd")) == ["b", "c", "d"]
    assert tiers.stats()["dropped"] == 2


def test_a_folder_that_is_a_file(folder: Path, clock: FakeClock) -> None:
    folder.write_text("")
    with closing(make(clock, disk_tier(folder, clock), most_items=3)) as tiers:
        for n in range(10):
            tiers.put(f"k{n}", entry(clock), durable=n % 2 == 0)
            tiers.flush()
        assert data_of(tiers, "k9") == b'"v"'
        assert tiers.get("k0", stale=True) is not None  # it waits
        stats = tiers.stats()["disk"]
        assert not stats["works"]
        assert str(folder) in stats["error"]
        folder.unlink()
        clock.advance(RETRY)
        tiers.flush()
        assert tiers.stats()["disk"]["works"]
        assert tiers.stats()["disk"]["items"] == 10


def test_a_full_disk_still_answers(folder: Path, clock: FakeClock) -> None:
    disk = DiskTier(folder, most_bytes=16 * MIB, now=clock)
    disk._kind.pragmas["max_page_count"] = 13
    with closing(make(clock, disk, most_items=2)) as tiers:
        tiers.put("a", entry(clock), durable=True)
        forget_memory(tiers)
        for n in range(5):
            tiers.put(f"k{n}", entry(clock, b"x" * 100_000))
            tiers.flush()
        stats = tiers.stats()["disk"]
        assert not stats["works"]
        assert "full" in stats["error"]
        assert data_of(tiers, "k4") == b"x" * 100_000


def test_a_file_that_is_made_anew(tiers: Tiers, clock: FakeClock) -> None:
    tiers.put("a", entry(clock), durable=True)
    disk = flaky(tiers)
    disk.close()
    disk.path.write_bytes(b"no database at all" * 1_000)
    assert tiers.get("none") is None
    assert tiers.stats()["disk"]["renewals"] == 1
    assert data_of(tiers, "a") == b'"v"'
    for key in "bcd":
        tiers.put(key, entry(clock))
    tiers.flush()
    assert data_of(disk, "a") == b'"v"'  # demoted with its data, since it was there no more


def test_where_no_thread_can_run_much_is_written_by_who_puts(
    tiers: Tiers, other: DiskTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(write_behind, "start_thread", none)
    tiers.put_many([(f"k{n}", entry(clock)) for n in range(1_300)])
    assert other.stats()["items"] >= 500
    assert len(tiers._behind._dirty) < 600


# ---------------------------------------------------------------------------- processes

SHARED = """
tiers = Tiers(most_items=10, most_bytes=1 << 20, write_behind=float(sys.argv[2]),
              disk=DiskTier(sys.argv[1], most_bytes=1 << 24))
def entry(data, written=None):
    now = time.time()
    return Entry(data.encode(), written or now, now + 100, now + 1000)
def data(key):
    hit = tiers.get(key)
    return hit and hit.entry.data.decode()
"""


def test_two_processes_share_the_disk(folder: Path) -> None:
    source = """
tiers.put("mine", entry("other"))
tiers.put("both", entry("older"), durable=True)
hear()
say([data("ours"), data("mine")])
hear()
tiers.close()
say()
"""
    with (
        program(SHARED + source, folder, 0.01) as process,
        closing(
            Tiers(most_items=9, most_bytes=MIB, disk=DiskTier(folder, most_bytes=16 * MIB))
        ) as tiers,
    ):
        wait_until(lambda: tiers.get("mine"), BOUND)
        now = tiers._now()
        tiers.put("ours", Entry(b"ours", now, now + 100, now + 100), durable=True)
        tell(process)
        assert hear(process) == ["ours", "other"]
        assert data_of(tiers, "both") == b"older"
        tell(process)
        hear(process)
    check_file(folder / "cache.db")


def test_a_queued_put_of_another_process_loses_to_a_deletion(folder: Path) -> None:
    source = """
tiers.put("a", entry("a"))
tiers.put("b", entry("b"))
say()
hear()
tiers.flush()
say()
hear()
"""
    disk = DiskTier(folder, most_bytes=16 * MIB)
    with (
        program(SHARED + source, folder, 3600.0) as process,
        closing(Tiers(most_items=9, most_bytes=MIB, disk=disk)) as tiers,
    ):
        hear(process)
        tiers.delete("a")
        tell(process)
        hear(process)
        assert list(disk.get_many("ab")) == ["b"]
        assert tiers.get("a", stale=True) is None


FORK = """
import threading
tiers.put("durable", entry("durable"), durable=True)
tiers.put("queued", entry("queued"))
tiers.put("deleted", entry("deleted"))
def busy():
    n = 0
    while not ended.is_set():
        tiers.put(f"busy:{n % 50}", entry("x"))
        tiers.get(f"busy:{n % 70}")
        tiers.delete(f"busy:{n % 90}")
        n += 1
ended = threading.Event()
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for n in range(10):
    tiers.get("queued")
    child = os.fork()
    if not child:
        assert tiers._behind._thread is None and not tiers._behind._dirty
        assert data("durable") == "durable"
        assert data("queued") == "queued"  # from memory, or the parent has written it
        tiers.put(f"child:{n}", entry("child"))
        assert tiers._behind._thread.is_alive()
        deadline = time.monotonic() + 20
        while tiers._behind._dirty and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not tiers._behind._dirty
        tiers.close()
        os._exit(0) if n % 2 else sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
ended.set()
for thread in threads:
    thread.join()
tiers.delete("deleted")
tiers.flush()
say([[data(f"child:{n}") for n in range(10)], data("queued"), data("deleted")])
tiers.close()
"""


def test_forks_while_threads_are_at_work(folder: Path) -> None:
    with program(SHARED + FORK, folder, 0.05) as process:
        assert hear(process) == [["child"] * 10, "queued", None]
        assert process.wait(BOUND) == 0
    check_file(folder / "cache.db")


UNCLEAN = """
import threading
from distributed_breaker.fallback import forks
forks.WAIT = 0.02
tiers.put("a", entry("a"), durable=True)
disk = tiers._behind.disk
locks = {"disk": disk._writes._lock, "memory": tiers._memory._lock, "none": threading.Lock()}
held, ended = threading.Event(), threading.Event()
def hold():
    with locks[sys.argv[3]]:
        held.set()
        ended.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    found = [data("a")]
    tiers.put("b", entry("b"), durable=True)
    say([*found, data("b"), tiers.stats()["disk"]["works"]])
    os._exit(0)
os.waitpid(child, 0)
ended.set()
thread.join()
tiers.put("c", entry("c"), durable=True)
say([data("a"), data("c"), tiers.stats()["disk"]["works"]])
"""


@pytest.mark.parametrize(
    ("held", "seen"),
    [
        ("none", ["a", "b", True]),
        ("disk", ["a", "b", False]),  # memory only: SQLite's own locks may be taken for ever
        ("memory", ["a", "b", True]),  # memory begins empty, and a comes from disk
    ],
)
def test_a_fork_that_could_not_wait_for_a_lock(folder: Path, held: str, seen: list[Any]) -> None:
    with program(SHARED + UNCLEAN, folder, 3600.0, held) as process:
        assert hear(process) == seen
        assert hear(process) == ["a", "c", True]


# ---------------------------------------------------------------------------- threads


def test_threads_at_once_leave_everything_consistent(folder: Path) -> None:
    """Each key has one thread that puts and deletes it, and all read all keys.

    Nobody sees a version older than one that the owner had put before the last deletion, and at
    the end memory and disk hold the last version or nothing, as the owner left it.
    """
    disk = DiskTier(folder, most_bytes=16 * MIB)
    tiers = Tiers(most_items=20, most_bytes=MIB, disk=disk, write_behind=0.005)
    last: dict[str, bytes | None] = {}
    floor = dict.fromkeys((f"{t}:{n}" for t in range(6) for n in range(10)), -1)

    def work(number: int) -> None:
        rnd = random.Random(number)
        for version in range(300):
            own = f"{number}:{rnd.randrange(10)}"
            way = rnd.random()
            if way < 0.4:
                now = tiers._now()
                data = b"%d" % version + b" " * rnd.randrange(3_000)
                tiers.put(own, Entry(data, now, now + 100, now + 100), durable=way < 0.02)
                last[own] = data
                floor[own] = version
            elif way < 0.5:
                tiers.delete(own)
                last[own] = None
                floor[own] = version
                assert tiers.get(own) is None
            else:
                key = rnd.choice(list(floor))
                least = floor[key]
                hit = tiers.get(key)
                assert hit is None or int(hit.entry.data) >= least

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    held = tiers._memory.items()
    assert tiers.stats()["memory"]["bytes"] == sum(size_of(*pair) for pair in held)
    assert tiers._saved <= {key for key, _ in held}
    assert tiers._behind._dirty_bytes == sum(
        size_of(*pair) for pair in tiers._behind._dirty.items()
    )
    assert tiers.stats()["dropped"] == 0
    tiers.close()
    for source in (tiers._memory, disk):
        for key, expected in last.items():
            assert data_of(source, key) in (expected, None)
    assert {k for k in last if disk.get(k)} == {k for k, data in last.items() if data is not None}
    disk.close()
    check_file(disk.path)


def test_what_an_entry_costs_is_counted_in_full(clock: FakeClock) -> None:
    """The queue holds the same objects as memory; its bytes are bounded like memory's."""
    tiers = make(clock)
    tiers.put("key", entry(clock, b"12345"))
    assert tiers.stats()["memory"]["bytes"] == 3 + 5 + OVERHEAD
