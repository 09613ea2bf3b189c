"""Results of reads that are kept for the time when the database cannot give one.

They lie in memory and on the disk of the host, for all of its processes.  What is kept was read
before the last write to each of its tables, or it is not served: each write leaves a mark, the time
of a file's change, for each table that it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..fallback.disk import DiskTier
from ..fallback.memory import Entry
from ..fallback.tiers import Tiers
from .database_statements import names_of, targets_of
from .database_values import Rows, decode, encode

MOST_ITEMS, MOST_BYTES, MOST_ON_DISK = 10_000, 64 * 2**20, 512 * 2**20
LARGEST = 2**20  # bytes of one result
KEPT_EVERY = 1.0  # s after which the result of the same query is kept again
MOST_RECENT = 1_000  # queries of which it is known when that was
EVERYTHING = "all"


class Asked(NamedTuple):
    """A statement as it is sent: its text for the driver, and its parameters by name."""

    text: str
    params: Any
    dialect: str

    @property
    def key(self) -> str:
        """The same in every process.

        Raises:
            TypeError: a parameter is of a type that has no text.
        """
        params = json.dumps(encode(self.params))
        return hashlib.sha256(f"{self.text}\0{params}".encode()).hexdigest()


class StoredReads:
    """Results by statement and parameters.

    Args:
        folder: private to the user; for all processes of one service on this host.
        fresh: seconds for which a result counts as fresh.
        stale: seconds after which it is not served any more.
    """

    def __init__(self, folder: Path, fresh: float, stale: float) -> None:
        self.fresh, self.stale = fresh, stale
        self._tiers = Tiers(
            most_items=MOST_ITEMS,
            most_bytes=MOST_BYTES,
            disk=DiskTier(folder, most_bytes=MOST_ON_DISK),
        )
        self._folder = folder / "written"
        self._recent: dict[Hashable, float] = {}
        self._last_write = 0.0
        self._marks: dict[str, float] = {}  # should the disk not take them
        self._made = False

    def wants(self, mark: Hashable, began: float) -> bool:
        """Whether a result is worth keeping: one of the same query, that was kept less than a
        second ago and is still right as far as this process knows, is as good.

        Args:
            mark: of the query, in this process.
            began: when it was asked, in seconds since the epoch.
        """
        recent = self._recent
        try:
            last = recent.get(mark)
        except TypeError:
            return True  # a parameter that has no hash
        if last is not None and began - last < KEPT_EVERY and last > self._last_write:
            return False
        if len(recent) >= MOST_RECENT:
            recent.clear()
        recent[mark] = began
        return True

    def keep(self, asked: Asked, rows: list[dict[str, Any]], began: float) -> None:
        """Keep a result, if it can be kept.

        Args:
            asked: what was asked.
            rows: what was answered.
            began: when that began, in seconds since the epoch.
        """
        with suppress(TypeError, ValueError):
            names = list(rows[0]) if rows else []
            values = [encode([row[name] for name in names]) for row in rows]
            data = json.dumps([names, *values], separators=(",", ":")).encode()
            if len(data) <= LARGEST:
                end = max(self.fresh, self.stale)
                entry = Entry(data, began, began + self.fresh, began + end)
                self._tiers.put(asked.key, entry)

    def find(self, asked: Asked) -> Rows | None:
        """The last result, if nothing that it names has been written since."""
        with suppress(TypeError, ValueError):
            hit = self._tiers.get(asked.key, stale=True)
            if hit is not None and self._is_right(asked, hit.entry.written):
                names, *values = json.loads(hit.entry.data)
                rows = Rows(dict(zip(names, decode(row), strict=True)) for row in values)
                rows.stale, rows.age = True, hit.age
                return rows
        return None

    def _is_right(self, asked: Asked, began: float) -> bool:
        names = names_of(asked.text, asked.dialect)
        if names is None:
            return False
        return all(self._mark(bucket) < began for bucket in {EVERYTHING, *map(_bucket, names)})

    def _mark(self, bucket: str) -> float:
        mark = self._marks.get(bucket, 0.0)
        with suppress(OSError):
            mark = max(mark, os.stat(self._folder / bucket).st_mtime)
        return mark

    def wrote(self, targets: Iterable[str] | None) -> None:
        """Something was written: to tables of these names; None: nobody knows to which."""
        now = self._last_write = time.time()
        for bucket in {EVERYTHING} if targets is None else set(map(_bucket, targets)):
            self._marks[bucket] = now
            with suppress(OSError):
                if not self._made:
                    self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                    self._made = True
                path = self._folder / bucket
                path.touch()
                os.utime(path, (now, now))

    def sent(self, texts: Collection[str], dialect: str, *, all_of_them: bool = True) -> None:
        """Writes are over, however they ended.

        Args:
            texts: theirs.
            dialect: SQLAlchemy's name of it.
            all_of_them: False: there were others, of which nothing is known.
        """
        if texts:
            targets = [targets_of(text, dialect) for text in texts]
            known = all_of_them and all(targets)
            self.wrote(frozenset().union(*filter(None, targets)) if known else None)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held, by tier."""
        return self._tiers.stats()

    def close(self) -> None:
        """Write what waits to be written."""
        self._tiers.close()


def _bucket(table: str) -> str:
    """The file of a table's mark.  There are few, so that nobody fills the folder with names; two
    tables may share one."""
    return hashlib.sha256(table.encode()).hexdigest()[:2]
