"""What the demo prints: narration, and a table that is redrawn in place on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence

from .fleet import Fleet, Worker

WIDEST = 100
REDRAW = 0.1  # s
# They fit into the 80 columns of a terminal.
COLUMNS = {
    "worker": "<6",
    "pid": "<7",
    "state": "<9",
    "decided by": "<10",
    "calls": ">6",
    "failed": ">6",
    "refused": ">7",
    "probes": ">6",
    "worst delay": ">11",
}
ERASE = "\x1b[{}F\x1b[J"  # up by so many lines, and clear all below


class Screen:
    """Standard output: a terminal shows the table at all times, a file once an act."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = 0  # how many lines of a table are to be erased
        self._next = 0.0  # when the table may be drawn again

    def say(self, text: str = "", indent: str = "") -> None:
        """Print a sentence or two."""
        self._erase()
        width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
        print(textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent))
        sys.stdout.flush()

    def redraw(self, fleet: Fleet) -> None:
        """Bring the table up to date, where it is live."""
        if self._live and time.monotonic() >= self._next:
            lines = table(fleet)
            self._erase()
            self._print(lines)
            self._drawn = len(lines)
            self._next = time.monotonic() + REDRAW

    def table(self, fleet: Fleet) -> None:
        """Print the table for good."""
        self._erase()
        self._print(["", *table(fleet), ""])

    def _erase(self) -> None:
        if self._drawn:
            sys.stdout.write(ERASE.format(self._drawn))
            self._drawn = 0

    def _print(self, lines: Sequence[str]) -> None:
        # A line that the terminal broke in two would spoil the count of lines to erase.
        width = shutil.get_terminal_size().columns - 1 if self._live else WIDEST
        sys.stdout.write("".join(line[:width] + "\n" for line in lines))
        sys.stdout.flush()


def table(fleet: Fleet) -> list[str]:
    """The workers, with what they have counted since the mark."""
    return [_line(list(COLUMNS)), *(_line(_cells(worker)) for worker in fleet.workers)]


def _line(cells: Sequence[object]) -> str:
    fitted = (format(str(c), width) for c, width in zip(cells, COLUMNS.values(), strict=True))
    return "  " + " ".join(fitted).rstrip()


def _cells(worker: Worker) -> list[object]:
    look, counted = worker.look, worker.counted()
    state, source = (look.state, look.source) if look is not None else ("", "")
    return [
        worker.number,
        worker.process.pid,
        "gone" if worker.gone else state,
        source,
        *counted[:4],
        f"{worker.longest * 1000:.1f} ms",
    ]
