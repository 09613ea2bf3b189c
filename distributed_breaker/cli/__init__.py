"""The command ``breakers``: looks at a running fleet through its store, and steps in.

Needs the extra ``cli``.  What each command prints with ``--json``, and the exit codes, are promised
in ``docs/command.md``.
"""

from __future__ import annotations

import sys

LIBRARIES = ("typer", "rich", "pydantic")


def main() -> None:
    """The entry point, which an installation without the extra has, too."""
    try:
        from .app import app
    except ModuleNotFoundError as missing:
        if missing.name not in LIBRARIES:
            raise
        sys.stderr.write(f"{missing}: pip install 'distributed-breaker[cli]'\n")
        sys.exit(64)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # An old locale must not end the command.
    app()
