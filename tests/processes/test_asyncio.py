"""asyncio: tasks that are cancelled in the midst of calls on a shared circuit."""

from __future__ import annotations

import signal

import pytest
import redis

from tests.fleet.process import until
from tests.processes.conftest import Start

pytestmark = pytest.mark.servers("valkey")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cancelled_calls_are_counted_and_give_their_permits_back(
    start: Start, client: redis.Redis, number: int
) -> None:
    """The lease of ``probed`` does not end while the test lasts: one permit that is lost would
    leave the circuit half open, and no call would be let through again."""
    program = start("-m", "tests.processes.apps.loops")

    def enough() -> bool:
        assert program.running, program.log()
        probes = program.totals(client, "probed")["probes"] if program.noted("wave") else 0
        return len(program.noted("wave")) >= 40 and probes >= 5

    until(enough, f"forty waves and five probes\n{program.log()}")
    program.signal(number)
    assert program.wait() == 0
    program.audit(client, "counted", "probed")
    assert program.noted("call", circuit="counted", outcome="cancelled")
    assert program.totals(client, "counted")["dropped"] == 0
