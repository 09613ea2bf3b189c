"""``python -m tests.simulation``: run seeds, or one again.

    python -m tests.simulation --seeds 1000
    python -m tests.simulation --minutes 5 --server valkey
    python -m tests.simulation --seed 4711 --events 3,17,20

Ends with 1 when a rule was broken; then it prints the shortest list of events that breaks it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time

from tests.simulation.plan import draw
from tests.simulation.runner import runner_on, soak
from tests.simulation.shrink import MOST_RUNS, describe, shortened
from tests.simulation.world import Failure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=10**9, help="how many seeds at most")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long at most (default: 1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--server", default="", help="valkey, redis8 or redis: run on its script")
    parser.add_argument(
        "--shorten",
        type=int,
        default=MOST_RUNS,
        metavar="RUNS",
        help=f"how often to try to shorten what fails (default: {MOST_RUNS})",
    )
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--events", help="with --seed: only these events, or none")
    given = parser.parse_args()
    if given.seed is not None:
        return again(given)
    begin = time.monotonic()
    tally = soak(first=given.first, seconds=given.minutes * 60, most=given.seeds, jobs=given.jobs,
                 kind=given.server, shorten=given.shorten)  # fmt: skip
    spent = time.monotonic() - begin
    where = f"the script on {given.server}" if given.server else "the model"
    print(
        f"{tally.seeds} seeds on {where} in {spent:.0f} s: {tally.seeds / spent:.1f} seeds/s, "
        f"{tally.steps / spent:,.0f} steps/s"
    )
    if tally.failure:
        print(f"\nFAILED\n{tally.failure}")
        return 1
    print(
        "every rule held; met "
        + ", ".join(f"{n:,} × {what}" for what, n in tally.seen.most_common(12))
    )
    return 0


def again(given: argparse.Namespace) -> int:
    """Run one seed, as it is or with some of its events."""
    seed, events, kind = given.seed, given.events, given.server
    plan = draw(seed)
    if events is not None:
        plan = plan.only([] if events == "none" else map(int, events.split(",")))
    with contextlib.ExitStack() as stack:
        carry_out = stack.enter_context(runner_on(kind))
        try:
            carry_out(plan)
        except Failure as failure:
            print(
                describe(
                    failure if events is not None else shortened(failure, carry_out, given.shorten)
                )
            )
            return 1
    print(f"seed {seed}: every rule held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
