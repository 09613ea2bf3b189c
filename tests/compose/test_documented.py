"""The snippets of docs/composition.md run, and do what the text beside them says."""

from __future__ import annotations

from typing import Any

from tests import snippets


class Connection:
    """What the page's blocking function waits for."""

    timeout: float | None = None

    def settimeout(self, seconds: float) -> None:
        self.timeout = seconds

    def recv(self, size: int) -> bytes:
        return b""


def test_the_page_runs() -> None:
    connection, stored = Connection(), list[str]()
    given: dict[str, Any] = {
        "charge": lambda order: f"{order} charged",
        "connection": connection,
        "store": stored.append,
    }
    left = snippets.run(snippets.DOCS / "composition.md", given, redis="memory://")
    with left["registry"] as registry:
        assert left["answer"] == "order 1 charged"
        assert connection.timeout is not None
        assert 0 < connection.timeout <= 2.0
        assert stored == ["a", "b"]
        assert registry.breaker("search").snapshot().totals["failures"] == 1
        assert registry.breaker("search.acme").snapshot().totals["calls"] == 1


def test_the_order_that_the_page_names_is_the_one_of_the_decision() -> None:
    order = "fallback → deadline → retry → bulkhead → circuit → timeout → your function"
    for page in ("composition.md", "decisions/0016-the-order-of-a-pipeline.md"):
        text = (snippets.DOCS / page).read_text("utf-8")
        assert order in " ".join(text.split()), page
