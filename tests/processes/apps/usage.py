"""What the programs under test do with their breakers, and what they note of it.

Each program is told by its environment which store and namespace to use, and where the ledger lies:
a file with one JSON line for everything that happens to a call, which is what the test compares
with the store's counts.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any


def handlers() -> dict[int, Any]:
    """What the process does at each signal."""
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


# Before anything of the library is imported; the registry is made below, at import, as in most
# applications.
_BEFORE = handlers()

import distributed_breaker.address as address  # noqa: E402
import distributed_breaker.admission as admission  # noqa: E402
from distributed_breaker import (  # noqa: E402
    CircuitBreakerOpenException,
    CircuitBreakerRegistry,
    Policy,
)
from distributed_breaker.link import Link  # noqa: E402

BOUND = 60.0  # s after which a held call ends by itself

# A busy machine must look neither like an outage of the store nor like an exit in a hurry.
address.READ_TIMEOUT = address.CONNECT_TIMEOUT = 2.0
admission.FIRST_ANSWER = 10.0
Link.close.__defaults__ = (10.0,)

COMMON: dict[str, Any] = {"failure_rate": None, "jitter": 0.0}
POLICIES = {
    "payments": Policy(failure_threshold=5, open_interval=3600.0, **COMMON),
    "counted": Policy(failure_threshold=100_000, **COMMON),
    # Whoever takes a permit of this one must settle it or give it back: its lease does not end.
    "probed": Policy(
        failure_threshold=3,
        open_interval=0.1,
        success_threshold=1,
        permit_lease=3600.0,
        quorum=1,
        **COMMON,
    ),
}


class BrokenError(Exception):
    """The dependency does not work."""


def note(event: str, **more: Any) -> None:
    """Write a line into the ledger: at once, whole, and in order among processes."""
    line = json.dumps({"event": event, "pid": os.getpid(), **more}).encode() + b"\n"
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(ledger, line)
    finally:
        os.close(ledger)


registry = CircuitBreakerRegistry.from_url(os.environ["STORE"], os.environ["NAMESPACE"])
breakers = {name: registry.breaker(name, policy) for name, policy in POLICIES.items()}
if handlers() != _BEFORE:
    note("handlers", when="import")


def use_before_forks() -> None:
    """Have the link at work and outcomes pending when this process forks others."""
    act(count=3)
    registry.flush(BOUND)
    deadline = time.monotonic() + BOUND
    while registry._link._subscription is None and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    act(count=7)


def _work(fail: bool) -> None:
    if fail:
        raise BrokenError


def act(circuit: str = "counted", outcome: str = "success", count: int = 1) -> dict[str, int]:
    """Make calls, and note those that were let through and those that were refused."""
    said = {"admitted": 0, "rejected": 0}
    before = handlers()
    for _ in range(count):
        try:
            breakers[circuit].call(_work, outcome == "failure")
        except CircuitBreakerOpenException:
            said["rejected"] += 1
            continue
        except BrokenError:
            pass
        said["admitted"] += 1
        note("call", circuit=circuit, outcome=outcome)
    if handlers() != before:
        note("handlers", when="call")
    return said


def hold(circuit: str, gate: str) -> dict[str, Any]:
    """Make one call that lasts until the file ``gate`` is there."""
    try:
        with breakers[circuit].guard() as permit:
            note("held", circuit=circuit, probe=permit.is_probe)
            deadline = time.monotonic() + BOUND
            while not Path(gate).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
    except CircuitBreakerOpenException:
        return {"admitted": 0}
    note("call", circuit=circuit, outcome="success")
    return {"admitted": 1}


def _hear(change: Any) -> None:
    note("heard", circuit=change.circuit, old=change.old.value, new=change.new.value)


breakers["payments"].on_transition(_hear)


def senders() -> int:
    """How many threads or greenlets send for the link, without a parent's that stay behind."""
    frames = list(sys._current_frames().values())
    if "greenlet" in sys.modules:
        kind = sys.modules["greenlet"].greenlet
        frames += [g.gr_frame for g in gc.get_objects() if isinstance(g, kind) and g.gr_frame]
    sending, waiting = Link._send_loop.__code__, Link._stay_behind.__code__
    found = set()
    for top in frames:
        frame: Any = top
        # Below a frame that another thread is just leaving, CPython 3.11 may show no frame at all.
        while isinstance(frame, FrameType) and frame.f_code is not waiting:
            if frame.f_code is sending:
                found.add(id(frame))
            frame = frame.f_back
    return len(found)


def look(circuit: str = "payments") -> dict[str, Any]:
    """What this process knows of a circuit, and what runs in it."""
    own = breakers[circuit].own_view()
    header = own.shadow.header
    return {
        "state": own.decision.state.value,
        "source": own.decision.source,
        "shared": header.state if header else "",
        "reporter": own.shadow.reporter,
        "threads": sorted(t.name for t in threading.enumerate()),
        "senders": senders(),
    }


def carry_out(command: str, options: dict[str, str]) -> dict[str, Any]:
    """One command of the test, by name; with the option ``pid``, only in that process."""
    me = os.getpid()
    if int(options.pop("pid", me)) != me:
        return {"pid": me, "done": False}
    if "count" in options:
        return {"pid": me, "done": True, **act(**options | {"count": int(options["count"])})}  # type: ignore[arg-type]
    commands: dict[str, Any] = {"act": act, "hold": hold, "look": look}
    return {"pid": me, "done": True, **commands[command](**options)}
