"""Many faults at once, in an order drawn from a seed; then everything heals.

What must hold throughout: probes never exceed permits, nothing is counted twice or forgotten, and
nobody raises or logs a traceback.  What must hold afterwards: all agree, and the circuit works.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import redis

from scripts.servers import Server
from tests.faults.mischief import POLICY, THRESHOLD, Mischief, until_healed, until_it_works
from tests.faults.proxy import Proxy
from tests.fleet.harness import Fleet

pytestmark = pytest.mark.servers("valkey")

STEPS = 50
# More of them can be tried: CHAOS_SEEDS=200 make test ARGS=tests/faults/test_chaos.py
SEEDS = int(os.environ.get("CHAOS_SEEDS", "3"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everything_at_once(
    broken_server: Server, fleet: Fleet, client: redis.Redis, proxy: Proxy, seed: int
) -> None:
    fleet.start(3, POLICY, url=proxy.url)
    fleet.start(3, POLICY)
    fleet.do("logs")
    fleet.do("hammer", threads=2, hold=0.002, pause=0.005)
    mischief = Mischief(seed, fleet, broken_server, client, proxy)
    for _ in range(STEPS):
        mischief.step()
    mischief.end()
    fleet.do("rest")
    until_healed(fleet, client)
    fleet.audit(client, kept=False)
    # In one generation one failure, or three successes, end the probing.
    probes = Counter(call["of"] for call in fleet.calls("enter", probe=True, local=False))
    assert max(probes.values(), default=0) <= THRESHOLD
    # And the circuit works.
    until_it_works(fleet)
    count = len(fleet.processes)
    assert fleet.do("succeed", count=5) == [{"admitted": 5, "rejected": 0}] * count
