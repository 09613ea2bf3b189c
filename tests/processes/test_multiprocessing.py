"""multiprocessing: children skip atexit; they end by hooks of their own, or by their pool."""

from __future__ import annotations

import pytest
import redis

from tests.processes.conftest import Start

pytestmark = pytest.mark.servers("valkey")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_that_end_in_order_lose_nothing(
    start: Start, client: redis.Redis, method: str
) -> None:
    """Processes, a pool that replaces its processes, and an executor."""
    program = start("-m", "tests.processes.apps.children", method)
    assert program.wait() == 0, program.log()
    program.audit(client, "counted")
    assert program.totals(client, "counted")["dropped"] == 0
    children = program.noted("child")
    assert len(children) == 6  # The executor's only process does two.
    assert len({child["pid"] for child in children}) == 5
    assert len({child["reporter"] for child in children}) == 5
    assert all(child["source"] == "shared" for child in children)
    for child in children:
        ours = [name for name in child["threads"] if name.startswith("circuit-breaker")]
        assert ours == ["circuit-breaker-link", "circuit-breaker-pushes"]


def test_what_a_task_flushed_survives_the_termination_of_its_pool(
    start: Start, client: redis.Redis
) -> None:
    """Everything else may be lost, but nothing is counted twice."""
    program = start("-m", "tests.processes.apps.children", "terminate")
    assert program.wait() == 0, program.log()
    totals = program.totals(client, "counted")
    counted = totals["calls"] + totals["dropped"]
    last = program.noted("child")[-1]["pid"]
    noted = program.noted("call", circuit="counted")
    lost = len(noted) - counted
    assert 0 <= lost <= sum(call["pid"] == last for call in noted), (totals, program.log())
    program.audit_log()
