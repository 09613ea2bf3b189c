"""The alert rules and the dashboard ask only for what is exported, and each rule fires when it
should and at no other time.

They are evaluated by ``promql.py``, which knows as much of PromQL as they use.  Where ``promtool``
is on PATH it is asked too; no package brings it, so it may be missing everywhere.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_breaker import State
from distributed_breaker.monitoring.exposition import exposition
from distributed_breaker.monitoring.figures import Figures
from distributed_breaker.policy import Policy
from distributed_breaker.snapshot import ReporterShare, Snapshot
from tests.fleet.process import ROOT
from tests.monitoring import promql, rules
from tests.monitoring.exported import Exported
from tests.monitoring.promql import Labels, Scene, Vector

RULES_FILE = ROOT / "docs/prometheus/alerts.yml"
DASHBOARD_FILE = ROOT / "docs/grafana/circuit_breakers.json"
RUNBOOK_FILE = ROOT / "docs/monitoring.md"
RULES = rules.read(RULES_FILE)["groups"][0]["rules"]
AT = 1_764_000_000.0
NAME = "api.http"

BUCKETS = {f"b{i}": 0 for i in range(16)}
CALM = {"calls": 10_000, "failures": 100, "rejected": 0, "fallbacks": 10, "ignored": 0,
        "duration_us": 9_000_000, **BUCKETS, "b3": 10_000}  # fmt: skip
STATS = {"outbox": {"works": True, "topics": {"x": {"waiting": 3, "parked": 0, "oldest": 2.0}}}}


class World:
    """A fleet of one circuit and one process, five minutes ago and now."""

    def __init__(self) -> None:
        self.circuit: dict[str, Any] = {"totals": CALM, "since": AT - 60, "fleet": True}
        self.state = State.CLOSED
        self.own: dict[str, Any] = {"source": "shared", "mirror_age": 1.0}
        self.more: dict[str, Any] = {}
        self.growth = {"calls": 1000, "failures": 10, "b3": 1000, "duration_us": 900_000}
        self.parked = 0
        self.lost = False

    def figures(self, grown: float, process: str = "here:1") -> Figures:
        """What a process says after so many times five minutes."""
        totals = {n: v + round(grown * self.growth.get(n, 0)) for n, v in CALM.items()}
        held = Snapshot(
            NAME, self.state, self.state, "shared", **{**self.circuit, "totals": totals}
        )
        own = Snapshot(NAME, **{"state": self.state, "shared_state": self.state, **self.own})
        topics = {"x": {"waiting": 3, "parked": self.parked, "oldest": 2.0}}
        clients = {
            NAME: {
                "outbox": {"works": True, "topics": topics},
                "attempts": round(100 * grown), "retries": round(grown),
                "stored": {"hits": round(50 * grown), "stale": round(grown)},
            },
            "api.database": {"pool": {"size": 5, "checked_out": 2, "overflow": 0}},
        }  # fmt: skip
        return Figures(
            None if self.lost else {NAME: held},
            {NAME: own},
            clients,
            {},
            "shop",
            process,
            **self.more,
        )

    def exported(self, grown: float, processes: int = 1) -> Exported:
        """What Prometheus holds when it has scraped each process at an address of its own."""
        found = Exported([])
        for number in range(processes):
            one = Exported.of(*exposition("", self.figures(grown, f"here:{number}")))
            target = {("instance", f"here:{9000 + number}"), ("job", "shop")}
            found.series |= {(name, labels | target): v for (name, labels), v in one.series.items()}
        return found

    def scene(self, processes: int = 1) -> Scene:
        return Scene(self.exported(0, processes), self.exported(1, processes), at=AT)


def opened(world: World) -> None:
    world.state, world.circuit["ends_at"] = State.OPEN, AT + 30
    world.growth = {"rejected": 1000}


def half_open(world: World) -> None:
    world.state, world.circuit["permits"] = State.HALF_OPEN, 3


def forced(world: World) -> None:
    world.state = State.FORCED_CLOSED


def lost(world: World) -> None:
    world.lost = True


def lost_and_open(world: World) -> None:
    world.lost = True
    world.own |= {"source": "shadow", "state": State.OPEN}


def mismatch(world: World) -> None:
    world.own["policy_mismatch"] = True


def fallbacks(world: World) -> None:
    world.growth["fallbacks"] = 400


def rejections(world: World) -> None:
    world.growth["rejected"] = 100


def quarantine(world: World) -> None:
    world.own |= {"source": "quarantine", "state": State.OPEN}


def suspect(world: World) -> None:
    world.circuit |= {
        "policy": Policy(),
        "reporters": (ReporterShare("a", 9, 9, AT), ReporterShare("b", 0, 0, AT)),
    }


def parked(world: World) -> None:
    world.parked = 2


def rejected(world: World) -> None:
    world.more["rejected"] = True


SCENES: dict[Callable[[World], None], set[str]] = {
    lambda world: None: set(),
    opened: {"Open", "HighRejection"},
    half_open: {"StuckHalfOpen"},
    forced: {"Override"},
    lost: {"StoreLost"},
    lost_and_open: {"StoreLost", "Open"},
    mismatch: {"PolicyMismatch"},
    fallbacks: {"HighFallbackShare"},
    rejections: {"HighRejection"},
    quarantine: {"Quarantine"},
    suspect: {"Quarantine"},
    parked: {"OutboxParked"},
    rejected: {"ConfigurationRejected"},
}


@pytest.mark.parametrize("change", SCENES)
def test_each_rule_fires_when_it_should_and_else_not(change: Callable[[World], None]) -> None:
    world = World()
    change(world)
    fired = {rule["alert"]: evaluated(rule["expr"], world.scene()) for rule in RULES}
    assert {name.removeprefix("CircuitBreaker") for name, found in fired.items() if found} == (
        SCENES[change]
    )
    for rule in RULES:
        for found in fired[rule["alert"]]:
            # What its texts name is there to be put in.
            texts = " ".join(rule["annotations"].values())
            assert set(re.findall(r"\$labels\.(\w+)", texts)) <= {label for label, _ in found}


def test_each_rule_is_fired_by_one_of_them() -> None:
    names = {rule["alert"].removeprefix("CircuitBreaker") for rule in RULES}
    assert names == set().union(*SCENES.values())


def test_shares_are_of_all_calls_whatever_their_outcome() -> None:
    world = World()
    world.growth |= {"calls": 900, "failures": 450, "rejected": 100, "fallbacks": 250}
    exprs = {rule["alert"]: rule["expr"] for rule in RULES}
    for name, share in (("HighFallbackShare", 0.25), ("HighRejection", 0.1)):
        (found,) = evaluated(exprs[f"CircuitBreaker{name}"], world.scene()).values()
        assert found == pytest.approx(share)


@pytest.mark.parametrize("change", [opened, fallbacks, suspect])
def test_more_exporters_change_nothing(change: Callable[[World], None]) -> None:
    """What is said of the fleet is the same from each, and must not be counted for each."""
    world = World()
    change(world)
    for text in [rule["expr"] for rule in RULES] + [
        text for _, text in asked("stat", "timeseries")
    ]:
        if "_client" in text or "client" in text or "process" in text:
            continue
        assert evaluated(text, world.scene(1)) == evaluated(text, world.scene(3)), text


def evaluated(text: str, scene: Scene) -> Vector:
    found = promql.evaluate(text, scene)
    assert isinstance(found, dict)
    return found


# ---------------------------------------------------------------------------- rules


def test_each_rule_is_complete() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    headings = anchors(RUNBOOK_FILE)
    for rule in RULES:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook"}
        file, _, anchor = notes["runbook"].partition("#")
        assert (ROOT / file, anchor in headings) == (RUNBOOK_FILE, True), notes["runbook"]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------------------- the dashboard


def asked(*kinds: str) -> list[tuple[str, str]]:
    """The panels' expressions with their titles; variables stand for all that there is."""
    dashboard = json.loads(DASHBOARD_FILE.read_text())
    return [
        (panel["title"], filled(target["expr"]))
        for panel in dashboard["panels"]
        if panel["type"] in kinds
        for target in panel["targets"]
    ]


def filled(text: str) -> str:
    text = text.replace("$__rate_interval", "5m")
    return re.sub(r"\$(fleet|service|circuit)\b", ".*", text)


KINDS = ("stat", "timeseries", "state-timeline", "table")


def test_each_panel_shows_something_in_one_of_the_scenes() -> None:
    scenes = []
    for change in SCENES:
        world = World()
        change(world)
        scenes.append(world.scene(2))
    panels = asked(*KINDS)
    assert len(panels) > 25
    for title, text in panels:
        assert any(evaluated(text, scene) for scene in scenes), (title, text)


def test_what_the_dashboard_counts() -> None:
    world = World()
    opened(world)
    counts = {title: evaluated(text, world.scene(3)) for title, text in asked("stat")}
    none: Labels = frozenset()
    assert counts.pop("Open") == {none: 1}
    assert counts.pop("Half-open") == counts.pop("Forced") == {none: 0}
    assert not any(counts.values())
    ((_, states),) = asked("state-timeline")
    assert list(evaluated(states, world.scene(3)).values()) == [2]


def test_the_dashboard_can_be_imported() -> None:
    """As far as that can be known without Grafana."""
    dashboard = json.loads(DASHBOARD_FILE.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} <= {*KINDS, "row"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another one"
        taken |= cells
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    for name in set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(dashboard))):
        assert name in known, name
    for variable in dashboard["templating"]["list"][1:]:
        query = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert query
        found = evaluated(filled(query[1]), World().scene())
        assert all(query[2] in dict(labels) for labels in found)
        assert found


# ---------------------------------------------------------------------------- promtool

PROMTOOL = shutil.which("promtool")
promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: Prometheus was not asked")


@promtool
def test_prometheus_itself_finds_the_same(tmp_path: Path) -> None:
    """Each scene goes on for 90 minutes; the alerts of its end are compared."""
    tests = []
    for change, wanted in SCENES.items():
        world = World()
        change(world)
        before, now = world.exported(0).series, world.exported(1).series
        firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
        samples = [{"labels": f'{{alertname="CircuitBreaker{n}"}}', "value": 1} for n in wanted]
        tests.append({
            "interval": "1m",
            "input_series": [
                {"series": written(*one), "values": f"{start}+{(now[one] - start) / 5}x90"}
                for one, start in before.items()
            ],
            "promql_expr_test": [{"expr": firing, "eval_time": "90m", "exp_samples": samples}],
        })  # fmt: skip
    file = tmp_path / "tests.json"
    file.write_text(json.dumps({"rule_files": [str(RULES_FILE)], "tests": tests}))
    command = [str(PROMTOOL), "test", "rules", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


@promtool
def test_prometheus_itself_can_read_the_dashboard(tmp_path: Path) -> None:
    records = [
        {"record": f"panel_{number}", "expr": text}
        for number, (_, text) in enumerate(asked(*KINDS))
    ]
    file = tmp_path / "panels.json"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": records}]}))
    command = [str(PROMTOOL), "check", "rules", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def written(name: str, labels: Labels) -> str:
    """A series as PromQL names it."""
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in sorted(labels)) + "}"
