"""Where background threads cannot run, the shadow decides, and that is said once."""

from __future__ import annotations

import pytest
import redis

from tests.fleet.harness import Fleet

pytestmark = pytest.mark.servers("valkey")

HOW = pytest.mark.parametrize("how", ["refused", "idle"])


@HOW
@pytest.mark.parametrize("asynchronous", [False, True])
def test_calls_go_on_without_threads(
    fleet: Fleet, client: redis.Redis, how: str, asynchronous: bool
) -> None:
    (process,) = fleet.start(1, blank=True)
    process.do("without_threads", how=how)
    (said,) = fleet.open([process], {"open_interval": 0.2}, first="attempt",
                         asynchronous=asynchronous)  # fmt: skip
    assert said["admitted"]
    assert said["took"] < 0.3 + 2.0
    process.do("waits")
    assert process.do("succeed", count=50) == {"admitted": 50, "rejected": 0}
    process.do("breaker", circuit="other")
    assert process.do("attempt", circuit="other")["admitted"]
    assert process.fail_until_refused(circuit="other") >= 5
    # Nobody waits for a thread that does not run.
    assert process.do("waits") == []
    said = [line for line in process.do("logs") if line["level"] in ("WARNING", "ERROR")]
    assert len(said) == 1
    assert "threads" in said[0]["text"]
    # It was never heard of, so the store knows nothing of its calls.
    assert fleet.found(client) is None


@HOW
def test_the_shadow_protects_and_recovers_without_threads(fleet: Fleet, how: str) -> None:
    (process,) = fleet.start(1, blank=True)
    process.do("without_threads", how=how)
    fleet.open([process], {"open_interval": 0.2}, first="attempt")
    assert process.fail_until_refused() >= 5
    assert process.do("attempt")["source"] == "shadow"
    for _ in range(3):
        while not process.do("attempt")["admitted"]:
            pass
    assert process.do("look")["state"] == "closed"


@HOW
def test_what_needs_the_store_says_so(fleet: Fleet, how: str) -> None:
    (process,) = fleet.start(1, blank=True)
    process.do("without_threads", how=how)
    fleet.open([process], {}, first="attempt")
    assert process.do("operate", step="force_open").startswith("StoreUnavailable: ")
    assert process.do("fleet_snapshot")["raised"].startswith("StoreUnavailable: ")
    assert process.do("snapshot")["fleet"] is False
    process.do("close")
    process.exit()


@HOW
def test_a_child_that_may_start_threads_joins_the_fleet(
    fleet: Fleet, client: redis.Redis, how: str
) -> None:
    """uWSGI's master cannot run threads, its forked workers can."""
    (parent,) = fleet.start(1, blank=True)
    parent.do("without_threads", how=how)
    fleet.open([parent], {}, first="attempt")
    (other,) = fleet.start(1, {})
    other.do("fail", count=5)
    fleet.until_all("open", [other])
    (child,) = parent.fork()
    fleet.processes.append(child)
    child.do("with_threads")
    # Like any newcomer it asks the store before its first call.
    said = child.do("attempt")
    assert (said["admitted"], said["state"], said["source"]) == (False, "open", "shared")
    assert other.do("operate", step="reset") == ""
    fleet.until_all("closed", [child, other])
    assert parent.do("attempt")["admitted"]


def test_pushes_that_cannot_run_are_replaced_by_polls(fleet: Fleet, client: redis.Redis) -> None:
    """Only the second thread cannot be started."""
    (process,) = fleet.start(1, blank=True)
    process.do("without_threads", how="second")
    (other,) = fleet.start(1, {})
    (said,) = fleet.open([process], {}, first="attempt")
    assert said["admitted"]
    assert process.do("succeed", count=5) == {"admitted": 5, "rejected": 0}
    assert process.fail_until_refused() >= 5
    assert len([line for line in process.do("logs") if line["level"] == "WARNING"]) <= 1
    assert other.do("attempt")["admitted"]
