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
REFUSALS = 10  # more than fit into one report, so that the newest are newer than the question


class Stage(NamedTuple):
    """All that the acts play with."""

    server: Server
    upstream: Upstream
    fleet: Fleet


class Trip(NamedTuple):
    """How the fleet's circuit opened."""

    figures: list[str]
    began: float  # a time just before the upstream broke
    reached: int  # how many calls have reached the broken upstream since it was started
    generation: int


def demand(so: bool, otherwise: str) -> None:
    """Raise ActFailed unless ``so``."""
    if not so:
        raise ActFailed(otherwise)


def ms(seconds: float) -> str:
    """A duration with about three digits."""
    return f"{seconds * 1000:,.{3 if seconds < 0.001 else 1 if seconds < 0.1 else 0}f} ms"


def some(count: int, what: str) -> str:
    """A count with its noun."""
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
    nobody_waited(fleet)
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
    open_and_quiet(stage, trip.generation)
    first = nobody_early(fleet, trip, trip.began)
    nothing_but_probes(stage, trip.reached)
    probes, most = upstream.arrived("broken probe"), upstream.most_probing()
    demand(probes > 0, "the circuit opened anew without a probe")
    few_at_a_time(most)
    nobody_waited(fleet)
    return [
        *trip.figures,
        f"open: {some(fleet.total().refused, 'call')} refused, and none reached the upstream; "
        f"{ms(first)} after the break the fleet sent {some(probes, 'probe')}, which failed, and "
        f"the circuit opened again",
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
    fleet.wait_for_looks("every process decides by itself", killed, alone)
    fleet.wait_for_each("the change is heard of", lambda w: bool(w.changes_since(killed)))
    noticed = max(w.changes_since(killed)[0].at for w in fleet.workers) - killed
    fleet.wait_for_each("every process probes by itself", lambda w: w.counted().probes > 0)
    first = nobody_early(fleet, trip, killed)
    nothing_but_probes(stage, trip.reached)
    nobody_closed(fleet, killed)
    nobody_waited(fleet)
    total, probes = fleet.total(), upstream.arrived("broken probe") - probes
    return [
        f"{trip.figures[0]}; then the server was killed",
        f"killed while open: {ms(noticed)} later all {WORKERS} knew, and each went on refusing by "
        f"its own shadow ({some(total.refused, 'call')}); none closed; {ms(first)} after the break "
        f"the first of them probed by itself, and then the others: {some(probes, 'probe')} and no "
        f"other call reached the upstream",
        f"worst delay added to a call: {ms(fleet.longest())}",
    ]


def back_while_open(stage: Stage) -> list[str]:
    """The server has lost everything, and hears from the processes that the circuit is open."""
    fleet, upstream = stage.fleet, stage.upstream
    before, reached = fleet.generation(), upstream.arrived("broken call")
    began = fleet.mark()
    stage.server.restart(empty=True)
    up = time.monotonic()
    fleet.wait_for_looks("every process shares again", up, sharing)
    back, stored = time.monotonic() - up, stored_circuit(stage)
    open_and_quiet(stage, before)
    nobody_closed(fleet, began)
    demand(stored.state in ("open", "half_open"), f"the server says {stored.state}")
    demand(stored.generation > before, "the server's generation is an old one")
    nothing_but_probes(stage, reached)
    nobody_waited(fleet)
    longest = fleet.longest()
    return [
        f"back empty: {ms(back)} after its start all {WORKERS} shared again; the server, which "
        f"had lost everything, holds the circuit again, {stored.state}, in a newer generation; no "
        f"process has closed and no call but probes reached the upstream",
        f"worst delay added to a call: {ms(longest)}",
        *mend_upstream(stage),
    ]


def killed_while_closed(stage: Stage) -> list[str]:
    """Calls go on as if nothing had happened."""
    fleet = stage.fleet
    killed = fleet.mark()
    stage.server.kill()
    fleet.wait_for_looks("every process decides by itself", killed, alone)
    knowing = fleet.total()
    fleet.wait_for_each("calls go on", lambda w: w.counted().calls >= HEALTHY_CALLS // 2)
    nothing_refused(stage)
    nobody_waited(fleet)
    demand(not fleet.changes(killed), f"the circuit changed: {fleet.changes(killed)}")
    total = fleet.total()
    return [
        f"killed while closed: each of the {WORKERS} went on calling, by its own shadow; of "
        f"{some(total.calls, 'call')} ({total.calls - knowing.calls:,} since all knew) none failed "
        f"and none was refused",
        f"worst delay added to a call: {ms(fleet.longest())}",
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
        f"back empty: {ms(back)} after its start all {WORKERS} shared again; the server, which "
        f"had lost everything, holds the circuit again, {stored.state}, in a newer generation; of "
        f"{some(fleet.total().calls, 'call')} none failed and none was refused",
        f"worst delay added to a call: {ms(fleet.longest())}",
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


def curtain(stage: Stage) -> str:
    """All workers end; the upstream must have seen as many calls as they have made."""
    wrong = stage.fleet.end()
    demand(not wrong, "; ".join(wrong))
    made = sum(worker.tally.calls for worker in stage.fleet.workers)
    arrived = stage.upstream.all_arrived()
    demand(made == arrived, f"the workers made {made} calls, and {arrived} reached the upstream")
    return f"in all, the processes made {made:,} calls, and the upstream counted as many"


# ---------------------------------------------------------------------------- what they share


def break_upstream(stage: Stage) -> Trip:
    """Break it, and wait until every worker has been refused a call by the fleet's circuit."""
    fleet, upstream = stage.fleet, stage.upstream
    earlier = upstream.arrived("broken call")
    refused = {w.number: w.tally.refused for w in fleet.workers}
    broken = upstream.switch("broken")
    # A worker makes one call at a time: once it has been refused one, no other is under way.
    fleet.wait_for_each("every call is refused", lambda w: w.tally.refused > refused[w.number])
    fleet.wait_for_each(
        "every process hears that the fleet's circuit is open",
        lambda w: any((c.new, c.source) == ("open", "shared") for c in w.changes_since(broken)),
    )
    reached = upstream.arrived("broken call")
    # A process that trips by itself, faster than the fleet, has a second change to shared.
    opened = fleet.changes(broken, "open")
    each = {c.worker: c.at for c in reversed(opened)}
    first, last = opened[0], max(each.values())
    fleet.wait_for_looks("the cause is known", last, lambda look: look.trip is not None)
    figures = [
        f"trip: {some(reached - earlier, 'call')} reached the broken upstream; worker "
        f"{first.worker} saw the trip first, {ms(first.at - broken)} after the break; all "
        f"{WORKERS} refused after {ms(last - broken)}, that is {ms(last - first.at)} later",
        evidence(fleet),
    ]
    return Trip(figures, broken, reached, max(c.generation for c in opened if c.source == "shared"))


def evidence(fleet: Fleet) -> str:
    """Why the circuit opened, as the store has kept it."""
    look = fleet.workers[0].look
    trip: dict[str, Any] = (look.trip if look is not None else None) or {}
    return (
        f"evidence that the server keeps: {some(trip.get('run', 0), 'failure')} in a row, while "
        f"{trip.get('reporters', 0)} processes took part (cause: {trip.get('cause')})"
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
    nobody_waited(fleet)
    return [
        f"recovery: the fleet sent {some(probes, 'probe')}, at most {most} at a time; "
        f"{ms(min(closings) - mended)} after the mending (the open interval had to end first) the "
        f"circuit closed; all {WORKERS} called again {ms(max(closings) - min(closings))} later",
    ]


def open_and_quiet(stage: Stage, after: int) -> None:
    """Wait until the fleet's circuit is open for a while yet, in a generation newer than ``after``,
    and no probe is under way any more."""
    fleet = stage.fleet

    def firmly(look: Look) -> bool:
        left = look.retry_after >= LEFT * POLICY.open_interval
        return sharing(look) and look.state == "open" and look.generation > after and left

    fleet.wait_for_looks("a probe has failed and the circuit is open again", 0.0, firmly)
    refused = {w.number: w.tally.refused + REFUSALS for w in fleet.workers}
    fleet.wait_for_each("no probe is under way", lambda w: w.tally.refused > refused[w.number])


def sharing(look: Look) -> bool:
    """This process goes by the fleet's circuit."""
    return look.source == "shared"


def alone(look: Look) -> bool:
    """This process goes by its own shadow, since it cannot ask the server."""
    return look.source == "shadow"


def closed(look: Look) -> bool:
    """This process goes by the fleet's circuit, which admits all calls."""
    return sharing(look) and look.state == "closed"


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


def nobody_early(fleet: Fleet, trip: Trip, since: float) -> float:
    """Nobody probed before the open interval was over.  Returns after how many seconds one did."""
    first = fleet.changes(since, "half_open")[0].at - trip.began
    demand(first >= POLICY.open_interval, f"a probe was sent {ms(first)} after the break")
    return first


def nothing_but_probes(stage: Stage, reached: int) -> None:
    """Since ``reached`` calls had reached the broken upstream, only probes did."""
    more = stage.upstream.arrived("broken call") - reached
    demand(more == 0, f"{some(more, 'call')} reached the upstream while the circuit was open")


def few_at_a_time(most: int) -> None:
    """The fleet has kept to the policy's permits."""
    allowed = POLICY.half_open_permits
    assert allowed is not None
    demand(most <= allowed, f"{most} probes at a time, and {allowed} are allowed")


def nobody_closed(fleet: Fleet, since: float) -> None:
    """While the upstream is broken, no process may close the circuit."""
    closings = fleet.changes(since, "closed")
    demand(not closings, f"closed though nobody had mended the upstream: {closings}")


def nothing_refused(stage: Stage) -> None:
    """Since the mark, every call was admitted and went well."""
    total = stage.fleet.total()
    demand(total.refused == 0, f"{some(total.refused, 'call')} refused")
    demand(total.failed == 0, f"{some(total.failed, 'call')} failed")


def nobody_waited(fleet: Fleet) -> None:
    """Whatever the server does, no call waits for it longer than is promised."""
    longest = fleet.longest()
    demand(longest <= LONGEST_DELAY, f"the breaker added {ms(longest)} to a call")
