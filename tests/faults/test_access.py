"""TLS, users and passwords; and that none of these secrets is ever said."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import servers
from scripts.servers import Server, ServerError
from tests.faults.proxy import stub
from tests.fleet.harness import CIRCUIT, PATIENT, Fleet, client_of, until
from tests.required import need

SECRET = "s3cret-pa55"
ADJUST = PATIENT
USER = "u5er-name"


@pytest.fixture
def encrypted(certificate: tuple[Path, Path]) -> Iterator[tuple[Server, int]]:
    """A server that also speaks TLS, and the port on which it does."""
    cert, key = certificate
    reasons = []
    for kind in ("redis", "redis8", "valkey"):
        if servers.why_missing(kind):
            reasons.append(servers.why_missing(kind))
            continue
        port = servers._free_port()
        options = f"--tls-port {port} --tls-cert-file {cert} --tls-key-file {key} "
        options += f"--tls-ca-cert-file {cert} --tls-auth-clients no"
        with contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(Server.start(kind, tcp=True, args=options.split()))
            except ServerError as error:
                reasons.append(f"{kind} was built without TLS, or: {str(error)[-200:]}")
                continue
            yield server, port
            return
    need("no server with TLS: " + "; ".join(reasons))


def works(fleet: Fleet) -> None:
    fleet.start(2, {})
    fleet.do("succeed")
    fleet.do("flush")
    fleet.do("fail", count=5)
    fleet.until_all("open")
    assert fleet[0].do("fleet_snapshot") == {CIRCUIT: "open"}


def said_by(fleet: Fleet) -> str:
    return "\n".join(fleet.do("say_all"))


def test_tls(
    encrypted: tuple[Server, int],
    certificate: tuple[Path, Path],
    fleet_of: Callable[[str], Fleet],
) -> None:
    fleet = fleet_of(f"rediss://localhost:{encrypted[1]}/0?ssl_ca_certs={certificate[0]}")
    works(fleet)


def test_tls_with_a_user(
    encrypted: tuple[Server, int],
    certificate: tuple[Path, Path],
    fleet_of: Callable[[str], Fleet],
) -> None:
    server, port = encrypted
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", USER, "on", f">{SECRET}", "~*", "&*", "+@all")
    fleet = fleet_of(f"rediss://{USER}:{SECRET}@localhost:{port}/0?ssl_ca_certs={certificate[0]}")
    works(fleet)
    assert SECRET not in said_by(fleet)


def test_tls_to_a_stranger(encrypted: tuple[Server, int], fleet_of: Callable[[str], Fleet]) -> None:
    """A certificate that nobody vouches for: degraded, and nothing is sent."""
    fleet = fleet_of(f"rediss://{USER}:{SECRET}@localhost:{encrypted[1]}/0")
    (process,) = fleet.start(1, blank=True)
    (said,) = fleet.open([process], {}, first="attempt")
    assert said["admitted"]
    until(lambda: process.do("look")["degraded"], "degraded")
    assert process.fail_until_refused() >= 5
    assert SECRET not in said_by(fleet)
    assert encrypted[0].running
    with client_of(encrypted[0]) as client:
        assert client.dbsize() == 0


@pytest.mark.servers("valkey")
def test_tls_to_a_server_that_speaks_none(
    server: Server, own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet]
) -> None:
    plain = own_server(tcp=True)
    fleet = fleet_of(plain.url.replace("redis://", f"rediss://{USER}:{SECRET}@"))
    fleet.adjust = {}  # Nobody answers, so patience would only cost time.
    (process,) = fleet.start(1, blank=True)
    (said,) = fleet.open([process], {}, first="attempt")
    assert said["admitted"]
    until(lambda: process.do("look")["degraded"], "degraded")
    assert SECRET not in said_by(fleet)


@pytest.mark.servers("valkey", "redis8", "redis")
@pytest.mark.parametrize("tcp", [False, True])
def test_a_user_with_a_password(
    own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet], tcp: bool
) -> None:
    server = own_server(tcp=tcp)
    awkward = "p%2Fa%40s%23s%3F"  # p/a@s#s?
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", USER, "on", ">p/a@s#s?", "~*", "&*", "+@all")
    scheme, _, rest = server.url.partition("://")
    fleet = fleet_of(f"{scheme}://{USER}:{awkward}@{rest}")
    works(fleet)
    said = said_by(fleet)
    assert "p/a@s#s?" not in said
    assert awkward not in said


@pytest.mark.servers("valkey")
def test_a_password_alone(
    own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet]
) -> None:
    server = own_server(args=["--requirepass", SECRET])
    works(fleet_of(server.url.replace("unix://", f"unix://:{SECRET}@")))
    blocked = fleet_of(server.url)
    (process,) = blocked.start(1, blank=True)
    (said,) = blocked.open([process], {}, first="attempt")
    assert said["admitted"]
    assert process.do("look")["down"] == "NOAUTH"


@pytest.mark.servers("valkey")
def test_another_database(
    own_server: Callable[..., Server], fleet_of: Callable[..., Fleet]
) -> None:
    """Pub/sub ignores database numbers, so the channel holds it."""
    server = own_server()
    here, there = fleet_of(server.url + "?db=0"), fleet_of(server.url + "?db=7")
    works(here)
    (process,) = there.start(1, {})
    assert process.do("attempt")["admitted"]
    assert here[0].do("operate", step="force_open") == ""
    here.until_all("forced_open")
    process.do("flush")
    assert process.do("attempt")["admitted"]
    with contextlib.closing(server.client(db=7, decode_responses=True)) as client:
        assert there.stored(client).state == "closed"


STRANGERS = {
    "refusing": b"-WRONGPASS invalid username-password pair or user is disabled.\r\n",
    "too old": b"-ERR unknown command 'HELLO'\r\n",
    "no redis": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "redis+cluster"])
@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-name.invalid"])
def test_no_secret_is_said_when_nobody_is_there(
    fleet_of: Callable[[str], Fleet], scheme: str, host: str
) -> None:
    path = {"redis+sentinel": "/mymaster/0", "redis+cluster": ""}.get(scheme, "/0")
    says_no_secret(fleet_of(f"{scheme}://{USER}:{SECRET}@{host}{path}"))


@pytest.mark.parametrize("what", STRANGERS)
def test_no_secret_is_said_when_the_store_cannot_be_used(
    fleet_of: Callable[[str], Fleet], what: str
) -> None:
    with stub({"*": STRANGERS[what]}) as there:
        says_no_secret(fleet_of(there.url.replace("unix://", f"unix://{USER}:{SECRET}@")))


def says_no_secret(fleet: Fleet) -> None:
    (process,) = fleet.start(1, blank=True)
    (said,) = fleet.open([process], {}, first="attempt")
    assert said["admitted"]
    until(lambda: process.do("look")["down"], "it is down")
    assert process.fail_until_refused() >= 5
    everything = said_by(fleet)
    assert "StoreUnavailable" in everything
    assert SECRET not in everything
    assert USER not in everything


@pytest.mark.servers("valkey")
def test_no_secret_of_an_error_reaches_the_store(
    own_server: Callable[..., Server], fleet_of: Callable[[str], Fleet]
) -> None:
    """Errors quote connection URLs, statements and parameters; the log keeps none of them."""
    server = own_server()
    fleet = fleet_of(server.url)
    fleet.start(1, {})
    message = (
        f"cannot connect to postgresql://{USER}:{SECRET}@db.example/x: timeout "
        f"[SQL: SELECT card FROM cards WHERE pin = %(pin)s] [parameters: {{'pin': '{SECRET}'}}]\n"
        f"(Background on this error at: {SECRET})"
    )
    fleet[0].do("fail", count=5, message=message)
    fleet.until_all("open")
    with client_of(server) as client:
        kept = " ".join(map(str, client.hgetall(f"cb:{{{fleet.namespace}:{CIRCUIT}}}").values()))
        kept += str(fleet.log(client))
    assert "cannot connect to" in kept
    assert SECRET not in kept
    assert SECRET not in said_by(fleet)
