"""What reaches a dependency that is down, and how a fleet finds out that it is well again."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from scripts.servers import Server

from .children import children, hear
from .figures import Row, Spread, Topic
from .setting import Setting
from .subjects import Boom, Ours, Rules, Subject, using, work

FLEET = 8
INTERVAL = 1.0  # s that a circuit stays open; some peers count in whole seconds
DOWN = 2.5  # intervals for which the dependency is down
LASTS = 0.02  # s of each call that reaches the dependency
PAUSE = 0.02  # s between the calls of one process
WATCHED = 2.0  # s for which the fleet is watched after the interval in which it could close
METHOD = (
    f"{FLEET} processes share one circuit, which opens at one failure for {INTERVAL:g} s and "
    f"closes after one good probe; each makes up to {1 / PAUSE:.0f} calls/s to a dependency that "
    f"takes {LASTS * 1e3:.0f} ms. It is down for {DOWN:g} intervals, so two probes fail "
    "and the third succeeds: two calls should reach it while it is down and the circuit open, and "
    "one more before it closes. The time runs from the end of the first good probe until every "
    "process has made a call after its last refusal, and contains the pauses between calls. All "
    "libraries at once, each with a server of its own."
)


@dataclass(frozen=True)
class Seen:
    """What one process saw, by the machine's clock: calls that reached the dependency (start, end,
    good), and when a call was last refused."""

    reached: list[tuple[float, float, bool]]
    refused: float


def run(setting: Setting) -> Topic:
    """Let fleets of all libraries live through the same outage of a dependency."""
    kinds: list[type[Subject]] = [Ours, *setting.shared]
    dead: dict[str, list[float]] = {}
    probes: dict[str, list[float]] = {}
    closed: dict[str, list[float]] = {}
    limits: set[str] = set()
    for _ in range(setting.count(1, 3)):
        for title, seen, up in _live_through(kinds, setting.server):
            tripped = up - DOWN * INTERVAL
            reached = sorted(call for each in seen for call in each.reached)
            # What was under way at the trip is no probe.
            late = tripped + INTERVAL / 2
            dead.setdefault(title, []).append(sum(late < start < up for start, _, _ in reached))
            good = min((end for start, end, fine in reached if fine and start > up), default=None)
            if good is None:
                limits.add(f"{title} had not closed {WATCHED:g} s after it could have.")
                continue
            probes.setdefault(title, []).append(sum(up < s < good for s, _, _ in reached))
            back = [min((s for s, _, _ in each.reached if s > each.refused), default=0.0)
                    for each in seen]  # fmt: skip
            if not all(back):
                limits.add(f"{title}: a process still refused calls at the end.")
                continue
            closed.setdefault(title, []).append(max(0.0, max(back) - good) * 1e3)
    rows = [
        _row("calls that reach the dead dependency after the trip", "", dead, "2"),
        _row("probes before it closes", "", probes, "1"),
        _row("from the good probe until all have closed", "ms", closed, ""),
    ]
    return Topic("recovery", "Recovery", METHOD, rows, sorted(limits), [row.name for row in rows])


def _row(name: str, unit: str, by_title: dict[str, list[float]], target: str) -> Row:
    spreads = {title: Spread.of(values) for title, values in by_title.items()}
    return Row(name, unit, spreads.pop(Ours.title, None), spreads, target=target)


def _live_through(kinds: list[type[Subject]], server: str) -> list[tuple[str, list[Seen], float]]:
    """What the fleets saw, and when the dependency was up again."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server.start(server)) for _ in kinds]
        given = [(kind, own.url) for kind, own in zip(kinds, servers, strict=True)
                 for _ in range(FLEET)]  # fmt: skip
        pipes = stack.enter_context(children(member, given))
        for pipe in pipes:
            hear(pipe)
        down = time.monotonic() + 0.5
        for pipe in pipes:
            pipe.send(down)
        seen = [hear(pipe) for pipe in pipes]
    fleets = [seen[n : n + FLEET] for n in range(0, len(seen), FLEET)]
    up = down + DOWN * INTERVAL
    return [(kind.title, fleet, up) for kind, fleet in zip(kinds, fleets, strict=True)]


# ------------------------------------------------------------------ in the processes


def member(kind: type[Subject], url: str, pipe: Connection) -> None:
    """Call until some time after the dependency's return, and tell what was seen."""
    with using(kind, url) as subject:
        guarded = subject.guard("recovery", Rules(failures=1, interval=INTERVAL))
        guarded.call(work)
        pipe.send("ready")
        down = pipe.recv()
        up = down + DOWN * INTERVAL
        reached: list[tuple[float, float, bool]] = []
        refused = 0.0

        def dependency() -> None:
            start = time.monotonic()
            time.sleep(LASTS)
            fine = not down <= start < up
            reached.append((start, time.monotonic(), fine))
            if not fine:
                raise Boom

        while time.monotonic() < up + INTERVAL + WATCHED:
            before = len(reached)
            with contextlib.suppress(Exception):
                guarded.call(dependency)
            if len(reached) == before:  # Whatever it raised: the call did not go through.
                refused = time.monotonic()
            time.sleep(PAUSE)
        pipe.send(Seen(reached, refused))
        pipe.recv()
