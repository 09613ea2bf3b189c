"""What requests', urllib3's and httpx's own documentation says of timeouts and retries holds for
their sessions and clients under the rules, too."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests

from distributed_breaker.clients.http import HttpClient
from tests.http import service as does
from tests.http.conftest import Start
from tests.http.service import Service, answer
from tests.http.test_outcomes import counts

Get = Callable[..., Any]


@pytest.fixture
def client(start: Start) -> HttpClient:
    return start(max_retries=0, total_timeout=30, connect_timeout=20, read_timeout=20)


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a listener that takes no connection any more."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def of_requests(client: HttpClient, url: str, timeout: Any) -> Any:
    with client.mount(requests.Session()) as session:
        return session.get(url, timeout=timeout)


def of_httpx(client: HttpClient, url: str, timeout: Any) -> Any:
    with httpx.Client(transport=client.transport(), timeout=timeout) as plain:
        return plain.get(url)


QUICK = {of_requests: (0.1, 0.1), of_httpx: httpx.Timeout(0.1)}
SLOW = {of_requests: (20, 20), of_httpx: httpx.Timeout(20)}
LATE_READ = {of_requests: (20, 0.1), of_httpx: httpx.Timeout(20, read=0.1)}
LATE_CONNECT = {of_requests: (0.1, 20), of_httpx: httpx.Timeout(20, connect=0.1)}


@pytest.mark.parametrize("get", [of_requests, of_httpx])
def test_which_timeout_it_was(client: HttpClient, service: Service, nobody: str, get: Get) -> None:
    service.scripts["/silent"] = [does.silent]
    for timeout in (QUICK, LATE_CONNECT):
        with pytest.raises((requests.ConnectTimeout, httpx.ConnectTimeout)):
            get(client, nobody, timeout[get])
    for timeout in (QUICK, LATE_READ):
        with pytest.raises((requests.ReadTimeout, httpx.ReadTimeout)):
            get(client, f"{service.url}/silent", timeout[get])
    assert counts(client) == (0, 2, 0)
    assert client.circuit_of(nobody).snapshot().totals["failures"] == 2
    for endless in (None, SLOW[get]):
        assert get(client, f"{service.url}/x", endless).status_code == 200


def test_httpxs_pool_timeout(client: HttpClient, service: Service) -> None:
    service.scripts["/drip"] = [does.drip]
    transport = client.transport(limits=httpx.Limits(max_connections=1))
    timeout = httpx.Timeout(20, pool=0.1)
    with httpx.Client(transport=transport, timeout=timeout) as plain:
        begun = time.monotonic()
        with plain.stream("GET", f"{service.url}/drip"), pytest.raises(httpx.PoolTimeout):
            plain.get(f"{service.url}/x")
        assert time.monotonic() - begun < 15, "its own, not the call's total_timeout"
        assert plain.get(f"{service.url}/x").status_code == 200


@pytest.mark.parametrize(
    ("method", "status", "attempts"),
    [
        ("GET", 503, 3), ("PUT", 503, 3), ("DELETE", 503, 3), ("HEAD", 503, 3),
        ("POST", 503, 1), ("PATCH", 503, 1), ("GET", 404, 1), ("GET", 413, 1),
    ],
)  # fmt: skip
def test_what_urllib3_would_try_again(
    start: Start, service: Service, method: str, status: int, attempts: int
) -> None:
    """By its ``Retry(2, status_forcelist=[503])``; the last answer is returned, as it says of
    ``raise_on_status=False``."""
    client = start(max_retries=2, retry_on_status=[503])
    service.scripts["/x"] = [answer(status)]
    with client.mount(requests.Session()) as session:
        assert session.request(method, f"{service.url}/x").status_code == status
    assert service.asked("/x") == attempts


def test_httpx_retries_connecting_only(start: Start, service: Service) -> None:
    """Its ``HTTPTransport(retries=1)``, which tries connecting again, and nothing else."""
    client = start(max_retries=0)
    service.scripts["/x"] = [does.reset]
    plain = httpx.Client(transport=client.transport(retries=1))
    with plain, pytest.raises(httpx.ReadError):
        plain.get(f"{service.url}/x")
    assert service.asked("/x") == 1
