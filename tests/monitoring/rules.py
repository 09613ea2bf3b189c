"""Reads as much of YAML as the alert rules use: no package of the tests' brings a reader.

Maps and lists by indentation, plain and double-quoted texts of one line, and texts that are folded
(``>-``).  Anything else is an error, so that what is read here is also what YAML says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

KEY = re.compile(r"( *)((?:- )?)([a-z_]+):(?: (.*))?")

Line = tuple[int, bool, str, str]  # how far in, whether it begins an entry of a list, key, value


def read(path: Path) -> dict[str, Any]:
    """The file as YAML would read it."""
    value, rest = _map(_lines(path.read_text()), 0)
    assert not rest, f"can't be read: {rest[0]}"
    return value


def _lines(text: str) -> list[Line]:
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r" *#", line)]
    found: list[Line] = []
    while lines:
        key = KEY.fullmatch(lines[0])
        assert key, f"no key: {lines[0]!r}"
        lines.pop(0)
        depth = len(key[1]) + len(key[2])
        value = key[4] or ""
        if value == ">-":
            folded = []
            while lines and len(lines[0]) - len(lines[0].lstrip()) > depth:
                folded.append(lines.pop(0).strip())
            value = json.dumps(" ".join(folded))
        found.append((depth, bool(key[2]), key[3], value))
    return found


def _map(lines: list[Line], depth: int) -> tuple[dict[str, Any], list[Line]]:
    found: dict[str, Any] = {}
    while lines and lines[0][0] == depth and not (found and lines[0][1]):
        (_, _, key, value), *lines = lines
        assert key not in found, f"twice: {key}"
        if value:
            found[key] = _scalar(value)
        elif lines and lines[0][1] and lines[0][0] > depth:
            found[key], lines = _list(lines, lines[0][0])
        else:
            assert lines, f"nothing below {key}"
            assert lines[0][0] > depth, f"nothing below {key}"
            found[key], lines = _map(lines, lines[0][0])
    return found, lines


def _list(lines: list[Line], depth: int) -> tuple[list[Any], list[Line]]:
    found = []
    while lines and lines[0][0] == depth and lines[0][1]:
        entry, lines = _map(lines, depth)
        found.append(entry)
    return found, lines


def _scalar(value: str) -> str:
    if value.startswith('"'):
        text: str = json.loads(value)
        return text
    assert re.fullmatch(r"\w+", value), f"quote it: {value}"
    return value
