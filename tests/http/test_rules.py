"""When a request is tried again, what answers instead of the service, and what waits."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import httpx
import pytest
import requests
import time_machine

from distributed_breaker import CircuitBreakerOpenException
from distributed_breaker.clients.http import HttpClient, InvalidRequest
from scripts.servers import Server
from tests.http import service as does
from tests.http.conftest import BRITTLE, Start
from tests.http.service import Service, answer, to
from tests.http.test_outcomes import LIBRARIES, ask, counts
from tests.unit.clock import wait_until

# ---------------------------------------------------------------------------- another attempt


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_request_that_may_be_repeated_is(
    client: HttpClient, service: Service, library: str
) -> None:
    service.scripts["/x"] = [answer(500), does.reset, does.half, answer(200, "there")]
    assert ask(client, library, "GET", "/x").json() == "there"
    assert counts(client) == (1, 3, 0), "every attempt is an outcome"
    assert client.stats()["retries"] == 3
    service.scripts["/p"] = [answer(503), answer(200)]
    assert ask(client, library, "POST", "/p", json={}, idempotency_key="k").status_code == 200
    assert [s[2]["Idempotency-Key"] for s in service.seen[4:]] == ["k", "k"]
    assert service.seen[4][3] == service.seen[5][3] == b"{}"


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("misbehaves", [answer(503), does.reset, does.half])
def test_a_post_is_sent_once(
    client: HttpClient, service: Service, library: str, misbehaves: does.Does
) -> None:
    service.scripts["/x"] = [misbehaves]
    with contextlib.suppress(requests.RequestException, httpx.HTTPError):
        ask(client, library, "POST", "/x", json={})
    assert service.asked("/x") == 1


def test_attempts_are_bounded_by_number_time_budget_and_circuit(
    start: Start, service: Service
) -> None:
    service.scripts["/x"] = [answer(500)]
    client = start(max_retries=2)
    assert client.get("/x").status_code == 500
    assert service.asked("/x") == 3
    client.get("/x", retry=False)
    assert service.asked("/x") == 4
    service.scripts["/later"] = [answer(500, Retry_After="3")]
    client.get("/later", total_timeout=2)
    assert service.asked("/later") == 1, "its Retry-After is beyond the call's time"
    start(failure_threshold=2, max_retries=5).get("/x")
    assert service.asked("/x") == 6, "the circuit opens after two"
    client = start(max_retries=1, retry_budget=0.05)
    before = service.asked("/x")
    for _ in range(100):
        client.get("/x")
    retries = service.asked("/x") - before - 100
    assert retries == 5, "a twentieth of a hundred, which was lent the first of them"
    assert client.stats()["retries_over_budget"] == 100 - retries


def test_a_forks_child_earns_retries_by_its_own_requests(start: Start, service: Service) -> None:
    """Pinned: they counted anew, and its budget went on with its parent's."""
    client = start(max_retries=1, retry_budget=0.05)
    client.counts.add("requests", 10_000)
    assert client.may_retry()
    client.forked()
    client.counts.add("requests", 200)
    assert [client.may_retry() for _ in range(6)] == [True] * 5 + [False]
    client.counts.add("requests", 100)
    assert [client.may_retry() for _ in range(6)] == [True] * 5 + [False]


def test_a_short_retry_after_is_waited_for(start: Start, service: Service) -> None:
    service.scripts["/x"] = [answer(500, Retry_After="1"), answer(200)]
    begun = time.monotonic()
    assert start().get("/x").status_code == 200
    assert time.monotonic() - begun >= 1


def test_timeouts_are_shorter_while_the_service_is_slow_or_on_trial(
    start: Start, service: Service
) -> None:
    client = start(read_timeout=0.2, max_retries=0, failure_threshold=1, timeout=0.001)
    options = client._prepare({})[0]
    permit = client.breaker.acquire()
    assert client.timeouts(options, permit) == (1.0, 0.2)
    service.scripts["/x"] = [does.silent]
    with pytest.raises(requests.Timeout):
        client.get("/x")
    assert 0.1 < client.timeouts(options, permit)[1] < 0.2
    wait_until(lambda: not client.breaker.refusing)
    probe = client.breaker.acquire()
    assert probe.is_probe
    assert client.timeouts(options, probe)[1] == 0.1


# ---------------------------------------------------------------------------- instead of it


@pytest.mark.parametrize("library", LIBRARIES)
def test_stored_answers_by_vary_and_by_who_asks(
    start: Start, service: Service, library: str
) -> None:
    client = start(**BRITTLE)

    def get(language: str = "de", token: str = "mine", path: str = "/x") -> Any:
        headers = {"Accept-Language": language, "Authorization": token}
        return ask(client, library, "GET", path, headers=headers)

    service.scripts["/x"] = [answer(200, "Katze", Vary="Accept-Language", Set_Cookie="a=b")]
    service.scripts["/secret"] = [answer(200, "x", Cache_Control="no-store")]
    assert not get().stale
    get(path="/secret")
    client.session.cookies.clear()  # they are credentials as well
    client.breaker.force_open()
    response = get()
    assert (response.json(), response.stale, response.fallback) == ("Katze", True, "stale")
    assert response.headers["X-Circuit-Breaker"] == "stale"
    assert response.headers["Age"] == "0"
    assert "Set-Cookie" not in response.headers
    for other in ({"language": "fr"}, {"token": "theirs"}, {"path": "/secret"}, {"path": "/y"}):
        with pytest.raises(CircuitBreakerOpenException):
            get(**other)
    assert ask(client, library, "GET", "/y", default={"a": 1}).json() == {"a": 1}
    assert (
        ask(client, library, "GET", "/y", fallback=lambda refused: refused.state) == "forced_open"
    )
    client.breaker.release()
    service.scripts["/x"] = [does.reset]
    assert get().stale, "the attempt that opens the circuit again is answered, too"
    assert client.breaker.state == "open"


def test_not_modified_makes_a_stored_answer_young_again(start: Start, service: Service) -> None:
    client = start(**BRITTLE)
    service.scripts["/x"] = [
        answer(200, "Katze", ETag='"1"', Vary="Accept"), answer(304, b"", ETag='"1"'),
        answer(304, b"", ETag='"2"'), answer(304, b""),
    ]  # fmt: skip
    ages = []
    with time_machine.travel(1_800_000_000, tick=False) as traveller:
        for _ in range(4):
            client.get("/x", headers={"If-None-Match": "any"})
            traveller.shift(10)
            client.breaker.force_open()
            ages.append(client.get("/x").headers["Age"])
            client.breaker.release()
    assert ages == ["10", "10", "20", "30"], "only the one of the same tag"


def test_a_plain_get_is_answered_at_once_for_who_asked(start: Start, service: Service) -> None:
    client = start(**BRITTLE)
    client.session.headers["X-Api-Key"] = "mine"
    fresh = client.get("/x")
    assert not fresh.stale
    client.breaker.force_open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.session, "prepare_request", None)  # that is what would take long
        stored = client.get("/x")
    assert (stored.stale, stored.content, stored.url) == (True, fresh.content, fresh.url)
    assert client.stats()["served_stale"] == 1
    totals = client.breaker.snapshot().totals
    assert (totals["rejected"], totals["fallbacks"]) == (1, 1)
    for change in (
        lambda: client.session.headers.update({"X-Api-Key": "theirs"}),
        lambda: client.headers.update({"Authorization": "theirs"}),
        lambda: setattr(client.session, "auth", ("they", "secret")),
        lambda: client.session.cookies.set("sid", "theirs"),
    ):
        change()
        with pytest.raises(CircuitBreakerOpenException):
            client.get("/x")
    client.session.cookies.clear()
    client.session.auth = None
    client.headers.clear()
    client.session.headers["X-Api-Key"] = "mine"
    assert client.get("/x").stale
    client.breaker.release()
    assert not client.get("/x").stale


def test_what_the_file_says_of_fallbacks(start: Start, service: Service) -> None:
    client = start(default_response={"message": "later"}, enable_cached_response_fallback=False)
    client.get("/x")
    client.breaker.force_open()
    response = client.post("/x", json={})
    assert (response.status_code, response.json()) == (200, {"message": "later"})
    assert response.headers["X-Circuit-Breaker"] == response.fallback == "default"
    assert client.get("/x").fallback == "default", "nothing was stored"
    client.get("/x", fallback=lambda refused: None)
    assert not service.asked("/x") > 1
    assert client.breaker.snapshot().totals["fallbacks"] == 3
    assert (client.stats()["defaults"], client.stats()["fallbacks"]) == (2, 1)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_waits_is_sent_once_the_service_is_back(
    start: Start, service: Service, library: str
) -> None:
    client = start(enable_request_queue=True, **{**BRITTLE, "timeout": 0.05})
    client.headers = {"X-Api-Key": "secret"}
    service.scripts["/x"] = [does.reset, answer(200)]
    response = ask(client, library, "POST", "/x", json={"n": 0}, queue=True)
    assert (response.status_code, response.fallback) == (202, "queued")
    ask(client, library, "POST", "/x", json={"n": 1}, queue=True, idempotency_key="mine")
    wait_until(lambda: client.stats()["outbox"]["topics"] == {})
    bodies = [(s[3].replace(b" ", b""), s[2].get("Idempotency-Key")) for s in service.seen]
    assert [body for body, _ in bodies[1:]] == [b'{"n":0}', b'{"n":1}']
    assert bodies[1][1] == response.json()["queued"]
    assert bodies[2][1] == "mine"
    assert {s[2]["X-Api-Key"] for s in service.seen} == {"secret"}, "the client adds it anew"


def test_what_may_not_wait_does_not(start: Start, service: Service) -> None:
    client = start(enable_request_queue=True, **BRITTLE)
    client.breaker.force_open()
    with pytest.raises(CircuitBreakerOpenException):
        client.post("/x", json={})
    with pytest.raises(InvalidRequest, match="Authorization"):
        client.post("/x", json={}, headers={"Authorization": "t"}, queue=True)
    client.post("/x", json={}, queue=True)
    assert "secret" not in str(client.outbox.entries())
    client.close()
    service.scripts["/x"] = [answer(422)]
    again = start(enable_request_queue=True, **BRITTLE)
    again.get("/y")
    wait_until(lambda: again.problems())
    assert "1 requests are parked" in again.problems()[0]
    off = start()
    off.breaker.force_open()
    with pytest.raises(CircuitBreakerOpenException):
        off.post("/x", json={}, queue=True)


# ---------------------------------------------------------------------------- where to


@pytest.mark.parametrize("library", LIBRARIES)
def test_redirects_are_bounded_and_carry_no_credentials_away(
    client: HttpClient, service: Service, other: Service, library: str
) -> None:
    service.scripts["/loop"] = [to("/loop")]
    with pytest.raises((requests.TooManyRedirects, httpx.TooManyRedirects)):
        ask(client, library, "GET", "/loop")
    assert service.asked("/loop") == 4
    service.scripts["/away"] = [to(f"{other.url}/there")]
    service.scripts["/here"] = [to("/there")]
    secrets = {"Authorization": "a", "X-Api-Key": "b", "X-Auth-Token": "c", "Cookie": "d=e"}
    for path in ("/here", "/away"):
        response = ask(client, library, "GET", path, headers={**secrets, "X-Plain": "f"})
        assert len(response.history) == 1
    assert {"X-Api-Key", "X-Plain", "Authorization"} <= set(service.seen[-2][2])
    assert set(other.seen[0][2]) & set(secrets) == set()
    assert other.seen[0][2]["X-Plain"] == "f"
    assert ask(client, library, "GET", "/away", allow_redirects=False).status_code == 302


def test_hosts_have_circuits_of_their_own(start: Start, service: Service, other: Service) -> None:
    client = start(base_url=None, **BRITTLE)
    service.scripts["/x"] = [answer(500)]
    client.get(f"{service.url}/x?token=secret")
    with pytest.raises(CircuitBreakerOpenException) as refused:
        client.get(f"{service.url}/x?token=secret")
    assert refused.value.circuit == f"api.http@127.0.0.1:{service.server_port}"
    assert "secret" not in str(refused.value)
    assert client.get(f"{other.url}/x").status_code == 200
    assert client.stats()["hosts"] == {"total": 2, "open": 1}
    assert client.problems()[0].startswith("1 of 2 hosts are left alone")
    client.configure(client.section.model_copy(update={"base_url": other.url}))
    assert client.circuit_of(f"{other.url}/x") is client.breaker


def test_circuits_of_hosts_are_bounded(client: HttpClient) -> None:
    for number in range(300):
        client.circuit_of(f"http://host{number}/")
    assert len(client._hosts) == 256
    assert client.circuit_of("http://" + "h" * 200) is client.breaker


@pytest.mark.servers("valkey")
def test_the_health_check_is_the_probe(start: Start, service: Service, server: Server) -> None:
    client = start(server.url, health_check_url="/health", **{**BRITTLE, "timeout": 0.05})
    wait_until(lambda: client.breaker.check.passed)  # type: ignore[union-attr]
    assert client.breaker.check._interval == 60_000  # type: ignore[union-attr]
    service.scripts["/health"] = [answer(503), answer(200)]
    service.scripts["/x"] = [answer(500)]
    client.get("/x")
    wait_until(lambda: client.problems() or client.breaker.state == "closed")
    wait_until(lambda: client.breaker.state == "closed")
    assert service.asked("/x") == 1
    assert client.problems() == []


# ---------------------------------------------------------------------------- users' sessions


def test_a_session_of_the_users_has_the_same_rules(start: Start, service: Service) -> None:
    client = start(**{**BRITTLE, "max_retries": 1, "failure_threshold": 3})
    service.scripts["/x"] = [answer(500), answer(200, "there")]
    service.scripts["/down"] = [answer(500)]
    session = client.mount(requests.Session())
    assert session.get(f"{service.url}/x", timeout=2).json() == "there"
    with httpx.Client(transport=client.transport()) as plain:
        service.scripts["/x"] = [answer(503), answer(200, "there")]
        assert plain.get(f"{service.url}/x").json() == "there"
        assert counts(client) == (2, 2, 0)
        with plain.stream("GET", f"{service.url}/x") as response:
            assert counts(client) == (2, 2, 0)
            response.read()
        assert counts(client) == (3, 2, 0)
        service.scripts["/drip"] = [does.drip]
        with pytest.raises(httpx.ReadTimeout):
            start(total_timeout=0.3).transport().handle_request(
                httpx.Request("GET", f"{service.url}/drip")
            ).read()
        client.breaker.force_open()
        with pytest.raises(httpx.ConnectError):
            plain.get(f"{service.url}/y")
    with pytest.raises(requests.ConnectionError):
        session.get(f"{service.url}/y")

    async def main() -> None:
        async with httpx.AsyncClient(transport=client.async_transport()) as plain:
            with pytest.raises(httpx.ConnectError):
                await plain.get(f"{service.url}/y")

    asyncio.run(main())


def test_a_cancelled_request_counts_as_nothing(client: HttpClient, service: Service) -> None:
    service.scripts["/x"] = [does.silent]

    async def main() -> None:
        task = asyncio.create_task(client.get_async("/x"))
        while not service.seen:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.aclose()

    asyncio.run(main())
    assert counts(client) == (0, 0, 1)
