"""A server that is there and has no time: paused, loading, or busy with somebody's script."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import redis

from scripts.servers import Server
from tests.fleet.harness import PATIENT, Fleet, Process, client_of, until

pytestmark = pytest.mark.servers("valkey", "redis8", "redis")

LASTING = {"failure_threshold": 100_000}


@contextlib.contextmanager
def endless_script(server: Server, client: redis.Redis) -> Iterator[None]:
    """Somebody's script that never ends; afterwards it is killed."""

    def run(own: redis.Redis) -> None:
        with contextlib.suppress(redis.ResponseError):  # that it was killed
            own.eval("while true do end", 0)

    def busy() -> bool:
        try:
            client.ping()
        except redis.RedisError:
            return True
        return False

    client.config_set("lua-time-limit", 1)
    with server.client(socket_timeout=60.0) as own:
        thread = threading.Thread(target=run, args=(own,))
        thread.start()
        try:
            until(busy, "the script runs")
            yield
        finally:
            client.script_kill()
            thread.join()


def down_of(process: Process) -> str:
    """Why it counts the store as gone."""
    return str(process.do("look", circuit="new")["down"])


@pytest.mark.parametrize("first", ["closed", "open"])
def test_a_server_that_is_busy_with_a_script(
    broken_server: Server, fleet: Fleet, client: redis.Redis, first: str
) -> None:
    """BUSY: degraded at once, nothing raised, and everybody is back when the script was killed."""
    fleet.adjust["READ_TIMEOUT"] = 10.0  # A busy machine must not look like another outage.
    fleet.start(3, {} if first == "open" else LASTING)
    if first == "open":
        fleet.trip(client)
    fleet.do("logs")
    fleet.do("hammer", threads=1, outcome="failure")
    with endless_script(broken_server, client):
        until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")
        assert fleet.states() == [first] * 3
        (newcomer,) = fleet.start(1, blank=True)
        (said,) = fleet.open([newcomer], {}, circuit="new", first="attempt")
        assert said["admitted"]
        until(lambda: down_of(newcomer) in ("BUSY", "TIMEOUT"), "it has heard so")
    newcomer.do("breaker", circuit="payments")
    fleet.until_agreed(client)
    done = fleet.do("rest", fleet.processes[:3])
    wanted = {"admitted"} if first == "closed" else {"shared", "shadow"}
    assert all(set(said) - {"slowest"} <= wanted for said in done)
    assert fleet.states(fleet.processes[:3]) == [first] * 3
    for process in fleet:
        said = [line["text"] for line in process.do("logs") if line["level"] == "WARNING"]
        assert len(said) == 1, said
    fleet.audit(client)


def test_a_server_that_is_loading(
    own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet]
) -> None:
    """LOADING, for real: it accepts connections, and refuses everything until it has its data."""
    # 10 ms for each of the 200 keys below are what makes it last.
    delay = "--key-load-delay 10000 --loading-process-events-interval-bytes 1024"
    server = own_server(args=delay.split())
    fleet = fleet_of(server.url)
    with client_of(server) as client:
        knowing = fleet.start(2, {})
        (newcomer,) = fleet.start(1, blank=True)
        fleet.do("fail", knowing, count=5)
        fleet.until_all("open", knowing)
        client.mset({f"theirs:{number}": "x" * 4_000 for number in range(200)})
        client.save()
        fleet.do("hammer", knowing, threads=1)
        server.kill()
        with restarting(server):
            until(lambda: is_loading(client), "it loads")
            (said,) = fleet.open([newcomer], {}, circuit="new", first="attempt")
            assert said["admitted"]
            # A slow machine may let it come to its end before.
            refused = ("LOADING", "TIMEOUT")
            until(lambda: down_of(newcomer) in refused or not is_loading(client), "it hears so")
            assert fleet.states(knowing) == ["open"] * 2
        newcomer.do("breaker", circuit="payments")
        fleet.until_agreed(client)
        done = fleet.do("rest", knowing)
        assert not any(said.get("admitted") for said in done)
        assert fleet.states(knowing) == ["open"] * 2
        fleet.audit(client, kept=False)


@contextlib.contextmanager
def restarting(server: Server) -> Iterator[None]:
    """It is being started with its data; returns when that has come to its end."""
    restart = threading.Thread(target=server.restart, kwargs={"empty": False})
    restart.start()
    try:
        yield
    finally:
        restart.join()


def is_loading(client: redis.Redis) -> bool:
    try:
        client.get("theirs:0")
    except redis.exceptions.BusyLoadingError:
        return True
    except redis.RedisError:
        return False
    return False


@contextlib.contextmanager
def paused(client: redis.Redis, everything: bool) -> Iterator[None]:
    """CLIENT PAUSE.  ALL makes its own end wait too, so that one ends by itself."""
    client.client_pause(1_500 if everything else 60_000, all=everything)
    yield
    if not everything:
        client.client_unpause()


EVERY_PAUSE = pytest.mark.parametrize("everything", [True, False], ids=["ALL", "WRITE"])


def holds_permit(process: Process) -> bool:
    """Begin a probe with the fleet's permit.  A busy machine may look like an outage for a moment,
    and then a process probes for itself."""
    said = process.do("begin", name="p", how="guard")
    if said["admitted"] and said["local"]:
        process.do("finish", name="p")
    return bool(said["admitted"] and not said["local"])


@EVERY_PAUSE
def test_a_settle_while_the_server_pauses_its_clients(
    broken_server: Server, fleet: Fleet, client: redis.Redis, everything: bool
) -> None:
    """R5 and S5: it is sent until it is acknowledged, and counts once, though the server may carry
    out each of the attempts when it goes on."""
    policy = {"open_interval": 0.2, "success_threshold": 2, "permit_lease": 600.0}
    fleet.start(3, policy)
    fleet.trip(client)
    until(lambda: holds_permit(fleet[0]), "a probe")
    fleet.until_all("half_open")
    with paused(client, everything):
        assert fleet[0].do("finish", name="p") == "returned"
        fleet.do("hammer", fleet.processes[1:], threads=1)
        until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")
    fleet.until_agreed(client)
    fleet.until_all("closed")
    fleet.do("rest", fleet.processes[1:])
    fleet.audit(client)
    causes = [entry["cause"] for entry in fleet.log(client)]
    assert causes.count("recovered") == 1


@EVERY_PAUSE
def test_a_pause_in_the_midst_of_traffic(
    broken_server: Server, fleet: Fleet, client: redis.Redis, everything: bool
) -> None:
    """As in a planned failover; what was held back is carried out afterwards, but counted once."""
    fleet.start(3, LASTING)
    fleet.do("hammer", threads=1, outcome="failure")
    fleet.do("waits")
    with paused(client, everything):
        until(lambda: all(look["degraded"] for look in fleet.do("look")), "all are degraded")
        assert fleet.do("waits") == [[]] * 3
    fleet.until_agreed(client)
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    sums = fleet.audit(client)
    assert sums["flushed"] > 0


def test_scripts_that_are_flushed_all_the_time(
    broken_server: Server, fleet: Fleet, client: redis.Redis
) -> None:
    """Stoplight #777: NOSCRIPT loops.  Whenever a step finds its script gone, it loads it once and
    is sent once more; should that be in vain too, the store counts as gone, and no loop begins."""
    fleet.start(3, LASTING, READ_TIMEOUT=10.0)
    fleet.do("hammer", threads=1, outcome="failure")
    stop = threading.Event()

    def flush() -> None:
        with client_of(broken_server) as own:
            while not stop.is_set():
                own.script_flush()

    thread = threading.Thread(target=flush)
    before = counts(client)
    thread.start()
    try:
        until(lambda: counts(client)["script|load"] > before["script|load"] + 20, "many loads")
    finally:
        stop.set()
        thread.join()
    fleet.until_agreed(client)
    done = fleet.do("rest")
    assert all(set(said) == {"admitted", "slowest"} for said in done)
    after = counts(client)
    steps, loads = (after[name] - before[name] for name in ("evalsha", "script|load"))
    assert loads <= steps
    fleet.audit(client)
    assert fleet.states() == ["closed"] * 3


def counts(client: redis.Redis) -> dict[str, int]:
    """How often the server was asked to run and to load a script."""
    stats = client.info("commandstats")
    assert isinstance(stats, dict)
    names = ("evalsha", "script|load")
    return {name: int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in names}


def test_the_audit_finds_an_undisturbed_fleet_in_order(fleet: Fleet, client: redis.Redis) -> None:
    """Nothing of the above has happened, so nothing may be missing."""
    fleet.start(2, {}, **PATIENT)
    fleet.do("succeed", count=20)
    fleet.do("fail", count=2)
    assert fleet.audit(client) == {"recorded": 44, "flushed": 44, "dropped": 0, "pending": 0}
    assert fleet.totals(client)["calls"] == 44
