"""A registry without a store, on a clock that the test moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry, address, admission
from distributed_breaker.store import RedisStore
from tests.unit.clock import BRITTLE, FakeClock
from tests.unit.fake_store import Process, Server
from tests.unit.stub import Stub

# Nothing here is timed: how long an example takes says more about the machine.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry(clock: FakeClock) -> Iterator[CircuitBreakerRegistry]:
    with CircuitBreakerRegistry.from_url("memory://", clock=clock) as registry:
        yield registry


@pytest.fixture
def brittle(registry: CircuitBreakerRegistry) -> CircuitBreaker:
    """A circuit that one failure trips and one probe closes."""
    return registry.breaker("brittle", BRITTLE)


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The link survives its own defects and logs them, so they would go unnoticed here."""
    yield
    defects = [r for r in caplog.get_records("call") if r.exc_info and "listener" not in r.msg]
    assert not defects, defects[0].exc_info


@pytest.fixture
def fake_server(clock: FakeClock) -> Server:
    return Server(clock)


@pytest.fixture
def start(
    fake_server: Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Process]]:
    """Starts another process that shares the store."""
    # On a busy machine an answer may take longer than users would wait for it.
    monkeypatch.setattr(admission, "FIRST_ANSWER", 20.0)
    processes: list[Process] = []

    def start() -> Process:
        processes.append(Process(fake_server, clock))
        return processes[-1]

    yield start
    for process in processes:
        process.registry.close()


@pytest.fixture
def patience() -> float:
    """Seconds that a store waits for the stub, which may be slow on a busy machine."""
    return 10.0


@pytest.fixture
def stub(patience: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(address, "READ_TIMEOUT", patience)
    with contextlib.closing(Stub()) as stub:
        yield stub


@pytest.fixture
def store(stub: Stub) -> Iterator[RedisStore]:
    with contextlib.closing(RedisStore(f"redis://127.0.0.1:{stub.port}/0", "ns")) as store:
        yield store
