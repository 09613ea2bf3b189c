"""Django: guarded views, blocking and asynchronous, and the answer to a refusal."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker
from tests.integrations import views
from tests.unit.clock import FakeClock


def serve(kind: str) -> Any:
    from django.core.exceptions import PermissionDenied, SuspiciousOperation
    from django.http import Http404, JsonResponse

    if kind == "boom":
        raise OSError("the database is down")
    errors = {"http404": Http404, "denied": PermissionDenied, "fishy": SuspiciousOperation}
    if kind in errors:
        raise errors[kind]
    return JsonResponse({"kind": kind}, status={"missing": 404, "broken": 502}.get(kind, 200))


class Shop:
    """A site with one guarded view, served as WSGI or ASGI would."""

    def __init__(self, urls: Any, breaker: CircuitBreaker, way: str) -> None:
        from django.urls import path
        from django.utils.decorators import method_decorator
        from django.views import View

        from distributed_breaker.integrations.django import protect

        @protect(breaker)
        def item(request: Any, kind: str) -> Any:
            return serve(kind)

        @protect(breaker)
        async def item_async(request: Any, kind: str) -> Any:
            return serve(kind)

        class Item(View):
            @method_decorator(protect(breaker))
            def get(self, request: Any, kind: str) -> Any:
                return serve(kind)

        view: Any = {"coroutine": item_async, "class": Item.as_view()}.get(way, item)
        urls.urlpatterns = [path("<kind>", view)]
        self._asgi = way == "coroutine"

    def ask(self, path: str, headers: dict[str, str]) -> views.Got:
        from django.test import AsyncClient, Client

        if self._asgi:
            client = AsyncClient(raise_request_exception=False)
            got = asyncio.run(client.get(path, headers=headers))  # type: ignore[arg-type]
        else:
            got = Client(raise_request_exception=False).get(path, headers=headers)
        small = {name.lower(): value for name, value in got.items()}
        return views.Got(got.status_code, small, got.content.decode())


@pytest.mark.parametrize("way", ["function", "coroutine", "class"])
@pytest.mark.parametrize("path", ["/boom", "/broken"])
def test_the_life_of_a_view(
    django: Any, breaker: CircuitBreaker, clock: FakeClock, path: str, way: str
) -> None:
    shop = Shop(django, breaker, way)
    ours = ("/missing", "/http404", "/denied", "/fishy")
    views.the_callers_own_mistakes_do_not_count(shop.ask, breaker, ours)
    views.a_failure_opens_it(shop.ask, breaker, path, {"/broken": 502}.get(path, 500))
    views.a_refusal_is_answered(shop.ask, "/good", clock)
    views.it_closes_again(shop.ask, breaker, "/good", clock)
