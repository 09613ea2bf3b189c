"""What each kind of answer and of misbehaviour is to the circuit, with both libraries."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.clients.http import HttpClient
from distributed_breaker.clients.http_answers import InvalidAnswer
from tests.http import service as does
from tests.http.conftest import BRITTLE, Start
from tests.http.service import Service, answer

LIBRARIES = ("requests", "httpx")
ERRORS = (requests.RequestException, httpx.HTTPError)


def ask(client: HttpClient, library: str, method: str, path: str, **kwargs: Any) -> Any:
    """One request with one of the libraries."""
    if library == "requests":
        return client.request(method, path, **kwargs)

    async def main() -> Any:
        try:
            return await client.request_async(method, path, **kwargs)
        finally:
            await client.aclose()

    return asyncio.run(main())


def counts(client: HttpClient) -> tuple[int, int, int]:
    """Successes, failures and ignored ones that the circuit has counted."""
    totals = client.breaker.snapshot().totals
    good = totals["calls"] - totals["failures"] - totals["ignored"]
    return good, totals["failures"], totals["ignored"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("status", "counted"),
    [
        (200, (1, 0, 0)), (204, (1, 0, 0)), (304, (1, 0, 0)), (400, (1, 0, 0)), (401, (1, 0, 0)),
        (404, (1, 0, 0)), (409, (1, 0, 0)), (422, (1, 0, 0)), (408, (0, 1, 0)), (425, (0, 1, 0)),
        (429, (0, 1, 0)), (500, (0, 1, 0)), (501, (0, 1, 0)), (503, (0, 1, 0)), (599, (0, 1, 0)),
    ],
)  # fmt: skip
def test_each_status_is_what_the_table_says(
    start: Start, service: Service, library: str, status: int, counted: tuple[int, int, int]
) -> None:
    service.scripts["/x"] = [answer(status, b"" if status in (204, 304) else b"{}")]
    client = start(max_retries=0)
    response = ask(client, library, "GET", "/x")
    assert response.status_code == status, "the answer is the library's own, and nothing is raised"
    assert (response.stale, response.fallback) == (False, "")
    assert counts(client) == counted


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "misbehaves", [does.reset, does.half, does.giant, does.drip, does.drip_headers, does.silent]
)
def test_each_misbehaviour_is_one_failure_and_the_librarys_own_error(
    start: Start, service: Service, library: str, misbehaves: does.Does
) -> None:
    service.scripts["/x"] = [misbehaves]
    client = start(max_retries=0, max_response_size=1_000_000, read_timeout=20)
    begun, total = time.monotonic(), 5.0 if misbehaves is does.giant else 0.3
    with pytest.raises(ERRORS) as caught:
        ask(client, library, "GET", "/x", total_timeout=total)
    assert time.monotonic() - begun < 5, "what never ends is ended"
    assert type(caught.value).__module__.split(".")[0] in (library, "distributed_breaker")
    assert isinstance(caught.value, requests.RequestException) is (library == "requests")
    assert isinstance(caught.value, InvalidAnswer) is (misbehaves is does.giant)
    assert counts(client) == (0, 1, 0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_host_that_is_not_there_is_a_failure(start: Start, library: str) -> None:
    client = start(base_url="http://127.0.0.1:1", **BRITTLE)
    with pytest.raises(ERRORS) as caught:
        ask(client, library, "GET", "/")
    assert type(caught.value).__name__ in ("ConnectionError", "ConnectError")
    with pytest.raises(CircuitBreakerOpenException) as refused:
        ask(client, library, "GET", "/")
    native = {"requests": requests.ConnectionError, "httpx": httpx.ConnectError}[library]
    assert isinstance(refused.value, native)
    assert refused.value.retry_after > 50


@pytest.mark.parametrize("library", LIBRARIES)
def test_mistakes_of_the_callers_count_as_nothing(
    start: Start, library: str, service: Service
) -> None:
    client = start(refuse_private_hosts=True)
    with pytest.raises(ValueError, match="not a public host"):
        ask(client, library, "GET", "/x")
    client = start(base_url=None)
    with pytest.raises(ValueError, match=r"api\.http has no base_url"):
        ask(client, library, "GET", "/x?token=1")
    with pytest.raises(ValueError, match="request is not valid"):
        ask(client, library, "POST", service.url, json=1, validate_request={"type": "object"})
    assert counts(client)[:2] == (0, 0)
    assert service.seen == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_answer_that_is_not_valid_is_a_failure(
    start: Start, service: Service, library: str
) -> None:
    from pydantic import BaseModel

    class Cat(BaseModel):
        name: str

    client = start(max_retries=0)
    service.scripts["/x"] = [answer(200, {"name": 5})]
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    for validate in (schema, Cat, lambda response: response.json()["name"] != 5):
        with pytest.raises(InvalidAnswer) as caught:
            ask(client, library, "GET", "/x", validate=validate)
        assert caught.value.response.status_code == 200
    with pytest.raises(InvalidAnswer, match="not text/html"):
        ask(client, library, "GET", "/x", content_types=("text/html",))
    service.scripts["/x"] = [answer(200, b"<html>")]
    with pytest.raises(InvalidAnswer, match="not JSON"):
        ask(start(max_retries=0, validate_response_json=True), library, "GET", "/x")
    assert counts(client) == (0, 4, 0)
    service.scripts["/x"] = [answer(200, {"name": "Tom"})]
    assert ask(client, library, "GET", "/x", validate=schema).json() == {"name": "Tom"}


def test_what_counts_can_be_said_by_the_file_the_call_and_the_client(
    start: Start, service: Service
) -> None:
    from distributed_breaker import Outcome

    client = start(max_retries=0, expected_status_codes=[200])
    service.scripts["/x"] = [answer(202)]
    client.get("/x")
    assert counts(client) == (0, 1, 0)
    client.get("/x", expected_statuses=(202,))
    client.judge = lambda status: Outcome.IGNORED if status == 202 else None
    client.get("/x")
    assert counts(client) == (1, 1, 1)


@pytest.mark.parametrize("how", ["whole", "closed", "half"])
def test_the_outcome_of_a_stream_comes_with_its_end(
    client: HttpClient, service: Service, how: str
) -> None:
    service.scripts["/x"] = [does.half if how == "half" else answer(200, b"x" * 300_000)]
    response = client.get("/x", stream=True)
    assert counts(client) == (0, 0, 0)
    pieces = response.iter_content(1_000)
    assert next(pieces) if how != "half" else True
    if how == "whole":
        assert sum(map(len, pieces)) == 299_000
    elif how == "closed":
        response.close()
    else:
        with pytest.raises(requests.RequestException):
            list(pieces)
    expected = {"whole": (1, 0, 0), "closed": (0, 0, 1), "half": (0, 1, 0)}
    assert counts(client) == expected[how]


@pytest.mark.parametrize("library", LIBRARIES)
def test_certificates(
    start: Start, certificate: tuple[Path, Path], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Service(certificate)) as service:
        client = start(base_url=service.url)
        with pytest.raises(ERRORS, match=r"(?i)certificate"):
            ask(client, library, "GET", "/x")
        assert counts(client) == (0, 1, 0), "a stranger's; it is not tried again"
        for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
            monkeypatch.setenv(variable, str(certificate[0]))
        client = start(base_url=service.url)
        assert ask(client, library, "GET", "/x").status_code == 200
        times = client.stats()["times"]
        assert {phase for phase in times if times[phase]["count"]} == {
            "connect", "tls", "wait", "read",
        }  # fmt: skip
        assert all(spent["seconds"] > 0 for spent in times.values() if spent["count"])


@pytest.mark.parametrize("library", [*LIBRARIES, "httpx, blocking"])
def test_a_handshake_that_never_ends_is_ended(start: Start, library: str) -> None:
    with does.dripping() as port:
        url = f"https://127.0.0.1:{port}"
        client = start(
            base_url=url, max_retries=0, total_timeout=0.3, connect_timeout=60, read_timeout=60
        )

        def blocking() -> None:
            with httpx.Client(transport=client.transport(), timeout=None) as plain:
                plain.get(url)

        begun = time.monotonic()
        with pytest.raises(ERRORS):
            blocking() if library not in LIBRARIES else ask(client, library, "GET", "/")
        assert time.monotonic() - begun < 5
        assert counts(client) == (0, 1, 0)
        gc.collect()  # a connection that was left open would be told


def test_the_look_up_of_a_host_is_timed(start: Start, service: Service) -> None:
    client = start(base_url=service.url.replace("127.0.0.1", "localhost"))
    client.get("/x")
    client.get("/x")
    counted = {phase: spent["count"] for phase, spent in client.stats()["times"].items()}
    assert counted == {"dns": 1, "connect": 1, "tls": 0, "wait": 2, "read": 2}


def test_counts_are_exact_under_threads(client: HttpClient) -> None:
    class One(int):
        """Lets others run between the reading and the writing of a sum."""

        def __radd__(self, other: int) -> int:
            time.sleep(0)
            return other + 1

    def count() -> None:
        for _ in range(500):
            client.counts.add("requests", One())

    with ThreadPoolExecutor(4) as pool:
        for work in [pool.submit(count) for _ in range(4)]:
            work.result()
    assert client.stats()["requests"] == 2_000


def test_each_request_of_a_loop_has_bounds_of_its_own(start: Start, service: Service) -> None:
    """Pinned: while one that refuses private hosts connected, the others refused them as well."""
    strict, free = start(refuse_private_hosts=True, max_retries=0), start()
    looking, looked = asyncio.Event(), asyncio.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        look_up = loop.getaddrinfo

        async def slowly(*args: Any, **kwargs: Any) -> Any:
            looking.set()
            await looked.wait()
            return await look_up(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "getaddrinfo", slowly)
            refused = asyncio.create_task(strict.get_async("/x"))
            await asyncio.wait_for(looking.wait(), 10)
            patch.undo()
            assert (await free.get_async("/x")).status_code == 200
            looked.set()
        with pytest.raises(ValueError, match="not a public host"):
            await refused
        await strict.aclose()
        await free.aclose()

    asyncio.run(main())


def test_three_times_not_found_opens_nothing(start: Start, service: Service) -> None:
    client = start(failure_threshold=3)
    service.scripts["/x"] = [answer(404)]
    for _ in range(4):
        assert client.get("/x").status_code == 404
    assert client.breaker.state == "closed"


def test_files_and_all_verbs(client: HttpClient, service: Service) -> None:
    client.post("/files", files={"one": ("a.txt", b"inside")})
    assert b"inside" in service.seen[-1][3]
    for verb in ("get", "put", "patch", "delete", "head", "options"):
        assert getattr(client, verb)("/x").status_code == 200
    assert [one[0] for one in service.seen[1:]] == "GET PUT PATCH DELETE HEAD OPTIONS".split()
