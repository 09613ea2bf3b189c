"""A clock that only a test moves, and outboxes on one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_breaker.fallback.outbox import Outbox
from tests.fallback.outboxes import Make, outboxes
from tests.unit.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1_700_000_000.0)


@pytest.fixture
def make(tmp_path: Path, clock: FakeClock) -> Iterator[Make]:
    with outboxes(tmp_path / "outbox.db", clock) as make:
        yield make


@pytest.fixture
def outbox(make: Make) -> Outbox:
    return make()
