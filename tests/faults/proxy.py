"""A proxy before a real server that can do what networks and servers do on bad days.

It reads each command and each answer as a whole, so a rule can hit exactly one of them:

    proxy.fail("report", "LOADING Redis is loading the dataset in memory")
    proxy.cut("settle")                  # it is carried out, then the connection breaks
    held = proxy.hold("acquire")         # it is carried out, and the answer comes late
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import urlsplit

LONGEST = 30.0  # s that an answer is held


@dataclass
class Rule:
    """What happens to commands of one name, or to steps of one operation, or (``*``) to all."""

    what: str
    action: str  # "fail", "cut", "hold"
    times: float
    text: str = ""
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let held answers go on, and hold no more."""
        self.times = 0
        self.released.set()


class Proxy:
    """Listens on a unix socket (``url``) and passes everything on to the server at ``behind``."""

    def __init__(self, behind: str) -> None:
        self._behind = behind
        self._folder = tempfile.mkdtemp(prefix="dbk-")
        self._path = os.path.join(self._folder, "s")
        self.url = f"unix://{self._path}"
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.seen: Counter[str] = Counter()  # commands, and the operations of steps
        self.swallow_pushes = False
        self.silent = False  # nothing at all comes through a subscription
        self.latency = 0.0  # s that each command is under way
        self.greeting = b""  # said to every new connection, which is then closed
        self.connect()

    # ------------------------------------------------------------------ what tests do

    @property
    def listening(self) -> bool:
        """Whether it accepts connections."""
        return self._listener is not None

    def fail(self, what: str, text: str, times: float = math.inf) -> Rule:
        """Answer with this error, and pass nothing on."""
        return self._add(Rule(what, "fail", times, text))

    def cut(self, what: str, times: float = 1) -> Rule:
        """Pass it on and break the connection instead of giving the answer."""
        return self._add(Rule(what, "cut", times))

    def hold(self, what: str, times: float = math.inf) -> Rule:
        """Pass it on and keep the answer back until the rule is released.  A subscription begins
        only then."""
        return self._add(Rule(what, "hold", times))

    def clear(self) -> None:
        """No rule any more."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.release()

    def refuse(self) -> None:
        """Break all connections and refuse new ones."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            os.unlink(self._path)
            # A thread that waits in accept() is not woken by a mere close.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.reset()

    def reset(self) -> None:
        """Break all connections."""
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        """Accept connections (again)."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        self.clear()
        self.refuse()
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------ inside

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def _rule_for(self, names: list[str]) -> Rule | None:
        with self._lock:
            self.seen.update(names)
            for rule in self._rules:
                if rule.times > 0 and (rule.what == "*" or rule.what in names):
                    rule.times -= 1
                    rule.hits += 1
                    return rule
        return None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, EOFError):
            stack.enter_context(client)
            if self.greeting:
                client.sendall(self.greeting)
                return
            server = stack.enter_context(_connected(self._behind))
            with self._lock:
                self._open |= {client, server}
            self._talk(client, server)

    def _talk(self, client: socket.socket, server: socket.socket) -> None:
        asked, answered = client.makefile("rb"), server.makefile("rb")
        while True:
            command = read_frame(asked)
            names = _names(command)
            rule = self._rule_for(names)
            if rule is not None and rule.action == "fail":
                client.sendall(f"-{rule.text}\r\n".encode())
                continue
            if self.latency:
                time.sleep(self.latency)
            if names[0] == "SUBSCRIBE":
                if rule is not None and rule.action == "hold":
                    rule.released.wait(LONGEST)
                server.sendall(command)
                threading.Thread(target=self._push, args=(answered, client), daemon=True).start()
                while True:
                    server.sendall(read_frame(asked))
            server.sendall(command)
            answer = read_frame(answered)
            if rule is not None and rule.action == "cut":
                client.shutdown(socket.SHUT_RDWR)
                return
            if rule is not None and rule.action == "hold":
                rule.released.wait(LONGEST)
            client.sendall(answer)

    def _push(self, answered: IO[bytes], client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame = read_frame(answered)
                if not (self.silent or (self.swallow_pushes and b"\r\nmessage\r\n" in frame)):
                    client.sendall(frame)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(parts.path)
            stack.pop_all()
            return connection
    return socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379))


def read_frame(source: IO[bytes]) -> bytes:
    """One whole command or answer in RESP 2."""
    line = source.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    count = int(line[1:]) if line[:1] in b"$*" else -1
    if line[:1] == b"$" and count >= 0:
        return line + source.read(count + 2)
    return line + b"".join(read_frame(source) for _ in range(count if line[:1] == b"*" else 0))


def _names(command: bytes) -> list[str]:
    """The command's name, and the operation of a step."""
    words = command.split(b"\r\n")[2::2]
    names = [words[0].decode().upper()]
    return names + ([words[5].decode()] if names[0] == "EVALSHA" else [])


@contextlib.contextmanager
def proxy_before(url: str) -> Iterator[Proxy]:
    """A proxy before the server at ``url``."""
    with contextlib.closing(Proxy(url)) as proxy:
        yield proxy


class Stub(Proxy):
    """A server that knows only these answers, ``*`` to all other commands."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self._answers = answers
        super().__init__("")

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError):
            asked = client.makefile("rb")
            while True:
                names = _names(read_frame(asked))
                self._rule_for(names)
                client.sendall(self._answers.get(names[0]) or self._answers["*"])


@contextlib.contextmanager
def stub(answers: dict[str, bytes]) -> Iterator[Stub]:
    """A server that gives these answers to commands of these names."""
    with contextlib.closing(Stub(answers)) as it:
        yield it
