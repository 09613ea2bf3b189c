"""What a client knows of its outbox without reading it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import CircuitBreakerRegistry
from distributed_breaker.clients import waiting
from distributed_breaker.clients.waiting import Waiting
from distributed_breaker.fallback.outbox import Outbox


@pytest.mark.parametrize("moment", ["replay", "round"])
def test_what_is_added_while_nothing_seems_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A thread has looked, and not yet said so, when another one adds something."""
    breaker = CircuitBreakerRegistry.from_url("memory://").breaker("b")
    breaker.force_open(actor="test", reason="test")
    queue = Waiting(Outbox(tmp_path / "o.db"), "t", breaker, lambda _: None)
    queue.care = lambda: None  # type: ignore[method-assign]  # no thread

    def adding(look: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*args: Any, **kwargs: Any) -> Any:
            found = look(*args, **kwargs)
            monkeypatch.undo()
            queue.add_many([("kind", None, "")])
            return found

        return looked

    if moment == "replay":
        monkeypatch.setattr(queue.outbox, "replay", adding(queue.outbox.replay))
        assert queue.replay().left == 0
    else:
        monkeypatch.setattr(waiting, "exists", adding(waiting.exists))
        assert queue.round()
    assert queue.possible
    assert queue.count() == 1
    queue.close()
