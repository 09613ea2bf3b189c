"""The pages that a run writes: docs/benchmarks.md and .json, and the table in the README.

Pure but for ``Pages.write``: text from figures.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from scripts.marks import between, marks

from .figures import OURS, Judgement, Row, Spread, Topic, Verdict, number, times
from .plots import plot

BEGIN, END = MARKS = marks("bench")
MISSING = "–"
NAME = 66  # columns of a row's name on the terminal

# What the README shows: the key of a row and how it is said there.
README_ROWS = {
    "calls: closed, decorator": "a closed call through the decorator, with durations",
    "calls: closed, decorator, no durations": "the same, without durations",
    "calls: rejected, decorator": "a rejection, beyond raising an exception",
    "traffic: 5,000 calls/s: commands": "Redis commands per closed call, at 5,000 calls/s",
    "trips: 8 idle processes refuse": "a trip, until eight other processes refuse calls",
    "outage: stopped: longest call": "the longest call while Redis is stopped",
    "recovery: probes before it closes": "probes of eight processes before the circuit closes",
}


@dataclass(frozen=True)
class Report:
    """One run: where and with what, its topics and the verdicts on them.

    Attributes:
        machine: what it ran on, label → words.
        versions: title of a library → its version.
        configurations: title of a library → how it was configured.
        limits: what peers can't do in any topic.
        quick: the figures are rough.
    """

    machine: Mapping[str, str]
    versions: Mapping[str, str]
    configurations: Mapping[str, str]
    topics: Sequence[Topic]
    judgements: Sequence[Judgement]
    shared: frozenset[str]
    limits: Sequence[str] = ()
    quick: bool = False

    @property
    def unexplained(self) -> list[str]:
        """The rows in which ours is behind for no reason that is on file."""
        return [f"{j.topic}: {j.row.name}" for j in self.judgements if j.unexplained]

    # ------------------------------------------------------------------ on the terminal

    def summary(self) -> str:
        """One line for each row; where ours is behind, the number of the reason."""
        lines = [f"{'':{NAME}}{'ours':>11}  {'best peer':<36}"]
        reasons: dict[str, int] = {}
        for judgement in self.judgements:
            row, best = judgement.row, judgement.row.best()
            ours = MISSING if row.ours is None else number(row.ours.median)
            line = f"{f'{judgement.topic}: {row.name}':{NAME}.{NAME}}{ours:>11}  "
            if best is None:
                words = [row.unit, row.target and f"target {row.target}", *row.extra.values()]
                lines.append(line + ", ".join(filter(None, words)))
                continue
            line += f"{_short(best[1], row.unit)}, {best[0]}".ljust(36)
            line += f"{judgement.verdict:>7} {times(row.ratio()):>8}"
            if judgement.unexplained:
                line += "  UNEXPLAINED"
            elif judgement.verdict is Verdict.BEHIND:
                line += f"  [{reasons.setdefault(judgement.reason, len(reasons) + 1)}]"
            lines.append(line)
        lines.append("")
        for reason, place in reasons.items():
            lines += textwrap.wrap(f"[{place}] {reason}", 100, subsequent_indent="    ")
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts().items())
        return "\n".join([*lines, "", counts])

    def counts(self) -> dict[str, int]:
        """How many rows have which verdict."""
        return {
            str(verdict): sum(j.verdict is verdict for j in self.judgements)
            for verdict in Verdict
            if verdict is not Verdict.ALONE
        }

    # ------------------------------------------------------------------ the pages

    def markdown(self) -> str:
        """docs/benchmarks.md."""
        parts = ["# Benchmarks", self._preface()]
        for topic in self.topics:
            parts.append(f"## {topic.title}")
            parts.append(topic.method)
            parts.append(self._table(topic))
            parts += self._reasons(topic)
            if topic.drawn:
                parts.append(f"![{topic.title}](benchmarks/{topic.key}.svg)")
            if topic.limits:
                parts.append("\n".join(f"- {limit}" for limit in topic.limits))
            parts.append(self._all_figures(topic))
        return "\n\n".join(parts) + "\n"

    def _preface(self) -> str:
        rough = (
            "**These are rough figures of a quick run.** They show the format, not the speed.\n\n"
            if self.quick
            else ""
        )
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts().items())
        machine = "\n".join(f"| {label} | {words} |" for label, words in self.machine.items())
        libraries = "\n".join(
            f"| {title} | {self.versions[title]} | {'Redis' if title in self.shared else 'memory'} "
            f"| {how} |"
            for title, how in self.configurations.items()
        )
        return (
            f"{rough}Written by `make bench`, all in one run; compare figures of one run only. "
            f"Every figure is a median, with the lower and upper quartile where it was sampled. "
            f"Rows that compare: {counts}. “Level” means that the medians are within 3 %, "
            "that the middle halves of the samples overlap, or that both are the machine's noise. "
            "A peer in memory shares nothing, so it is compared for what a call costs only.\n\n"
            f"| | |\n|---|---|\n{machine}\n\n"
            f"| library | version | state in | configuration |\n|---|---|---|---|\n{libraries}\n\n"
            "What the peers can't do:\n\n" + "\n".join(f"- {limit}" for limit in self.limits)
        )

    def _table(self, topic: Topic) -> str:
        extras = list(dict.fromkeys(key for row in topic.rows for key in row.extra))
        target = ["target"] if any(row.target for row in topic.rows) else []
        columns = ["", OURS, "best in memory", "best with Redis", "", *target, *extras]
        if not any(title not in self.shared for row in topic.rows for title in row.peers):
            columns.remove("best in memory")
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in topic.rows:
            verdict = row.verdict
            word = "" if verdict is Verdict.ALONE else f"{verdict}, {times(row.ratio())}"
            cells = [row.name + (f" ({row.note})" if row.note and not row.peers else "")]
            cells.append(_cell(row.ours, row.unit))
            if "best in memory" in columns:
                cells.append(_best(row, set(row.peers) - self.shared))
            cells += [_best(row, set(row.peers) & self.shared), word]
            cells += [row.target] if target else []
            cells += [row.extra.get(key, "") for key in extras]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _reasons(self, topic: Topic) -> list[str]:
        """Why ours is not ahead, for each reason the rows that it explains."""
        rows: dict[str, list[str]] = {}
        for judgement in self.judgements:
            if judgement.topic == topic.key and judgement.verdict is Verdict.BEHIND:
                rows.setdefault(judgement.reason or "**No reason is on file.**", []).append(
                    judgement.row.name
                )
        if not rows:
            return []
        lines = [f"- {'; '.join(names)}: {reason}" for reason, names in rows.items()]
        return ["Where ours is behind, and why:\n\n" + "\n".join(lines)]

    def _all_figures(self, topic: Topic) -> str:
        titles = list(dict.fromkeys(title for row in topic.rows for title in row.peers))
        if not titles:
            return ""
        lines = ["| | " + " | ".join([OURS, *titles]) + " |", "|---" * (len(titles) + 2) + "|"]
        for row in topic.rows:
            cells = [_cell(row.ours, row.unit)]
            cells += [_cell(row.peers.get(title), row.unit) for title in titles]
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        table = "\n".join(lines)
        return f"<details><summary>All figures</summary>\n\n{table}\n\n</details>"

    def json(self) -> str:
        """docs/benchmarks.json: all that was measured."""
        verdicts = [
            {"topic": j.topic, "row": j.row.name, "verdict": str(j.verdict), "reason": j.reason}
            for j in self.judgements
        ]
        content = {
            "quick": self.quick,
            "spread": "least, lower quartile, median, upper quartile, greatest, samples",
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "configurations": dict(self.configurations),
            "topics": [_plain(topic) for topic in self.topics],
            "verdicts": verdicts,
        }
        text = json.dumps(content, ensure_ascii=False, indent=1)
        # A spread is one line, so that the file stays small and its changes can be read.
        return re.sub(r"\[[-\d.,\se]+\]", lambda found: "".join(found[0].split()), text) + "\n"

    def readme(self) -> str:
        """What stands between the marks of the README."""
        rows = {f"{topic.key}: {row.name}": row for topic in self.topics for row in topic.rows}
        machine = ", ".join(self.machine.values())
        rough = "Rough figures of a quick run, p" if self.quick else "P"
        lines = [
            f"{rough}rinted by `make bench` ({machine}). [All figures](docs/benchmarks.md) stand "
            f"beside those of {len(self.configurations) - 1} configurations of other breakers, and "
            "wherever this one is behind, the reason. Compare figures of one run only.",
            "Of these, interlock-cb shares a circuit's state and no outcomes: each process judges "
            "its own calls.",
            "",
            "| median | this, shared | best peer in memory | best peer with Redis |",
            "|---|---|---|---|",
        ]
        for key, words in README_ROWS.items():
            if key in rows:
                row = rows[key]
                memory = _best(row, set(row.peers) - self.shared, short=True)
                redis = _best(row, set(row.peers) & self.shared, short=True)
                ours = MISSING if row.ours is None else _short(row.ours, row.unit)
                lines.append(f"| {words} | {ours} | {memory} | {redis} |")
        return "\n".join(lines)


def _plain(value: object) -> object:
    """What JSON holds: a spread as its numbers, with six digits, since more of them are noise."""
    if isinstance(value, Spread):
        return [float(f"{figure:.6g}") for figure in astuple(value)]
    if isinstance(value, Topic | Row):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _short(spread: Spread, unit: str) -> str:
    return f"{number(spread.median)} {unit}".strip()


def _cell(spread: Spread | None, unit: str) -> str:
    if spread is None:
        return MISSING
    text = _short(spread, unit)
    if spread.samples == 1 or spread.low == spread.high:
        return text
    return f"{text} ({number(spread.low)} to {number(spread.high)})"


def _best(row: Row, titles: set[str], *, short: bool = False) -> str:
    peers = {title: spread for title, spread in row.peers.items() if title in titles}
    best = Row(row.name, row.unit, None, peers, row.more_is_better).best()
    if best is None:
        return MISSING
    figure = _short(best[1], row.unit) if short else _cell(best[1], row.unit)
    return f"{figure}, {best[0]}"


def write(report: Report, folder: Path, readme: Path | None) -> list[Path]:
    """Write the pages and plots into a folder, and the README's table; the files written."""
    written = {
        folder / "benchmarks.md": report.markdown(),
        folder / "benchmarks.json": report.json(),
    }
    for topic in report.topics:
        if topic.drawn:
            written[folder / "benchmarks" / f"{topic.key}.svg"] = plot(topic)
    if readme is not None:
        written[readme] = between(readme.read_text(encoding="utf-8"), report.readme(), MARKS)
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(written)
