"""A call's longest wait while the server is killed, stopped or slow, and when it is back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from scripts.servers import Server

from .children import ask, children, hear
from .delay import Delay
from .figures import Row, Spread, Topic
from .setting import Setting
from .subjects import Bare, Boom, Guarded, Ours, Rules, Subject, boom, open_up, using, work

SLOW = 0.05  # s that each round trip takes longer on the slow way
PAUSE = 0.004  # s between two calls
FAILING = 50  # one call in so many fails while closed, which makes ours report at once
INTERVAL = 0.4  # s that a circuit stays open before it is probed
FAULTS = {"well": "in good health", "kill": "killed", "pause": "stopped", "slow": "50 ms slow"}
METHOD = (
    "One fresh process for each library with a server of its own, all at once: each makes up to "
    f"{1 / PAUSE:.0f} calls/s, of which one in {FAILING} fails, and no circuit may open. Then the "
    "server is killed (SIGKILL), stopped (SIGSTOP) or put behind a way that is 50 ms slower; then "
    "it comes back: empty, as if nothing had been, or fast again. Every figure is the longest "
    "single call. Every client waits for at most 0.3 s and repeats nothing, as ours does "
    "(purgatory takes only a URL, so its client repeats as redis-py does by default). The last "
    "rows are ours alone: circuits that are open, probed, or not yet begun."
)
STATES = {"open": "0", "probed": "≤ 300 each", "starting": "≤ 300, once"}


@dataclass(frozen=True)
class Told:
    """What a process tells of its calls: the longest (ms) in each phase, and the errors."""

    longest: list[float]
    calls: int
    raised: int


def run(setting: Setting) -> Topic:
    """Strike the servers of all libraries, one fault after another."""
    phases = (setting.either(0.2, 1.0), setting.either(1.0, 4.0), setting.either(0.6, 3.0))
    kinds: list[type[Subject]] = [Ours, Bare, *setting.shared]
    told: dict[str, dict[str, Told]] = {}
    waits: dict[str, Told] = {}
    for fault in FAULTS:
        scenarios = [(kind, "closed") for kind in kinds]
        # Ours stands beside the others in its other states as well, where calls could wait.
        scenarios += [(Ours, state) for state in STATES] if fault == "pause" else []
        answers = _strike(setting.server, scenarios, fault, phases)
        told[fault] = {k.title: answer for k, answer in zip(kinds, answers, strict=False)}
        waits |= dict(zip(STATES, answers[len(kinds) :], strict=False))
    noise = max(max(by_title.pop(Bare.title).longest) for by_title in told.values())
    rows = [_longest(fault, 1, told[fault], noise) for fault in FAULTS]
    rows += [_longest(fault, 2, told[fault], noise) for fault in FAULTS if fault != "well"]
    rows += [_raised(fault, told[fault]) for fault in FAULTS if fault != "well"]
    for state, target in STATES.items():
        name, note = f"{state} circuit, stopped: longest call", f"{waits[state].calls:,} calls"
        longest = Spread.exactly(waits[state].longest[1])
        rows.append(Row(name, "ms", longest, target=target, note=note))
    limits = [f"The longest bare call, beside them and without a breaker, took {noise:.1f} ms."]
    drawn = [row.name for row in rows if row.peers and "longest" in row.name]
    return Topic("outage", "While the store is away", METHOD, rows, limits, drawn)


def _longest(fault: str, phase: int, told: dict[str, Told], noise: float) -> Row:
    longest = {title: Spread.exactly(each.longest[phase]) for title, each in told.items()}
    when = FAULTS[fault] if phase == 1 else f"back, having been {FAULTS[fault]}"
    target = "" if fault == "well" else "0"
    ours = longest.pop(Ours.title)
    return Row(f"{when}: longest call", "ms", ours, longest, target=target, noise=noise)


def _raised(fault: str, told: dict[str, Told]) -> Row:
    raised = {title: Spread.exactly(each.raised) for title, each in told.items()}
    note = "of calls: " + ", ".join(f"{title} {each.calls:,}" for title, each in told.items())
    name = f"{FAULTS[fault]}: calls with an error raised into them"
    return Row(name, "", raised.pop(Ours.title), raised, target="0", note=note)


def _strike(
    kind: str,
    scenarios: Sequence[tuple[type[Subject], str]],
    fault: str,
    phases: tuple[float, float, float],
) -> list[Told]:
    """Let one fault strike for all scenarios at the same time, and take it away again."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server.start(kind)) for _ in scenarios]
        ways = [stack.enter_context(contextlib.closing(Delay(s.url.removeprefix("unix://"))))
                for s in servers] if fault == "slow" else []  # fmt: skip
        urls = [way.url for way in ways] or [server.url for server in servers]
        given = [(*s, url, phases) for s, url in zip(scenarios, urls, strict=True)]
        pipes = stack.enter_context(children(suffer, given))
        for pipe in pipes:
            hear(pipe)
        for pipe in pipes:
            pipe.send("go")
        time.sleep(phases[0])
        for server in servers:
            if fault in ("kill", "pause"):
                getattr(server, fault)()
        for way in ways:
            way.seconds = SLOW
        time.sleep(phases[1])
        for server in servers:
            if fault == "kill":
                server.restart()
            elif fault == "pause":
                server.resume()
        for way in ways:
            way.seconds = 0.0
        return [hear(pipe) for pipe in pipes]


# ------------------------------------------------------------------ in the fresh process


def suffer(
    kind: type[Subject],
    state: str,
    url: str,
    phases: tuple[float, float, float],
    pipe: Connection,
) -> None:
    """Bring a circuit into its state, and time calls through what happens."""
    with using(kind, url) as subject:
        guarded = None if state == "starting" else subject.guard("outage", _rules(state))
        if state in ("open", "probed") and guarded is not None:
            open_up(guarded)
        ask(pipe, "ready")
        start = time.monotonic()
        ends = [start + sum(phases[:n]) for n in (1, 2, 3)]
        if guarded is None:
            time.sleep(phases[0] + 0.2)  # The server has been struck: only now it begins.
            begun = time.perf_counter()
            guarded = subject.guard("outage", _rules("closed"))
            first = (time.perf_counter() - begun) * 1e3
        else:
            first = 0.0
        told = _calls(guarded, boom if state == "probed" else work, ends)
        told.longest[1] = max(told.longest[1], first)
        pipe.send(told)
        pipe.recv()


def _rules(state: str) -> Rules:
    if state == "closed":
        return Rules(failures=1_000_000)
    return Rules(failures=1, interval=3_600.0 if state == "open" else INTERVAL)


def _calls(guarded: Guarded, function: Callable[[], None], ends: list[float]) -> Told:
    """Call again and again, with short pauses; the longest call of each phase."""
    longest = [0.0] * len(ends)
    calls = raised = 0
    while (now := time.monotonic()) < ends[-1]:
        phase = next(n for n, end in enumerate(ends) if now < end)
        calls += 1
        start = time.perf_counter()
        try:
            guarded.call(boom if calls % FAILING == 0 else function)
        except (Boom, guarded.refusal):
            pass
        except Exception:
            raised += 1
        took = (time.perf_counter() - start) * 1e3
        longest[phase] = max(longest[phase], took)
        time.sleep(PAUSE)
    return Told(longest, calls, raised)
