"""One worker for all processes of a host, and what becomes of workers when applications end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker.clients import ml_host
from distributed_breaker.clients.ml_host import connect, start_worker
from distributed_breaker.clients.ml_models import ModelProblem
from distributed_breaker.clients.ml_process import ProcessEngine, WorkerDied
from tests.ml.test_process import LONG, MIB, gone, running, save, soon, spec
from tests.unit.clock import wait_until

MODEL = {"path": "/no/model.pt", "device": "cpu", "factory": None, "safe_globals": []}
ROOT = Path(__file__).parents[2]


class App:
    """Another process with an engine; see ``process_app``."""

    def __init__(self, path: str, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ml.process_app", path, kind], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def tell(self, command: str, *given: Any) -> None:
        print(json.dumps([command, *given]), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str, *given: Any) -> Any:
        self.tell(command, *given)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def workers_of(folder: Path) -> set[int]:
    """Those whose door is in a folder."""
    found = set()
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{folder}/distributed_breaker/".encode() in each.read_bytes():
                found.add(int(each.parent.name))
    return found


def end_workers(folder: Path) -> None:
    """End them."""
    for pid in workers_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where shared workers are found."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "distributed_breaker"
    end_workers(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return save(tmp_path / "net.pt", 1.0)


@pytest.fixture
def begin() -> Iterator[Callable[[str, str], App]]:
    with contextlib.ExitStack() as stack:

        def begin(path: str, kind: str) -> App:
            app = App(path, kind)
            stack.callback(app.kill)
            return app

        yield begin


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[ProcessEngine]]]:
    folder = tmp_path_factory.mktemp("pair")
    model = spec(save(folder / "net.pt", 1.0))
    engines = [ProcessEngine(model, shared=True, most_bytes=100 * MIB) for _ in range(2)]
    yield folder, engines
    for each in engines:
        each.close()
    end_workers(folder)


@pytest.fixture
def two(
    pair: tuple[Path, list[ProcessEngine]], monkeypatch: pytest.MonkeyPatch
) -> list[ProcessEngine]:
    """Two that share a worker, as two processes do; tests leave them with one that is well."""
    folder, engines = pair
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert running(engines[0]) == running(engines[1])
    return engines


def test_processes_that_come_at_once_start_one_worker(
    folder: Path, path: str, begin: Callable[[str, str], App]
) -> None:
    apps = [begin(path, "shared") for _ in range(4)]
    for app in apps:
        app.ask("pid")  # it runs, and has not begun yet to look for a worker … or has just begun
    for app in apps:
        app.tell("run", {"do": "pid"}, LONG)
    pids = {app.answer() for app in apps}
    assert len(pids) == 1
    assert {app.ask("pid") for app in apps} == pids
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [each.suffix for each in folder.iterdir()] == [".sock"]
    # It does not end with the one that has started it.
    apps[0].kill()
    apps[1].kill()
    assert apps[2].ask("run", {"do": "pid"}, LONG) in pids


def test_who_only_waited_in_a_worker_that_ended_asks_the_next_one(
    two: list[ProcessEngine],
) -> None:
    guilty, innocent = two
    pid = running(guilty)
    caught: list[Exception] = []

    def call() -> None:
        try:
            guilty.run({"do": "hang"}, 0.5)
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: guilty._own_crew().current._channel.marked())
    answer = innocent.run({"do": "pid"}, LONG)
    assert answer != pid
    assert gone(pid)
    thread.join(LONG)
    assert "not answered within 0.5 s" in str(caught[0])
    # Who has killed it is not given another one to kill.
    assert running(guilty) == running(innocent) == answer
    with pytest.raises(WorkerDied, match="has ended"):
        guilty.run({"do": "abort"}, LONG)
    soon(lambda: gone(answer))
    soon(lambda: innocent.stats()["pid"] not in (answer, None))


def test_a_shared_worker_that_leaks_is_replaced_for_all(two: list[ProcessEngine]) -> None:
    pid = running(two[0])
    two[0].run({"do": "leak", "with": [160 * MIB]}, LONG)
    for each in two:
        soon(lambda each=each: each.run({"do": "pid"}, LONG) != pid)
    assert running(two[0]) == running(two[1])
    soon(lambda: gone(pid))


def test_a_shared_worker_lives_on_without_a_hostile_client(two: list[ProcessEngine]) -> None:
    pid, greeting = running(two[0]), two[0]._own_crew().current._greeting
    for frame in (
        b"\xff",
        b"[]",
        b"{}",
        b'{"call": 1}',
        b'{"call": "1", "deadline": 1.0}',
        b'{"call": 1, "deadline": NaN}',
        b'{"call": 1, "deadline": 1e300, "tree": [0, 0]}',
        b'{"call": 1, "deadline": 1e300, "tree": [-1, 5]}',
        b'{"model": {}, "most_bytes": null}',
        b'{"model": {"path": "another"}, "most_bytes": null}',
        b'{"model": ' + b"[" * 50_000,
        b"x" * 100_000,
    ):
        with connect(*greeting.values()) as sock:
            sock.settimeout(LONG)
            sock.send(frame)
            assert sock.recv(100) == b""
    with connect(*greeting.values()) as sock:
        sock.settimeout(LONG)
        sock.send(b'{"call": -5, "deadline": 1e300}')
        assert json.loads(sock.recv(1000))["call"] == -5
    with connect(*greeting.values()) as sock:  # and one that says nothing at all
        assert two[0].run({"do": "pid"}, LONG) == pid
        assert sock.fileno() >= 0


def test_workers_end_with_their_application(path: str, begin: Callable[[str, str], App]) -> None:
    app = begin(path, "own")
    here = app.ask("run", {"do": "pid"}, LONG)
    there = app.ask("fork")
    assert here != there
    wait_until(lambda: gone(there))  # the child has ended without a word
    assert app.ask("run", {"do": "pid"}, LONG) == here
    app.ask("begin", {"do": "hang"}, 0.5)
    app.kill()
    soon(lambda: gone(here))  # though it is stuck


def test_an_idle_worker_ends_with_its_application(
    path: str, begin: Callable[[str, str], App]
) -> None:
    app = begin(path, "own")
    pid = app.ask("run", {"do": "pid"}, LONG)
    os.kill(pid, 0)
    app.kill()
    soon(lambda: gone(pid))


@pytest.mark.parametrize("there", [True, False], ids=["", "without its folder"])
def test_a_worker_that_nobody_needs_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    folder.mkdir(0o700)
    monkeypatch.chdir(folder)
    at = str(folder / "a.sock")
    program = "import distributed_breaker.clients.ml_worker as w; w.LINGERING = 0.2; w.LOOK = 0.1; "
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind("a.sock")  # a whole path may be too long
        listening.listen()
        fd = listening.fileno()
        program += f"w.main(['{fd}', '{at}'])"
        subprocess.run([sys.executable, "-c", program], pass_fds=[fd], check=True, cwd=ROOT)
    if not there:
        folder.rename(folder.with_name("gone"))
    soon(lambda: not workers_of(folder.parent))
    assert not list(folder.iterdir()) if there else not folder.exists()


@pytest.mark.parametrize("what", ["open", "link", "file", "foreign"])
def test_the_folder_must_be_this_users_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "open":
        folder.mkdir()
        folder.chmod(0o750)
    elif what == "link":
        (folder.parent / "else").mkdir(0o700)
        folder.symlink_to(folder.parent / "else")
    elif what == "file":
        folder.write_text("")
    else:
        folder.mkdir(0o700)
        monkeypatch.setattr(ml_host.os, "geteuid", lambda: 12345)
    with pytest.raises(ModelProblem, match=r"is no.* this user's.*: remove it, or set XDG"):
        connect(MODEL, None)


def test_what_lies_in_the_sockets_place_must_be_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ml_host, "start_worker", _no_worker)
    folder.mkdir(0o700)
    at = folder / f"{ml_host._key(MODEL, None)}.sock"
    at.write_text("")
    with pytest.raises(ModelProblem, match="is no socket of this user's"):
        connect(MODEL, None)


def _no_worker(*_: Any) -> Any:
    raise AssertionError("a worker is started")


def test_the_other_side_must_be_this_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ml_host._see_who(ours)
        monkeypatch.setattr(ml_host.os, "geteuid", lambda: 12345)
        with pytest.raises(PermissionError):
            ml_host._see_who(ours)


def test_what_a_worker_depends_on_is_in_its_name(path: str) -> None:
    model = {**MODEL, "path": path}
    names = {
        ml_host._key(model, None),
        ml_host._key(model, 5),
        ml_host._key({**model, "device": "cuda"}, None),
        ml_host._key({**model, "factory": "a:b"}, None),
    }
    assert ml_host._key(dict(model), None) in names
    save(Path(path), 2.0)
    names.add(ml_host._key(model, None))
    assert len(names) == 5


def test_a_worker_is_started_by_pythons_own_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ml_host._python() == sys.executable
    monkeypatch.setattr(ml_host.multiprocessing.spawn, "get_executable", lambda: "/usr/bin/uwsgi")
    assert subprocess.check_output([ml_host._python(), "-c", "print(1)"]) == b"1\n"
    assert callable(start_worker)
