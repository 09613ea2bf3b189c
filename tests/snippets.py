"""Runs the Python snippets of a documentation page, in order, as one program."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[str]:
    """All Python blocks of a page, each moved down to its line, so that errors point there."""
    text = page.read_text("utf-8")
    return ["\n" * text.count("\n", 0, m.start(1)) + m[1] for m in _BLOCK.finditer(text)]


def run(page: Path, names: Mapping[str, Any], **instead: str) -> dict[str, Any]:
    """Execute all of a page, ``await`` outside of functions included; returns the names it leaves.

    Args:
        page: the file.
        names: what it takes as given.
        instead: texts by the names of ``_STANDARD``: what stands for addresses of real servers.
    """
    space: dict[str, Any] = {"__name__": "snippets", **names}
    blocks = snippets(page)
    assert blocks, f"{page} has no Python"

    async def all_of_them() -> None:
        for block in blocks:
            for name, text in instead.items():
                block = block.replace(_STANDARD[name], text)
            code = compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if code.co_flags & inspect.CO_COROUTINE:
                await eval(code, space)
            else:
                exec(code, space)

    asyncio.run(all_of_them())
    return space


_STANDARD = {"redis": "redis://localhost:6379/0"}
