"""The mutants that behave as the original does: the list, and what is wrong with it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .mutant import Mutant

LIST = Path(__file__).with_name("equivalent.toml")
Key = tuple[str, str, str, str, int]


class Equivalent(NamedTuple):
    """One entry of the list; ``key`` is the mutant's."""

    key: Key
    reason: str

    def __str__(self) -> str:
        file, function, was, now, nth = self.key
        return f"{file} {function}\n    - {was}\n    + {now}" + (
            f"  (nth {nth})" if nth > 1 else ""
        )


def read(path: Path = LIST) -> list[Equivalent]:
    """The entries. Each group has one reason, one file, one function and some changes of a line."""
    found = []
    for group in tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", []):
        reason = " ".join(group["reason"].split())
        for was, now, *nth in group["mutants"]:
            key = (group["file"], group["function"], was, now, nth[0] if nth else 1)
            found.append(Equivalent(key, reason))
    return found


def faults(entries: Iterable[Equivalent], mutants: Iterable[Mutant]) -> list[str]:
    """What is wrong with the list before anything is judged."""
    keys = {mutant.key for mutant in mutants}
    seen: set[Key] = set()
    found = []
    for entry in entries:
        if entry.key not in keys:
            found.append(f"listed as equivalent, but there is no such mutant: {entry}")
        if entry.key in seen:
            found.append(f"listed twice: {entry}")
        if len(entry.reason) < 20:
            found.append(f"listed without a reason: {entry}")
        seen.add(entry.key)
    return found
