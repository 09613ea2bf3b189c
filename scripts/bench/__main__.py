"""``python -m scripts.bench [--quick] [--only TOPIC …] [--server KIND]``; see ``make bench``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.servers import KINDS, Server, why_missing

from . import (
    cache,
    calls,
    circuits,
    database,
    http,
    ml,
    monitoring,
    outage,
    pages,
    peers,
    recovery,
    startup,
    threads,
    traffic,
    trips,
)
from .figures import Topic, judge
from .machine import describe
from .reasons import REASONS
from .setting import Setting, limits, missing
from .subjects import Ours, Subject, version

ROOT = Path(__file__).parents[2]
TOPICS: dict[str, Callable[[Setting], Topic]] = {
    "calls": calls.run,
    "threads": threads.run,
    "traffic": traffic.run,
    "trips": trips.run,
    "outage": outage.run,
    "recovery": recovery.run,
    "circuits": circuits.run,
    "startup": startup.run,
    "cache": cache.run,
    "http": http.run,
    "database": database.run,
    "ml": ml.run,
    "monitoring": monitoring.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the summary and write the pages; 1 when a row is behind without a reason."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description="Measure speed and cost")
    add = parser.add_argument
    add("--quick", action="store_true", help="rough figures in under two minutes; writes nothing")
    add("--only", nargs="+", choices=TOPICS, default=list(TOPICS), help="topics; writes nothing")
    add("--server", choices=KINDS, default="valkey", help="kind of server")
    add("--write", action="store_true", help="write docs/ and README.md, whatever the run was")
    add("--out", type=Path, metavar="FOLDER", help="write the pages there, and not the README")
    add("--without", action="store_true", help="go on although peers are not installed")
    options = parser.parse_args(arguments)
    reason = why_missing(options.server)
    if reason:
        parser.error(reason)
    absent = missing()
    if absent and not options.without:
        parser.error(f"not installed: {', '.join(absent)}; `make bench` installs them")
    logging.disable()  # That circuits open and servers are away is what is wanted here.
    setting = Setting(options.server, options.quick)
    start = time.monotonic()
    machine = describe(setting.server)
    print("\n".join(f"{label:12}{words}" for label, words in machine.items()), flush=True)
    topics = []
    for name in options.only:
        begun = time.monotonic()
        topics.append(TOPICS[name](setting))
        print(f"measured {name} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    report = _report(setting, machine, topics, absent)
    print("\n" + report.summary())
    print(f"\nmeasured in {time.monotonic() - start:.0f} s; compare figures of one run only")
    _write(report, options)
    if report.unexplained:
        print("behind, and no reason is on file: " + "; ".join(report.unexplained), file=sys.stderr)
    return 1 if report.unexplained else 0


def _report(
    setting: Setting, machine: dict[str, str], topics: list[Topic], absent: list[str]
) -> pages.Report:
    kinds: list[type[Subject]] = [Ours, *setting.in_memory, *setting.shared]
    said = limits()
    if absent:
        said.append(f"Not installed, and so not measured: {', '.join(absent)}.")
    if version("purgatory"):
        with Server.start(setting.server) as server, contextlib.suppress(ImportError):
            error = peers.purgatory_blocking_error(server.url)
        if error:
            said.append(f"purgatory's blocking Redis storage fails at its first call: `{error}`.")
    return pages.Report(
        machine=machine,
        versions={kind.title: version(kind.packages[0]) for kind in kinds},
        configurations={kind.title: kind.how for kind in kinds},
        topics=topics,
        judgements=judge(topics, REASONS),
        shared=frozenset(kind.title for kind in kinds if kind.shared),
        limits=said,
        quick=setting.quick,
    )


def _write(report: pages.Report, options: argparse.Namespace) -> None:
    """A whole and thorough run writes the pages; others only when they are told to."""
    whole = not options.quick and options.only == list(TOPICS) and not options.without
    if options.out is not None:
        written = pages.write(report, options.out, None)
    elif options.write or whole:
        written = pages.write(report, ROOT / "docs", ROOT / "README.md")
    else:
        print("nothing was written (--write or --out FOLDER does)")
        return
    print(f"wrote {len(written)} files: {', '.join(str(path) for path in written)}")


if __name__ == "__main__":
    sys.exit(main())
