"""How far one exploration goes: the policy, what may be sent, and what may go wrong, and how often.

Time passes in whole ticks, on which the policy's durations lie.  Everything that a process may do
again and again in earnest is counted here, so the states are finite, and a process that has used
up its acquires or syncs simply stays silent: also a thing that processes do.
"""

from __future__ import annotations

from dataclasses import dataclass

from distributed_breaker.policy import Numbers

TICK = 1000  # ms
NOON = 1_764_000_000_000
OPEN, LEASE, MARGIN = 2, 3, 1  # ticks: the open interval, a permit's lease, and R1's margin


def ms(tick: int) -> int:
    """A tick by the store's clock, by which the processes' clocks happen to go as well."""
    return NOON + tick * TICK


@dataclass(frozen=True)
class Bounds:
    """One exploration: where it begins, and how much of everything there is.

    ``start``: the state that both processes know at tick 0 (``closed``, or ``open``, just tripped);
    ``past``: how many transitions there were before.
    ``acquires``, ``syncs``, ``reports``: how many each process may send.  ``kinds``: how probes may
    end.  ``room``: how many messages may be under way at once; the next one is lost.
    ``repeats``: how often a settle without an answer is sent again (R5).  ``duplicates``: how many
    requests, of those in ``duplicated``, the network doubles.  ``crashes``: processes that die, and
    begin anew with nothing.  ``failover`` to any earlier state, ``emptied``: the store loses all;
    at most one of them happens.  ``operator``: the steps of which one person makes one.
    ``least``: states that a search must go through, or it has ended too early.
    """

    name: str
    horizon: int
    least: int = 1
    start: str = "open"
    past: int = 1
    permits: int = 1
    threshold: int = 2
    acquires: int = 1
    syncs: int = 0
    reports: int = 0
    kinds: str = "s"
    repeats: int = 0
    pushes: bool = True
    room: int = 4
    duplicates: int = 0
    duplicated: tuple[str, ...] = ("acquire", "settle", "cancel")
    crashes: int = 0
    failover: bool = False
    emptied: bool = False
    operator: tuple[str, ...] = ()

    @property
    def numbers(self) -> Numbers:
        """The policy: one failure trips, probes decide everything else."""
        return Numbers(
            version=1,
            failure_threshold=1,
            failure_rate=0,
            window=24 * TICK,
            minimum_calls=50,
            slow_call_rate=10_000,
            open_interval=OPEN * TICK,
            open_interval_max=0,
            backoff_multiplier=200,
            jitter=0,
            success_threshold=self.threshold,
            half_open_permits=self.permits,
            permit_lease=LEASE * TICK,
            quorum=1,
        )
