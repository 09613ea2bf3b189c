"""gunicorn: workers that are forked, with and without the application, and all end by SIGTERM."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.fleet.process import until
from tests.processes.conftest import Start
from tests.processes.launch import Program, connections_of
from tests.processes.site import Site

pytestmark = pytest.mark.servers("valkey")


def serve(start: Start, address: Path, *options: str, **more: str) -> tuple[Program, Site]:
    program = start(
        "-m", "gunicorn", "--no-control-socket", "--bind", f"unix:{address}", *options,
        # Nothing but the end of their work ends the workers.
        "--timeout", "120", "--graceful-timeout", "60",
        "tests.processes.apps.web:wsgi", **more,
    )  # fmt: skip
    return program, Site(program, address)


def until_agreed(site: Site, pids: list[int], state: str, circuit: str) -> None:
    """Wait until all workers are in this state, by the fleet's word."""
    for pid in pids:
        until(
            lambda pid=pid: site.tell(pid, "look", circuit=circuit)["shared"] == state,
            f"worker {pid} is {state}\n{site.program.log()}",
        )


def check_workers(program: Program, site: Site, pids: list[int], store: Server) -> None:
    """Each is a reporter of its own, with its own threads and connections."""
    looks = [site.tell(pid, "look") for pid in pids]
    assert len({look["reporter"] for look in looks}) == len(pids)
    connections = [connections_of(pid, store.url) for pid in (program.pid, *pids)]
    assert all(len(held) == 2 for held in connections[1:]), connections
    assert len(set().union(*connections)) == sum(map(len, connections)), connections
    for pid in pids:
        until(lambda pid=pid: site.tell(pid, "look")["senders"] == 1, "one sends")
    for look in looks:
        ours = [name for name in look["threads"] if name.startswith("circuit-breaker")]
        # The one that logs transitions begins with the first of them.
        assert set(ours) - {"circuit-breaker-listeners"} == {
            "circuit-breaker-link",
            "circuit-breaker-pushes",
        }
        assert len(ours) == len(set(ours))


WAYS = [
    *itertools.product(["sync", "gthread", "gevent"], [False, True]),
    # As gevent's users are told to: everything is patched in the master, before the application
    # is loaded.  Its greenlets come along into each worker.
    ("patched gevent", True),
]


@pytest.mark.parametrize(
    ("kind", "preload"), WAYS, ids=[f"{k}-preload" if p else k for k, p in WAYS]
)
def test_the_life_of_a_server(
    start: Start, store: Server, client: redis.Redis, address: Path, tmp_path: Path,
    kind: str, preload: bool,
) -> None:  # fmt: skip
    """Two workers share a circuit; they are replaced while outcomes and a probe are pending; and
    the whole server ends while the store hangs (or, with ``preload``, is dead)."""
    options = ["--threads", "4"] if kind == "gthread" else []
    before = {"PRELOADED": "yes"} if preload else {}
    options += ["--preload"] if preload else []
    options += ["--worker-class", kind.removeprefix("patched ")]
    if kind == "patched gevent":
        options += ["--config", "python:tests.processes.apps.patched"]
    program, site = serve(start, address, "--workers", "2", *options, **before)
    first = site.workers(2)
    for pid in first:
        assert site.tell(pid, "act", count=40)["admitted"] == 40
        site.tell(pid, "act", count=2, outcome="failure")
    check_workers(program, site, first, store)

    # A trip takes failures of both, and is seen by both.
    for pid in first:
        site.tell(pid, "act", circuit="payments", count=5, outcome="failure")
    until_agreed(site, first, "open", "payments")
    assert all(site.tell(p, "act", circuit="payments", count=3)["rejected"] == 3 for p in first)
    assert program.transitions(client, "payments") == ["closed", "open"]
    until(
        lambda: len({line["pid"] for line in program.noted("heard")} & set(first)) == 2,
        "each worker's listener heard of it",
    )

    # One worker holds the only permit when both are told to go.
    site.tell(first[0], "act", circuit="probed", count=3, outcome="failure")
    until_agreed(site, first, "open", "probed")
    gate = tmp_path / "gate"
    held = []

    def probing() -> bool:
        held.append(site.begin("hold", circuit="probed", gate=gate))
        until(lambda: program.noted("held", probe=True) or not held[-1].is_alive(), "an answer")
        return bool(program.noted("held", probe=True))

    until(probing, "a probe")
    if kind == "sync":  # The worker that holds it is busy; the other one takes all requests.
        busy = program.noted("held")[0]["pid"]
        site.tell(next(p for p in first if p != busy), "act", count=70)
    else:
        for pid in first:
            site.tell(pid, "act", count=70)
    program.signal(signal.SIGHUP)
    second = site.workers(2, gone=set(first))
    gate.touch()
    for thread in held:
        thread.join()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first), "the first have gone")
    program.audit(client, "counted", "payments", "probed")
    assert program.transitions(client, "probed")[-1] == "closed"

    # Their successors are new reporters, and take up what the fleet knows.
    for pid in second:
        assert site.tell(pid, "act", circuit="payments")["rejected"] == 1
        site.tell(pid, "act", count=30)
    check_workers(program, site, second, store)

    store.kill() if preload else store.pause()
    for pid in second:
        site.tell(pid, "act", count=5, outcome="failure")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    program.audit_log()
    assert "SIGKILL" not in program.log()


def test_workers_that_are_replaced_after_some_requests_lose_nothing(
    start: Start, client: redis.Redis, address: Path
) -> None:
    program, site = serve(start, address, "--workers", "2", "--max-requests", "4")
    site.workers(2)
    seen: set[int] = set()

    def replaced() -> bool:
        seen.add(site.ask("act", count=3)["pid"])
        return len(seen) >= 6

    until(replaced, "the third generation of workers")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    program.audit(client, "counted")
    assert program.totals(client, "counted")["dropped"] == 0
