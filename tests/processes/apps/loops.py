"""An asyncio program whose tasks are cancelled in the midst of calls, again and again, until
SIGINT or SIGTERM ends it in order."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal

from distributed_breaker import CircuitBreakerOpenException
from tests.processes.apps.usage import BrokenError, breakers, handlers, note, registry

# Kept by the event loop itself, and not to be touched by anybody else.
OURS = (signal.SIGINT, signal.SIGTERM)


async def call(circuit: str, outcome: str) -> None:
    """One call that takes a while, and a line about how it ended."""
    ended = "cancelled"
    try:
        async with breakers[circuit].guard():
            try:
                await asyncio.sleep(random.uniform(0.0, 0.02))
                ended = outcome
            finally:
                # Whatever ended it, the block was entered and is left now.
                note("call", circuit=circuit, outcome=ended)
            if outcome == "failure":
                raise BrokenError
    except (CircuitBreakerOpenException, BrokenError):
        pass


async def wave() -> None:
    """Some tasks, half of which are cancelled soon: before, while, or after they call."""
    chance = random.Random()
    tasks = [
        asyncio.create_task(call(circuit, chance.choice(("success", "failure"))))
        for circuit in ("counted", "probed")
        for _ in range(10)
    ]
    await asyncio.sleep(chance.uniform(0.0, 0.02))
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def main() -> None:
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in OURS:
        loop.add_signal_handler(number, over.set)
    before = handlers()
    waves = 0
    while not over.is_set():
        await wave()
        waves += 1
        note("wave", number=waves)
    if handlers() != before:
        note("handlers", when="traffic")
    # What is under way at the end is cancelled, too.
    last = [asyncio.create_task(call("counted", "success")) for _ in range(20)]
    await asyncio.sleep(0)
    for task in last:
        task.cancel()
    await asyncio.gather(*last, return_exceptions=True)
    with contextlib.suppress(Exception):
        await registry.flush_async()


if __name__ == "__main__":
    asyncio.run(main())
