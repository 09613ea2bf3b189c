"""Real servers for the tests.

A test that asks for ``server`` or ``own_server`` runs on every kind of server; the marker
``servers("valkey")`` narrows it. A kind that is missing here skips the test with the reason. Where
CI is set, that is a failure: what must run and was skipped has not been shown to work.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.servers import EXTERNAL, KINDS, Server, why_missing
from tests.fleet.process import Nursery
from tests.required import need
from tests.unit.clock import forget_the_context, nothing_stays_in_the_context

REDIS_URL = os.environ.get("REDIS_URL", "")

# Most of what the explorations make lives to their end; looking at it again and again would take an
# eighth of their time.
gc.set_threshold(20_000, 20, 20)

# A shell that runs `make test &` has SIGINT ignored, and every process below it inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SERVER_KINDS = (*KINDS, EXTERNAL) if REDIS_URL else KINDS


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores: half of the tests wait for servers and processes."""
    return (os.cpu_count() or 1) + 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_kind" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("servers")
    kinds = marker.args if marker else SERVER_KINDS
    if "own_server" in metafunc.fixturenames:
        kinds = [kind for kind in kinds if kind != EXTERNAL]
    metafunc.parametrize("server_kind", kinds, indirect=True)


@pytest.fixture
def server_kind(request: pytest.FixtureRequest) -> str:
    """The kind of server that the test runs on."""
    kind: str = request.param
    need("" if kind == EXTERNAL else why_missing(kind))
    return kind


@pytest.fixture(scope="session")
def _shared_servers() -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture
def server(server_kind: str, _shared_servers: dict[str, Server]) -> Server:
    """An empty server that later tests use too: don't stop, pause or configure it."""
    if server_kind == EXTERNAL:
        # Never emptied: the unique namespace keeps the tests apart, and its data is not ours.
        return Server.external(REDIS_URL)
    if server_kind not in _shared_servers:
        _shared_servers[server_kind] = Server.start(server_kind)
    shared = _shared_servers[server_kind]
    with contextlib.closing(shared.client()) as client:
        client.flushall()
    return shared


@pytest.fixture
def own_server(server_kind: str) -> Iterator[Callable[..., Server]]:
    """Start servers that belong to this test alone, which may kill or pause them.

    ``own_server(tcp=False, args=())`` takes what ``Server.start`` takes.
    """
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Server:
            return stack.enter_context(Server.start(server_kind, **options))

        yield start


@pytest.fixture(autouse=True)
def clean_context() -> Iterator[None]:
    """What a test leaves in the context would change what the next tests of its worker see."""
    yield
    try:
        nothing_stays_in_the_context()
    finally:
        forget_the_context()


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What clients keep on disk stays out of the user's own folders."""
    folder = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        patch.setenv("XDG_STATE_HOME", folder)
        yield


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Makes the processes of all tests' fleets."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"test-{uuid.uuid4().hex[:16]}"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that has signed itself, and its key."""
    if shutil.which("openssl") is None:
        need("no openssl on PATH to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
        f"-keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key
