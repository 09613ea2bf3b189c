"""``make scaling``: what one server carries, and the model that tells what a larger fleet needs.

It measures the server's processor time for each thing that processes ask of it, fits a model with
one cost for each, checks the model against a fleet of hundreds of members that this machine can
run, and extends it to fleets that it cannot.  ``--write`` puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import selectors
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, Policy, model
from distributed_breaker.linked import SLOW_FLUSH
from distributed_breaker.model import Reply, Run, Step
from distributed_breaker.session import POLL
from distributed_breaker.store import RedisStore, encode, key_of
from scripts.bench.machine import describe
from scripts.marks import between, marks
from scripts.servers import Server

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
MARKS = marks("measured")

NUMBERS = Policy(failure_threshold=1_000_000, failure_rate=None).numbers
REPORTS_PER_CIRCUIT = 1000 / SLOW_FLUSH  # a second, by each process in which it is called
POLLS_PER_CIRCUIT = 1000 / POLL  # a second, by each process in which it is not
PINGS = 1.0  # a second, by each process
ROUNDS = 5  # of each measurement, of which the median counts

# The fleet that checks the model: processes, members (each has a link of its own) in each,
# circuits in each member, and how many of those are called.
PROCESSES, MEMBERS, CIRCUITS, CALLED = 4, 50, 20, 10
FLEET_SECONDS = 20.0

# Fleets to tell of: processes, circuits, share of the circuits called within two seconds.
FLEETS = ((50, 20, 1.0), (1_000, 50, 1.0), (1_000, 50, 0.1), (10_000, 1_000, 1.0),
          (10_000, 1_000, 0.1))  # fmt: skip


# ---------------------------------------------------------------------------- instruments


@dataclass(frozen=True)
class Spent:
    """What one thing cost the server: µs of its processor, bytes in and out, each."""

    cpu: float
    received: float
    sent: float


class Meter:
    """Reads what a server has spent."""

    def __init__(self, server: Server) -> None:
        self.client: Any = server.client(decode_responses=True)

    def read(self) -> tuple[float, int, int]:
        info = self.client.info()
        cpu = info["used_cpu_user"] + info["used_cpu_sys"]
        return cpu * 1e6, info["total_net_input_bytes"], info["total_net_output_bytes"]

    def per(self, count: int, work: Callable[[], object]) -> Spent:
        """What each of ``count`` things cost that ``work`` does; the median of some rounds."""
        rounds = []
        for _ in range(ROUNDS):
            before = self.read()
            work()
            rounds.append([(b - a) / count for a, b in zip(before, self.read(), strict=True)])
        return Spent(*(statistics.median(column) for column in zip(*rounds, strict=True)))

    def memory(self) -> int:
        return int(self.client.info("memory")["used_memory"])


class Hand:
    """Steps on circuits, made without a link."""

    def __init__(self, server: Server, namespace: str, circuits: int) -> None:
        self.store = RedisStore(server.url, namespace)
        self.nonces = (f"{number:08x}" for number in itertools.count(1))
        self.names = [f"circuit-{number}" for number in range(circuits)]
        self.known: dict[str, model.Known] = {}
        for chunk in chunks(self.names, 500):
            # A circuit that was just made is told more for ten seconds; a reset ends that.
            self.steps(chunk, "report")
            self.steps(chunk, "override", kind="forced_open")
            self.steps(chunk, "reset")
            self.steps(chunk, "report", batch=(Run("s"),))

    def steps(self, names: Sequence[str], op: str, **arguments: Any) -> None:
        """One step on each of these circuits, in one pipeline."""
        steps = []
        for name in names:
            known = self.known.get(name, model.NOTHING)
            step = Step(op, next(self.nonces), NUMBERS, known, offer=True, reporter="scaling",
                        era=(known.v, known.nonce), **arguments)  # fmt: skip
            steps.append((name, step))
        for name, reply in zip(names, self.store.run(steps), strict=True):
            assert isinstance(reply, Reply), reply
            header = model.load_header(reply.header)
            left = reply.remaining
            self.known[name] = model.Known(
                header.v, header.nonce, header.state, left, header.attempt
            )


# What a report cannot do without: the arguments, the same reads and writes, and the same answer.
FLOOR = """
local raw = redis.call('HMGET', KEYS[1], 'h', 'w', 'r', 's', 'p', 't', 'x', 'e')
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], 'h', raw[1], 'w', raw[2], 'r', raw[3], 't', raw[6])
return {raw[1], t[1], '0', 'closed', '', 'ok', '0', '', ''}
"""


def chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Listeners:
    """Subscriptions that are read and thrown away, by one thread."""

    def __init__(self, server: Server, channel: str, count: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._ended = False
        self._sockets = []
        path = server.url.removeprefix("unix://").partition("?")[0]
        for _ in range(count):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            connection.sendall(f"SUBSCRIBE {channel}\r\n".encode())
            connection.recv(1_000)
            self._selector.register(connection, selectors.EVENT_READ)
            self._sockets.append(connection)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(0.1):
                key.fileobj.recv(65_536)  # type: ignore[union-attr]

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        for connection in self._sockets:
            connection.close()


# ---------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Costs:
    """The model: µs of the server's processor and bytes for each thing asked of it."""

    report: Spent  # of one circuit, in a pipeline with fifty
    poll: Spent
    reports: float  # µs more, for a pipeline of reports
    polls: float
    ping: Spent
    transition: Spent
    push: Spent  # of one transition, for each process that hears it
    memory: int  # bytes of one circuit
    logged: int  # bytes of one circuit and its log of one entry

    def cores(self, processes: float, circuits: float, share: float, transitions: float) -> float:
        """What share of one processor the server needs."""
        pairs = processes * circuits
        spent = (
            pairs * share * REPORTS_PER_CIRCUIT * self.report.cpu
            + pairs * (1 - share) * POLLS_PER_CIRCUIT * self.poll.cpu
            + processes * REPORTS_PER_CIRCUIT * self.reports * (share > 0)
            + processes * POLLS_PER_CIRCUIT * self.polls * (share < 1)
            + processes * PINGS * self.ping.cpu
            + transitions * (self.transition.cpu + processes * self.push.cpu)
        )
        return spent / 1e6

    def bytes(self, processes: float, circuits: float, share: float) -> tuple[float, float]:
        """Bytes a second to the server, and from it, without transitions."""
        pairs = processes * circuits
        report, poll = share * REPORTS_PER_CIRCUIT, (1 - share) * POLLS_PER_CIRCUIT
        return (
            pairs * (report * self.report.received + poll * self.poll.received),
            pairs * (report * self.report.sent + poll * self.poll.sent),
        )


def measure(server: Server, out: list[str]) -> Costs:
    """The costs, with the tables of what was measured."""
    meter = Meter(server)
    steps = steps_in_pipelines(server, meter, out)
    ping = meter.per(2_000, lambda: [meter.client.ping() for _ in range(2_000)])
    transition, push = pushes(server, meter, out)
    memory, logged = stored(server, meter, out)
    return Costs(*steps, ping, transition, push, memory, logged)


def steps_in_pipelines(
    server: Server, meter: Meter, out: list[str]
) -> tuple[Spent, Spent, float, float]:
    """What a report and a poll cost in a pipeline of fifty, and what each pipeline costs beside."""
    batch, deltas = (Run("s", 25),), (("duration_us", 40_000), ("b4", 20), ("b5", 5))
    hand = Hand(server, "steps", 1_000)
    found: dict[int, tuple[Spent, Spent]] = {}
    for size in (1, 10, 50, 1_000):
        names = hand.names[:size]
        times = max(2, 2_000 // size)

        def report(names: list[str] = names, times: int = times) -> None:
            for _ in range(times):
                hand.steps(names, "report", batch=batch, deltas=deltas)

        def poll(names: list[str] = names, times: int = times) -> None:
            for _ in range(times):
                hand.store.poll(names)

        found[size] = meter.per(times * size, report), meter.per(times * size, poll)
    out += [
        "| circuits in one pipeline | a report: µs | bytes to / from the server | a poll: µs "
        "| bytes to / from the server |",
        "|---|---|---|---|---|",
        *(
            f"| {size:,} | {r.cpu:.1f} | {r.received:.0f} / {r.sent:.0f} | {p.cpu:.1f} "
            f"| {p.received:.0f} / {p.sent:.0f} |"
            for size, (r, p) in found.items()
        ),
        "",
        f"Of a report in a pipeline of fifty, {floor(meter, hand, batch, deltas):.1f} µs are what "
        f"any script would need that reads, writes and answers the same, and decides nothing.",
        "",
    ]
    (one, one_poll), (many, many_poll) = found[1], found[50]
    return many, many_poll, max(0.0, one.cpu - many.cpu), max(0.0, one_poll.cpu - many_poll.cpu)


def floor(meter: Meter, hand: Hand, batch: Sequence[Run], deltas: Sequence[Any]) -> float:
    """µs of a script that is given a report, and keeps what is stored as it is."""
    script = meter.client.script_load(FLOOR)
    names = hand.names[:50]
    commands = []
    for name in names:
        step = Step("report", "0" * 8, NUMBERS, hand.known[name], offer=True, reporter="scaling",
                    era=(1, "0" * 8), batch=tuple(batch), deltas=tuple(deltas))  # fmt: skip
        key = key_of("steps", name)
        commands.append((key, encode(step, hand.store.channel, name)))

    def work() -> None:
        for _ in range(40):
            with meter.client.pipeline(transaction=False) as pipe:
                for key, arguments in commands:
                    pipe.evalsha(script, 2, key, key + ":log", *arguments)
                pipe.execute()

    return meter.per(40 * len(names), work).cpu


def pushes(server: Server, meter: Meter, out: list[str]) -> tuple[Spent, Spent]:
    """What a transition costs with so many subscriptions, and the line through the points."""
    hand = Hand(server, "pushes", 1)

    def transitions() -> None:
        for _ in range(100):
            hand.steps(hand.names, "override", kind="forced_open")
            hand.steps(hand.names, "reset")

    points: dict[int, Spent] = {}
    for count in (0, 50, 200, 500):
        listeners = Listeners(server, hand.store.channel, count)
        points[count] = meter.per(200, transitions)
        listeners.close()
    costs = [
        statistics.linear_regression(list(points), [getattr(s, kind) for s in points.values()])
        for kind in ("cpu", "received", "sent")
    ]
    out += [
        "| subscriptions | a transition: µs | bytes from the server |",
        "|---|---|---|",
        *(f"| {count} | {spent.cpu:.0f} | {spent.sent:.0f} |" for count, spent in points.items()),
        "",
    ]
    return Spent(*(c.intercept for c in costs)), Spent(*(c.slope for c in costs))


def stored(server: Server, meter: Meter, out: list[str]) -> tuple[int, int]:
    """Bytes of a circuit, without and with its log, as the server counts them."""
    found = {}
    for count in (1, 100, 10_000):
        hand = Hand(server, f"memory-{count}", count)
        keys = [hand.store._key(name) for name in hand.names]
        own = [meter.client.memory_usage(key) for key in keys[:100]]
        log = [meter.client.memory_usage(key + ":log") for key in keys[:100]]
        found[count] = round(statistics.mean(own)), round(statistics.mean(own + log) * 2)
    out += [
        "| circuits | bytes each | with its log |",
        "|---|---|---|",
        *(f"| {count:,} | {own:,} | {log:,} |" for count, (own, log) in found.items()),
        "",
    ]
    meter.client.flushall()
    return found[10_000]


# ---------------------------------------------------------------------------- a real fleet


def member(url: str, pipe: Connection) -> None:
    """In a process of its own: members that call some of their circuits and hold the others."""
    with contextlib.ExitStack() as stack:
        called: list[CircuitBreaker] = []
        for _ in range(MEMBERS):
            registry = stack.enter_context(CircuitBreakerRegistry.from_url(url, "fleet"))
            breakers = [registry.breaker(f"c{n}", STURDY) for n in range(CIRCUITS)]
            for breaker in breakers:
                breaker.call(int)
            called += breakers[:CALLED]
        pipe.send("ready")
        pipe.recv()
        calls, began, spent = 0, time.monotonic(), time.process_time()
        while time.monotonic() - began < FLEET_SECONDS:
            for breaker in called:
                breaker.call(int)
            calls += len(called)
            time.sleep(0.2)
        pipe.send((calls, time.process_time() - spent))
        pipe.recv()


STURDY = Policy(failure_threshold=1_000_000, failure_rate=None)


def check(server: Server, costs: Costs, out: list[str]) -> None:
    """Real members, real subscriptions: what the model says beside what the server spent."""
    meter, context = Meter(server), multiprocessing.get_context("spawn")
    members = PROCESSES * MEMBERS
    pipes = []
    for _ in range(PROCESSES):
        ours, theirs = context.Pipe()
        context.Process(target=member, args=(server.url, theirs), daemon=True).start()
        pipes.append(ours)
    for pipe in pipes:
        assert pipe.poll(120), "a process did not get ready"
        pipe.recv()
    deadline = time.monotonic() + 60
    while meter.client.pubsub_numsub("cb:0:fleet")[0][1] < members:
        assert time.monotonic() < deadline, "not all members hear the others"
        time.sleep(0.1)
    time.sleep(12.0)  # a circuit that was just made is told more for ten seconds
    for pipe in pipes:
        pipe.send("go")
    time.sleep(2.0)
    before, commands = meter.read(), meter.client.info("stats")["total_commands_processed"]
    began = time.monotonic()
    time.sleep(FLEET_SECONDS - 6.0)
    after, more = meter.read(), meter.client.info("stats")["total_commands_processed"]
    seconds = time.monotonic() - began
    told = [pipe.recv() for pipe in pipes]
    subscriptions = meter.client.pubsub_numsub("cb:0:fleet")[0][1]
    for pipe in pipes:
        pipe.send("end")
    measured = (after[0] - before[0]) / 1e6 / seconds
    expected = costs.cores(members, CIRCUITS, CALLED / CIRCUITS, 0)
    calls = sum(count for count, _ in told)
    spent = sum(cpu for _, cpu in told)
    out += [
        f"{members} members ({PROCESSES} processes with {MEMBERS} links each, {subscriptions} "
        f"subscriptions), {CIRCUITS} circuits, {CALLED} of them called, "
        f"{calls / FLEET_SECONDS:,.0f} calls/s in all:",
        "",
        "| | |",
        "|---|---|",
        f"| commands a second, those in scripts included | {(more - commands) / seconds:,.0f} |",
        f"| the server's processor, measured | {measured:.1%} |",
        f"| the server's processor, by the model | {expected:.1%} |",
        f"| bytes a second to / from it, measured | {(after[1] - before[1]) / seconds:,.0f} / "
        f"{(after[2] - before[2]) / seconds:,.0f} |",
        "| by the model | {:,.0f} / {:,.0f} |".format(
            *costs.bytes(members, CIRCUITS, CALLED / CIRCUITS)
        ),
        f"| a member's own processor, its calls included | {spent / FLEET_SECONDS / members:.2%} |",
        "",
    ]


# ---------------------------------------------------------------------------- larger fleets


def extend(costs: Costs, out: list[str]) -> None:
    out += [
        "| processes × circuits | called within 2 s | reports/s | polls/s | server cores "
        "| Mbit/s to / from | a trip is told in | Redis memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for processes, circuits, share in FLEETS:
        pairs = processes * circuits
        to, back = (8 * n / 1e6 for n in costs.bytes(processes, circuits, share))
        told = (costs.transition.cpu + processes * costs.push.cpu) / 1000
        out.append(
            f"| {processes:,} × {circuits:,} | {share:.0%} "
            f"| {pairs * share * REPORTS_PER_CIRCUIT:,.0f} "
            f"| {pairs * (1 - share) * POLLS_PER_CIRCUIT:,.0f} "
            f"| {costs.cores(processes, circuits, share, 0):.2f} | {to:,.0f} / {back:,.0f} "
            f"| {told:.1f} ms | {circuits * costs.logged / 1e6:.1f} MB |"
        )
    per_second = 1e6 / costs.report.cpu
    out += [
        "",
        f"One core at {0.6:.0%} load carries {0.6 * per_second:,.0f} reports a second: "
        f"{0.6 * per_second / REPORTS_PER_CIRCUIT:,.0f} pairs of a process and a circuit that it "
        f"calls all the time, or {0.6e6 / costs.poll.cpu / POLLS_PER_CIRCUIT:,.0f} pairs that "
        "are only held.",
        "",
    ]


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="make scaling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    parser.add_argument("--server", default="valkey", help="kind of server (default: valkey)")
    options = parser.parse_args(words)
    machine = describe(options.server)
    out = ["```", *(f"{label:12}{words}" for label, words in machine.items()), "```", ""]
    with Server.start(options.server) as server:
        out += ["### What each thing costs the server", ""]
        costs = measure(server, out)
        out += ["### A fleet that this machine can run", ""]
        check(server, costs, out)
    out += ["### Fleets that it cannot", ""]
    extend(costs, out)
    text = "\n".join(out)
    print(text)
    if options.write:
        DOCUMENT.write_text(between(DOCUMENT.read_text("utf-8"), text, MARKS), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
