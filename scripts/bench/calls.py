"""What a guarded call costs beside a bare one, closed and rejected, in each form."""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
import textwrap
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed_breaker import CircuitBreaker
from distributed_breaker.linked import FULL
from scripts.servers import Server

from .figures import Row, Spread, Topic, number
from .peers import InterlockRedis
from .setting import Setting
from .subjects import (
    WORK,
    Boom,
    Ours,
    OursUnmeasured,
    Rules,
    Subject,
    boom,
    open_up,
    using,
    work,
    work_async,
)
from .timing import REJECTED, Case, measure

# A full tally is drained by the call that fills it: each sample holds one drain, no more or less.
CALLS = FULL + 1
ASKING = 12  # calls in a round where each asks the server

TARGETS = {
    "decorator": "≤ 0.35",
    "call": "≤ 0.35",
    "with guard()": "≤ 0.6",
    "with breaker": "≤ 1.2",
    "async decorator": "≤ 0.5",
    "async call": "≤ 0.5",
}
UNMEASURED_TARGETS = {"decorator": "≤ 0.2", "call": "≤ 0.2"}

# Form → the bare statement that it is compared with.
BARE = {
    "decorator": "f()",
    "call": "f()",
    "with": "f()",
    "with breaker": "f()",
    "two steps": "f()",
    "async decorator": "await f_async()",
    "async call": "await f_async()",
    "async with": "await f_async()",
    "generator": "for _ in f_generator():\n    pass",
    "async generator": "async for _ in f_async_generator():\n    pass",
}
REFUSED = ("decorator", "call", "with", "async decorator")
RAISE = "raise"
PING = "one PING round trip"
TIMED, COUNTED = "cheapest wrapper that times and counts", "cheapest wrapper that counts"
METHOD = (
    "Each form is compiled into a loop of its own and timed once per round, all libraries in turn. "
    "What a call adds is its time less that of the same call without a breaker in the same round. "
    "Each library has its defaults. Ours is shared through a server whose link runs meanwhile; "
    "peers in memory share nothing. “× bare” is the whole call to the bare one, “× floor” "
    "the whole call to the cheapest wrapper that can time and count it (two clock reads and an "
    "append to a bounded deque) or, without durations, only count it (one append), "
    "“of a PING” the added time as a share of one PING round trip; all are ratios of medians."
)


@dataclass
class _Rounds:
    """The samples of all cases, and what they say."""

    cases: list[Case] = field(default_factory=list)
    samples: Mapping[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, statement: str, names: Mapping[str, object], calls: int) -> None:
        self.cases.append(Case(name, statement, names, calls))

    def total(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def added(self, name: str, bare: str) -> Spread:
        """What one case takes longer than another, round by round."""
        pairs = zip(self.samples[name], self.samples[bare], strict=True)
        return Spread.of(took - without for took, without in pairs)


def run(setting: Setting) -> Topic:
    """Time all forms of all libraries in interleaved rounds."""
    rounds = _Rounds()
    limits: list[str] = []
    peers = [*setting.in_memory, *setting.shared]
    count = setting.count(2, 30)
    with (
        Server.start(setting.server) as server,
        asyncio.Runner() as runner,
        contextlib.closing(server.client()) as client,
        contextlib.ExitStack() as stack,
    ):
        for form, statement in BARE.items():
            rounds.add(f"bare: {form}", statement, WORK, CALLS)
        rounds.add(RAISE, REJECTED.format("f()"), {"f": boom, "Refusal": Boom}, CALLS)
        rounds.add(PING, "ping()", {"ping": client.ping}, ASKING)
        _floors(rounds)
        kinds: list[type[Subject]] = [Ours, OursUnmeasured, *peers]
        for kind in kinds:
            subject = stack.enter_context(using(kind, server.url, runner.get_loop()))
            limits += _breakers(rounds, subject, runner.run)
        ours = stack.enter_context(using(Ours, server.url))
        rounds.samples = measure(rounds.cases, count, runner.run)
        drained = _draining(ours, count)
        if not all(snapshot.fleet for snapshot in ours.registry.snapshot().values()):
            raise RuntimeError("the circuits were not shared while they were timed")
    rows = [*_closed(rounds, peers), drained, *_refused(rounds, peers), *_floor_rows(rounds)]
    drawn = ("closed, decorator", "closed, async decorator", "rejected, decorator")
    return Topic(
        "calls", "Calls: what a breaker adds, closed and open", METHOD, rows, limits, drawn
    )


# ------------------------------------------------------------------ cases


def _breakers(rounds: _Rounds, subject: Subject, run: Callable[[Any], Any]) -> list[str]:
    """A closed and an open breaker in every form that the library has and that guards.

    A form that lets calls through an open breaker does another job, so it is left out, and said.
    """
    name = re.sub(r"\W", "_", subject.title)
    closed = subject.guard(f"closed_{name}")
    asking = subject.shared and not isinstance(subject, Ours | InterlockRedis)
    calls = ASKING if asking else CALLS
    loose = []
    for position, (form, statement) in enumerate(closed.forms.items()):
        # One for each form: a call that gets through may close what the next one is to find open.
        circuit = f"open_{name}_{position}"
        opened = subject.guard(circuit, Rules(failures=1))
        open_up(opened)
        if isinstance(subject, Ours):
            subject.wait_open(circuit)
        names = {**opened.names, "Refusal": opened.refusal}
        if not _refuses(Case(form, statement, names, 1), opened.refusal, run):
            loose.append(form)
            continue
        rounds.add(f"{subject.title}: {form}", statement, closed.names, calls)
        if form in REFUSED:
            refused = REJECTED.format(textwrap.indent(statement, "    ").strip())
            rounds.add(f"{subject.title}: open, {form}", refused, names, calls)
    if not loose:
        return []
    return [f"{subject.title} lets calls through an open breaker in these forms, which are "
            f"therefore left out: {', '.join(loose)}."]  # fmt: skip


def _refuses(case: Case, refusal: type[BaseException], run: Callable[[Any], Any]) -> bool:
    """Whether one call is refused."""
    try:
        spent = case.loop()(range(1), time.perf_counter)
        if case.asynchronous:
            run(spent)
    except refusal:
        return True
    return False


def _floors(rounds: _Rounds) -> None:
    """The least that a wrapper in Python does to count a call, and to time it.

    They guard nothing: they only show what no breaker of this kind can undercut.
    """
    taken: deque[float] = deque(maxlen=FULL)
    append, clock = taken.append, time.perf_counter

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = function(*args, **kwargs)
            append(clock() - start)
            return result

        return wrapper

    def timed_async(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = await function(*args, **kwargs)
            append(clock() - start)
            return result

        return wrapper

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            append(0.0)
            return result

        return wrapper

    def counted_async(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = await function(*args, **kwargs)
            append(0.0)
            return result

        return wrapper

    for title, plain, awaiting in (
        (TIMED, timed, timed_async),
        (COUNTED, counted, counted_async),
    ):
        rounds.add(f"{title}: decorator", "g()", {"g": plain(work)}, CALLS)
        rounds.add(f"{title}: async decorator", "await g()", {"g": awaiting(work_async)}, CALLS)


# ------------------------------------------------------------------ rows


def _closed(rounds: _Rounds, peers: Sequence[type[Subject]]) -> list[Row]:
    rows = []
    for ours, suffix, floor, targets in (
        (Ours.title, "", TIMED, TARGETS),
        (OursUnmeasured.title, ", no durations", COUNTED, UNMEASURED_TARGETS),
    ):
        for form in BARE:
            # Ours has two ways to guard a block; both stand beside the others' one.
            theirs = "with" if form == "with breaker" else form
            rows.append(
                Row(
                    f"closed, {_spelled(form)}{suffix}",
                    "µs",
                    rounds.added(f"{ours}: {form}", f"bare: {form}"),
                    _added_by(rounds, peers, theirs, f"bare: {form}"),
                    target=targets.get(_spelled(form), ""),
                    extra=_ratios(rounds, ours, form, floor),
                )
            )
    return rows


def _spelled(form: str) -> str:
    return "with guard()" if form == "with" else form


def _added_by(
    rounds: _Rounds, peers: Sequence[type[Subject]], form: str, bare: str
) -> dict[str, Spread]:
    return {
        peer.title: rounds.added(f"{peer.title}: {form}", bare)
        for peer in peers
        if f"{peer.title}: {form}" in rounds.samples
    }


def _ratios(rounds: _Rounds, title: str, form: str, floor: str) -> dict[str, str]:
    whole, bare = rounds.total(f"{title}: {form}"), rounds.total(f"bare: {form}")
    least = f"{floor}: {'async decorator' if 'async' in form else 'decorator'}"
    comparable = form in ("decorator", "call", "async decorator", "async call")
    return {
        "× bare": number(whole / bare),
        "× floor": number(whole / rounds.total(least)) if comparable else "",
        "of a PING": f"{(whole - bare) / rounds.total(PING):.2%}",
    }


def _refused(rounds: _Rounds, peers: Sequence[type[Subject]]) -> list[Row]:
    rows = []
    for form in REFUSED:
        whole = rounds.total(f"{Ours.title}: open, {form}")
        rows.append(
            Row(
                f"rejected, {_spelled(form)}",
                "µs",
                rounds.added(f"{Ours.title}: open, {form}", RAISE),
                _added_by(rounds, peers, f"open, {form}", RAISE),
                target="≤ 1 in all",
                extra={
                    "× bare": number(whole / rounds.total(RAISE)),
                    "of a PING": f"{whole / rounds.total(PING):.2%}",
                },
                note=f"added to raising and catching an exception; {number(whole)} µs in all",
            )
        )
    return rows


def _floor_rows(rounds: _Rounds) -> list[Row]:
    """What the ratios are taken to: nothing is compared here."""
    rows = [
        Row(f"{floor}, {form}", "µs", rounds.added(f"{floor}: {form}", f"bare: {form}"))
        for floor in (TIMED, COUNTED)
        for form in ("decorator", "async decorator")
    ]
    bare = [("bare call", "bare: decorator"), ("bare coroutine", "bare: async decorator")]
    bare += [("raising and catching an exception", RAISE), (PING, PING)]
    return rows + [Row(name, "µs", Spread.of(rounds.samples[case])) for name, case in bare]


def _draining(ours: Ours, rounds: int) -> Row:
    """What it takes to drain a tally, for each call in it.

    Closed calls contain it, since calls without a pause drain their own tallies.
    """
    breaker: CircuitBreaker = ours.registry.breaker("drained")
    guarded = breaker(work)
    guarded()
    samples = []
    for _ in range(rounds):
        breaker.drain()
        for _ in range(FULL):
            guarded()
        start = time.perf_counter()
        breaker.drain()
        samples.append((time.perf_counter() - start) / FULL * 1e6)
    note = "contained in closed calls"
    return Row("draining a tally, per call", "µs", Spread.of(samples), target="≤ 0.15", note=note)
