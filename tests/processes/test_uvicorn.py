"""uvicorn: an event loop that ends by the signal which it was told to end by, so without atexit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.fleet.process import until
from tests.processes.conftest import Start
from tests.processes.launch import Program
from tests.processes.site import Site

pytestmark = pytest.mark.servers("valkey")


def serve(start: Start, address: Path, *options: str, **more: str) -> Site:
    program = start("-m", "uvicorn", "--uds", str(address), *options,
                    "tests.processes.apps.web:asgi", **more)  # fmt: skip
    return Site(program, address)


def use(site: Site, pids: list[int]) -> None:
    for pid in pids:
        site.tell(pid, "act", count=70)
        site.tell(pid, "act", count=2, outcome="failure")
    # A probe that is settled just before the end.
    site.tell(pids[0], "act", circuit="probed", count=3, outcome="failure")
    until(lambda: site.tell(pids[0], "act", circuit="probed")["admitted"], "a probe")
    for pid in pids:
        site.tell(pid, "act", count=40)


def lost(program: Program, client: redis.Redis) -> int:
    """How many outcomes were recorded and neither counted nor counted as dropped."""
    totals = program.totals(client, "counted")
    return len(program.noted("call", circuit="counted")) - totals["calls"] - totals["dropped"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_registry_that_the_lifespan_closes_loses_nothing(
    start: Start, client: redis.Redis, address: Path, workers: int
) -> None:
    site = serve(start, address, "--workers", str(workers), CLOSES="yes")
    pids = site.workers(workers)
    use(site, pids)
    site.program.signal(signal.SIGTERM)
    site.program.wait()
    site.program.audit(client, "counted", "probed")
    assert site.program.transitions(client, "probed")[-1] == "closed"


def test_without_that_its_last_outcomes_may_be_lost_and_nothing_else(
    start: Start, client: redis.Redis, address: Path
) -> None:
    """uvicorn dies of the signal, so no exit handler runs.  If this test fails because nothing is
    lost any more, docs/processes.md can say so."""
    site = serve(start, address)
    (pid,) = site.workers(1)
    site.tell(pid, "act", count=70)
    until(lambda: not lost(site.program, client), "what waited is reported")
    site.tell(pid, "act", count=40)
    site.program.signal(signal.SIGTERM)
    assert site.program.wait() == -signal.SIGTERM
    assert 0 <= lost(site.program, client) <= 40
    site.program.audit_log()


@pytest.mark.parametrize("what", ["stopped", "killed"])
def test_it_ends_soon_though_the_store_is_away(
    start: Start, store: Server, address: Path, what: str
) -> None:
    site = serve(start, address, CLOSES="yes")
    use(site, site.workers(1))
    store.pause() if what == "stopped" else store.kill()
    site.ask("act", count=3, outcome="failure")
    site.program.signal(signal.SIGTERM)
    assert site.program.wait() == -signal.SIGTERM
    site.program.audit_log()
    assert "Application shutdown complete" in site.program.log()
