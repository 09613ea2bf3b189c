"""The protected cache: Redis first, and behind it memory, disk and the caller's loader.

Values are anything that JSON gives back; they are stored as JSON, so that other programs can read
them and numbers can be counted up.  While Redis answers, what is read and written is kept in the
tiers as well; when it does not, the tiers answer, and changes wait in an outbox on disk until they
can be carried out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis

from ..fallback.outbox import Entry, Outbox, Parked, Replayed
from .cache_base import MISSING
from .cache_changes import Change, decode
from .cache_rules import CacheRules, Info
from .redis_guard import CacheOpenException, counts

__all__ = ["CacheClient", "CacheOpenException", "Info"]


class CacheClient(CacheRules):
    """A service's cache.  Keys are texts, without the section's ``cache_key_prefix``.

    Every method has a twin whose name ends in ``_async``.  For all of them:

    Raises:
        CacheOpenException: the circuit is open, and nothing behind Redis could answer instead.  It
            is a ``CircuitBreakerOpenException`` and also redis-py's ``ConnectionError``.
        redis.RedisError: Redis failed, and nothing behind it could answer instead; or the error is
            the caller's own, such as a wrong type.
    """

    # ------------------------------------------------------------------ reads

    def get(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Any:
        """The value of a key.

        Args:
            key: which.
            default: what is returned when there is none, instead of None; and when Redis and the
                tiers cannot say, instead of an error.
            loader: makes the value when there is none, as a rule from the database; its value is
                stored.  Of many callers at once one loads, in the whole fleet while Redis answers.
            ttl: seconds for which a loaded value lives; None: the section's ``default_ttl``.
        """
        name = self._name(key)
        if loader is None and self._queue.nothing_of(name):
            # What _get does, for the most frequent of all calls.
            if self._breaker.refusing:
                hit = self._in_memory(name)
                if hit is not None:
                    self._breaker.count_rejection()
                    return self._served(hit)
            seen = self._changes
            try:
                with self._breaker.guard():
                    data = self._store.get(name)
            except Exception as error:
                rules = self._behind(name, self._native(error), default, None, None)
                return self._drive(rules).value
            if data is not None:
                self._keep(name, data, seen)
                return decode(data)
            return self._missed(name, default, seen)
        return self._drive(self._get(key, default, loader, ttl)).value

    def get_with_info(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Info:
        """As ``get``, and where the value comes from, how old it is, and whether it is stale."""
        return self._drive(self._get(key, default, loader, ttl))

    async def get_async(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Any:
        """As ``get``; the loader may be a coroutine function."""
        return (await self._drive_async(self._get(key, default, loader, ttl))).value

    async def get_with_info_async(
        self,
        key: str,
        default: Any = MISSING,
        *,
        loader: Callable[[], Any] | None = None,
        ttl: float | None = None,
    ) -> Info:
        """As ``get_with_info``."""
        return await self._drive_async(self._get(key, default, loader, ttl))

    def get_many(self, keys: Sequence[str], default: Any = MISSING) -> dict[str, Any]:
        """The values of those keys that have one; with a default, of all keys.

        When Redis cannot answer, what the tiers know is the answer; only if they know nothing, and
        there is no default, that is an error.
        """
        return self._drive(self._get_many(keys, default))

    async def get_many_async(self, keys: Sequence[str], default: Any = MISSING) -> dict[str, Any]:
        """As ``get_many``."""
        return await self._drive_async(self._get_many(keys, default))

    def exists(self, key: str) -> bool:
        """Whether a key has a value."""
        return self._drive(self._exists(key))

    async def exists_async(self, key: str) -> bool:
        """As ``exists``."""
        return await self._drive_async(self._exists(key))

    def ttl(self, key: str) -> float | None:
        """Seconds that a key still lives; ``inf``: for ever; None: it has no value."""
        return self._drive(self._ttl(key))

    async def ttl_async(self, key: str) -> float | None:
        """As ``ttl``."""
        return await self._drive_async(self._ttl(key))

    # ------------------------------------------------------------------ changes

    def set(self, key: str, value: Any, ttl: float | None = None, *, durable: bool = False) -> bool:
        """Set a key.

        Args:
            key: which.
            value: anything that JSON gives back; tuples become lists, and keys texts.
            ttl: seconds for which it lives; None: the section's ``default_ttl``.
            durable: have it on disk, too, before this returns.

        Returns:
            True when Redis has it; False when it waits on disk for Redis to return.
        """
        return self._drive(self._set(key, value, ttl, durable))

    async def set_async(
        self, key: str, value: Any, ttl: float | None = None, *, durable: bool = False
    ) -> bool:
        """As ``set``."""
        return await self._drive_async(self._set(key, value, ttl, durable))

    def set_many(self, values: Mapping[str, Any], ttl: float | None = None) -> bool:
        """Set several keys; True when Redis has all of them."""
        return self._drive(self._set_many(values, ttl))

    async def set_many_async(self, values: Mapping[str, Any], ttl: float | None = None) -> bool:
        """As ``set_many``."""
        return await self._drive_async(self._set_many(values, ttl))

    def delete(self, *keys: str) -> bool:
        """Delete keys; False when that waits for Redis to return.  No tier serves them then."""
        return self._drive(self._delete(keys))

    async def delete_async(self, *keys: str) -> bool:
        """As ``delete``."""
        return await self._drive_async(self._delete(keys))

    def increment(self, key: str, amount: int = 1, ttl: float | None = None) -> int | None:
        """Add to a whole number; one that is not there begins at 0.

        While Redis is away the amount waits and is added when it is back, whatever others have
        added meanwhile.

        Args:
            key: which.
            amount: what is added.
            ttl: seconds for which a new number lives; None: for ever.

        Returns:
            The sum; while Redis is away what it is as far as is known here, or None.

        Raises:
            redis.RedisError: also when Redis got the amount and did not answer: whether it was
                added is unknown then, so it is not added again.
        """
        return self._drive(self._increment(key, amount, ttl))

    async def increment_async(
        self, key: str, amount: int = 1, ttl: float | None = None
    ) -> int | None:
        """As ``increment``."""
        return await self._drive_async(self._increment(key, amount, ttl))

    def expire(self, key: str, ttl: float) -> bool:
        """Let a key live for so many seconds from now on; False: it has no value, or that waits."""
        return self._drive(self._expire(key, ttl))

    async def expire_async(self, key: str, ttl: float) -> bool:
        """As ``expire``."""
        return await self._drive_async(self._expire(key, ttl))

    # ------------------------------------------------------------------ bringing back what waits

    def replay(self) -> Replayed:
        """Carry out what waits, as far as Redis takes it; done by itself while the client lives."""
        return self._queue.replay()

    def _deliver(self, entry: Entry) -> None:
        try:
            change = Change.read(entry)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Parked(f"it is no change of a cache: {error!r}") from error
        try:
            self._drive(self._carry_out(change, replayed=entry.uid))
            self._counts["replayed"] += 1
        except (redis.TimeoutError, redis.exceptions.OutOfMemoryError):
            raise  # it may be this change that is too much, so in the end it is parked
        except redis.RedisError as error:
            if counts(error):
                # Redis is away, which is held against no change, however long it lasts.
                raise CacheOpenException(self._breaker.name, reason="it has just failed") from error
            raise Parked(f"{type(error).__name__}: {error}") from error

    # ------------------------------------------------------------------ the rest

    @property
    def redis(self) -> Any:
        """redis-py's client of the cache's Redis for all else; its commands and pipelines are calls
        under the circuit.  Keys are whole there: the prefix is not added."""
        return self._raw

    def redis_async(self) -> Any:
        """The same for asyncio: one for each event loop, closed by ``aclose``."""
        return self._raws.get()

    @property
    def outbox(self) -> Outbox:
        """Where changes wait while Redis is away."""
        return self._queue.outbox

    def stats(self) -> dict[str, Any]:
        """Counts of this process, what the tiers hold, and what waits on this host.

        ``stale``: values served that may have been out of date, and ``oldest_served`` how old
        (seconds) the oldest one from the tiers was; ``queued``, ``replayed``: changes that had to
        wait, and that were brought back; ``superseded``: those of them that something newer had
        replaced; ``lost``: changes that neither Redis nor the disk took, each of them an error for
        its caller.
        """
        return {
            "tiers": None if self._tiers is None else self._tiers.stats(),
            "outbox": self._queue.outbox.stats(),
            **self._counts,
            "oldest_served": self._oldest,
        }

    def problems(self) -> list[str]:
        """What is wrong with the disk, or with what waits there."""
        found = self._queue.problems("changes")
        disk = None if self._tiers is None else self._tiers.stats()["disk"]
        if disk and not disk["works"]:
            found.append(f"the disk tier fails, values are in memory only: {disk['error']}")
        if self._counts["lost"]:
            found.append(f"{self._counts['lost']} changes were lost: no Redis, no room on disk")
        return found

    def close(self) -> None:
        """Write what the disk tier has not got yet, and let go of files and connections."""
        if self._tiers is not None:
            self._tiers.close()
        self._queue.close()
        self._store.close()
        self._raw.close()

    async def aclose(self) -> None:
        """Let go of the running event loop's connections, before the loop ends."""
        await self._stores.aclose()
        await self._raws.aclose()
