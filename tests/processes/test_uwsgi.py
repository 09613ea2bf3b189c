"""uWSGI: it forks without asking Python, and runs threads only where it is told to."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.fleet.process import until
from tests.processes.conftest import Start
from tests.processes.launch import connections_of
from tests.processes.site import Site

pytestmark = pytest.mark.servers("valkey")

RUN = "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])"


# Threads are started in the master, and uWSGI forks whatever they hold: a worker may never answer.


def serve(start: Start, address: Path, *options: str) -> Site:
    program = start(
        "-c", RUN, "--master", "--processes", "2", "--need-app", "--die-on-term",
        "--http-socket", str(address), "--disable-logging",
        "--module", "tests.processes.apps.web:wsgi", *options,
    )  # fmt: skip
    return Site(program, address)


@pytest.mark.parametrize(
    "options",
    [[], ["--lazy-apps"]],
    ids=["forked", "lazy"],
)
def test_workers_with_threads_share_and_lose_nothing(
    start: Start, store: Server, client: redis.Redis, address: Path, options: list[str]
) -> None:
    site = serve(start, address, "--enable-threads", *options)
    pids = site.workers(2)
    for pid in pids:
        assert site.tell(pid, "act", count=40)["admitted"] == 40
        site.tell(pid, "act", circuit="payments", count=5, outcome="failure")
    for pid in pids:
        until(
            lambda pid=pid: site.tell(pid, "look")["shared"] == "open",
            f"worker {pid} knows",
        )
        site.tell(pid, "act", count=30)
    looks = [site.tell(pid, "look") for pid in pids]
    assert len({look["reporter"] for look in looks}) == 2
    connections = [connections_of(pid, store.url) for pid in pids]
    assert [len(held) for held in connections] == [2, 2]
    assert not connections[0] & connections[1]
    site.program.signal(signal.SIGTERM)
    assert site.program.wait() == 0
    site.program.audit(client, "counted", "payments")
    assert site.program.totals(client, "counted")["dropped"] == 0


def test_without_threads_each_worker_is_on_its_own_and_says_so_once(
    start: Start, address: Path
) -> None:
    site = serve(start, address)
    pids = site.workers(2)
    for pid in pids:
        site.tell(pid, "act", circuit="payments", count=5, outcome="failure")
        assert site.tell(pid, "act", circuit="payments")["rejected"] == 1
        assert site.tell(pid, "look")["source"] == "shadow"
    assert site.program.log().count("with uWSGI, add --enable-threads") == len(pids)
    site.program.signal(signal.SIGTERM)
    assert site.program.wait() == 0
    site.program.audit_log()
