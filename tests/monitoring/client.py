"""Asks the endpoints as their users do: over HTTP, and for as long as events come."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

import distributed_breaker.monitoring
from tests.fleet.process import BOUND

PREFIX = "/circuit-breakers"


class Said(NamedTuple):
    """An answer; the names of headers are in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """Where the endpoints are."""

    def __init__(self, port: int, prefix: str = PREFIX) -> None:
        self.port = port
        self.prefix = prefix

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: Any = None
    ) -> Said:
        """Ask for a path below the prefix; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND)
        with contextlib.closing(connection):
            sent = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, self.prefix + path, sent, headers or {})
            answer = connection.getresponse()
            return Said(answer.status, _headers(answer), answer.read())

    def get(self, path: str, **headers: str) -> Any:
        """The JSON at a path."""
        return self.ask("GET", path, headers).json

    def post(self, action: str, token: str = "", **body: Any) -> Said:
        """Step in."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self.ask("POST", f"/{action}", headers, body)

    @contextlib.contextmanager
    def events(self) -> Iterator[Iterator[tuple[str, Any]]]:
        """Watch: kinds of events and their documents, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND)
        with contextlib.closing(connection):
            connection.request("GET", f"{self.prefix}/events")
            answer = connection.getresponse()
            assert answer.status == 200
            assert _headers(answer)["content-type"] == "text/event-stream"
            with contextlib.closing(answer):
                yield _events(answer)


def _headers(answer: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in answer.getheaders()}


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    kind = ""
    for line in iter(answer.readline, b""):
        name, _, value = line.rstrip(b"\n").partition(b": ")
        if name == b"event":
            kind = value.decode()
        elif name == b"data":
            yield kind, json.loads(value)


def first(events: Iterator[tuple[str, Any]], wanted: str, **keys: Any) -> Any:
    """The next event of a kind, whose document has these values."""
    for kind, document in events:
        if kind == wanted and all(document.get(key) == value for key, value in keys.items()):
            return document
    raise AssertionError(f"the stream has ended without {wanted!r}")


def valid(document: Any, name: str) -> Any:
    """The document, which is what the schema promises."""
    _validator(name).validate(document)
    return document


@functools.cache
def _validator(name: str) -> Any:
    folder = Path(distributed_breaker.monitoring.__path__[0])
    schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    checker = jsonschema.Draft202012Validator
    checker.check_schema(schema)
    return checker({**schema, "$ref": f"#/$defs/{name}"})
