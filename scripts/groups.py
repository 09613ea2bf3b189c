"""Starts groups of real servers for the tests: a cluster, and a primary watched by Sentinels.

    with Cluster.start() as cluster:
        cluster.url  # redis+cluster://127.0.0.1:…

Every server is a ``Server`` of ``servers.py``, so it has a private folder and dies with the process
that started it.  All are on loopback.  Nothing here waits without a bound.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import redis
from redis.crc import key_slot

from scripts.servers import Server, ServerError

SLOTS = 16_384
PRIMARY = "mymaster"  # by which name the Sentinels know it

# ms without an answer after which a server counts as gone. A busy machine must not look like one.
NODE_TIMEOUT = 2_000
READY_TIMEOUT = 60.0
_POLL = 0.02

_REPLICA = "replica"  # the user as whom replicas speak to their primary, so that it can be shut out
_REPLICATION = (
    *("--repl-diskless-sync-delay", "0", "--masteruser", _REPLICA, "--masterauth", _REPLICA),
    *("--user", _REPLICA, "on", f">{_REPLICA}", "+psync", "+replconf", "+ping"),
)


def wait_for(condition: Callable[[], object], what: str, timeout: float = READY_TIMEOUT) -> None:
    """Return when the condition is true; a server that does not answer yet makes it false.

    Raises ServerError after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(redis.RedisError, LookupError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise ServerError(f"waited {timeout} s in vain: {what}")
        time.sleep(_POLL)


class Group:
    """Some servers that end together, and a client for looking at each."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._clients: dict[int, redis.Redis] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all servers for good. Safe to call twice."""
        self._stack.close()
        self._clients.clear()

    def client(self, server: Server) -> redis.Redis:
        """A client of one server. It follows no redirections, and lives as long as the group."""
        if id(server) not in self._clients:
            client = server.client(decode_responses=True, socket_timeout=10.0)
            self._clients[id(server)] = self._stack.enter_context(contextlib.closing(client))
        return self._clients[id(server)]

    def ask(self, server: Server, *words: object) -> Any:
        """Have one server carry out a command."""
        client: Any = self.client(server)
        return client.execute_command(*words)

    def info(self, server: Server, section: str) -> dict[str, Any]:
        """What a server says of itself."""
        said: Any = self.client(server).info(section)
        return dict(said)

    def caught_up(self, primary: Server, replica: Server) -> bool:
        """Whether a replica holds all that its primary has written."""
        mine, its = self.info(primary, "replication"), self.info(replica, "replication")
        return its["role"] == "slave" and (its["master_link_status"], its["slave_repl_offset"]) == (
            "up",
            mine["master_repl_offset"],
        )

    def cut_replication(self, primary: Server) -> None:
        """From now on a primary's replicas hear nothing of what it writes."""
        self.ask(primary, "ACL", "SETUSER", _REPLICA, "off")
        self.ask(primary, "CLIENT", "KILL", "TYPE", "replica")
        wait_for(lambda: self.info(primary, "replication")["connected_slaves"] == 0, "it is cut")

    def is_primary(self, server: Server) -> bool:
        """Whether a server says that it is one."""
        return bool(self.info(server, "replication")["role"] == "master")


def port_of(server: Server) -> int:
    """The port of a server that was started with ``tcp``."""
    return int(server.url.rsplit(":", 1)[1].split("/")[0])


# ---------------------------------------------------------------------------- cluster


class Cluster(Group):
    """Three primaries, each with a replica.

    Attributes:
        nodes: the servers; the first three began as primaries, the others as their replicas.
        url: what a registry takes; it names two of the nodes.
    """

    @classmethod
    def start(cls, kind: str = "valkey", *, primaries: int = 3, replicas: int = 1) -> Self:
        """Start one, and return when all slots are served and all replicas have caught up."""
        cluster = cls()
        try:
            cluster._make(kind, primaries, replicas)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _make(self, kind: str, primaries: int, replicas: int) -> None:
        self._kind = kind
        self.nodes = [self.add_server() for _ in range(primaries * (1 + replicas))]
        self.url = "redis+cluster://" + ",".join(
            f"127.0.0.1:{port_of(node)}" for node in self.nodes[:2]
        )
        leaders = self.nodes[:primaries]
        for number, node in enumerate(self.nodes, 1):
            self.ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number)
        for number, node in enumerate(leaders):
            first, last = (SLOTS * n // primaries for n in (number, number + 1))
            self.ask(node, "CLUSTER", "ADDSLOTSRANGE", first, last - 1)
        for node in self.nodes[1:]:
            self.ask(node, "CLUSTER", "MEET", "127.0.0.1", port_of(self.nodes[0]))
        wait_for(lambda: all(self._knows(n, len(self.nodes)) for n in self.nodes), "nodes meet")
        for number, node in enumerate(self.nodes[primaries:]):
            leader = leaders[number % primaries]
            wait_for(partial(self._follow, node, leader), "replicas follow")
        self.wait_ready()

    def _follow(self, node: Server, leader: Server) -> bool:
        return bool(self.ask(node, "CLUSTER", "REPLICATE", self.id_of(leader)) == "OK")

    def add_server(self) -> Server:
        """Start a server that belongs to no cluster yet."""
        options = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": NODE_TIMEOUT,
            # A replica stands for election however long it has been without its primary.
            "cluster-replica-validity-factor": 0,
            "cluster-allow-replica-migration": "no",
        }
        args = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        started = Server.start(self._kind, tcp=True, args=[*args, *_REPLICATION])
        return self._stack.enter_context(started)

    @property
    def running(self) -> list[Server]:
        """The nodes that have not been killed."""
        return [node for node in self.nodes if node.running]

    def wait_ready(self) -> None:
        """Return when all running nodes find the cluster well, and all replicas have caught up."""

        def ready() -> bool:
            for node in self.running:
                if not self._ok(node):
                    return False
                replication = self.info(node, "replication")
                if replication["role"] == "slave" and replication["master_link_status"] != "up":
                    return False
            return len({self._view(node) for node in self.running}) == 1

        wait_for(ready, f"the cluster is well: {[str(n) for n in self.running]}")

    def _ok(self, node: Server) -> bool:
        return "cluster_state:ok" in str(self.ask(node, "CLUSTER", "INFO"))

    def _view(self, node: Server) -> str:
        """Who serves what, as one node sees it."""
        rows = self.ask(node, "CLUSTER", "SLOTS")
        return str(sorted((row[0], row[1], row[2][1], len(row)) for row in rows))

    def _knows(self, node: Server, count: int) -> bool:
        peers = str(self.ask(node, "CLUSTER", "NODES")).splitlines()
        return len(peers) == count and not any("handshake" in peer for peer in peers)

    def id_of(self, node: Server) -> str:
        """A node's name within the cluster."""
        return str(self.ask(node, "CLUSTER", "MYID"))

    def primary_of(self, key: str) -> Server:
        """The node that serves a key, by the word of the first that answers."""
        return self._at(self._owner(key_slot(key.encode())))

    def _owner(self, slot: int) -> int:
        for node in self.running:
            with contextlib.suppress(redis.RedisError):
                for first, last, primary, *_ in self.ask(node, "CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return int(primary[1])
        raise ServerError(f"no node serves slot {slot}")

    def replicas_of(self, primary: Server) -> list[Server]:
        """The replicas of a primary."""
        port = port_of(primary)
        roles = [(node, self.info(node, "replication")) for node in self.running]
        return [n for n, r in roles if r["role"] == "slave" and int(r["master_port"]) == port]

    def replica_of(self, primary: Server) -> Server:
        """The one replica of a primary."""
        return self.replicas_of(primary)[0]

    def _at(self, port: int) -> Server:
        return next(node for node in self.nodes if port_of(node) == port)

    def switch(self, key: str) -> Server:
        """Have a replica promoted while the primary of a key is well; returns the new one."""
        replica = self.replica_of(self.primary_of(key))
        deadline = time.monotonic() + READY_TIMEOUT
        while not self.is_primary(replica):
            # One that does not come about within five seconds is given up by the nodes.
            self.ask(replica, "CLUSTER", "FAILOVER")
            with contextlib.suppress(ServerError):
                wait_for(lambda: self.is_primary(replica), "it is promoted", 6.0)
            if time.monotonic() > deadline:
                raise ServerError(f"{replica} is not promoted\n{replica.log()}")
        self.wait_ready()
        return replica

    def lose(self, key: str) -> Server:
        """SIGKILL the primary of a key; returns the replica that has been promoted."""
        primary = self.primary_of(key)
        replica = self.replica_of(primary)
        primary.kill()
        wait_for(lambda: self.is_primary(replica), f"{replica} is promoted")
        self.wait_ready()
        return replica

    def move_slot(self, slot: int, to: Server, during: Callable[[], object] = lambda: None) -> None:
        """Move a slot as a resharding does, but one key at a time; ``during`` is called before the
        first key, and after each."""
        source = self._at(self._owner(slot))
        self.ask(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        self.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(to))
        during()
        while keys := self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            key = min(keys, key=len)  # a circuit before its log
            self.ask(source, "MIGRATE", "127.0.0.1", port_of(to), key, 0, 10_000)
            during()
        for node in (to, source):
            self.ask(node, "CLUSTER", "SETSLOT", slot, "NODE", self.id_of(to))
        self.wait_ready()


# ---------------------------------------------------------------------------- Sentinel


class _Sentinel(Server):
    """A Sentinel. It writes to its configuration, which therefore must be a file."""

    def _settle(self, binary: Path, tcp: bool, args: Sequence[str]) -> None:
        super()._settle(binary, tcp, ())
        configuration = self._folder / "sentinel.conf"
        configuration.write_text("\n".join(args) + "\n")
        self._command = [
            self._command[0], str(configuration), "--sentinel", "--port", str(port_of(self)),
            "--bind", "127.0.0.1", "--dir", str(self._folder),
        ]  # fmt: skip


class Watched(Group):
    """A primary with two replicas, and three Sentinels that watch them.

    Attributes:
        servers: the first began as the primary.
        sentinels: two of the three must agree that the primary is gone.
        url: what a registry takes.
    """

    @classmethod
    def start(cls, kind: str = "valkey", *, replicas: int = 2, sentinels: int = 3) -> Self:
        """Start one, and return when all Sentinels know all of it."""
        group = cls()
        try:
            group._make(kind, replicas, sentinels)
        except BaseException:
            group.stop()
            raise
        return group

    def _make(self, kind: str, replicas: int, sentinels: int) -> None:
        first = self._add(kind)
        follow = ("--replicaof", f"127.0.0.1 {port_of(first)}")
        self.servers = [first] + [self._add(kind, *follow) for _ in range(replicas)]
        lines = [
            f"sentinel monitor {PRIMARY} 127.0.0.1 {port_of(first)} {sentinels // 2 + 1}",
            f"sentinel down-after-milliseconds {PRIMARY} {NODE_TIMEOUT}",
            # After twice this time a failover that did not come about is tried again.
            f"sentinel failover-timeout {PRIMARY} 5000",
            f"sentinel parallel-syncs {PRIMARY} {replicas}",
        ]
        wait_for(lambda: all(self.caught_up(first, s) for s in self.servers[1:]), "replicas follow")
        self.sentinels = [
            self._stack.enter_context(_Sentinel.start(kind, tcp=True, args=lines))
            for _ in range(sentinels)
        ]
        hosts = ",".join(f"127.0.0.1:{port_of(sentinel)}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/{PRIMARY}/0"
        wait_for(self._all_known, "the Sentinels know each other and all servers")

    def _add(self, kind: str, *args: str) -> Server:
        started = Server.start(kind, tcp=True, args=[*args, *_REPLICATION])
        return self._stack.enter_context(started)

    def _all_known(self) -> bool:
        for sentinel in self.sentinels:
            known = self.state(sentinel)
            if known["num-slaves"] != str(len(self.servers) - 1):
                return False
            if known["num-other-sentinels"] != str(len(self.sentinels) - 1):
                return False
            if known["flags"] != "master":
                return False
        return True

    @property
    def running(self) -> list[Server]:
        """The servers that have not been killed."""
        return [server for server in self.servers if server.running]

    def state(self, sentinel: Server) -> dict[str, str]:
        """What one Sentinel knows of the primary."""
        said = self.ask(sentinel, "SENTINEL", "MASTER", PRIMARY)
        if isinstance(said, dict):
            return {str(name): str(value) for name, value in said.items()}
        return dict(zip(said[::2], said[1::2], strict=True))

    def named(self) -> Server | None:
        """The primary, if all running Sentinels name the same one, it runs, and is one."""
        ports = {
            int(self.ask(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY)[1])
            for sentinel in self.sentinels
            if sentinel.running
        }
        if len(ports) != 1:
            return None
        (server,) = (s for s in self.servers if port_of(s) in ports)
        return server if server.running and self.is_primary(server) else None

    def primary_of(self, key: str) -> Server:
        """The primary, waiting for a failover that is under way."""
        found: list[Server] = []

        def agreed() -> bool:
            server = self.named()
            found[:] = [server] if server is not None else []
            return server is not None

        wait_for(agreed, "the Sentinels agree on a primary")
        return found[0]

    def replicas_of(self, primary: Server) -> list[Server]:
        """The replicas of the primary."""
        return [server for server in self.running if server is not primary]

    def switch(self, key: str) -> Server:
        """Have a replica promoted while the primary is well; returns the new primary."""
        old = self.primary_of(key)
        wait_for(lambda: self.ask(self.sentinels[0], "SENTINEL", "FAILOVER", PRIMARY), "it begins")
        wait_for(lambda: self.named() not in (None, old), "another is the primary")
        return self.primary_of(key)

    def lose(self, key: str) -> Server:
        """SIGKILL the primary; returns the one that has been promoted."""
        self.primary_of(key).kill()
        return self.primary_of(key)

    def wait_ready(self) -> None:
        """Return when every running server but the primary replicates it and has caught up."""

        def ready() -> bool:
            primary = self.named()
            return primary is not None and all(
                self.caught_up(primary, server) for server in self.running if server is not primary
            )

        wait_for(ready, "all replicas follow the primary")
