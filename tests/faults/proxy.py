"""A proxy before a real server that can do what networks and servers do on bad days.

It reads each command and each answer as a whole, so a rule can hit exactly one of them:

    proxy.fail("report", "LOADING Redis is loading the dataset in memory")
    proxy.cut("settle")                  # it is carried out, then the connection breaks
    held = proxy.hold("acquire")         # it is carried out, and the answer comes late
    proxy.swallow("SUBSCRIBE")           # it never arrives, nor does anything behind it
    proxy.latency = proxy.lag = 0.1      # commands and answers are under way for so long
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

from scripts import servers

LONGEST = 30.0  # s that an answer is held
RST = struct.pack("ii", 1, 0)  # closing a TCP connection discards what waits, and says so


@dataclass
class Rule:
    """What happens to commands of one name, or to steps of one operation, or (``*``) to all."""

    what: str
    action: str  # "fail", "cut", "hold", "swallow"
    times: float
    text: str = ""
    after: int = 0  # how many it lets pass first
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let held answers go on, and hold no more."""
        self.times = 0
        self.released.set()


class Proxy:
    """Listens (``url``) and passes everything on to the server at ``behind``.

    Args:
        behind: the server's URL.
        tcp: listen on a port of 127.0.0.1, where a broken connection is one that was reset;
            otherwise on a unix socket, where it is one that has ended.
    """

    def __init__(self, behind: str, *, tcp: bool = False) -> None:
        self._behind = behind
        self._folder = tempfile.mkdtemp(prefix="dbk-")
        self._path = os.path.join(self._folder, "s")
        # Not a port that the kernel may give away while we refuse connections.
        self._port = servers._free_port() if tcp else 0
        self.url = f"redis://127.0.0.1:{self._port}/0" if tcp else f"unix://{self._path}"
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.seen: Counter[str] = Counter()  # commands, and the operations of steps
        self.swallow_pushes = False
        self.silent = False  # nothing at all comes through a subscription
        self.latency = 0.0  # s that each command is under way
        self.lag = 0.0  # s that each answer is under way, a subscription's apart
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

    def swallow(self, what: str, times: float = math.inf) -> Rule:
        """A black hole: neither this nor what follows it on its connection ever arrives."""
        return self._add(Rule(what, "swallow", times))

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
            if not self._port:
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
            _break(connection)

    def connect(self) -> None:
        """Accept connections (again)."""
        self._listener = socket.socket(socket.AF_INET if self._port else socket.AF_UNIX)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self._port) if self._port else self._path)
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
                    if rule.after > 0:
                        rule.after -= 1
                        continue
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
            stack.callback(_break, server)  # It wakes whoever still waits for an answer.
            with self._lock:
                self._open.add(client)
            asked = stack.enter_context(client.makefile("rb"))
            line = _Line(self, client, server)
            stack.callback(line.end)
            while True:
                line.carry(read_frame(asked))


class _Line:
    """One connection through the proxy.  Commands and answers keep their order, whatever delays
    them; a delay is the same for all that are under way together."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._answered = server.makefile("rb")
        self._subscribed = False
        self._gone = False  # in a black hole
        self._answer = _later(lambda: proxy.lag, self._deliver)
        self._carry = _later(lambda: proxy.latency, self._arrive)

    def carry(self, command: bytes) -> None:
        """A command was sent."""
        names = _names(command)
        self._carry((command, names, self._proxy._rule_for(names)))

    def end(self) -> None:
        """The client has gone."""
        self._carry(None)

    def _arrive(self, item: tuple[bytes, list[str], Rule | None] | None) -> bool:
        """Have one command carried out; returns whether more may follow."""
        if item is None:
            self._answer(None)
            return False
        command, names, rule = item
        action = "" if rule is None else rule.action
        self._gone = self._gone or action == "swallow"
        if self._gone:
            return True
        if rule is not None and action == "fail":
            self._answer(f"-{rule.text}\r\n".encode())
        elif names[0] == "SUBSCRIBE":
            if rule is not None and action == "hold":
                rule.released.wait(LONGEST)
            self._server.sendall(command)
            self._subscribed = True
            threading.Thread(target=self._push, daemon=True).start()
        elif self._subscribed:
            self._server.sendall(command)
        else:
            self._server.sendall(command)
            answer = read_frame(self._answered)
            if action == "cut":
                _break(self._client)
                return False
            if rule is not None and action == "hold":
                rule.released.wait(LONGEST)
            self._answer(answer)
        return True

    def _deliver(self, answer: bytes | None) -> bool:
        if answer is None:
            return False
        self._client.sendall(answer)
        return True

    def _push(self) -> None:
        proxy = self._proxy
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame = read_frame(self._answered)
                muted = proxy.swallow_pushes and b"\r\nmessage\r\n" in frame
                if not (proxy.silent or muted):
                    self._client.sendall(frame)
        _break(self._client)


def _later(delay: Callable[[], float], deliver: Callable[[Any], bool]) -> Callable[[Any], None]:
    """A function that has things delivered in order, each after the delay, by a thread that ends
    when ``deliver`` says so or fails."""
    waiting: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()

    def work() -> None:
        more = True
        with contextlib.suppress(OSError, EOFError, ValueError):
            while more:
                due, item = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))  # the network's delay
                more = deliver(item)

    threading.Thread(target=work, daemon=True).start()
    return lambda item: waiting.put((time.monotonic() + delay(), item))


def _break(connection: socket.socket) -> None:
    """End a connection, whoever waits on it.  A TCP client finds it reset: it is closed without a
    farewell by the thread that reads from it, which this wakes."""
    with contextlib.suppress(OSError):
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
            connection.shutdown(socket.SHUT_RD)
        else:
            connection.shutdown(socket.SHUT_RDWR)


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
def proxy_before(url: str, *, tcp: bool = False) -> Iterator[Proxy]:
    """A proxy before the server at ``url``."""
    with contextlib.closing(Proxy(url, tcp=tcp)) as proxy:
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
