"""Health and metrics in the shapes that existing consumers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import pytest

from distributed_breaker import CircuitBreakerRegistry, Policy, State, StoreUnavailable
from distributed_breaker.monitoring import report
from distributed_breaker.snapshot import ReporterShare, Snapshot, Window
from scripts.servers import Server
from tests.fleet.process import until

AT = 1_764_000_000.0
SHARED_STATES = {"closed": "healthy", "half_open": "degraded", "forced_closed": "degraded"}


class Spec(NamedTuple):
    service: str = "web_app"
    kind: str = "cache"
    policy: Policy = Policy()
    enabled: bool = True


def snapshot(state: str = "closed", **more: Any) -> Snapshot:
    values: dict[str, Any] = {"shared_state": State(state), "source": "shared", "fleet": True}
    return Snapshot(circuit="web_app.cache", state=State(state), **{**values, **more})


def health(found: Snapshot | None, spec: Spec | None = None, lost: str = "") -> dict[str, Any]:
    name = "web_app.cache"
    held = {} if found is None else {name: found}
    specs: Mapping[str, Spec] = {} if spec is None else {name: spec}
    return report.health(held, specs, AT, lost)


def one(found: dict[str, Any]) -> dict[str, Any]:
    circuit: dict[str, Any] = found["circuit_breakers"]["web_app.cache"]
    return circuit


def metrics(found: Snapshot | None, spec: Spec | None = None) -> dict[str, Any]:
    held = {} if found is None else {"web_app.cache": found}
    return one(report.metrics(held, {} if spec is None else {"web_app.cache": spec}, AT))


# ---------------------------------------------------------------------------- health


@pytest.mark.parametrize("state", list(State))
def test_the_status_of_each_state(state: State) -> None:
    wanted = SHARED_STATES.get(state.value, "unhealthy")
    found = health(snapshot(state.value))
    assert one(found)["status"] == found["overall_status"] == wanted
    assert found["summary"] == {
        "total": 1, "healthy": 0, "degraded": 0, "unhealthy": 0, wanted: 1,
    }  # fmt: skip


def test_the_worst_circuit_decides() -> None:
    held = {"a": snapshot(), "b": snapshot("half_open"), "c": snapshot("open")}
    for names, overall in (("a", "healthy"), ("ab", "degraded"), ("abc", "unhealthy")):
        found = report.health({name: held[name] for name in names}, {}, AT)
        assert found["overall_status"] == overall
        assert found["summary"]["total"] == len(names)


def test_nothing_at_all_is_healthy() -> None:
    assert report.health({}, {}, AT)["overall_status"] == "healthy"


def test_quarantine_is_degraded_though_the_process_refuses_calls() -> None:
    sick = snapshot("open", shared_state=State.CLOSED, source="quarantine")
    assert one(health(sick))["status"] == "degraded"
    worse = snapshot("open", shared_state=State.OPEN, source="quarantine")
    assert one(health(worse))["status"] == "unhealthy"


def test_a_lost_store_is_degraded_at_least() -> None:
    alone = snapshot(source="shadow", shared_state=None)
    assert one(health(alone))["status"] == "degraded"
    assert one(health(snapshot("open", source="shadow")))["status"] == "unhealthy"
    found = health(snapshot(), lost="no answer")
    assert (found["overall_status"], one(found)["status"]) == ("degraded", "degraded")
    assert found["store"] == {"reachable": False, "problem": "no answer"}
    assert report.health({}, {}, AT, "no answer")["overall_status"] == "degraded"


def test_a_circuit_that_nobody_has_called() -> None:
    circuit = one(health(None, Spec()))
    assert (circuit["status"], circuit["state"], circuit["called"]) == ("healthy", "closed", False)
    assert (circuit["shared_state"], circuit["configured"]) == (None, True)
    assert metrics(None, Spec())["total_requests"] == 0
    assert one(health(snapshot(totals={"rejected": 1})))["called"] is True


def test_a_circuit_that_is_switched_off() -> None:
    for found in (None, snapshot("open")):
        circuit = one(health(found, Spec(enabled=False)))
        assert (circuit["status"], circuit["state"]) == ("healthy", "closed")
        assert (circuit["enabled"], circuit["source"]) == (False, "disabled")
    off = one(health(snapshot(source="disabled"), Spec()))
    assert (off["status"], off["enabled"]) == ("healthy", False)


def test_the_keys_that_consumers_read() -> None:
    found = health(snapshot())
    assert {"overall_status", "timestamp", "circuit_breakers", "summary"} <= set(found)
    whole = report.metrics({}, {}, AT, report.Setting("staging", False, 5))
    assert whole["manager_info"] == {
        "total_circuits": 0, "services_configured": 5, "environment": "staging",
        "monitoring_enabled": False,
    }  # fmt: skip
    wanted = (
        "state total_requests successful_requests failed_requests rejected_requests slow_requests "
        "failure_rate average_response_time p95_response_time p99_response_time last_failure_time "
        "last_success_time last_state_change state_transitions next_attempt_time"
    )
    assert set(wanted.split()) <= set(metrics(snapshot()))


def test_times_are_iso_in_utc() -> None:
    assert report.iso(AT + 0.25) == "2025-11-24T16:00:00.250+00:00"
    assert report.iso(None) is None
    assert datetime.fromisoformat(health(snapshot())["timestamp"]).timestamp() == AT


def test_one_reporter_that_alone_sees_failures_is_suspected() -> None:
    policy = Policy(failure_threshold=5)
    sick, well = ReporterShare("sick", 5, 2, AT), ReporterShare("well", 0, 0, AT)
    found = health(snapshot(reporters=(sick, well), policy=policy))
    assert one(found)["suspects"] == ["sick"]
    for reporters in (
        (sick,),
        (sick._replace(bad=4), well),
        (sick, well._replace(bad=1)),
    ):
        found = health(snapshot(reporters=reporters, policy=policy))
        assert one(found)["suspects"] == []
    found = health(snapshot("open", reporters=(sick, well), policy=policy))
    assert one(found)["suspects"] == []


# ---------------------------------------------------------------------------- metrics


def test_requests_add_up() -> None:
    totals = {"calls": 100, "failures": 20, "slow": 7, "ignored": 5, "rejected": 50,
              "opens": 3, "half_opens": 2, "closes": 1}  # fmt: skip
    found = metrics(snapshot(totals=totals))
    assert found["total_requests"] == 150
    parts = ("successful_requests", "failed_requests", "ignored_requests", "rejected_requests")
    assert [found[part] for part in parts] == [75, 20, 5, 50]
    assert found["slow_requests"] == 7
    assert found["failure_rate"] == pytest.approx(20 / 95)
    assert found["state_transitions"] == {"to_open": 3, "to_half_open": 2, "to_closed": 1}


def test_without_calls_no_number_is_invented() -> None:
    found = metrics(snapshot())
    assert found["failure_rate"] == 0.0
    assert found["average_response_time"] is None
    assert found["p99_response_time"] is None
    assert found["last_failure_time"] is None


@pytest.mark.parametrize("bucket", range(16))
def test_a_quantile_lies_in_its_bucket(bucket: int) -> None:
    """Bucket i holds what lasted less than 2^(20+i) ns and no less than half of that."""
    counts = [0] * 16
    counts[bucket] = 1000
    upper = 2 ** (20 + bucket) / 1e9
    values = [report.quantile(counts, share) for share in (0.01, 0.5, 0.99, 1.0)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(upper)
    assert all(v is not None and v > (upper / 2 if bucket else 0) for v in values)


def test_quantiles_of_two_groups() -> None:
    counts = [0] * 16
    counts[2], counts[10] = 96, 4  # below 4.2 ms; 0.54 to 1.07 s
    found = metrics(snapshot(totals={"duration_us": 3_000_000} | {
        f"b{i}": count for i, count in enumerate(counts)
    }))  # fmt: skip
    assert found["average_response_time"] == pytest.approx(0.03)
    assert 0.0020 < found["p50_response_time"] < 0.0042
    assert 0.0020 < found["p95_response_time"] < 0.0042
    assert 0.53 < found["p99_response_time"] < 1.08


def test_when_the_next_attempt_is() -> None:
    due = snapshot("open", ends_at=AT + 30, retry_after=30.0)
    assert metrics(due)["next_attempt_time"] == report.iso(AT + 30)
    local = snapshot("open", shared_state=State.CLOSED, source="quarantine", retry_after=5.0)
    assert metrics(local)["next_attempt_time"] == report.iso(AT + 5)
    assert metrics(snapshot("closed", ends_at=AT))["next_attempt_time"] is None
    manual = Spec(policy=Policy(auto_recovery=False))
    assert metrics(due, manual)["next_attempt_time"] is None


def test_the_window_has_a_rate_of_its_own() -> None:
    found = metrics(snapshot(window=Window(8, 2, 1)))
    assert found["window"] == {"calls": 8, "failures": 2, "slow": 1, "failure_rate": 0.25}


# ---------------------------------------------------------------------------- a process's own view


@pytest.mark.servers("valkey")
def test_a_process_that_has_lost_its_store(
    own_server: Callable[..., Server], namespace: str
) -> None:
    """What an endpoint does: the fleet's view while there is one, else its own."""
    server = own_server()
    with CircuitBreakerRegistry.from_url(server.url, namespace) as registry:
        breaker = registry.breaker("web_app.cache", Policy(failure_threshold=3))
        breaker.call(int)
        registry.flush(10.0)
        found = health(registry.snapshot(10.0)["web_app.cache"])
        assert (found["overall_status"], one(found)["source"]) == ("healthy", "shared")
        assert one(found)["mirror_age"] is not None
        server.kill()
        with pytest.raises(StoreUnavailable) as lost:
            until(lambda: registry.snapshot(10.0) and None, "it is noticed")
        until(lambda: breaker.snapshot().source == "shadow", "the shadow decides")
        found = health(breaker.snapshot(), lost=str(lost.value))
        assert (found["overall_status"], one(found)["source"]) == ("degraded", "shadow")
        assert one(found)["shared_state"] == "closed"
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                breaker.call(lambda: 1 // 0)
        found = health(breaker.snapshot(), lost=str(lost.value))
        assert (found["overall_status"], one(found)["state"]) == ("unhealthy", "open")
        assert one(found)["next_attempt_time"] is not None
