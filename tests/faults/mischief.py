"""Faults of every kind in an order drawn from a seed, and how a fleet must be afterwards."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable

import redis

from distributed_breaker.store import key_of
from scripts.servers import Server
from tests.faults.proxy import Proxy
from tests.fleet.harness import CIRCUIT, Fleet, Process, until

THRESHOLD = 3
POLICY = {
    "open_interval": 0.15,
    "half_open_permits": 2,
    "success_threshold": THRESHOLD,
    "failure_threshold": 3,
    "permit_lease": 60.0,
}


def live(seconds: float) -> None:
    """Let the fleet live with what has happened."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end)


class Mischief:
    """Faults, and what users and operators do meanwhile."""

    def __init__(
        self, seed: int, fleet: Fleet, server: Server, client: redis.Redis, proxy: Proxy
    ) -> None:
        self.draw = random.Random(seed)
        self.fleet = fleet
        self.server = server
        self.client = client
        self.proxy = proxy
        self.frozen: list[Process] = []
        self.kinds: list[Callable[[], object]] = [
            *[self.fail] * 6, *[self.succeed] * 4, self.flushall, self.evict, self.rename,
            self.script_flush, self.reset, self.refuse, *[self.connect] * 2, self.cut, self.latency,
            self.refuse_some, self.deafen, self.kill_clients, self.hold_back, self.override,
            self.release, self.freeze, *[self.thaw] * 2, self.restart, self.pause, self.die,
            self.full, *[self.room] * 2, self.become_replica, *[self.become_primary] * 2,
        ]  # fmt: skip

    def one(self) -> Process:
        return self.draw.choice([p for p in self.fleet if p not in self.frozen])

    def step(self) -> None:
        with contextlib.suppress(redis.RedisError):  # of our own client
            self.draw.choice(self.kinds)()
        live(self.draw.choice([0.0, 0.01, 0.05, 0.1]))

    def end(self) -> None:
        while self.frozen:
            self.thaw()
        self.proxy.latency = self.proxy.lag = 0.0
        self.proxy.clear()
        self.connect()
        self.room()
        self.become_primary()

    def fail(self) -> None:
        self.one().do("fail", count=self.draw.randint(1, 4))

    def succeed(self) -> None:
        self.one().do("succeed", count=self.draw.randint(1, 4))

    def flushall(self) -> None:
        self.client.flushall()

    def evict(self) -> None:
        self.client.delete(key_of(self.fleet.namespace, CIRCUIT))

    def script_flush(self) -> None:
        self.client.script_flush()

    def reset(self) -> None:
        self.proxy.reset()

    def refuse(self) -> None:
        self.proxy.refuse()

    def connect(self) -> None:
        if not self.proxy.listening:
            self.proxy.connect()

    def latency(self) -> None:
        self.proxy.latency = self.draw.choice([0.0, 0.0, 0.02, 0.1])
        self.proxy.lag = self.draw.choice([0.0, 0.0, 0.0, 0.24, 0.26])

    def cut(self) -> None:
        what = self.draw.choice(["report", "acquire", "settle", "override", "SCRIPT", "TIME"])
        self.proxy.cut(what, times=self.draw.randint(1, 3))

    def refuse_some(self) -> None:
        text = self.draw.choice(["OOM x", "READONLY x", "BUSY x", "LOADING x", "MISCONF x"])
        what = self.draw.choice(["report", "acquire", "settle", "*"])
        self.proxy.fail(what, text, times=self.draw.randint(1, 3))

    def kill_clients(self) -> None:
        self.client.client_kill_filter(_type="normal", skipme=True)

    def hold_back(self) -> None:
        self.client.client_pause(self.draw.choice([50, 400]), all=False)

    def full(self) -> None:
        self.client.config_set("maxmemory", 1)

    def room(self) -> None:
        self.client.config_set("maxmemory", 0)

    def become_replica(self) -> None:
        self.client.replicaof("127.0.0.1", 1)

    def become_primary(self) -> None:
        self.client.replicaof("NO", "ONE")

    def rename(self) -> None:
        """Away, or an old copy back."""
        key = key_of(self.fleet.namespace, CIRCUIT)
        pair = [key, "away"]
        self.draw.shuffle(pair)
        self.client.rename(*pair)

    def deafen(self) -> None:
        self.client.client_kill_filter(_type="pubsub")

    def override(self) -> None:
        step = self.draw.choice(["force_open", "force_closed"])
        self.one().do("operate", step=step, ttl=0.3)

    def release(self) -> None:
        self.one().do("operate", step=self.draw.choice(["release", "reset"]))

    def freeze(self) -> None:
        if len(self.frozen) < 2:
            self.frozen.append(self.one())
            self.frozen[-1].freeze()

    def thaw(self) -> None:
        if self.frozen:
            self.frozen.pop().thaw()

    def restart(self) -> None:
        self.server.restart(empty=self.draw.random() < 0.5)

    def pause(self) -> None:
        self.server.pause()
        live(self.draw.choice([0.05, 0.4]))
        self.server.resume()

    def die(self) -> None:
        if len(self.fleet.processes) > 4:
            victim = self.one()
            self.fleet.processes.remove(victim)
            victim.kill()


def until_healed(fleet: Fleet, client: redis.Redis) -> None:
    """Wait until all have returned and agree, with the circuit closed."""
    until(lambda: not any(look["degraded"] for look in fleet.do("look")), "all have returned")
    until(lambda: fleet[-1].do("operate", step="reset") == "", "a reset")
    fleet.until_agreed(client)
    # A quarantine may have begun just before the reset was heard; it ends by its own probes.
    until(lambda: fleet.do("attempt") and set(fleet.states()) == {"closed"}, "all are closed")


def until_it_works(fleet: Fleet) -> None:
    """Trip the circuit for all, and close it for all.  Nothing may wait to be reported: a success
    that is heard of between two failures ends their run."""
    fleet.do("fail", fleet.processes[:2], count=3)
    fleet.until_all("open")
    assert fleet[-1].do("operate", step="reset") == ""
    fleet.until_all("closed")
