"""The peers: other circuit breakers from PyPI, in memory and with Redis.

Each is imported by name, in the process that measures it, so that nothing depends on it.  What one
can't do is said by ``limits`` and ends up in the report.
"""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from .subjects import (
    DECORATED,
    PATIENCE,
    WORK,
    Guarded,
    Rules,
    Subject,
    decorated,
    module,
    work,
    work_async,
    written,
)


class Circuitbreaker(Subject):
    title = "circuitbreaker"
    packages: tuple[str, ...] = ("circuitbreaker",)
    how = "in memory; measures no durations"

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        library = module("circuitbreaker")
        given: dict[str, Any] = {}
        if rules is not None:
            given = {"failure_threshold": rules.failures, "recovery_timeout": rules.interval}
        breaker = library.CircuitBreaker(name=name, **given)
        forms = written(
            decorator="",
            call="breaker.call(f)",
            with_="with breaker:\n    f()",
            async_decorator="",
            async_call="await breaker.call_async(f_async)",
            generator="",
            async_generator="",
        )
        names = WORK | {"breaker": breaker} | decorated(breaker, *DECORATED)
        wrapped: dict[Any, Callable[[], Any]] = {}

        def call(function: Callable[[], Any]) -> Any:
            # Its own `call` asks nobody whether the breaker is open; only the decorator does.
            if function not in wrapped:
                wrapped[function] = breaker(function)
            return wrapped[function]()

        return Guarded(
            forms,
            names,
            library.CircuitBreakerError,
            call,
            lambda: int(breaker.failure_count),
        )


class Pybreaker(Subject):
    title = "pybreaker"
    packages: tuple[str, ...] = ("pybreaker",)
    how = "measures no durations; one lock around each call, the function included"

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        library = module("pybreaker")
        given: dict[str, Any] = {}
        if rules is not None:
            given = {"fail_max": rules.failures, "reset_timeout": rules.interval}
        if self.shared:
            storage = library.CircuitRedisStorage("closed", self.client, namespace=name)
            given["state_storage"] = storage
        breaker = library.CircuitBreaker(**given)
        forms = written(
            decorator="",
            call="breaker.call(f)",
            with_="with breaker.calling():\n    f()",
            generator="",
        )
        names = WORK | {"breaker": breaker} | decorated(breaker, "decorator", "generator")
        return Guarded(
            forms,
            names,
            library.CircuitBreakerError,
            breaker.call,
            lambda: int(breaker.fail_counter),
        )


class PybreakerRedis(Pybreaker):
    title = "pybreaker + Redis"
    packages = ("pybreaker", "redis")
    shared = True


class Aiobreaker(Subject):
    title = "aiobreaker"
    packages: tuple[str, ...] = ("aiobreaker",)
    how = "measures no durations"

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        library = module("aiobreaker")
        given: dict[str, Any] = {}
        if rules is not None:
            given["fail_max"] = rules.failures
            given["timeout_duration"] = timedelta(seconds=rules.interval)
        if self.shared:
            given["state_storage"] = module("aiobreaker.storage.redis").CircuitRedisStorage(
                library.CircuitBreakerState.CLOSED, self.client, namespace=name
            )
        breaker = library.CircuitBreaker(**given)
        forms = written(
            decorator="",
            call="breaker.call(f)",
            async_decorator="",
            async_call="await breaker.call_async(f_async)",
            generator="",
        )
        wanted = ("decorator", "async decorator", "generator")
        return Guarded(
            forms,
            WORK | {"breaker": breaker} | decorated(breaker, *wanted),
            library.CircuitBreakerError,
            breaker.call,
            lambda: int(breaker.fail_counter),
        )


class AiobreakerRedis(Aiobreaker):
    title = "aiobreaker + Redis"
    packages = ("aiobreaker", "redis")
    shared = True
    how = "measures no durations; a blocking client, also below `await`: it has no other"


class Interlock(Subject):
    title = "interlock-cb"
    packages: tuple[str, ...] = ("interlock-cb",)
    how = "measures durations (its slow-call rule can't be turned off)"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._breakers: list[Any] = []

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        library = module("interlock")
        breaker = library.CircuitBreaker(name=name, config=self._config(rules), storage=self._in())
        self._breakers.append(breaker)
        wanted = ["decorator", "async decorator"]
        forms = written(
            decorator="",
            call="breaker.call(f)",
            with_="with breaker:\n    f()",
            async_decorator="",
            async_call="await breaker.call_async(f_async)",
            async_with="async with breaker:\n    await f_async()",
        )
        if self.shared:  # A breaker with a blocking storage has no async side.
            wanted = ["decorator"]
            forms = {form: text for form, text in forms.items() if not form.startswith("async")}
        return Guarded(
            forms,
            WORK | {"breaker": breaker} | decorated(breaker, *wanted),
            library.CircuitOpenError,
            breaker.call_sync,
            lambda: int(breaker.snapshot().failed_calls),
        )

    def _config(self, rules: Rules | None) -> Any:
        library = module("interlock")
        if rules is None:
            return library.Config()
        # It counts no runs.  A rate next to nothing opens at the first failure once there were
        # as many calls.
        return library.Config(
            minimum_number_of_calls=min(rules.failures, 1_000_000),
            failure_rate_threshold=1e-9 if rules.failures == 1 else 1.0,
            wait_duration_in_open=rules.interval,
            permitted_calls_in_half_open=1,
            window_size=rules.window,
        )

    def _in(self) -> Any:
        return None

    def close(self) -> None:
        for breaker in self._breakers:
            breaker.close()


class InterlockRedis(Interlock):
    title = "interlock-cb + Redis"
    packages = ("interlock-cb", "redis")
    shared = True
    how = "measures durations; polls the server every second, its default"

    def _in(self) -> Any:
        return module("interlock.integrations.redis").RedisStorage(self.client)


class Nopanic(Subject):
    title = "nopanic"
    packages = ("nopanic",)
    how = "measures no durations"
    timed: Mapping[str, object] = {}

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        library = module("nopanic")
        breaker = library.circuit_breaker(name=name, **_nopanic_rules(rules), **self.timed)
        forms = written(
            decorator="",
            call="breaker.call(f)",
            with_="with breaker.guard():\n    f()",
            async_decorator="",
            async_call="await breaker.acall(f_async)",
            async_with="async with breaker.guard():\n    await f_async()",
            generator="",
            async_generator="",
        )
        return Guarded(
            forms,
            WORK | {"breaker": breaker} | decorated(breaker, *DECORATED),
            library.CircuitOpen,
            breaker.call,
            lambda: int(breaker.metrics.failures),
        )


class NopanicTimed(Nopanic):
    title = "nopanic, timed"
    how = "measures durations (`slow_call_duration=60`)"
    timed: Mapping[str, object] = {"slow_call_duration": 60.0}


class NopanicRedis(Subject):
    title = "nopanic-redis"
    packages = ("nopanic-redis", "redis")
    shared = True
    how = "measures no durations; `fail_open=True`, its default"

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        library = module("nopanic_redis")
        breaker = library.redis_circuit_breaker(self.client, name=name, **_nopanic_rules(rules))
        return Guarded(
            written(decorator="", call="breaker.call(f)"),
            WORK | {"breaker": breaker} | decorated(breaker, "decorator"),
            module("nopanic").CircuitOpen,
            breaker.call,
        )


def _nopanic_rules(rules: Rules | None) -> dict[str, Any]:
    """It judges by a rate; next to nothing opens at the first failure after enough calls."""
    if rules is None:
        return {}
    return {
        "min_calls": rules.failures,
        "failure_threshold": 1e-9 if rules.failures == 1 else 1.0,
        "reset_timeout": rules.interval,
    }


class Purgatory(Subject):
    title = "purgatory"
    packages = ("purgatory",)
    how = "measures no durations"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        library = module("purgatory")
        self._factory = library.SyncCircuitBreakerFactory()
        self._async_factory = library.AsyncCircuitBreakerFactory()
        # Both sides know the same breakers, so that one failure opens both.
        breakers = self._factory.uow.contexts.breakers
        self._async_factory.uow.contexts.breakers = breakers

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        given = _purgatory_rules(rules)
        factory, async_factory = self._factory, self._async_factory
        names = {"get": factory.get_breaker, "get_async": async_factory.get_breaker, "name": name}
        names |= {"given": given, "guarded": factory(name, **given)(work)}
        names |= {"guarded_async": async_factory(name, **given)(work_async)}

        def call(function: Callable[[], Any]) -> Any:
            with factory.get_breaker(name, **given):
                return function()

        return Guarded(
            written(
                decorator="",
                with_="with get(name, **given):\n    f()",
                async_decorator="",
                async_with="async with await get_async(name, **given):\n    await f_async()",
            ),
            WORK | names,
            module("purgatory.domain.model").OpenedState,
            call,
            lambda: int(factory.get_breaker(name, **given).context.failure_count or 0),
        )


class PurgatoryRedis(Subject):
    title = "purgatory + Redis"
    packages = ("purgatory", "redis")
    shared = True
    how = "measures no durations; asyncio only, since its blocking Redis storage does not work"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        library = module("purgatory")
        limits = f"?socket_timeout={PATIENCE}&socket_connect_timeout={PATIENCE}"
        self._factory = library.AsyncCircuitBreakerFactory(
            uow=library.AsyncRedisUnitOfWork(url + limits)
        )
        self._own: asyncio.AbstractEventLoop | None = None

    def guard(self, name: str, rules: Rules | None = None) -> Guarded:
        given = _purgatory_rules(rules)
        factory = self._factory

        async def guarded_call(function: Callable[[], Any]) -> Any:
            async with await factory.get_breaker(name, **given):
                return function()

        def call(function: Callable[[], Any]) -> Any:
            return self._loop().run_until_complete(guarded_call(function))

        names = {"get_async": factory.get_breaker, "name": name, "given": given}
        names |= {"guarded_async": factory(name, **given)(work_async)}
        return Guarded(
            written(
                async_decorator="",
                async_with="async with await get_async(name, **given):\n    await f_async()",
            ),
            WORK | names,
            module("purgatory.domain.model").OpenedState,
            call,
        )

    def _loop(self) -> asyncio.AbstractEventLoop:
        """Where its client lives; it adds some 20 µs to single calls that take some 500."""
        if self.loop is None:
            self.loop = self._own = asyncio.new_event_loop()
        return self.loop

    def close(self) -> None:
        self._loop().run_until_complete(self._factory.uow.contexts.redis.aclose())
        if self._own is not None:
            self._own.close()


def _purgatory_rules(rules: Rules | None) -> dict[str, Any]:
    return {} if rules is None else {"threshold": rules.failures, "ttl": rules.interval}


def purgatory_blocking_error(url: str) -> str:
    """What purgatory's blocking Redis storage raises at its first call; empty when it works."""
    library = module("purgatory")
    factory = library.SyncCircuitBreakerFactory(uow=library.SyncRedisUnitOfWork(url))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of coroutines that were never awaited
        try:
            factory.initialize()
            factory("blocking")(work)()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            del factory
            gc.collect()
    return ""
