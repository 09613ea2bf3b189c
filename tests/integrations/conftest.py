"""Circuits for views, on a clock of the test's own; and Django, which has one configuration."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerRegistry
from tests.required import need
from tests.unit.clock import BRITTLE, FakeClock

URLS = "tests_integrations_django_urls"
MIDDLEWARE = "distributed_breaker.integrations.django.CircuitBreakerMiddleware"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> Iterator[CircuitBreaker]:
    """A circuit that one failure trips, for a minute."""
    with CircuitBreakerRegistry.from_url("memory://", clock=clock) as registry:
        yield registry.breaker("secret-internal-name", BRITTLE)


@pytest.fixture
def django(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Django with nothing but our middleware, and whatever URLs a test sets."""
    if importlib.util.find_spec("django") is None:
        need("Django is not installed")
    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure(
            ROOT_URLCONF=URLS, ALLOWED_HOSTS=["testserver"], MIDDLEWARE=[MIDDLEWARE],
            LOGGING_CONFIG=None, SECRET_KEY="of tests", USE_TZ=True,
        )  # fmt: skip
        django.setup()
    urls = types.ModuleType(URLS)
    monkeypatch.setitem(sys.modules, URLS, urls)
    yield urls
    from django.urls import clear_url_caches

    clear_url_caches()
