"""Alerts: what is told, to whom, how often, and what happens when nobody takes it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from distributed_breaker import CircuitBreakerRegistry, Policy
from distributed_breaker.fallback.outbox import Outbox
from tests.monitoring.alerts.conftest import Evaluate
from tests.monitoring.alerts.receiver import Receiver
from tests.unit.clock import fail, succeed, wait_until

pytestmark = pytest.mark.servers("valkey")

# One failure trips it, and a probe may follow at once.
QUICK = Policy(failure_threshold=1, success_threshold=1, open_interval=0.05, jitter=0.0)
SLOW = Policy(failure_threshold=1, success_threshold=1, jitter=0.0)


def test_a_trip_and_its_recovery_are_a_pair(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    evaluate()
    breaker = registry.breaker("api.http", SLOW)
    fail(breaker)
    wait_until(lambda: receiver.of("open"))
    (opened,) = receiver.of("open")
    assert opened["circuit"] == "api.http"
    assert opened["service"] == "api"
    assert opened["severity"] == "critical"
    assert opened["state"] == "open"
    assert opened["previous"] == "closed"
    assert opened["cause"] == "run"
    assert opened["error"] == "Boom: the dependency is down"
    assert opened["evidence"]["run"] == 1
    assert opened["title"] == "circuit api.http is open"
    assert "Boom: the dependency is down" in opened["text"]
    assert opened["late"] is False
    breaker.reset(actor="op", reason="mended")
    wait_until(lambda: receiver.of("open", "resolved"))
    (closed,) = receiver.of("open", "resolved")
    assert closed["incident"] == opened["incident"]
    assert closed["title"] == "circuit api.http is closed again"
    assert closed["began_at"] == opened["at"]
    assert closed["duration"] > 0
    assert closed["id"] != opened["id"]
    assert len(receiver.got) == 2


def test_probes_that_fail_are_not_told_again(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    evaluate(rules={"all": {"on": ["open", "half_open"]}})
    breaker = registry.breaker("api.http", QUICK)
    fail(breaker)
    wait_until(lambda: receiver.of("open"))
    wait_until(lambda: _probe(breaker) and len(receiver.of("half_open")) >= 3)
    wait_until(lambda: _try(breaker))
    wait_until(lambda: receiver.of("open", "resolved"))
    assert len(receiver.of("open")) == len(receiver.of("open", "resolved")) == 1
    numbers = [told["number"] for told in receiver.of("half_open")]
    assert len(numbers) == len(set(numbers))


def _probe(breaker: Any) -> bool:
    with pytest.raises(Exception):  # noqa: B017, PT011 - refused, or the probe fails
        breaker.call(_boom)
    return True


def _boom() -> None:
    raise ValueError


def _try(breaker: Any) -> bool:
    try:
        succeed(breaker)
    except Exception:
        return False
    return True


def test_what_was_told_is_known_to_the_next_process(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver, raw: redis.Redis
) -> None:
    """The evaluator goes while a circuit is open; the next one tells the recovery only."""
    first = evaluate()
    breaker = registry.breaker("api.http", SLOW)
    fail(breaker)
    wait_until(lambda: receiver.of("open"))
    first.close()
    evaluate()
    prefix = f"cb:{registry.namespace}:alerts"
    wait_until(lambda: raw.exists(f"{prefix}:evaluator"))
    breaker.reset()
    wait_until(lambda: receiver.of("open", "resolved"))
    wait_until(lambda: raw.hgetall(f"{prefix}:incidents") == {})
    assert len(receiver.got) == 2


def test_overrides(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    evaluate()
    breaker = registry.breaker("api.http", SLOW)
    breaker.force_open(actor="ann", reason="a move")
    wait_until(lambda: receiver.of("forced_open"))
    assert "By ann." in receiver.of("forced_open")[0]["text"]
    assert "Reason: a move." in receiver.of("forced_open")[0]["text"]
    breaker.force_closed()
    wait_until(lambda: receiver.of("forced_closed"))
    breaker.reset()
    wait_until(lambda: receiver.of("forced_closed", "resolved"))
    wait_until(lambda: receiver.of("forced_open", "resolved"))


def test_a_receiver_that_is_down_gets_it_later(
    evaluate: Evaluate,
    registry: CircuitBreakerRegistry,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver.stop()
    evaluate()
    fail(registry.breaker("api.http", SLOW))
    wait_until(lambda: "alerts for hook wait" in caplog.text)
    receiver.start()
    wait_until(lambda: receiver.of("open"), timeout=20)
    receiver.status = 500
    before = receiver.asked
    registry.breaker("api.http").reset()
    wait_until(lambda: receiver.asked >= before + 2, timeout=20)
    receiver.status = 204
    wait_until(lambda: receiver.of("open", "resolved"), timeout=20)
    assert len(receiver.got) == 2
    assert "secret" not in caplog.text
    assert "answered 500" in caplog.text


def test_a_receiver_that_hangs_holds_up_no_other(
    evaluate: Evaluate,
    registry: CircuitBreakerRegistry,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hanging = Receiver()
    hanging.status = None
    try:
        evaluate(
            channels={
                "hangs": {"type": "webhook", "url": hanging.url, "timeout": 0.3},
                "works": {"type": "webhook", "url": receiver.url},
            }
        )
        fail(registry.breaker("api.http", SLOW))
        wait_until(lambda: receiver.of("open"))
        wait_until(lambda: "no answer within 0.3 s" in caplog.text)
        hanging.status = 200
        wait_until(lambda: hanging.of("open"), timeout=20)
    finally:
        hanging.stop()
    assert len(receiver.got) == 1


def test_an_alert_that_is_too_old_is_dropped(
    evaluate: Evaluate,
    registry: CircuitBreakerRegistry,
    receiver: Receiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver.status = 500
    evaluate(expire_after=1.0)
    fail(registry.breaker("api.http", SLOW))
    wait_until(lambda: "alerts: dropped for hook" in caplog.text, timeout=20)
    receiver.status = 200
    registry.breaker("api.http").reset()
    wait_until(lambda: receiver.got)
    assert [got["event"] for got in receiver.got] == ["resolved"]


def test_what_waited_comes_late_and_for_a_channel_that_is_gone_not_at_all(
    evaluate: Evaluate, receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process has left them on its host."""
    before = Outbox(tmp_path / "outbox.db", now=lambda: time.time() - 100)
    for channel in ("hook", "gone"):
        before.add(channel, "alert", {"kind": "open", "event": "firing", "title": "a is open"})
    before.close()
    evaluate(expire_after=99.5)
    wait_until(lambda: "alerts: 1 dropped, since there is no channel gone any more" in caplog.text)
    assert "alerts: dropped for hook after 100 s: a is open" in caplog.text
    other = Outbox(tmp_path / "outbox.db", now=lambda: time.time() - 70)
    other.add("hook", "alert", {"kind": "open", "event": "firing", "title": "b is open"})
    other.close()
    wait_until(lambda: receiver.got)
    assert receiver.got[0]["title"] == "b is open"
    assert receiver.got[0]["late"] is True
    assert 70 <= receiver.got[0]["age"] < 90


def test_slack_the_command_and_the_log(
    evaluate: Evaluate,
    registry: CircuitBreakerRegistry,
    receiver: Receiver,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "distributed_breaker.alerts")
    script = f"cd {tmp_path}; cat > told; env > new; mv new env"
    evaluate(
        channels={
            "chat": {
                "type": "slack",
                "url": receiver.url,
                "headers": {"Authorization": "Bearer ${TOKEN}"},
            },
            "run": {"type": "command", "command": ["sh", "-c", script]},
            "log": {"type": "log"},
        },
        rules={"all": {"title": "<$circuit> & $state", "text": "$error ($environment, $$5)"}},
    )
    fail(registry.breaker("api.http", SLOW))
    wait_until(lambda: receiver.got and (tmp_path / "env").exists())
    (said,) = receiver.got
    assert said["text"] == "*&lt;api.http&gt; &amp; open*"
    assert said["attachments"][0]["text"] == "Boom: the dependency is down (test, $5)"
    assert receiver.headers[0]["Authorization"] == "Bearer secret-token"
    assert receiver.headers[0]["path"] == "/hook/secret-path?key=secret-key"
    assert '"circuit": "api.http"' in (tmp_path / "told").read_text()
    variables = (tmp_path / "env").read_text().splitlines()
    assert "CIRCUIT_BREAKER_ALERT_KIND=open" in variables
    assert "CIRCUIT_BREAKER_ALERT_TITLE=<api.http> & open" in variables
    (record,) = [r for r in caplog.records if r.name == "distributed_breaker.alerts"]
    assert record.levelno == logging.ERROR
    assert record.circuit == "api.http"  # type: ignore[attr-defined]
    assert record.kind == "open"  # type: ignore[attr-defined]


def test_what_is_too_much_comes_as_a_digest(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    evaluate(rules={"all": {"limit": 2, "per": 1.0}})
    for number in range(5):
        fail(registry.breaker(f"api.http.{number}", SLOW))
    wait_until(lambda: receiver.of("digest"))
    (digest,) = receiver.of("digest")
    assert len(receiver.of("open")) == 2
    assert digest["count"] == 3
    assert digest["counts"] == {"open firing": 3}
    assert digest["title"] == "3 more alerts by the rule all"
    assert digest["text"].count("is open") == 3


def test_what_is_held_back_is_told_at_the_end(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver, raw: redis.Redis
) -> None:
    alerts = evaluate(rules={"all": {"limit": 1}})
    for number in range(3):
        fail(registry.breaker(f"api.http.{number}", SLOW))
    incidents = f"cb:{registry.namespace}:alerts:incidents"
    wait_until(lambda: raw.hlen(incidents) == 3)
    alerts.close()
    wait_until(lambda: receiver.of("digest"))
    assert receiver.of("digest")[0]["count"] == 2


def test_rules_choose(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    evaluate(
        rules={
            "pay": {"circuits": ["pay.*"], "recovery": False},
            "forced": {"on": ["forced_open"]},
        }
    )
    fail(registry.breaker("api.http", SLOW))
    fail(registry.breaker("pay.http", SLOW))
    registry.breaker("pay.http").reset()
    registry.breaker("api.http").force_open()
    wait_until(lambda: receiver.of("forced_open") and receiver.of("open"))
    told = sorted((got["circuit"], got["kind"], got["rule"]) for got in receiver.got)
    assert told == [("api.http", "forced_open", "forced"), ("pay.http", "open", "pay")]


def test_a_circuit_that_stays_half_open(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    evaluate(stuck_half_open_after=0.5)
    breaker = registry.breaker("api.http", QUICK)
    fail(breaker)
    permit = None

    def probe() -> bool:
        nonlocal permit
        try:
            permit = breaker.acquire()
        except Exception:
            return False
        return True

    wait_until(probe)
    wait_until(lambda: receiver.of("stuck_half_open"))
    assert "1 probes are out" in receiver.of("stuck_half_open")[0]["text"]
    assert permit is not None
    permit.success()
    wait_until(lambda: receiver.of("stuck_half_open", "resolved"))
    wait_until(lambda: receiver.of("open", "resolved"))


def test_policies_that_differ(
    evaluate: Evaluate, registry: CircuitBreakerRegistry, receiver: Receiver
) -> None:
    mismatched = ["api.http"]
    known = [{"host": "web-1", "pid": 7, "policy_mismatch": mismatched}]
    registry.breaker("api.http", SLOW)
    evaluate(processes=lambda: known, mismatch_after=0.3)
    wait_until(lambda: receiver.of("policy_mismatch"))
    assert "web-1:7" in receiver.of("policy_mismatch")[0]["text"]
    mismatched.clear()
    wait_until(lambda: receiver.of("policy_mismatch", "resolved"))


def test_circuits_without_a_store(evaluate: Evaluate, receiver: Receiver) -> None:
    with CircuitBreakerRegistry.from_url("memory://") as registry:
        evaluate(registry=registry)
        breaker = registry.breaker("api.http", SLOW)
        fail(breaker)
        wait_until(lambda: receiver.of("open"))
        breaker.reset()
        wait_until(lambda: receiver.of("open", "resolved"))
    assert len(receiver.got) == 2
