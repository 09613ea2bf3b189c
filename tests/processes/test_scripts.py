"""Plain scripts: how they end by signals, and what they have said by then."""

from __future__ import annotations

import signal

import pytest
import redis

from tests.fleet.process import until
from tests.processes.conftest import Start
from tests.processes.launch import Program

pytestmark = pytest.mark.servers("valkey")


def run(start: Start, how: str, number: int) -> Program:
    """A script that was sent a signal while outcomes wait, and has ended."""
    program = start("-m", "tests.processes.apps.script", how)
    until(lambda: program.noted("ready") or not program.running, "it is ready")
    program.signal(number)
    return program


@pytest.mark.parametrize(
    ("how", "number"), [("waits", signal.SIGINT), ("exits_by_signal", signal.SIGTERM)]
)
def test_a_script_that_handles_its_signal_loses_nothing(
    start: Start, client: redis.Redis, how: str, number: int
) -> None:
    program = run(start, how, number)
    assert program.wait() == 0
    program.audit(client, "counted")
    assert program.totals(client, "counted")["dropped"] == 0


def test_a_script_that_does_not_is_ended_at_once(start: Start, client: redis.Redis) -> None:
    """The library installs no handler, so what waited is lost, and nothing else."""
    program = run(start, "waits", signal.SIGTERM)
    assert program.wait() == -signal.SIGTERM
    assert program.totals(client, "counted")["calls"] in range(41)
    program.audit_log()


# How long the exit takes decides whether the listener can end by chance, so it may also pass.
def test_listeners_hear_the_last_transition(start: Start) -> None:
    program = start("-m", "tests.processes.apps.script", "listens")
    assert program.wait() == 0
    assert program.noted("heard late", new="open"), program.log()
