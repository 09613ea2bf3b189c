"""A cluster: which of its nodes holds which circuit, and following them when they change."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

from .address import Address, Host
from .nodes import (
    UNUSABLE,
    Answers,
    Command,
    connections_of,
    first_answer,
    host_of,
    pipeline,
    tell,
)

REDIRECTS = 5  # times that one command follows the cluster's directions
CENSUS = 10.0  # s between the listening thread's questions who belongs to the cluster


class Way(NamedTuple):
    """Where a command goes, whether as an exception (ASK), and with which words."""

    host: Host
    asking: bool
    words: tuple[Any, ...]


class Cluster:
    """The nodes of a cluster, and which of them holds which slot.

    What is known of the slots is renewed before the next command after anything that speaks against
    it: MOVED, CLUSTERDOWN, a lost connection, silence.
    """

    def __init__(self, address: Address, script: str) -> None:
        self._address = address
        self._script = script
        self._lock = threading.Lock()  # the sending and the listening thread may ask at once
        self._random = random.Random()  # not the application's, which may be seeded
        self._slots: dict[int, Host] = {}
        self._members: list[Host] = []  # primaries and replicas
        self._clients: dict[Host, redis.Redis] = {}
        self._known = False
        self._counted = 0.0  # s, when it was last asked who belongs to the cluster
        self._failed: Host | None = None  # the node that failed last is asked last

    def ask(self, commands: Sequence[Command], *, timed: bool = False) -> tuple[Answers, Answers]:
        self._learn()
        answers: Answers = [None] * len(commands)
        times: Answers = []
        left = {i: Way(self._place(c.key), False, c.words) for i, c in enumerate(commands)}
        for _ in range(1 + REDIRECTS):
            for (host, asking), part in _by_node(left).items():
                words = [left[i].words for i in part]
                said, time_there = self._tell(host, words, timed=timed, asking=asking)
                times += time_there
                for i, answer in zip(part, said, strict=True):
                    answers[i] = answer
            left = {
                i: self._elsewhere(commands[i], left[i], answers[i])
                for i in left
                if isinstance(answers[i], (AskError, TryAgainError))
            }
            if not left:
                break
        if timed and not commands:
            _, times = self._tell(self._place(""), [], timed=True)
        return answers, times

    def connection(self) -> Any:
        # Each node of a cluster passes pushes on to all others.
        self._learn()
        return self._client(self._place("")).connection_pool.make_connection()

    def serves(self, connection: Any) -> bool:
        here = host_of(connection)
        if time.monotonic() - self._counted > CENSUS:
            # A replica that has left the cluster answers as ever, only no push arrives there, and
            # no command goes there that could tell.  It may not know it yet, so it is asked last.
            with contextlib.suppress(*UNUSABLE):
                self._members = self._view(last=here)[1]
        return not self._members or here in self._members

    def connections(self) -> list[Any]:
        return connections_of(list(self._clients.values()))

    def close(self) -> None:
        for client in list(self._clients.values()):
            client.close()

    def _tell(
        self, host: Host, words: Sequence[tuple[Any, ...]], *, timed: bool, asking: bool = False
    ) -> tuple[Answers, Answers]:
        client = self._client(host)
        try:
            answers, times = tell(client, self._script, words, timed=timed, asking=asking)
        except (redis.RedisError, OSError):
            self._failed, self._known = host, False
            raise
        if any(isinstance(answer, (MovedError, ClusterDownError)) for answer in answers):
            self._known = False
        return answers, times

    def _elsewhere(self, command: Command, before: Way, answer: Any) -> Way:
        """Where a command goes that was not carried out, by what it was answered."""
        if isinstance(answer, TryAgainError):
            command.parted = bool(command.alone)
            return before._replace(words=command.alone or before.words)
        # A node that does not know its own address leaves it out.
        there = (answer.host or before.host[0], answer.port)
        return Way(there, not isinstance(answer, MovedError), before.words)

    def _place(self, key: str) -> Host:
        """The node that holds a key, or any, but rather not the one that failed last."""
        if key:
            host = self._slots.get(key_slot(key.encode()))
            if host is None:
                self._known = False
                raise ClusterDownError("no node holds the slot", status_code="CLUSTERDOWN")
            return host
        others = [host for host in self._members if host != self._failed]
        return self._random.choice(others or self._members)

    def _client(self, host: Host) -> redis.Redis:
        client = self._clients.get(host)
        if client is None:
            client = self._clients.setdefault(host, self._address.client_at(host))
        return client

    def _learn(self) -> None:
        """Ask the nodes, in an order of chance, who holds what, unless that is known."""
        with self._lock:
            if self._known:
                return
            slots, members = self._view(last=self._failed)
            self._slots, self._members, self._known = slots, members, True
            for host in [h for h in self._clients if h not in members]:
                # What is under way there may end.
                self._clients.pop(host).connection_pool.disconnect(inuse_connections=False)

    def _view(self, last: Host | None) -> tuple[dict[int, Host], list[Host]]:
        """Who holds which slot, and who belongs to the cluster.

        The nodes are asked in an order of chance, until one answers.
        """
        self._counted = time.monotonic()
        hosts = list(dict.fromkeys([*self._members, *self._address.hosts]))
        self._random.shuffle(hosts)
        hosts.sort(key=lambda host: host == last)
        return first_answer(hosts, self._look)

    def _look(self, host: Host) -> tuple[dict[int, Host], list[Host]]:
        """Who holds which slot, and who else belongs to the cluster, as one node sees it."""
        (said,) = pipeline(self._client(host), [("CLUSTER", "SLOTS")])
        if isinstance(said, redis.RedisError):
            raise said
        slots: dict[int, Host] = {}
        members: dict[Host, None] = {}
        for first, last, *nodes in said:
            # A node that has no name for another says "?", and nothing for itself.
            named = [(n[0] or host[0], int(n[1])) for n in nodes if n[0] != "?"]
            members.update(dict.fromkeys(named))
            if named and nodes[0][0] != "?":
                slots.update(dict.fromkeys(range(int(first), int(last) + 1), named[0]))
        if not slots:
            raise redis.ConnectionError(f"the node {host[0]}:{host[1]} knows of no slots")
        return slots, list(members)


def _by_node(left: dict[int, Way]) -> dict[tuple[Host, bool], list[int]]:
    parts: dict[tuple[Host, bool], list[int]] = {}
    for i, way in left.items():
        parts.setdefault((way.host, way.asking), []).append(i)
    return parts
