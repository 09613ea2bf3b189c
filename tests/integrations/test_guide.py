"""The lines of docs/integrations.md, as they stand there."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import State
from tests.integrations.test_celery_task import run
from tests.required import need

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
FAILURES = 5  # that open the circuit of the page


def snippets() -> dict[str, list[str]]:
    """The page's Python, by its headings."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^##? (?=[A-Z])", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        title, _, text = part.partition("\n")
        if codes := re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            found[title] = [code.replace("redis://localhost:6379", "memory://") for code in codes]
    return found


class Down:
    """What the page's views call."""

    broken = False

    def __call__(self, number: int) -> str | None:
        if self.broken:
            raise OSError("the service is down")
        return None if number == 404 else f"receipt of {number}"


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What every example of the page begins with."""
    made: dict[str, Any] = {"__name__": "page", "fetch_receipt": Down(), "pay": Down()}
    (common,) = snippets()["Flask, Starlette and FastAPI, Django, Celery"]
    exec(common, made)
    yield made
    made["registry"].close()


def opens_and_refuses(names: dict[str, Any], get: Any, status: int = 500) -> None:
    """``get(path)`` gives status and headers."""
    assert get("/orders/7/receipt")[0] == 200
    names["fetch_receipt"].broken = True
    for _ in range(FAILURES):
        assert get("/orders/7/receipt")[0] == status
    assert names["payments"].state is State.OPEN
    code, headers = get("/orders/7/receipt")
    assert code == 503
    assert 55 < int(headers["retry-after"]) <= 66


def test_every_snippet_is_executed_here() -> None:
    titles = ["Flask", "Starlette and FastAPI", "Django", "Celery"]
    assert [*snippets()][1:] == titles
    assert [len(codes) for codes in snippets().values()] == [1, 1, 3, 2, 1]


def test_flask(names: dict[str, Any]) -> None:
    exec(snippets()["Flask"][0], names)
    client = names["app"].test_client()

    def get(path: str) -> Any:
        got = client.get(path)
        return got.status_code, {name.lower(): value for name, value in got.headers}

    assert get("/orders/404/receipt")[0] == 404
    opens_and_refuses(names, get)


def test_starlette(names: dict[str, Any]) -> None:
    starlette, _, middleware = snippets()["Starlette and FastAPI"]
    exec(starlette, names)
    opens_and_refuses(names, getter(names["app"]))
    exec(middleware, names)
    assert getter(names["app"])("/orders/7/receipt")[0] == 503


def test_fastapi(names: dict[str, Any]) -> None:
    if importlib.util.find_spec("fastapi") is None:
        need("fastapi is not installed")
    exec(snippets()["Starlette and FastAPI"][1], names)
    opens_and_refuses(names, getter(names["app"]))


def getter(app: Any) -> Any:
    import httpx

    async def get(path: str) -> Any:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            got = await client.get(path)
        return got.status_code, got.headers

    return lambda path: asyncio.run(get(path))


def test_django(names: dict[str, Any], django: types.ModuleType) -> None:
    from django.core.cache import CacheHandler
    from django.db.utils import ConnectionHandler
    from django.test import Client
    from django.test.utils import override_settings
    from django.urls import path

    settings, view = snippets()["Django"]
    exec(view, names)
    django.urlpatterns = [path("orders/<int:number>/receipt", names["receipt"])]  # type: ignore[attr-defined]
    exec(settings, names)
    assert type(CacheHandler(names["CACHES"])["default"]).__module__.endswith(".django_cache")
    database = ConnectionHandler(names["DATABASES"])["default"]
    assert database.settings_dict["CIRCUIT"] == "web_app.database.write"
    client = Client(raise_request_exception=False)

    def get(url: str) -> Any:
        got = client.get(url)
        return got.status_code, {name.lower(): value for name, value in got.items()}

    with override_settings(MIDDLEWARE=names["MIDDLEWARE"]):
        opens_and_refuses(names, get)


def test_celery(names: dict[str, Any]) -> None:
    """What the page says of workers is shown in ``test_celery_worker.py``."""
    from distributed_breaker.integrations.celery import QueueGuard

    exec(snippets()["Celery"][0], names)
    app, charge, payments = names["app"], names["charge"], names["payments"]
    try:
        assert charge(7) == "receipt of 7"
        assert QueueGuard in app.steps["consumer"]
        assert app.amqp.router.route({}, "charge")["queue"].name == "charges"
        payments.force_open()
        assert run(app, charge, queue="charges")[0] == "RETRY"
    finally:
        app.close()
