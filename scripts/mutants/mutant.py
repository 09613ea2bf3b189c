"""One change of one file: where it is, what it does, and the name that it keeps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

# What becomes what, in either language. A boundary and its opposite: a test that finds both has
# been at the boundary, and on both sides of it.
COMPARISONS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("~=",),
    "~=": ("==",),
}


class Change(NamedTuple):
    """Replace ``source[start:end]`` by ``text``."""

    start: int
    end: int
    text: str
    operator: str


@dataclass(frozen=True)
class Mutant:
    """A change with its surroundings.

    ``was`` and ``now`` are the lines that it touches, without indentation. Together with the file,
    the function and ``nth`` (of equal ones in a function, counted from 1) they are the mutant's
    name: it stays the same when lines are added elsewhere.
    """

    file: str
    function: str
    operator: str
    line: int
    was: str
    now: str
    change: Change
    nth: int = 1

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What names the mutant in the list of equivalent ones."""
        return self.file, self.function, self.was, self.now, self.nth

    @property
    def id(self) -> str:
        """A short form of the key."""
        return hashlib.sha1("\0".join(map(str, self.key)).encode()).hexdigest()[:8]

    def plant(self, source: str) -> str:
        """The source with the change."""
        return source[: self.change.start] + self.change.text + source[self.change.end :]

    def __str__(self) -> str:
        place = f"{self.file}:{self.line} {self.function} ({self.operator})"
        return f"{self.id}  {place}\n    - {self.was}\n    + {self.now}"


def mutants_of(file: str, source: str, changes: Iterable[tuple[str, Change]]) -> list[Mutant]:
    """Mutants out of (function, change) pairs; of changes to the same text the first is taken."""
    seen: set[tuple[int, int, str]] = set()
    counted: Counter[tuple[str, str, str]] = Counter()
    found = []
    for function, change in sorted(changes, key=lambda pair: pair[1][:2]):
        narrow = narrowed(source, change)
        if narrow in seen or (narrow[0] == narrow[1] and not narrow[2]):
            continue
        seen.add(narrow)
        first = source.rfind("\n", 0, change.start) + 1
        last = source.find("\n", change.end)
        last = len(source) if last < 0 else last
        was = " ".join(source[first:last].split())
        after = source[first : change.start] + change.text + source[change.end : last]
        now = " ".join(after.split())
        counted[function, was, now] += 1
        mutant = Mutant(
            file,
            function,
            change.operator,
            source.count("\n", 0, change.start) + 1,
            was,
            now,
            change,
        )
        found.append(replace(mutant, nth=counted[function, was, now]))
    return found


def narrowed(source: str, change: Change) -> tuple[int, int, str]:
    """The change without what it leaves as it is: two ways to write one change become equal."""
    start, end, text, _ = change
    while text and start < end and source[start] == text[0]:
        start, text = start + 1, text[1:]
    while text and start < end and source[end - 1] == text[-1]:
        end, text = end - 1, text[:-1]
    return start, end, text


def numbers_near(value: int) -> list[str]:
    """The numbers that take a number's place: its neighbours and nothing."""
    return [str(number) for number in dict.fromkeys((value + 1, value - 1, 0)) if number != value]
