"""``python -m tests.exploration [--larger]``: all explorations, with their states, moves, seconds.

It ends with 1 if a rule was broken, whose shortest way is printed, or a situation did not come up.
"""

from __future__ import annotations

import argparse
import sys

from tests.exploration.explorations import LARGER, ORDINARY


def main() -> int:
    """Go through them all."""
    parser = argparse.ArgumentParser(prog="python -m tests.exploration", description=__doc__)
    parser.add_argument("--larger", action="store_true", help="larger bounds: some minutes")
    failed = 0
    for exploration in LARGER if parser.parse_args().larger else ORDINARY:
        found = exploration.search()
        missing = [what for what in exploration.situations if not found.world.notes[what]]
        print(found, *(f"  missing: {what}" for what in missing), sep="\n", flush=True)
        failed += bool(found.broken or missing)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
