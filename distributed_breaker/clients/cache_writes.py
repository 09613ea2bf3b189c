"""How the changes of a cache client get to Redis, or into the outbox."""

from __future__ import annotations

import logging
from typing import Any

import redis

from ..fallback.outbox import OutboxError
from ..store import script, sha
from .cache_base import CacheBase
from .cache_changes import SCRIPT, Change
from .driving import Aside, Ask, Rules
from .redis_cluster import together
from .redis_guard import counts, raise_outage, was_never_sent

log = logging.getLogger("distributed_breaker")


def _away(error: Exception) -> bool:
    """Whether a change waits after this answer; a script is not known where others failed."""
    return counts(error) or isinstance(error, redis.exceptions.NoScriptError)


class CacheWrites(CacheBase):
    """Each is a rule: a generator; see ``driving.py``."""

    def _change(
        self,
        op: str,
        name: str,
        *,
        data: bytes = b"",
        ttl: float | None = None,
    ) -> Rules[Any]:
        """Carry out one change; what Redis answers, or None: it waits."""
        change = Change(op, name, self._stamp(), data, ttl)
        try:
            if self._queue.possible and (yield from self._must_wait(change)):
                yield from self._let_wait([change], None)
                return None
            return (yield from self._carry_out(change))
        except redis.RedisError as error:
            if not counts(error):
                raise
            if op == "increment" and not was_never_sent(error):
                raise
            yield from self._let_wait([change], error)
            return None

    def _change_many(self, changes: list[Change]) -> Rules[bool]:
        if not changes:
            return True
        answers, _ = yield from self._together([change.command() for change in changes])
        self._note(*(change.name for change in changes))
        waits: list[Change] = []
        failed: list[Exception] = []
        for change, answer in zip(changes, answers, strict=True):
            if isinstance(answer, redis.exceptions.NoScriptError) and not waits:
                try:  # seldom: once after a start of each server
                    answer = yield from self._carry_out(change)
                except redis.RedisError as error:
                    answer = error
            if not isinstance(answer, Exception):
                continue
            failed.append(answer)
            if _away(answer):
                waits.append(change)
        if waits:
            yield from self._let_wait(waits, failed[0])
        for answer in failed:
            if not _away(answer):
                raise answer
        return not waits

    def _together(
        self, commands: list[tuple[Any, ...]]
    ) -> Rules[tuple[list[Any], Exception | None]]:
        """What is answered to each; and how Redis failed, if it did."""
        answers: list[Any] = []

        def look(said: list[Any]) -> None:
            answers.extend(said)
            raise_outage(said)

        try:
            if commands:
                yield Ask(lambda store: together(store, commands), look)
        except redis.RedisError as error:
            if not counts(error):
                raise
            return answers or [error] * len(commands), error
        return answers, None

    def _carry_out(self, change: Change, replayed: str = "") -> Rules[Any]:
        """Raises what Redis says; see ``lua/cache.lua``."""
        keys, words = change.words(replayed)
        try:
            reply = yield Ask(lambda store: store.evalsha(sha(SCRIPT), len(keys), *keys, *words))
        except redis.exceptions.NoScriptError:
            reply = yield Ask(lambda store: store.eval(script(SCRIPT), len(keys), *keys, *words))
        self._note(change.name)
        verdict, value = reply
        if verdict == b"newer":
            self._counts["superseded"] += 1
        return value

    def _must_wait(self, change: Change) -> Rules[bool]:
        """Whether a change builds on one that still waits.  What replaces a value does not: then
        the older one is not carried out, since its stamp is older."""
        if change.op in ("set", "delete"):
            return False
        queue, but = self._queue, "increment" if change.op == "increment" else ""
        held: bool = queue.has_file() and (yield Aside(lambda: queue.holds(change.name, but=but)))
        return held

    def _let_wait(self, changes: list[Change], error: BaseException | None) -> Rules[None]:
        items = [(c.op, c.payload(), c.name) for c in changes]
        try:
            yield Aside(lambda: self._queue.add_many(items))
        except OutboxError as full:
            if error is None:
                raise
            self._counts["lost"] += len(changes)
            log.error("%s: a change is lost: %s", self.name, full)
            raise error from full
        self._note(*(change.name for change in changes))
        self._counts["queued"] += len(changes)
        self._breaker.count_fallback()
