"""What a large fleet costs the dashboard: ``python -m tests.monitoring.dashboard_speed``.

A made-up fleet changes some hundred circuits each second, as the endpoints tell it at most; a real
Chromium shows it. Said is what its main thread did for each update.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.monitoring.made_up import MadeUp, Tile, iso, serving, tile
from tests.monitoring.test_dashboard import ARGS

TASKS = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration", "TaskDuration")
WATCH = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) longTasks.push(Math.round(entry.duration));
}).observe({ type: "longtask", buffered: true });
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--circuits", type=int, default=3000)
    options.add_argument("--changes", type=int, default=300, help="a second")
    options.add_argument("--seconds", type=int, default=10)
    asked = options.parse_args()
    binary = shutil.which("chromium")
    if binary is None:
        sys.exit("no chromium on PATH")
    names = [f"service_{i % 37:02}.cache.part_{i:04}" for i in range(asked.circuits)]
    with sync_playwright() as playwright, serving(*map(circuit, names)) as fleet:
        browser = playwright.chromium.launch(executable_path=binary, args=ARGS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.add_init_script(WATCH)
        start = time.monotonic()
        page.goto(fleet.url)
        page.locator(".tile").first.wait_for()
        print(f"{asked.circuits} circuits; the first tiles after {time.monotonic() - start:.2f} s")
        page.wait_for_timeout(1000)
        print(f"long tasks while loading: {page.evaluate('longTasks')} ms")
        measure(page, fleet, names, asked.changes, asked.seconds)
        browser.close()


def circuit(name: str) -> Tile:
    share = random.random()
    return tile(name, "open" if share < 0.01 else "half_open" if share < 0.015 else "closed")


def measure(page: Page, fleet: MadeUp, names: list[str], changes: int, seconds: int) -> None:
    session = page.context.new_cdp_session(page)
    # Of the thread itself: what other processes take of the machine meanwhile is left out.
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def metrics() -> dict[str, Any]:
        found = session.send("Performance.getMetrics")["metrics"]
        return {metric["name"]: metric["value"] for metric in found}

    page.evaluate("longTasks.length = 0")
    before, start = metrics(), time.monotonic()
    for second in range(seconds):
        changed = [circuit(name) for name in random.sample(names, changes)]
        now = iso(time.time())
        fleet.change(*[{**one, "since": now, "rate": random.random() * 100} for one in changed])
        page.wait_for_timeout(max(0.0, 1000 * (start + second + 1 - time.monotonic())))
    after = metrics()
    for task in TASKS:
        each = 1000 * (after[task] - before[task]) / seconds
        print(f"{task.removesuffix('Duration'):>12}: {each:6.1f} ms for each update of {changes}")
    print(f"long tasks (of more than 50 ms): {page.evaluate('longTasks')} ms")
    print(f"{after['Nodes']:.0f} nodes, {after['JSHeapUsedSize'] / 1e6:.0f} MB of heap")


if __name__ == "__main__":
    main()
