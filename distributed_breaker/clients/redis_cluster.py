"""redis-py's client of a cluster, as a cache needs it.

Left to itself it connects while it is constructed, raises errors that are none of redis-py's own
family, sends again by itself what got no answer in a pipeline, refuses EVALSHA there, and knows
nothing of a node to which a slot is only on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.cluster
from redis.asyncio.cluster import PipelineCommand
from redis.exceptions import AskError, RedisClusterException, TryAgainError

Words = tuple[Any, ...]
REDIRECTS = 8  # times that one command is sent, each but the last being pointed elsewhere
_LOST = (redis.ConnectionError, redis.TimeoutError)
# What was not carried out, because the slot is, or will be, elsewhere.
_POINTED = (AskError, TryAgainError)  # and MOVED, which is an AskError to redis-py


class Unreachable(redis.ConnectionError):
    """No node could say how the cluster is made up, so nothing was sent."""


@contextlib.contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except RedisClusterException as error:
        raise Unreachable(str(error)) from error


class Later:
    """A client that is made when it is first used, and again for the next use if that failed.

    Args:
        make: makes it; may raise redis-py's errors.  While one thread tries, others wait, and what
            it meets is their answer, too.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: Any = None
        self._lock = threading.Lock()
        self._failed: tuple[int, redis.RedisError | None] = (0, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._made or self._now(), name)

    def _now(self) -> Any:
        failures = self._failed[0]
        with self._lock:
            count, error = self._failed
            if error is not None and count != failures and self._made is None:
                raise copy.copy(error) from error
            if self._made is None:
                try:
                    self._made = self._make()
                except redis.RedisError as new:
                    self._failed = count + 1, new
                    raise
            return self._made

    def then(self, change: Callable[[Callable[[], Any]], Callable[[], Any]]) -> Later:
        """The same with another way to make it, which is given this one's."""
        return Later(change(self._make))

    def close(self) -> None:
        """Close it, if it was made."""
        if self._made is not None:
            self._made.close()


class Cluster(redis.cluster.RedisCluster):
    """The client for threads.  It connects while it is constructed: see ``Later``."""

    RedisClusterRequestTTL = REDIRECTS

    def __init__(self, **options: Any) -> None:
        with _unreachable():
            super().__init__(**options)
        # Asked again after a command has failed, it must not hide that command's own error, which
        # says whether the command was sent.
        ask: Any = self.nodes_manager.initialize

        def learn(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(redis.RedisError, RedisClusterException):
                ask(*args, **kwargs)

        self.nodes_manager.initialize = learn  # type: ignore[method-assign]

    def get_node(self, host: Any = None, port: Any = None, node_name: Any = None) -> Any:
        nodes = self.nodes_manager
        found = nodes.get_node(host, port, node_name)
        if found is None and node_name:
            node: Any = redis.cluster.ClusterNode
            found = node(*_host_of(node_name), "primary")
            nodes.nodes_cache[found.name] = found
        return found

    def together(self, commands: Sequence[Words]) -> list[Any]:
        """The answers to some commands, each of one slot; errors stand in their places."""
        answers: list[Any] = [None] * len(commands)
        parts: dict[Any, list[int]] = {}
        for i, words in enumerate(commands):
            slot: Any = self.determine_slot(*words)
            parts.setdefault(self.nodes_manager.get_node_from_slot(slot), []).append(i)
        silence: Exception | None = None
        for node, part in parts.items():
            said: list[Any] = [silence] * len(part)
            if silence is None:
                try:
                    said = _piped(self.get_redis_connection(node), [commands[i] for i in part])
                except _LOST as error:
                    # The next one might not answer either, and cost as much time.
                    silence = error if isinstance(error, redis.TimeoutError) else None
                    said = [error] * len(part)
                    self.nodes_manager.initialize(last_failed_node_name=node.name)
            for i, answer in zip(part, said, strict=True):
                answers[i] = answer
        for i, words in enumerate(commands):
            if isinstance(answers[i], _POINTED) and silence is not None:
                answers[i] = silence
            elif isinstance(answers[i], _POINTED):
                send: Any = self.execute_command
                try:
                    answers[i] = send(*words)
                except redis.RedisError as error:
                    answers[i] = error
                    silence = error if isinstance(error, redis.TimeoutError) else None
        return answers


class AsyncCluster(redis.asyncio.cluster.RedisCluster):
    """The client for one event loop.  It connects when it is first used."""

    RedisClusterRequestTTL = REDIRECTS

    async def initialize(self, *args: Any, **kwargs: Any) -> Any:
        with _unreachable():
            return await super().initialize(*args, **kwargs)

    async def aclose(self) -> None:
        # redis-py closes nothing when the next command was to ask who is there.
        if self._initialize and not (self._lock and self._lock.locked()):
            await self.nodes_manager.aclose()
            await self.nodes_manager.aclose("startup_nodes")
        await super().aclose()

    def get_node(self, host: Any = None, port: Any = None, node_name: Any = None) -> Any:
        nodes = self.nodes_manager
        found = nodes.get_node(host, port, node_name)
        if found is None and node_name:
            where = _host_of(node_name)
            found = redis.asyncio.cluster.ClusterNode(*where, "primary", **self.connection_kwargs)
            nodes.nodes_cache[found.name] = found
        return _Asked(found) if node_name else found

    async def together(self, commands: Sequence[Words]) -> list[Any]:
        """As ``Cluster.together``."""
        if self._initialize:
            await self.initialize()
        queue = [PipelineCommand(i, *words) for i, words in enumerate(commands)]
        parts: dict[Any, list[PipelineCommand]] = {}
        for command in queue:
            slot = await self._determine_slot(*command.args)
            parts.setdefault(self.nodes_manager.get_node_from_slot(slot), []).append(command)
        ends = await asyncio.gather(
            *(node.execute_pipeline(part) for node, part in parts.items()), return_exceptions=True
        )
        for part, end in zip(parts.values(), ends, strict=True):
            if isinstance(end, BaseException):
                if not isinstance(end, redis.RedisError):
                    raise end
                for command in part:
                    command.result = end
        answers: list[Any] = [command.result for command in queue]
        # If so, the next command asks who is there now.
        self._initialize |= any(isinstance(answer, _LOST) for answer in answers)
        silence = next((a for a in answers if isinstance(a, redis.TimeoutError)), None)
        for i, words in enumerate(commands):
            if isinstance(answers[i], _POINTED) and silence is not None:
                answers[i] = silence
            elif isinstance(answers[i], _POINTED):
                try:
                    answers[i] = await self.execute_command(*words)
                except redis.RedisError as error:
                    answers[i] = error
                    silence = error if isinstance(error, redis.TimeoutError) else None
        return answers


class _Asked:
    """A node to which a slot is on its way: each command goes out behind ASKING, on the same
    connection.  redis-py sends the two on whichever connections are free."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    async def execute_command(self, *words: Any, **_: Any) -> Any:
        if words == ("ASKING",):
            return None
        command = PipelineCommand(1, *words)
        await self._node.execute_pipeline([PipelineCommand(0, "ASKING"), command])
        if isinstance(command.result, Exception):
            raise command.result
        return command.result


def together(store: Any, commands: Sequence[Words]) -> Any:
    """The answers to some commands, sent at once; an error stands in its command's place.

    Args:
        store: any of redis-py's clients; of one for asyncio the result is to be awaited.
        commands: name and arguments of each, with keys of one slot.

    Raises:
        redis.RedisError: not one was answered.
    """
    if isinstance(store, Later | AsyncCluster):
        return store.together(commands)
    return _piped(store, commands)


def _piped(store: Any, commands: Sequence[Words]) -> Any:
    pipe = store.pipeline(transaction=False)
    for words in commands:
        pipe.execute_command(*words)
    return pipe.execute(raise_on_error=False)


def _host_of(node_name: str) -> tuple[str, int]:
    host, _, port = node_name.rpartition(":")
    return host, int(port)
