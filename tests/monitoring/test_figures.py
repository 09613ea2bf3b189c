"""Which numbers are made of what is known, and how they are written."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distributed_breaker import Policy, State
from distributed_breaker.monitoring import figures as figures_module
from distributed_breaker.monitoring.exposition import (
    OPENMETRICS,
    TEXT,
    exposition,
)
from distributed_breaker.monitoring.figures import FAMILIES, Figures
from distributed_breaker.snapshot import ReporterShare, Snapshot
from tests.fleet.process import ROOT
from tests.monitoring.exported import Exported

FORMATS = ["text/plain", "application/openmetrics-text"]
AT = 1_764_000_000.0
CACHE = "web_app.cache"


def snapshot(name: str = CACHE, state: str = "closed", **more: Any) -> Snapshot:
    values: dict[str, Any] = {"since": AT, "fleet": True, **more}
    return Snapshot(name, State(state), State(state), "shared", **values)


def exported(accept: str = "", **known: Any) -> Exported:
    return Exported.of(*exposition(accept, Figures(**{"process": "here:1", **known})))


def one(found: Snapshot, **known: Any) -> Exported:
    return exported(fleet={found.circuit: found}, **known)


# ---------------------------------------------------------------------------- formats


def test_the_format_is_the_one_that_is_asked_for() -> None:
    asked = {
        "": TEXT,
        "*/*": TEXT,
        "text/plain;version=0.0.4": TEXT,
        "application/json, text/plain, application/openmetrics-text": TEXT,
        "application/openmetrics-text": OPENMETRICS,
        # What Prometheus 3 sends.
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
        "text/plain;version=0.0.4;q=0.2,*/*;q=0.1": OPENMETRICS,
    }
    for accept, wanted in asked.items():
        kind, body = exposition(accept, Figures({}))
        assert kind == wanted, accept
        assert body.endswith(b"# EOF\n") is (wanted == OPENMETRICS)


def test_names_follow_the_conventions() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert re.fullmatch(r"circuit_breaker(_[a-z]+)+", family.name)
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
        assert not re.search(r"_(ms|us|millis|minutes|kb)\b", family.name)
        assert family.help.endswith(".")
        assert family.kind in ("counter", "gauge", "histogram")


def test_the_page_lists_all_of_them() -> None:
    page = (ROOT / "docs/prometheus.md").read_text()
    listed = set(re.findall(r"`([a-z_]+)`", page[page.index("## Metrics") : page.index("## Dash")]))
    for family in FAMILIES:
        name = family.name.removeprefix("circuit_breaker_")
        assert name + ("_total" if family.kind == "counter" else "") in listed


# ---------------------------------------------------------------------------- the fleet's figures


@pytest.mark.parametrize("state", list(State))
def test_one_state_is_1_and_all_others_are_0(state: State) -> None:
    found = one(snapshot(state=state.value)).all("circuit_breaker_state")
    assert {dict(labels)["state"]: value for (_, labels), value in found} == {
        other.value: float(other is state) for other in State
    }


def test_the_state_is_the_fleets_and_not_what_this_process_does() -> None:
    sick = Snapshot(CACHE, State.OPEN, State.CLOSED, "quarantine", fleet=True, local={"pending": 1})
    found = one(sick, own={CACHE: sick})
    assert found["circuit_breaker_state", {"state": "closed"}] == 1
    labels = {"circuit": CACHE, "source": "quarantine", "state": "open", "process": "here:1"}
    assert found["circuit_breaker_local_state", labels] == 1


def test_when_an_open_circuit_is_tried_again() -> None:
    name = "circuit_breaker_next_attempt_timestamp_seconds"
    due = snapshot(state="open", ends_at=AT + 30)
    assert one(due)[name] == AT + 30
    assert one(due)["circuit_breaker_state_since_timestamp_seconds"] == AT
    assert not one(snapshot(state="closed", ends_at=AT)).all(name)
    assert not one(snapshot(state="open")).all(name)
    assert not one(due, configured={CACHE: Spec(policy=Policy(auto_recovery=False))}).all(name)


def test_counts_are_those_of_the_store() -> None:
    totals = {"calls": 100, "failures": 20, "slow": 7, "ignored": 5, "rejected": 50, "late": 2,
              "dropped": 4, "probes": 6, "fallbacks": 8, "trips": 1, "opens": 3, "half_opens": 2,
              "closes": 9, "duration_us": 2_500_000}  # fmt: skip
    buckets = dict.fromkeys((f"b{i}" for i in range(16)), 0) | {"b0": 60, "b3": 30, "b15": 10}
    found = one(snapshot(totals=totals | buckets, permits=2))
    for name, labels, value in (
        ("calls_total", {"outcome": "success"}, 75),
        ("calls_total", {"outcome": "failure"}, 20),
        ("calls_total", {"outcome": "ignored"}, 5),
        ("rejections_total", {}, 50),
        ("slow_calls_total", {}, 7),
        ("fallbacks_total", {}, 8),
        ("late_calls_total", {}, 2),
        ("dropped_outcomes_total", {}, 4),
        ("probes_total", {}, 6),
        ("probes_out", {}, 2),
        ("trips_total", {}, 1),
        ("transitions_total", {"to": "open"}, 3),
        ("transitions_total", {"to": "half_open"}, 2),
        ("transitions_total", {"to": "closed"}, 9),
        ("call_duration_seconds_sum", {}, 2.5),
        ("call_duration_seconds_count", {}, 100),
        ("call_duration_seconds_bucket", {"le": "0.001048576"}, 60),
        ("call_duration_seconds_bucket", {"le": "0.008388608"}, 90),
        ("call_duration_seconds_bucket", {"le": "17.179869184"}, 90),
        ("call_duration_seconds_bucket", {"le": "+Inf"}, 100),
    ):
        of = {"circuit": CACHE, "service": "web_app", "fleet": "default"}
        assert found[f"circuit_breaker_{name}", labels | of] == value, name


def test_a_process_that_is_sick_alone_is_suspected() -> None:
    sick, well = ReporterShare("a", 5, 5, AT), ReporterShare("b", 0, 0, AT)
    found = one(snapshot(reporters=(sick, well), policy=Policy()))
    assert found["circuit_breaker_suspects"] == 1
    assert one(snapshot())["circuit_breaker_suspects"] == 0


class Spec:
    def __init__(self, policy: Policy | None = None, enabled: bool = True) -> None:
        self.service, self.kind, self.policy, self.enabled = (
            "shop",
            "http",
            policy or Policy(),
            enabled,
        )


def test_a_configured_circuit_is_there_before_its_first_call() -> None:
    found = exported(fleet={}, configured={"shop.http": Spec()})
    assert found["circuit_breaker_calls_total", {"outcome": "failure", "service": "shop"}] == 0
    assert found["circuit_breaker_state", {"state": "closed", "circuit": "shop.http"}] == 1


def test_a_circuit_that_is_switched_off_is_not_there() -> None:
    found = one(snapshot(state="open"), configured={CACHE: Spec(enabled=False)})
    assert not found.all(("circuit_breaker_state", {"circuit": CACHE}))


def test_there_are_never_more_circuits_than(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the configuration names stay longest, names of hosts go first."""
    monkeypatch.setattr(figures_module, "MOST", 2)
    held = {name: snapshot(name) for name in ("a@host", "b", "c", "shop.http")}
    found = exported(fleet=held, configured={"shop.http": Spec()}, own={
        name: Snapshot(name, State.OPEN, None, "shadow", policy_mismatch=True) for name in held
    })  # fmt: skip
    names = {dict(labels)["circuit"] for (_, labels), _ in found.all("circuit_breaker_probes_out")}
    assert names == {"shop.http", "b"}
    assert found["circuit_breaker_circuits_omitted"] == 2
    assert len(found.all("circuit_breaker_local_state")) == 2
    assert len(found.all("circuit_breaker_policy_mismatch")) == 2


def test_what_only_this_process_knows_is_not_said_of_the_fleet() -> None:
    """A circuit that the store does not hold yet, or whose key can't be read."""
    own = Snapshot("b", State.CLOSED, None, "shadow", totals={}, mirror_age=1.0)
    known = Figures.of({"a": snapshot("a"), "b": own}, {"b": own}, "default", "here:1")
    found = Exported.of(*exposition("", known))
    circuits = found.all("circuit_breaker_trips_total")
    assert [dict(labels)["circuit"] for (_, labels), _ in circuits] == ["a"]


def test_the_oldest_mirror_and_all_that_waits() -> None:
    own = {
        name: Snapshot(name, State.CLOSED, None, "shared", mirror_age=age, local={"pending": 2})
        for name, age in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    }
    found = exported(fleet={}, own=own)
    assert found["circuit_breaker_mirror_age_seconds"] == 3.0
    assert found["circuit_breaker_pending_outcomes"] == 6


def test_what_clients_say_of_themselves() -> None:
    topics = {
        "a": {"waiting": 3, "parked": 1, "oldest": 7.5},
        "b": {"waiting": 2, "parked": 0, "oldest": None},
        "c": {"waiting": 1, "parked": 0, "oldest": 2.5},
    }
    said = {
        "attempts": 5,
        "statuses": {"200": 3, "204": 1, "503": 1},
        "times": {"wait": {"count": 5, "seconds": 0.25}},
        "outbox": {"works": False, "topics": topics},
        "pool": {"size": 5},
    }
    found = exported(fleet={}, clients={"api.http": said, "api.cache": said, "api.database": {}})
    for name, value in (
        ("outbox_waiting", 6),
        ("outbox_parked", 1),
        ("outbox_oldest_age_seconds", 7.5),
        ("outbox_works", 0),
    ):
        for client in ("api.http", "api.cache"):
            assert found[f"circuit_breaker_{name}", {"client": client}] == value
    # What is of HTTP alone, nobody else has.
    assert found["circuit_breaker_http_attempts_total"] == 5
    assert found["circuit_breaker_http_responses_total", {"code": "2xx"}] == 4
    assert found["circuit_breaker_http_responses_total", {"code": "5xx"}] == 1
    assert found["circuit_breaker_http_phase_seconds_total", {"phase": "wait"}] == 0.25
    assert not found.all("circuit_breaker_database_pool_size")
    assert not [s for s in found.series if ("client", "api.database") in s[1]]


def test_no_text_breaks_out_of_its_label() -> None:
    name = 'a"} 1\nb\\'
    assert one(snapshot(name))["circuit_breaker_probes_out", {"circuit": name}] == 0
