"""``python -m scripts.demo``: plays all acts.  Exit status 0: everything came as it must."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from types import FrameType

from ..servers import Server, ServerError
from .acts import ACTS, Stage, curtain
from .fleet import ActFailed, Change, Fleet, Upstream
from .rules import CIRCUIT, NAMESPACE, POLICY, WORKERS
from .screen import Screen

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


def introduce(stage: Stage, screen: Screen) -> None:
    """Say who calls whom, by which rules."""
    p = POLICY
    screen.say(
        f"{WORKERS} processes call {stage.upstream.url} through one circuit, {CIRCUIT}, which "
        f"they share through {stage.server.url}. {p.failure_threshold} failures in a row, seen by "
        f"at least {p.quorum} processes, open it for {p.open_interval:g} s; "
        f"{p.success_threshold} successful probes, at most {p.half_open_permits} at a time in "
        f"the whole fleet, close it. All figures are measured in this run."
    )
    screen.say()


def play(stage: Stage, screen: Screen) -> None:
    """Play the acts.  Raises ActFailed, which names the act."""
    for number, (title, act) in enumerate(ACTS.items(), 1):
        screen.say(f"Act {number}. {title}")
        try:
            figures = act(stage)
        except (ActFailed, OSError, ServerError) as error:
            screen.table(stage.fleet)
            for line in stage.fleet.logged():
                print(line, file=sys.stderr)
            raise ActFailed(f"act {number} ({title}) went wrong: {error}") from error
        for figure in figures:
            screen.say(figure, "  ")
        screen.table(stage.fleet)


def stay(stage: Stage, screen: Screen) -> None:
    """Keep all up, until Ctrl-C, for people to try things out."""
    upstream, server = stage.upstream.url, stage.server
    screen.say("All of it stays up until Ctrl-C. Things to try:")
    for mode in ("broken", "slow", "ok"):
        screen.say(f"curl -X POST {upstream}/mode/{mode}", "  ")
    screen.say(f"curl {upstream}/counts", "  ")
    screen.say(f"redis-cli -u {server.url} SUBSCRIBE cb:0:{NAMESPACE}", "  ")
    screen.say(f"kill -STOP {server.pid}    (the server hangs; -CONT wakes it)", "  ")
    stage.fleet.mark()
    stage.fleet.news()
    while True:
        stage.fleet.idle()
        for change in stage.fleet.news():
            screen.say(told(change), "  ")


def told(change: Change) -> str:
    """A transition in one line."""
    return (
        f"{time.strftime('%H:%M:%S')} worker {change.worker}: {change.old} -> {change.new} "
        f"({change.source}, {change.cause})"
    )


def run(staying: bool) -> None:
    """Set up, play, and clear away, whatever happens."""
    screen, began = Screen(), time.monotonic()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server.start("valkey", tcp=True))
        upstream = Upstream()
        stack.callback(upstream.end)
        fleet = Fleet(server.url, upstream, screen.redraw)
        stack.callback(fleet.end)
        stage = Stage(server, upstream, fleet)
        introduce(stage, screen)
        play(stage, screen)
        if staying:
            screen.say(f"All acts came as they must, in {time.monotonic() - began:.0f} s.")
            with contextlib.suppress(KeyboardInterrupt):
                stay(stage, screen)
            return
        screen.say(f"The end: {curtain(stage)}.")
    screen.say(f"All acts came as they must, in {time.monotonic() - began:.0f} s.")


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.demo", description=__doc__)
    parser.add_argument("--stay", action="store_true", help="keep all up after the last act")
    staying = parser.parse_args().stay
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, interrupt)
    try:
        run(staying)
    except KeyboardInterrupt:
        print("FAILED: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on.  What Python would still flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ActFailed, ServerError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def interrupt(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C, so that everything is cleared away."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
