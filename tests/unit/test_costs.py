"""What a call and a step may cost, in counts: bytecode instructions, Python frames, calls of C
functions, Redis commands, steps in one pipeline.  Never in time, which ``make bench`` measures.

The bounds are what the code needs now on the interpreter that needs most.  A change that needs
more must be worth it, and then raises a bound here, in sight of its reviewer.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import distributed_breaker
from distributed_breaker import CircuitBreakerOpenException, CircuitBreakerRegistry, Policy, model
from distributed_breaker.linked import FAST_FLUSH, SLOW_FLUSH, LinkedCircuit
from distributed_breaker.model import Known, Reply, Run, Step
from distributed_breaker.session import POLL, Ask
from distributed_breaker.shadow import Bad, Shadow
from distributed_breaker.store import RedisStore
from scripts.servers import Server
from tests.unit.clock import STURDY, Boom, boom
from tests.unit.instruments import profiled
from tests.unit.test_session import ByHand

PACKAGE = str(Path(distributed_breaker.__file__).parent)

# ---------------------------------------------------------------------------- a call


class Count:
    """What ran inside the package: instructions, and how often each of its functions began."""

    def __init__(self) -> None:
        self.instructions = 0
        self.frames: Counter[str] = Counter()


def counted(call: Callable[[], object]) -> Count:
    """The instructions that one call executes in the package's own code."""
    count = Count()

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        count.instructions += event == "opcode"
        return local

    def begun(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count.frames[frame.f_code.co_name] += 1
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    # A debugger or a coverage tool may be tracing, too.
    before = sys.gettrace()
    for _ in range(3):  # The first ones make interpreters instrument the code.
        count.instructions = 0
        count.frames.clear()
        sys.settrace(begun)
        try:
            call()
        finally:
            sys.settrace(before)
    return count


def work() -> None:
    """A dependency that is well."""


async def work_async() -> None:
    """The same."""


def work_generator() -> Iterator[None]:
    """The same."""
    yield


@pytest.fixture
def registry() -> Iterator[CircuitBreakerRegistry]:
    """One with the system's clock: a clock of the tests' costs instructions of its own."""
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        yield registry


def ways(registry: CircuitBreakerRegistry, policy: Policy) -> dict[str, Callable[[], object]]:
    """Closed calls in each form, on a circuit that has had its first call."""
    breaker = registry.breaker("b", policy)
    guarded, guarded_async = breaker(work), breaker(work_async)
    guarded_generator = breaker(work_generator)

    def guard() -> None:
        with breaker.guard():
            pass

    def block() -> None:
        with breaker:
            pass

    def two_steps() -> None:
        breaker.acquire().success()

    def coroutine() -> None:
        with suppress(StopIteration):
            guarded_async().send(None)

    made = {
        "decorator": guarded,
        "call": lambda: breaker.call(work),
        "guard()": guard,
        "with": block,
        "two steps": two_steps,
        "coroutine": coroutine,
        "generator": lambda: list(guarded_generator()),
    }
    for way in made.values():
        way()
    return made


# Instructions and frames of one closed call, without the function's own.
CLOSED = {
    "decorator": (48, 1),
    "call": (53, 1),
    "guard()": (101, 4),
    "with": (193, 7),
    "two steps": (96, 4),
    "coroutine": (51, 1),
    "generator": (193, 7),
}


@pytest.mark.parametrize("way", CLOSED)
@pytest.mark.parametrize("policy", [Policy(), Policy(measure=False)], ids=["timed", "untimed"])
def test_what_a_closed_call_costs(
    registry: CircuitBreakerRegistry, policy: Policy, way: str
) -> None:
    call = ways(registry, policy)[way]
    count = counted(call)
    most, frames = CLOSED[way]
    assert 20 < count.instructions <= most, count.frames
    assert count.frames.total() <= frames, count.frames


def test_what_a_closed_call_asks_of_c(registry: CircuitBreakerRegistry) -> None:
    """The clock twice, and one append; `len` keeps the tally bounded."""
    call = ways(registry, Policy())["decorator"]
    with profiled() as calls:
        call()
    ours = {"setprofile", "next"}  # of the instrument itself
    assert {name: count for name, count in calls.items() if name not in ours} == {
        "perf_counter_ns": 2,
        "append": 1,
        "len": 1,
    }


def test_what_a_rejection_costs(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b", Policy())
    breaker.force_open()
    refused = breaker(work)

    def call() -> None:
        with suppress(CircuitBreakerOpenException):
            refused()

    count = counted(call)
    assert 40 < count.instructions <= 87, count.frames
    assert count.frames.total() <= 3, count.frames


def test_what_a_failure_costs(registry: CircuitBreakerRegistry) -> None:
    """It is taken in at once, so that it can trip the circuit before the next call."""
    failing = registry.breaker("b", STURDY)(boom)

    def call() -> None:
        with suppress(Boom):
            failing()

    count = counted(call)
    assert 500 < count.instructions <= 2_050, count.frames


# ---------------------------------------------------------------------------- a step in the store

NUMBERS = Policy(
    failure_threshold=2, quorum=1, open_interval=0.001, jitter=0.0, success_threshold=2
).numbers
LOOK = Counter(["hmget", "time"])
WRITE = LOOK + Counter(["hset"])
# A new generation is told to all, logged, and the log and the circuit expire some day.
TRANSITION = WRITE + Counter(["publish", "xadd", "pexpire", "pexpire"])


class Counting:
    """One circuit on a real server, and the commands of each step inside the script."""

    def __init__(self, server: Server) -> None:
        self.client: Any = server.client(decode_responses=True)
        self.store = RedisStore(server.url, "costs")
        self.nonces = (f"{number:08x}" for number in itertools.count(1))
        self.known, self.era = model.NOTHING, (0, "-")
        self.store.run([("other", Step("report", next(self.nonces), NUMBERS))])  # loads the script

    def step(self, op: str, **arguments: Any) -> tuple[Reply, Counter[str]]:
        arguments = {"reporter": "r", "era": self.era, **arguments}
        step = Step(op, next(self.nonces), NUMBERS, self.known, offer=True, **arguments)
        before = self.commands()
        (reply,) = self.store.run([("c", step)])
        spent = self.commands() - before
        assert isinstance(reply, Reply)
        assert spent.pop("evalsha") == 1, "one command on the wire"
        header = model.load_header(reply.header)
        self.era = (header.v, header.nonce)
        left = reply.remaining
        self.known = Known(header.v, header.nonce, header.state, left, header.attempt)
        return reply, spent

    def commands(self) -> Counter[str]:
        stats = self.client.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}
        return Counter({name: count for name, count in calls.items() if name != "info"})


def until_due(c: Counting) -> None:
    """Let the open interval of a millisecond end."""
    deadline = time.monotonic() + 5
    while c.step("report")[0].remaining > 0:
        assert time.monotonic() < deadline


def test_what_each_step_costs_the_server(own_server: Callable[..., Server]) -> None:
    """Two commands to look, a third to write, four more for a transition; one on the wire."""
    c = Counting(own_server())
    bad, good = (Run("f"),), (Run("s", 5),)
    first, second, third = "1" * 16, "2" * 16, "3" * 16
    assert c.step("report", batch=good)[1] == TRANSITION, "the circuit is made"
    assert c.step("report", batch=good)[1] == WRITE
    assert c.step("report")[1] == LOOK
    assert c.step("report", batch=bad)[1] == WRITE
    assert c.step("report", batch=bad)[1] == TRANSITION, "it trips"
    assert c.step("report", batch=good, era=(1, "-"))[1] == WRITE, "late"
    until_due(c)
    assert c.step("acquire", token=first)[1] == TRANSITION, "it half-opens"
    assert c.step("acquire", token=second)[1] == WRITE
    denied, spent = c.step("acquire", token=third)
    assert (denied.verdict, spent) == ("deny", LOOK)
    assert c.step("cancel", token=second)[1] == WRITE
    assert c.step("settle", token=first, kind="s")[1] == WRITE
    assert c.step("acquire", token=third)[1] == WRITE
    assert c.step("settle", token=third, kind="s")[1] == TRANSITION, "it closes"
    assert c.step("report", batch=good)[1] == WRITE, "by the shortcut"
    trip = c.step("report", batch=(Run("f", 2),))
    assert trip[1] == TRANSITION, "what the shortcut has asked for is not asked for again"
    forced = TRANSITION - Counter(["pexpire"]) + Counter(["persist"])
    assert c.step("override", kind="forced_open")[1] == forced
    assert c.step("release")[1] == TRANSITION
    assert c.step("reset")[1] == TRANSITION


def test_how_many_commands_a_poll_is(own_server: Callable[..., Server]) -> None:
    c = Counting(own_server())
    before = c.commands()
    c.store.poll(["other", "unknown"])
    assert c.commands() - before == Counter(["time", "hget", "hget"])


# ---------------------------------------------------------------------------- a process

MANY = 50
STURDY_NUMBERS = STURDY.numbers


class Process(ByHand):
    """A session that holds many circuits, all of which it has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: dict[str, model.Circuit | None] = {}
        self.held = [self.hold(f"c{number}", f"{number:08x}") for number in range(MANY)]
        for _ in range(3):
            self.go_round()

    def hold(self, name: str, nonce: str) -> LinkedCircuit:
        shadow = Shadow(STURDY_NUMBERS, "me", lambda: nonce, lambda: 0.5, self.time.ms)
        circuit = LinkedCircuit(name, STURDY, shadow, self.clock)
        self._circuits[name] = circuit
        self.add(circuit)
        return circuit

    def answer(self, ask: Ask) -> Any:
        if ask.what == "run":
            return [self.answer_step(name, step) for name, step in ask.about]
        if ask.what == "poll":
            circuits = [self.remote[name] for name in ask.about]
            return self.time.ms, [c and model.dump_header(c) for c in circuits]
        return None

    def answer_step(self, name: str, step: Step) -> Reply:
        stepped = model.step(self.remote.get(name), step, self.time.ms)
        self.remote[name] = stepped.circuit
        return stepped.reply

    def record(self, kind: str, circuit: LinkedCircuit | None = None) -> None:
        assert circuit is not None
        assert circuit._era is not None
        circuit._era.append(Bad("f", 0, self.time.ms) if kind == "f" else 0)
        if kind == "f":
            self.nudge(circuit)

    def go_on(self, ms: int) -> list[tuple[int, str, int]]:
        """Make the rounds of so many ms: when what was asked, and about how many circuits."""
        start, asked = self.time.ms, []
        while (wait := max(1, self.due() - self.time.ms)) <= start + ms - self.time.ms:
            self.time.ms += wait
            now = self.time.ms - start
            asked += [(now, ask.what, len(ask.about)) for ask in self.go_round()]
        self.time.ms = start + ms
        return asked


@pytest.fixture
def process() -> Process:
    return Process()


def test_all_circuits_report_in_one_pipeline(process: Process) -> None:
    for circuit in process.held:
        process.record("s", circuit)
    reports = [count for _, what, count in process.go_on(SLOW_FLUSH) if what == "run"]
    assert reports == [MANY]


def test_quiet_circuits_are_polled_together_and_nothing_else(process: Process) -> None:
    process.go_on(POLL)
    asked = process.go_on(5 * POLL)
    # The one more is the circuit that every session by hand has.
    assert [(what, count) for _, what, count in asked] == [("poll", MANY + 1)] * 5


def test_a_circuit_that_reports_is_not_polled(process: Process) -> None:
    for circuit in process.held:
        process.record("s", circuit)
    asked = process.go_on(SLOW_FLUSH)
    assert sum(count for _, what, count in asked if what == "poll") <= 1 + MANY
    for _ in range(3):
        for circuit in [process.circuit, *process.held]:
            process.record("s", circuit)
        assert {what for _, what, _ in process.go_on(SLOW_FLUSH)} == {"run"}


def test_the_flush_interval_and_its_bound(process: Process) -> None:
    """A bad outcome goes out at once.  Good ones wait for at most SLOW_FLUSH, and for at most
    FAST_FLUSH while the window has bad ones; afterwards it is as before."""
    healthy, failing = process.held[:2]

    def reports(ms: int) -> list[int]:
        """The times between reports while both circuits succeed all the time."""
        times = []
        for now in range(0, ms, 10):
            process.record("s", healthy)
            process.record("s", failing)
            times += [now for _, what, _ in process.go_on(10) if what == "run"]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    assert all(SLOW_FLUSH - 20 <= wait <= SLOW_FLUSH for wait in reports(20_000))
    process.record("f", failing)
    assert process.due() == 0, "at once"
    assert all(FAST_FLUSH - 20 <= wait <= FAST_FLUSH for wait in reports(40_000))
    process.go_on(NUMBERS.window)
    assert all(SLOW_FLUSH - 20 <= wait <= SLOW_FLUSH for wait in reports(20_000))


def test_only_restless_circuits_are_looked_at_between_sweeps(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    flush_due = LinkedCircuit.flush_due

    def look(circuit: LinkedCircuit, now: int) -> bool:
        looked.append(circuit.name)
        return flush_due(circuit, now)

    monkeypatch.setattr(LinkedCircuit, "flush_due", look)
    process.record("f", process.held[7])
    process.go_on(10 * SLOW_FLUSH)
    counts = Counter(looked)
    assert counts.pop("c7") >= 10 * SLOW_FLUSH / FAST_FLUSH - 10
    assert set(counts.values()) <= {10, 11}


def test_nothing_is_left_of_the_generations_before(registry: CircuitBreakerRegistry) -> None:
    """A name that was left over in a loop kept the last of them, and a circuit that had ever
    tripped was looked at again and again, as if it had something to tell."""
    breaker = registry.breaker("b", STURDY)
    for step in (breaker.force_open, breaker.reset) * 3:
        step()
        breaker.drain()
    assert breaker._retired == []
    assert not breaker.has_output
