"""Programs of real processes on a server of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from scripts.servers import Server
from tests.fleet.harness import client_of
from tests.processes.launch import Program, Warden

Start = Callable[..., Program]


@pytest.fixture(scope="session")
def warden() -> Iterator[Warden]:
    warden = Warden()
    yield warden
    warden.close()


@pytest.fixture
def store(own_server: Callable[..., Server]) -> Server:
    """The breakers' store: this test's own, to break; on a port, so that the kernel tells which
    process holds which connection."""
    return own_server(tcp=True)


@pytest.fixture
def client(store: Server) -> Iterator[redis.Redis]:
    """A client for looking at the store."""
    with client_of(store) as client:
        yield client


@pytest.fixture
def start(store: Server, warden: Warden, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Start a program: ``start("-m", "gunicorn", …, VARIABLE="value")``."""
    with contextlib.ExitStack() as stack:

        def starting(*arguments: str, **more: str) -> Program:
            program = Program(warden, tmp_path, arguments, store.url, namespace, **more)
            stack.callback(program.end)
            return program

        yield starting


@pytest.fixture
def address(store: Server) -> Path:
    """For the web server's socket: short enough, and removed with the store's folder."""
    return store._folder / "web"
