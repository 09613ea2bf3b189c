"""How fast a trip reaches other processes: idle ones, and ones whose cores are busy."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from multiprocessing.connection import Connection

from distributed_breaker import State, Transition
from scripts.servers import Server

from .children import Silence, ask, children, hear
from .figures import Row, Spread, Topic
from .figures import number as number_of
from .setting import Setting
from .subjects import Boom, Guarded, Ours, Rules, Subject, using, work

FLEETS = (2, 8, 32)
RATE = 2_000  # calls/s of the whole fleet, so that no library is drowned in calls
PATIENCE = 3.0  # s after which a process counts as never having refused
FAILURES = 50  # that are made at most to open a circuit which is to open at the first
METHOD = (
    f"So many processes make {RATE:,} calls/s together, each through its own breaker of the same "
    "circuit; then one more process has failures until it opens, which it is to do at the first. "
    "Measured is the time from the call that opened it "
    "until each of them has refused a call, so the pause between two calls of a process (1 ms with "
    "2 processes, 16 ms with 32) is contained for all. “CPU-bound”: each process has one more "
    "thread that never stops computing. “Heard” is ours without that pause: when the push has "
    "reached the process. Every trip has a circuit of its own."
)


def run(setting: Setting) -> Topic:
    """Trip circuits of all libraries before fleets of three sizes."""
    kinds: list[type[Subject]] = [Ours, *setting.shared]
    rows: list[Row] = []
    limits: list[str] = []
    with (
        Server.start(setting.server) as server,
        children(watch, [(server.url,)] * max(FLEETS)) as pipes,
        contextlib.ExitStack() as stack,
    ):
        subjects = [stack.enter_context(using(kind, server.url)) for kind in kinds]
        for pipe in pipes:
            hear(pipe)
        for burning in (False, True):
            for fleet in (FLEETS[0], FLEETS[-1]) if burning and setting.quick else FLEETS:
                # Busy processes take turns on the cores: few trips of many processes suffice.
                trips = setting.count(1, 8 if not burning else 4)
                rows += _rows(subjects, pipes[:fleet], burning, trips, limits)
    drawn = [row.name for row in rows if "refuse" in row.name]
    return Topic("trips", "A trip, as other processes see it", METHOD, rows, limits, drawn)


def _rows(
    subjects: list[Subject],
    pipes: list[Connection],
    burning: bool,
    trips: int,
    limits: list[str],
) -> list[Row]:
    refused: dict[str, list[float]] = {subject.title: [] for subject in subjects}
    heard: list[float] = []
    name = f"{len(pipes)} {'CPU-bound' if burning else 'idle'} processes"
    for number in range(trips):
        for subject in subjects:
            try:
                failures, seen = _trip(
                    subject, f"{name}-{number}".replace(" ", "-"), pipes, burning
                )
            except Silence as silence:
                limits.append(f"{subject.title}, {name}: {silence}.")
                continue
            never = [by_call for by_call, _ in seen if by_call is None]
            if failures != 1:
                limits.append(f"{subject.title}, {name}: {failures} failures before it opened.")
            if never:
                limits.append(f"{subject.title}, {name}: {len(never)} had not refused a call "
                              f"{PATIENCE:g} s after the trip.")  # fmt: skip
            refused[subject.title] += [(by_call or PATIENCE) * 1e3 for by_call, _ in seen]
            heard += [by_push * 1e3 for _, by_push in seen if by_push is not None]
    spreads = {title: Spread.of(values) for title, values in refused.items() if values}
    rows = [Row(f"{name} refuse", "ms", spreads.pop(Ours.title, None), spreads)]
    if heard:
        ordered = sorted(heard)
        extra = {"p99": f"{number_of(ordered[int(len(ordered) * 0.99)])} ms"}
        target = "" if burning else "p99 ≤ 10"
        rows.append(Row(f"{name} have heard", "ms", Spread.of(heard), target=target, extra=extra))
    return rows


def _trip(
    subject: Subject, circuit: str, pipes: list[Connection], burning: bool
) -> tuple[int, list[tuple[float | None, float | None]]]:
    """How many failures it took, and the seconds from the one that opened the circuit until each
    process refused, and heard of it."""
    guarded = _guard(subject, circuit)
    for pipe in pipes:
        pipe.send((type(subject), circuit, len(pipes) / RATE, burning))
    for pipe in pipes:
        hear(pipe)
    for pipe in pipes:
        pipe.send("go")
    time.sleep(0.05)  # They are calling now.
    failures, start = _open(guarded)
    times = [hear(pipe, 3 * PATIENCE) for pipe in pipes]
    return failures, [
        (by_call and by_call - start, by_push and by_push - start) for by_call, by_push in times
    ]


def _open(guarded: Guarded) -> tuple[int, float]:
    """Fail until the circuit refuses calls: how many failures it took, and when the last began.

    With some peers a success elsewhere takes the shared failure back before it is judged.
    """
    began: list[float] = []

    def fail() -> None:
        began.append(time.monotonic())
        raise Boom

    for _ in range(FAILURES):
        try:
            guarded.call(fail)
        except Boom:
            time.sleep(0.002)
        except guarded.refusal:
            break
        except Exception:
            time.sleep(0.002)  # Its client has had no answer in time.
    return len(began), began[-1]


# ------------------------------------------------------------------ in the other processes


def watch(url: str, pipe: Connection) -> None:
    """Call through one circuit after another until it refuses, and tell when that was."""
    subjects: dict[type[Subject], Subject] = {}
    pipe.send("ready")
    while True:
        kind, circuit, pause, burning = pipe.recv()
        if kind not in subjects:
            subjects[kind] = kind(url)
        subject = subjects[kind]
        guarded = _guard(subject, circuit)
        pushed: list[float] = []
        if isinstance(subject, Ours):
            subject.registry.breaker(circuit).on_transition(partial(_note, pushed))
        done = threading.Event()
        if burning:
            threading.Thread(target=_burn, args=(done,), daemon=True).start()
        ask(pipe, "calling")
        refused = None
        end = time.monotonic() + PATIENCE
        while refused is None and time.monotonic() < end:
            try:
                guarded.call(work)
            except guarded.refusal:
                refused = time.monotonic()
            except Exception:
                time.sleep(pause)  # Its client has had no answer in time: the call was not refused.
            else:
                time.sleep(pause)
        while refused and isinstance(subject, Ours) and not pushed and time.monotonic() < end:
            time.sleep(0.001)  # The dispatcher's thread tells it a little later than the call.
        done.set()
        pipe.send((refused, pushed[0] if pushed else None))


def _guard(subject: Subject, circuit: str) -> Guarded:
    """A breaker; some ask the server for it, which many processes keep from answering in time."""
    for _ in range(5):
        with contextlib.suppress(Exception):
            return subject.guard(circuit, Rules(failures=1))
    return subject.guard(circuit, Rules(failures=1))


def _note(pushed: list[float], change: Transition) -> None:
    if change.new is State.OPEN:
        pushed.append(time.monotonic())


def _burn(done: threading.Event) -> None:
    while not done.is_set():
        sum(range(1000))
