"""The answer to a refused request."""

from __future__ import annotations

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerOpenException
from distributed_breaker.integrations import web
from tests.integrations.conftest import BROWSER


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        ("", False),
        ("*/*", False),
        (BROWSER, True),
        ("text/plain", True),
        ("application/json, text/html;q=0.5", False),
        ("text/html, application/problem+json", False),
        ("text/html;q=0.2, application/json;q=0.1", True),
        ("text/html;q=rubbish, */*;q=0.1", False),
        ("text/html;level=1;q=0.3,application/*;q=0.4", False),
        (",;,=", False),
        ("image/png," * 100_000, False),
    ],
)
def test_text_goes_only_to_who_prefers_it(accept: str, text: bool) -> None:
    said = web.answer(CircuitBreakerOpenException("c", 1.0), accept)
    assert said.content_type.startswith("text/plain") is text


@pytest.mark.parametrize(("wait", "said"), [(0.001, "1"), (1.0, "1"), (59.2, "60")])
def test_the_wait_is_rounded_up(wait: float, said: str) -> None:
    answer = web.answer(CircuitBreakerOpenException("c", wait), "")
    assert answer.headers["Retry-After"] == said


def test_an_unknown_wait_is_not_said() -> None:
    unknown = CircuitBreakerOpenException("c", 0.0, reason="all permits are out")
    assert "Retry-After" not in web.answer(unknown, "").headers
    assert web.answer(unknown, "").body == '{"error": "service_unavailable", "retry_after": null}'
    assert web.answer(unknown, "text/html").body == "Service unavailable. Try again later.\n"


def test_what_cannot_be_guarded_is_refused_in_words(breaker: CircuitBreaker) -> None:
    def view() -> None: ...

    with pytest.raises(TypeError, match=r"@protect\(breaker\)"):
        web.protected(view, view, lambda r: (r, 200), lambda e: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is no view"):
        web.protected(breaker, "text", lambda r: (r, 200), lambda e: None)  # type: ignore[type-var]
