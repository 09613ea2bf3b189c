"""The small policies under which all states of a circuit can be gone through."""

from __future__ import annotations

from dataclasses import dataclass

from distributed_breaker.policy import Numbers

# A multiple of every tick, so that the grid lies on the buckets' bounds.
NOON = 1_764_000_000_000
SECOND = 1000
FORCED = ("forced_open", "forced_closed")
UNKNOWN = "nobody"


@dataclass(frozen=True)
class Small:
    """A small policy with the bounds within which its states are explored.

    ``states`` is how many there are at least; ``jumps`` are the times that may pass between two
    steps; ``kinds`` the outcomes that lead on; ``most_calls`` bounds the calls in the window;
    ``jitters`` are the first halves of the nonces; ``drifts`` also follows the offered policies,
    ``rewinds`` a clock that is set back.
    """

    name: str
    states: int
    numbers: Numbers
    tick: int
    jumps: tuple[int, ...]
    kinds: str = "sf"
    reporters: tuple[str, ...] = ("a",)
    tokens: tuple[str, ...] = ("t",)
    most_calls: int = 3
    jitters: tuple[str, ...] = ("0000",)
    drifts: bool = False
    rewinds: bool = False

    @property
    def offers(self) -> tuple[Numbers, ...]:
        """Policies that clients offer: the same, newer with other numbers, older."""
        p = self.numbers
        fewer = {"half_open_permits": 1, "success_threshold": 1}
        newer = p._replace(version=p.version + 1, window=2 * p.window, **fewer)
        return p, newer, p._replace(version=p.version - 1, failure_threshold=9)


def numbers(**changes: int) -> Numbers:
    """A small policy in the store's units; as it is, one probe closes and the slow rule sleeps."""
    plain = Numbers(
        version=1,
        failure_threshold=2,
        failure_rate=0,
        window=24,
        minimum_calls=50,
        slow_call_rate=10_000,
        open_interval=12,
        open_interval_max=0,
        backoff_multiplier=200,
        jitter=0,
        success_threshold=1,
        half_open_permits=1,
        permit_lease=12,
        quorum=1,
    )
    return plain._replace(**changes)


MINUTE = 60 * SECOND

SMALL = (
    Small(
        "run rule, backoff, clock set back",
        150,
        numbers(success_threshold=2, open_interval_max=24),
        tick=12,
        jumps=(12, 61 * SECOND),
        rewinds=True,
    ),
    Small(
        "run rule, quorum 2, two permits",
        350,
        # A tick is as long as a reporter stays active.
        numbers(
            failure_threshold=3,
            window=MINUTE,
            open_interval=MINUTE,
            success_threshold=2,
            half_open_permits=2,
            permit_lease=MINUTE,
            quorum=2,
        ),
        tick=MINUTE,
        jumps=(MINUTE,),
        reporters=("a", "b"),
        tokens=("t", "u"),
    ),
    Small(
        "rate rule, jitter",
        200,
        # A third of the window at a time, so that it still holds what the shares have forgotten.
        numbers(
            failure_threshold=9,
            failure_rate=6_000,
            minimum_calls=3,
            window=MINUTE,
            open_interval=20 * SECOND,
            jitter=10_000,
            permit_lease=20 * SECOND,
        ),
        tick=20 * SECOND,
        jumps=(20 * SECOND,),
        jitters=("0000", "8000"),
    ),
    Small(
        "slow and rate rules, quorum 2",
        450,
        numbers(
            failure_threshold=3, failure_rate=6_000, slow_call_rate=5_000, minimum_calls=2, quorum=2
        ),
        tick=12,
        jumps=(12, 61 * SECOND),
        kinds="sfSI",
        reporters=("a", "b"),
        most_calls=2,
    ),
    Small(
        "all rules, policies that drift",
        240,
        numbers(failure_rate=5_000, minimum_calls=2, half_open_permits=2, success_threshold=2),
        tick=12,
        jumps=(12,),
        kinds="sf",
        tokens=("t", "u"),
        most_calls=2,
        drifts=True,
    ),
)
