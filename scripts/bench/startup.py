"""What a fresh process pays: the import, the way to the first guarded call, and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.servers import Server

from .figures import Row, Spread, Topic
from .peers import (
    Aiobreaker,
    AiobreakerRedis,
    Circuitbreaker,
    Interlock,
    InterlockRedis,
    Nopanic,
    NopanicRedis,
    Purgatory,
    PurgatoryRedis,
    Pybreaker,
    PybreakerRedis,
)
from .setting import Setting
from .subjects import Ours, Subject

SECONDS = 60  # that one fresh interpreter may take
METHOD = (
    "Fresh interpreters, all libraries in turn. `redis` has been imported before the clock starts, "
    "also for those that do not use it. The first answer is that of the first guarded call through "
    "a breaker that is made right after the import; with Redis that contains the connection and "
    "the first question to the server. Memory is what is resident more than after `import redis`."
)


@dataclass(frozen=True)
class Script:
    """What a user writes: the imports, and the way to the first call of ``f``."""

    imports: str
    call: str


CLIENT = "client = redis.Redis.from_url(url)\n"
SCRIPTS: dict[type[Subject], Script] = {
    Ours: Script(
        "import distributed_breaker as d",
        "registry = d.CircuitBreakerRegistry.from_url(url, 'startup')\n"
        "registry.breaker('startup').call(f)",
    ),
    Circuitbreaker: Script("import circuitbreaker as c", "c.CircuitBreaker().call(f)"),
    Pybreaker: Script("import pybreaker as p", "p.CircuitBreaker().call(f)"),
    Aiobreaker: Script("import aiobreaker as a", "a.CircuitBreaker().call(f)"),
    Interlock: Script("import interlock as i", "i.CircuitBreaker(name='startup').call(f)"),
    Nopanic: Script("import nopanic as n", "n.circuit_breaker().call(f)"),
    Purgatory: Script("import purgatory as p", "p.SyncCircuitBreakerFactory()('startup')(f)()"),
    PybreakerRedis: Script(
        "import pybreaker as p",
        CLIENT + "p.CircuitBreaker(state_storage=p.CircuitRedisStorage('closed', client)).call(f)",
    ),
    AiobreakerRedis: Script(
        "import aiobreaker as a\nfrom aiobreaker.storage.redis import CircuitRedisStorage as S",
        CLIENT + "storage = S(a.CircuitBreakerState.CLOSED, client)\n"
        "a.CircuitBreaker(state_storage=storage).call(f)",
    ),
    InterlockRedis: Script(
        "import interlock as i\nfrom interlock.integrations.redis import RedisStorage",
        CLIENT + "i.CircuitBreaker(name='startup', storage=RedisStorage(client)).call(f)",
    ),
    NopanicRedis: Script(
        "import nopanic_redis as n",
        CLIENT + "n.redis_circuit_breaker(client, name='startup').call(f)",
    ),
    PurgatoryRedis: Script(
        "import purgatory as p, asyncio",
        "async def main():\n"
        "    factory = p.AsyncCircuitBreakerFactory(uow=p.AsyncRedisUnitOfWork(url))\n"
        "    await factory.initialize()\n"
        "    async with await factory.get_breaker('startup'): f()\n"
        "asyncio.run(main())",
    ),
}

FRAME = """
import json, os, sys, time
import redis
url = sys.argv[1]
def f(): pass
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before, start = resident(), time.perf_counter()
{imports}
imported = time.perf_counter()
{call}
called = time.perf_counter()
print(json.dumps([(imported - start) * 1e3, (called - start) * 1e3, resident() - before]))
"""
# pip has compiled the installed libraries, so ours must be allowed to be compiled, too.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ROWS = {"import": "ms", "import and first answer": "ms", "memory after the first answer": "MB"}


def run(setting: Setting) -> Topic:
    """Start interpreters, all libraries in turn."""
    kinds: list[type[Subject]] = [Ours, *setting.in_memory, *setting.shared]
    kinds = [kind for kind in kinds if kind in SCRIPTS]
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in ROWS}
    with Server.start(setting.server) as server:
        _start(SCRIPTS[Ours], server.url)  # compiles
        for _ in range(setting.count(1, 7)):
            for kind in kinds:
                for name, figure in zip(ROWS, _start(SCRIPTS[kind], server.url), strict=True):
                    figures[name].setdefault(kind.title, []).append(figure)
    rows = []
    for name, by_title in figures.items():
        spreads = {title: Spread.of(values) for title, values in by_title.items()}
        rows.append(Row(name, ROWS[name], spreads.pop(Ours.title), spreads))
    return Topic("startup", "Start-up", METHOD, rows, (), [row.name for row in rows])


def _start(script: Script, url: str) -> Sequence[float]:
    """Time (ms) to the import's end and the first answer, and memory (MB), of an interpreter."""
    code = FRAME.format(imports=script.imports, call=script.call)
    command = [sys.executable, "-c", code, url]
    result = subprocess.run(
        command, capture_output=True, timeout=SECONDS, check=True, text=True, env=COMPILED
    )
    figures: list[float] = json.loads(result.stdout)
    return figures
