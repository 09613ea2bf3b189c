"""The circuit that the demo is about, and how big and how fast its fleet is."""

from __future__ import annotations

from distributed_breaker import Policy

NAMESPACE = "demo"
CIRCUIT = "shop.http.payments"

WORKERS = 6
CALLS_PER_SECOND = 80  # of each worker
CALL_TIMEOUT = 3.0  # s; less than the lease, so that a probe that hangs does not lose its permit

# Short intervals, so that the demo is.  A call of the upstream's mode "slow" counts as bad too.
POLICY = Policy(
    failure_threshold=5,
    window=12.0,
    slow_call_duration=1.0,
    open_interval=2.0,
    jitter=0.05,
    success_threshold=3,
    half_open_permits=2,
    permit_lease=5.0,
    quorum=2,
)

# The breaker waits for its store only for a first sync and for a permit, and at most 0.3 s.  The
# rest is for a machine whose cores are all busy.  A client that waited for a dead server as
# redis-py does would need seconds.
LONGEST_DELAY = 0.3 + 0.3
