"""Django's Redis cache behind a circuit of the configuration file."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from django.core.cache.backends.redis import RedisCache as DjangosRedisCache
from django.core.exceptions import ImproperlyConfigured

from ..clients.redis_guard import CacheOpenException
from ..errors import CircuitBreakerOpenException
from ..services import current


class RedisCache(DjangosRedisCache):  # type: ignore[misc]
    """Django's ``RedisCache``, each of whose commands is a call under ``OPTIONS["circuit"]``.

    It must be the circuit of a section ``cache``.  All other settings are Django's.  There is no
    fallback: the protected cache client has some.

    Raises:
        ImproperlyConfigured: no circuit is named.
        CacheOpenException: from every command, while the circuit is open.  It is also redis-py's
            ConnectionError.
    """

    def __init__(self, server: Any, params: dict[str, Any]) -> None:
        options = dict(params.get("OPTIONS", {}))
        self._circuit = options.pop("circuit", None)
        if not isinstance(self._circuit, str):
            raise ImproperlyConfigured(
                'CACHES: name the circuit of this cache: "OPTIONS": {"circuit": "web_app.cache"}'
            )
        super().__init__(server, {**params, "OPTIONS": options})

    @cached_property
    def _cache(self) -> Any:
        return _Guarded(super()._cache, self._circuit)


class _Guarded:
    """Django's client of the cache."""

    def __init__(self, client: Any, circuit: str) -> None:
        self._client = client
        self._circuit = circuit

    def __getattr__(self, name: str) -> Callable[..., Any]:
        command = getattr(self._client, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                # The policy of a cache's circuit knows which errors are Redis's.
                return current().circuit(self._circuit).call(command, *args, **kwargs)
            except CircuitBreakerOpenException as refusal:
                raise CacheOpenException(*refusal.__reduce__()[1]) from None

        return guarded
