"""Starting worker processes, and finding one that all processes of this user's on the host share.

A shared worker is found by a socket in a folder that nobody else may enter, under a name made of
all that the model depends on, the state of its file included.  Clients come in, and workers come
and go, under one lock: so one is started however many want it, and none leaves while somebody is
about to come in.  Who starts it also makes its socket, so that nobody has to wait until it listens.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing.spawn
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from .ml_models import ModelProblem, stamp_of

PROTOCOL = 1  # changes when an older worker cannot serve a newer client, or the other way round
BUSY = 10.0  # s that one waits for the lock, which is held for as long as it takes to start one
WAITING = 128  # clients that may wait until a worker lets them in

_CREDENTIALS = struct.Struct("3i")


def start_worker(sock: socket.socket, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a process that serves ``sock``: a connected socket, or a listening one and its path.

    It finds modules where this process finds them, and is out of reach of its terminal's Ctrl-C.
    """
    folders = os.pathsep.join(each or os.getcwd() for each in sys.path)
    silent = (
        subprocess.DEVNULL if arguments else None
    )  # who outlives this process must hold nothing
    return subprocess.Popen(
        [_python(), "-P", "-u", "-m", "distributed_breaker.clients.ml_worker",
         str(sock.fileno()), *arguments],
        stdin=subprocess.DEVNULL, stdout=silent, stderr=silent, pass_fds=[sock.fileno()],
        env={**os.environ, "PYTHONPATH": folders}, start_new_session=True,
    )  # fmt: skip


def _python() -> str:
    """The interpreter: in uWSGI, ``sys.executable`` is uWSGI's."""
    found = os.fsdecode(multiprocessing.spawn.get_executable() or "")
    if "python" in os.path.basename(found) or os.path.basename(found).startswith("pypy"):
        return found
    return os.path.join(sys.exec_prefix, "bin", "python3")


def connect(model: dict[str, Any], most_bytes: int | None) -> socket.socket:
    """Connect to the worker of a model, started if there is none.

    Raises:
        ModelProblem: the folder or the socket is not this user's alone.
    """
    folder = _folder()
    name = f"{_key(model, most_bytes)}.sock"
    with _alone(folder) as here:
        sock = _connected(here, name)
        if sock is not None:
            return sock
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=here)  # of one that was killed
            listening.bind(_short(here, name))
            listening.listen(WAITING)
            first = start_worker(listening, os.path.join(folder, name))
            sock = _connected(here, name)
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.wait(BUSY)  # it only starts the one that stays
    if sock is None:
        raise ModelProblem(
            folder, "cannot be used for sockets", "set XDG_RUNTIME_DIR to another one"
        )
    return sock


def _key(model: dict[str, Any], most_bytes: int | None) -> str:
    code = sys.path if model["factory"] or model["safe_globals"] else None
    path = os.path.realpath(model["path"])
    key = [PROTOCOL, sys.executable, {**model, "path": path}, stamp_of(path), most_bytes, code]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def _folder() -> str:
    """Where sockets lie; made if it is missing."""
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    if own and os.access(own, os.W_OK):
        folder = os.path.join(own, "distributed_breaker")
    else:
        folder = os.path.join(tempfile.gettempdir(), f"distributed_breaker-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    return folder


def _opened(folder: str) -> int:
    """The folder, in whose place nobody can put another one from now on."""
    remedy = "remove it, or set XDG_RUNTIME_DIR to a folder of this user's"
    try:
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ModelProblem(
            folder, f"is no folder of this user's ({error.strerror})", remedy
        ) from None
    found = os.fstat(here)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(here)
        whose = f"owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
        raise ModelProblem(folder, f"is not this user's alone ({whose})", remedy)
    return here


def _short(here: int, name: str) -> str:
    """A path for a socket, which may have 107 bytes only."""
    return f"/proc/self/fd/{here}/{name}"


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[int]:
    """No client comes in, and no worker comes or goes meanwhile; gives the open folder."""
    here = _opened(folder)
    try:
        end = time.monotonic() + BUSY
        while True:
            try:
                fcntl.flock(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ModelProblem(
                        folder, f"was not free for {BUSY:g} s", "end the process that has locked it"
                    ) from None
                time.sleep(0.002)
        try:
            yield here
        finally:
            # A child that was forked just now shares the handle, and with it the lock.
            fcntl.flock(here, fcntl.LOCK_UN)
    finally:
        os.close(here)


def _connected(here: int, name: str) -> socket.socket | None:
    """Connected to whoever listens there; None: nobody does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        found = os.stat(name, dir_fd=here, follow_symlinks=False)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise ModelProblem(name, "is no socket of this user's", "remove it")
        sock.settimeout(BUSY)
        sock.connect(_short(here, name))
        _see_who(sock)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise ModelProblem(name, f"cannot be connected to ({error})", "try again") from error
    except ModelProblem:
        sock.close()
        raise
    return sock


def _see_who(sock: socket.socket) -> None:
    """See that the other side is this user.

    Raises:
        PermissionError
    """
    given = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(given)
    if user != os.geteuid():
        raise PermissionError(f"the other side is the user {user}")


class Door:
    """Where a shared worker's clients come in.

    Args:
        listening: the socket, which belongs to this object from now on.
        path: of it.
    """

    def __init__(self, listening: socket.socket, path: str) -> None:
        self._socket = listening
        self._socket.setblocking(False)
        self._path = path
        self._place = os.stat(path).st_ino

    def fileno(self) -> int:
        """The socket's, for ``select``; -1 once it is closed."""
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """Who waits; None: nobody."""
        try:
            sock, _ = self._socket.accept()
        except OSError:
            return None
        try:
            _see_who(sock)
        except OSError:
            sock.close()
            return None
        return sock

    def close(self, *, unless_wanted: bool = False) -> bool:
        """Let nobody in any more: who comes now starts another worker; False: it is still open.

        Args:
            unless_wanted: stay open if somebody waits.
        """
        if self.fileno() < 0:
            return True
        folder, name = os.path.split(self._path)
        # Where the folder is gone, or is another's by now, nobody can come in anyway.
        with contextlib.suppress(ModelProblem, OSError), _alone(folder) as here:
            if unless_wanted and select.select([self._socket], [], [], 0)[0]:
                return False
            if os.stat(name, dir_fd=here).st_ino == self._place:
                os.unlink(name, dir_fd=here)
            self._socket.close()
        self._socket.close()
        return True
