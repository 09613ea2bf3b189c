"""What happens in the demo, act by act, and what must come of it.

An act returns sentences with what it has measured, or raises ActFailed.  What it demands are the
promises of the library (who may call when, what is never closed, how long a call may wait at
most), never that a machine is fast.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from distributed_breaker import CircuitBreakerRegistry, Snapshot, StoreUnavailable

from ..servers import Server
from .fleet import ActFailed, Fleet, Look, Upstream
from .rules import CIRCUIT, LONGEST_DELAY, NAMESPACE, POLICY, WORKERS

HEALTHY_CALLS = 200  # of each worker: long enough for reports, which wait 2 s when all is well
LEFT = 0.4  # share of the open interval that must be left, so that an act fits into it


class Stage(NamedTuple):
    """All that the acts play with."""

    server: Server
    upstream: Upstream
    fleet: Fleet


class Trip(NamedTuple):
    """How the fleet's circuit opened."""

    figures: list[str]
    reached: int  # how many calls have reached the broken upstream since it was started
    generation: int


def demand(so: bool, otherwise: str) -> None:
    """Raise ActFailed unless ``so``."""
    if not so:
        raise ActFailed(otherwise)


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 0.0995 else f"{seconds * 1000:,.0f} ms"


def some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------------------- the acts


def all_healthy(stage: Stage) -> list[str]:
    """Every worker calls the upstream, and nothing stands in its way."""
    fleet = stage.fleet
    fleet.wait_for_looks("every worker has joined the circuit", 0.0, closed)
    scripts = scripts_run(stage.server)
    began = fleet.mark()
    fleet.wait_for_each("all calls pass", lambda w: w.counted().calls >= HEALTHY_CALLS)
    took, total = time.monotonic() - began, fleet.total()
    scripts = scripts_run(stage.server) - scripts
    nothing_refused(stage)
    demand(scripts < total.calls / 10, f"{scripts} scripts for {total.calls} calls")
    return [
        f"healthy: {WORKERS} processes made {some(total.calls, 'call')} in {took:.1f} s; none "
        f"failed and none was refused; the breaker added {ms(total.delays / total.calls)} to a "
        f"call on average and {ms(fleet.longest())} at worst",
        f"cost: {some(scripts, 'script')} ran in the server, {scripts / total.calls:.3f} a call",
    ]


def upstream_broken(stage: Stage) -> list[str]:
    """The fleet stops calling, looks once whether that was right, and goes on refusing."""
    fleet, upstream = stage.fleet, stage.upstream
    fleet.mark()
    trip = break_upstream(stage)
    fleet.wait_for_looks("a probe has failed and the circuit is open again", 0.0,
                         firmly_open(trip.generation))  # fmt: skip
    only_probes(stage, trip)
    probes, most = upstream.arrived("broken probe"), upstream.most_probing()
    demand(probes > 0, "the circuit opened anew without a probe")
    few_at_a_time(most)
    return [
        *trip.figures,
        f"open: {some(fleet.total().refused, 'call')} refused, and none reached the upstream; "
        f"after {POLICY.open_interval:g} s the fleet sent {some(probes, 'probe')}, which failed, "
        f"and stayed away",
    ]


def upstream_mended(stage: Stage) -> list[str]:
    """The fleet finds out by itself."""
    stage.fleet.mark()
    return mend_upstream(stage)


def killed_while_open(stage: Stage) -> list[str]:
    """Without the server each process goes on refusing, and then probes by itself."""
    fleet, upstream = stage.fleet, stage.upstream
    trip = break_upstream(stage)
    probes = upstream.arrived("broken probe")
    killed = fleet.mark()
    stage.server.kill()
    fleet.wait_for_looks("every process decides by itself", killed, lambda s: s.source == "shadow")
    noticed = max(next(c.at for c in w.changes if c.at >= killed) for w in fleet.workers) - killed
    fleet.wait_for_each("every process probes by itself", lambda w: w.counted().probes > 0)
    only_probes(stage, trip)
    nobody_closed(fleet, killed)
    nobody_waited(fleet)
    total, probes = fleet.total(), upstream.arrived("broken probe") - probes
    return [
        f"{trip.figures[0]}; then the server was killed",
        f"killed while open: after {ms(noticed)} all {WORKERS} knew, and each went on refusing by "
        f"its own shadow ({some(total.refused, 'call')}); none closed; when the open interval was "
        f"over each probed by itself: {some(probes, 'probe')} and no other call reached the "
        f"upstream",
        f"longest delay added to a call: {ms(fleet.longest())}",
    ]


def back_while_open(stage: Stage) -> list[str]:
    """The server has lost everything, and hears from the processes that the circuit is open."""
    fleet, upstream = stage.fleet, stage.upstream
    before, reached = fleet.generation(), upstream.arrived("broken call")
    began = fleet.mark()
    stage.server.restart(empty=True)
    up = time.monotonic()
    fleet.wait_for_looks("every process shares again", up, lambda s: s.source == "shared")
    back, stored = time.monotonic() - up, stored_circuit(stage)
    fleet.wait_for_looks("the circuit is open", up, firmly_open(before))
    nobody_closed(fleet, began)
    demand(stored.state in ("open", "half_open"), f"the server says {stored.state}")
    demand(stored.generation > before, "the server's generation is an old one")
    only_probes(stage, Trip([], reached, before))
    nobody_waited(fleet)
    longest = fleet.longest()
    return [
        f"back empty: {ms(back)} after its start all {WORKERS} shared again; the server, which "
        f"had lost everything, says {stored.state} once more, in a newer generation; no process "
        f"has closed and no call but probes reached the upstream",
        f"longest delay added to a call: {ms(longest)}",
        *mend_upstream(stage),
    ]


def killed_while_closed(stage: Stage) -> list[str]:
    """Calls go on as if nothing had happened."""
    fleet = stage.fleet
    killed = fleet.mark()
    stage.server.kill()
    fleet.wait_for_looks("every process decides by itself", killed, lambda s: s.source == "shadow")
    alone = fleet.total()
    fleet.wait_for_each("calls go on", lambda w: w.counted().calls >= HEALTHY_CALLS // 2)
    nothing_refused(stage)
    nobody_waited(fleet)
    demand(not fleet.changes(killed), f"the circuit changed: {fleet.changes(killed)}")
    total = fleet.total()
    return [
        f"killed while closed: each of the {WORKERS} went on calling, by its own shadow; of "
        f"{some(total.calls, 'call')} ({total.calls - alone.calls:,} since all knew) none failed "
        f"and none was refused",
        f"longest delay added to a call: {ms(fleet.longest())}",
    ]


def back_while_closed(stage: Stage) -> list[str]:
    """The server has lost everything, and nobody who calls sees anything of it."""
    fleet = stage.fleet
    before, began = fleet.generation(), fleet.mark()
    stage.server.restart(empty=True)
    up = time.monotonic()
    fleet.wait_for_looks("every process shares again", up, closed)
    back, stored = time.monotonic() - up, stored_circuit(stage)
    demand(stored.state == "closed", f"the server says {stored.state}")
    demand(stored.generation > before, "the server's generation is an old one")
    demand(not fleet.changes(began), f"the circuit changed: {fleet.changes(began)}")
    nothing_refused(stage)
    nobody_waited(fleet)
    return [
        f"back empty: {ms(back)} after its start all {WORKERS} shared again; the server says "
        f"{stored.state}, in a newer generation; of {some(fleet.total().calls, 'call')} none "
        f"failed and none was refused",
        f"longest delay added to a call: {ms(fleet.longest())}",
    ]


ACTS: dict[str, Callable[[Stage], list[str]]] = {
    "All healthy.": all_healthy,
    "The upstream breaks: it answers every call with HTTP 500.": upstream_broken,
    "The upstream is mended.": upstream_mended,
    "The upstream breaks again, and the server is killed while the circuit is open.": (
        killed_while_open
    ),
    "The server comes back empty while the circuit is open; then the upstream is mended.": (
        back_while_open
    ),
    "The server is killed while the circuit is closed.": killed_while_closed,
    "The server comes back empty while the circuit is closed.": back_while_closed,
}


def curtain(stage: Stage) -> list[str]:
    """All workers end; the upstream must have seen as many calls as they have made."""
    wrong = stage.fleet.end()
    demand(not wrong, "; ".join(wrong))
    made = sum(worker.tally.calls for worker in stage.fleet.workers)
    arrived = stage.upstream.all_arrived()
    demand(made == arrived, f"the workers made {made} calls, and {arrived} reached the upstream")
    return [f"in all, the processes made {made:,} calls, and the upstream counted as many"]


# ---------------------------------------------------------------------------- what they share


def break_upstream(stage: Stage) -> Trip:
    """Break it, and wait until every worker has been refused a call."""
    fleet, upstream = stage.fleet, stage.upstream
    earlier = upstream.arrived("broken call")
    refused = {w.number: w.tally.refused for w in fleet.workers}
    broken = upstream.switch("broken")
    # A worker makes one call at a time: once it has been refused one, no other is under way.
    fleet.wait_for_each("the circuit opens", lambda w: w.tally.refused > refused[w.number])
    fleet.wait_for_each("the transition is heard of", lambda w: bool(w.changes)
                        and w.changes[-1].at >= broken)  # fmt: skip
    reached = upstream.arrived("broken call")
    opened = fleet.changes(broken, "open")
    first, each = opened[0], {c.worker: c for c in reversed(opened)}
    demand(len(each) == WORKERS, "not every worker saw the circuit open")
    last = max(c.at for c in each.values())
    fleet.wait_for_looks("the cause is known", last, lambda s: s.trip is not None)
    return Trip(
        [
            f"trip: {some(reached - earlier, 'call')} reached the broken upstream; worker "
            f"{first.worker} saw the trip first, {ms(first.at - broken)} after the break; all "
            f"{WORKERS} refused {ms(last - first.at)} later",
            evidence(fleet),
        ],
        reached,
        max(c.generation for c in opened),
    )


def evidence(fleet: Fleet) -> str:
    """Why the circuit opened, as the store has kept it."""
    look = fleet.workers[0].look
    trip: dict[str, Any] = (look.trip if look is not None else None) or {}
    return (
        f"evidence: {some(trip.get('run', 0), 'failure')} in a row, seen by "
        f"{some(trip.get('reporters', 0), 'process')}"
    )


def mend_upstream(stage: Stage) -> list[str]:
    """Mend it while the circuit is open, and wait until every process calls it again."""
    fleet, upstream = stage.fleet, stage.upstream
    earlier = upstream.arrived("ok probe")
    mended = upstream.switch("ok")
    fleet.wait_for_looks("the circuit closes", mended, closed)
    fleet.wait_for_each("the transition is heard of", lambda w: w.changes[-1].new == "closed")
    probes, most = upstream.arrived("ok probe") - earlier, upstream.most_probing()
    closings = [w.changes[-1].at for w in fleet.workers]
    # One period of probes, unless a probe took so long that it counted as slow.
    periods = len({c.generation for c in fleet.changes(mended, "half_open")})
    enough = POLICY.success_threshold
    demand(
        enough <= probes <= enough * periods,
        f"{probes} probes in {periods} half-open periods; {enough} successes close the circuit",
    )
    few_at_a_time(most)
    return [
        f"recovery: the fleet sent {some(probes, 'probe')}, at most {most} at a time; "
        f"{ms(min(closings) - mended)} after the mending (the open interval had to end first) the "
        f"circuit closed; all {WORKERS} called again {ms(max(closings) - min(closings))} later",
    ]


def closed(look: Look) -> bool:
    return (look.state, look.source) == ("closed", "shared")


def firmly_open(after: int) -> Callable[[Look], bool]:
    """Open for a while yet, in a generation that is newer than ``after``."""
    return lambda look: (
        (look.state, look.source) == ("open", "shared")
        and look.generation > after
        and look.retry_after >= LEFT * POLICY.open_interval
    )


def scripts_run(server: Server) -> int:
    """How many scripts the server has run."""
    with contextlib.closing(server.client()) as client:
        stats: dict[str, Any] = client.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


def stored_circuit(stage: Stage) -> Snapshot:
    """The circuit as the server holds it, read by a process that takes no part in it."""
    with CircuitBreakerRegistry.from_url(stage.server.url, NAMESPACE) as registry:
        try:
            return registry.snapshot(timeout=5.0)[CIRCUIT]
        except (StoreUnavailable, KeyError) as error:
            raise ActFailed(f"the server does not tell of the circuit: {error!r}") from error


def only_probes(stage: Stage, trip: Trip) -> None:
    """Since all refused, nothing but probes has reached the broken upstream."""
    more = stage.upstream.arrived("broken call") - trip.reached
    demand(more == 0, f"{some(more, 'call')} reached the upstream while the circuit was open")


def few_at_a_time(most: int) -> None:
    allowed = POLICY.half_open_permits
    assert allowed is not None
    demand(most <= allowed, f"{most} probes at a time, and {allowed} are allowed")


def nobody_closed(fleet: Fleet, since: float) -> None:
    closings = fleet.changes(since, "closed")
    demand(not closings, f"closed though nobody had mended the upstream: {closings}")


def nothing_refused(stage: Stage) -> None:
    total = stage.fleet.total()
    demand(total.refused == 0, f"{some(total.refused, 'call')} refused")
    demand(total.failed == 0, f"{some(total.failed, 'call')} failed")


def nobody_waited(fleet: Fleet) -> None:
    """Whatever the server does, no call waits for it longer than is promised."""
    longest = fleet.longest()
    demand(longest <= LONGEST_DELAY, f"the breaker added {ms(longest)} to a call")
