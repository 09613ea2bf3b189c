"""What came out: counts, killers, and what is wrong."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence

from scripts.servers import available

from .equivalents import Key
from .judge import Verdict
from .mutant import Mutant

Judged = Sequence[tuple[Mutant, Verdict]]


def problems(judged: Judged, listed: set[Key]) -> list[str]:
    """Survivors that are not listed, and listed ones that did not survive."""
    found = []
    for mutant, verdict in judged:
        if not verdict.killer and mutant.key not in listed:
            found.append(f"survived: {mutant}")
        if verdict.killer and mutant.key in listed:
            found.append(f"listed as equivalent, but killed by {verdict.killer}: {mutant}")
    return found


def summary(judged: Judged, listed: set[Key], seconds: float) -> str:
    """A table of the two twins, and who killed how many."""
    rows = ["mutants", "killed", "by the corpus", "by other tests", "by hanging"]
    rows += ["broken (in killed)", "equivalent (listed)", "survived"]
    counts: dict[str, Counter[str]] = {}
    killers: Counter[str] = Counter()
    for mutant, verdict in judged:
        row = counts.setdefault(mutant.file, Counter())
        row["mutants"] += 1
        if not verdict.killer:
            row["equivalent (listed)" if mutant.key in listed else "survived"] += 1
            continue
        row["killed"] += 1
        row["broken (in killed)"] += verdict.broken
        kind = {"corpus": "by the corpus", "hang": "by hanging"}.get(verdict.killer)
        row[kind or "by other tests"] += 1
        if kind is None:
            killers[verdict.killer] += 1
    files = list(counts)
    lines = [f"{'':22}" + "".join(f"{file:>8}" for file in files) + f"{'all':>8}"]
    for name in rows:
        numbers = [counts[file][name] for file in files]
        lines.append(f"{name:22}" + "".join(f"{n:8}" for n in [*numbers, sum(numbers)]))
    lines += ["", "The other tests that killed most:"] if killers else []
    lines += [f"{number:6}  {killer}" for killer, number in killers.most_common(12)]
    return "\n".join([*lines, "", f"{seconds:.0f} s on {machine()}"])


def machine() -> str:
    """Where this was found out."""
    python = f"Python {platform.python_version()}"
    server = available().get("valkey")
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, {python}, {server}"
