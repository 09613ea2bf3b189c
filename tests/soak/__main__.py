"""``make soak``: the simulation and a fleet of real processes, for as long as asked.

    make soak ARGS="--minutes 30"
    make soak ARGS="--minutes 5 --only fleet --server redis8"

Half of the time goes to seeds of the simulation (on the model, and a fifth of them on the script of
a real server), the other half to eight real processes among random faults.  Ends with 1 at the
first thing that does not hold, and says how to see it again.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time

from scripts.servers import KINDS
from tests.simulation.runner import Tally, soak
from tests.soak.fleet import drive

PARTS = ("model", "script", "fleet")
SHARES = {"model": 0.4, "script": 0.1, "fleet": 0.5}


def simulate(part: str, first: int, seconds: float, kind: str) -> bool:
    """Seeds for so long; says what came of them."""
    where = f"the script on {kind}" if part == "script" else "the model"
    begin = time.monotonic()
    tally: Tally = soak(
        first=first,
        seconds=seconds,
        most=10**9,
        jobs=os.cpu_count() or 1,
        kind=kind if part == "script" else "",
    )
    spent = time.monotonic() - begin
    print(
        f"simulation on {where}: seeds {first:,} to {first + tally.seeds - 1:,} in {spent:.0f} s: "
        f"{tally.seeds / spent:.1f} seeds/s, {tally.steps / spent:,.0f} steps/s",
        flush=True,
    )
    if tally.failure:
        print(f"\nFAILED\n{tally.failure}")
    return not tally.failure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (default: 10)")
    parser.add_argument("--only", choices=PARTS, help="spend all of the time on one part")
    parser.add_argument("--server", choices=KINDS, default="valkey", help="kind of server")
    parser.add_argument("--first", type=int, help="the first seed (default: drawn from the time)")
    given = parser.parse_args()
    first = given.first if given.first is not None else int(time.time()) % 10**6 * 10**4
    print(f"CPython {platform.python_version()}, {os.cpu_count()} cores, seeds from {first}")
    for part in [given.only] if given.only else PARTS:
        seconds = given.minutes * 60 * (1.0 if given.only else SHARES[part])
        if part == "fleet":
            well = drive(first, seconds, given.server)
        else:
            well = simulate(part, first, seconds, given.server)
        if not well:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
