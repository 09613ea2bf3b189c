"""``python -m scripts.bench [--quick] [--only TOPIC …] [--server KIND]``; see ``make bench``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from scripts.servers import KINDS, why_missing

from . import calls, outage, store
from .report import Setting, Table, describe

TOPICS: dict[str, Callable[[Setting], Table]] = {
    "calls": calls.run,
    "store": store.run,
    "outage": outage.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the topics one after another, then print all tables; 0 unless something broke."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description="Measure speed and cost")
    parser.add_argument("--quick", action="store_true", help="rough figures in under 20 s")
    parser.add_argument("--only", nargs="+", choices=TOPICS, default=list(TOPICS), help="topics")
    parser.add_argument("--server", choices=KINDS, default="valkey", help="kind of server")
    options = parser.parse_args(arguments)
    reason = why_missing(options.server)
    if reason:
        parser.error(reason)
    setting = Setting(options.server, options.quick)
    start = time.monotonic()
    print(describe(setting), flush=True)
    tables = []
    for name in options.only:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        tables.append(TOPICS[name](setting))
    print("\n" + "\n\n".join(table.text() for table in tables))
    print(f"\nmeasured in {time.monotonic() - start:.0f} s; compare figures of one run only")
    return 0


if __name__ == "__main__":
    sys.exit(main())
