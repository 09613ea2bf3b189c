"""Reports as people read them: tables on a terminal, and lines of plain text in a pipe.

Texts that came out of the store (messages of errors, reasons of operators) are shown without
control characters: whoever can write there must not command a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .doctor import Finding, Verdict

Report = Mapping[str, Any]

STYLES = {
    "closed": ("🟢", "green"),
    "open": ("🔴", "bold red"),
    "forced_open": ("🔴", "bold red"),
    "half_open": ("🟡", "yellow"),
    "forced_closed": ("🟡", "yellow"),
    "disabled": ("⚪", "dim"),
}
STATUS_STYLES = {
    "healthy": ("🟢", "green"),
    "degraded": ("🟡", "yellow"),
    "unhealthy": ("🔴", "bold red"),
}
VERDICT_STYLES = {
    Verdict.OK: ("✓", "green"),
    Verdict.UNKNOWN: ("?", "dim"),
    Verdict.WARNING: ("!", "yellow"),
    Verdict.PROBLEM: ("✗", "bold red"),
}
FOLLOWING = "following"
CAUSES = {
    "created": "it was made",
    "unreadable": "the store's key cannot be read",
    "restored": "the store had lost it, and processes put it back",
    "run": "bad outcomes in a row",
    "rate": "the share of failures in the window",
    "slow": "the share of slow calls in the window",
    "retry_after": "the dependency asked to be left alone",
    "due": "the open interval was over",
    "recovered": "enough probes succeeded",
    "probe": "a probe failed",
    "forced_open": "an operator forced it open",
    "forced_closed": "an operator forced it closed",
    "released": "an operator released it",
    "expired": "an operator's override ran out",
    "reset": "an operator reset it",
}


# ---------------------------------------------------------------------------- plain lines


def summary_line(report: Report) -> str:
    """``<time> <overall status> total=… healthy=… degraded=… unhealthy=…``"""
    counts = [f"{name}={count}" for name, count in report["summary"].items()]
    problem = report["store"]["problem"]
    if problem:
        counts += ["shadow=deciding", f"store={_quoted(problem)}"]
    return " ".join([report["timestamp"], report["overall_status"], *counts])


def circuit_lines(report: Report) -> Iterator[str]:
    """One line for each circuit: ``<time> <circuit> <state> <status> <name>=<value>…``"""
    lost = bool(report["store"]["problem"])
    for name, circuit in report["circuit_breakers"].items():
        words = [report["timestamp"], name, _shown_state(circuit), circuit["status"]]
        words += [f"{key}={_quoted(value)}" for key, value in _facts(circuit, lost).items()]
        yield " ".join(words)


def metric_lines(report: Report) -> Iterator[str]:
    """One line for each circuit: ``<time> <circuit> <name>=<value>…``"""
    for name, circuit in report["circuit_breakers"].items():
        known = {key: value for key, value in _flat(circuit).items() if value is not None}
        words = [f"{key}={_quoted(value)}" for key, value in known.items()]
        yield " ".join([report["timestamp"], name, *words])


def _flat(values: Report) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


def _facts(circuit: Report, lost: bool) -> dict[str, Any]:
    """What is worth saying of a circuit; what is empty is left out."""
    facts = {
        "fleet": circuit["shared_state"] or "unknown",
        "shadow": _shadow(circuit, lost),
        "since": circuit["since"],
        "next": circuit["next_attempt_time"],
        "cause": circuit["cause"],
        "reporters": ",".join(seen_by(circuit)),
        "calls": circuit["window"]["calls"],
        "failures": circuit["window"]["failures"],
        "why": said(circuit["detail"]),
    }
    if not circuit["called"]:
        facts["called"] = "never"
    return {key: value for key, value in facts.items() if value not in (None, "")}


def _shadow(circuit: Report, lost: bool) -> str:
    """What is known of the processes' own machines: a shadow decides where the store cannot."""
    if circuit["suspects"]:
        return f"quarantine:{','.join(circuit['suspects'])}"
    return "deciding" if lost or circuit["source"] == "shadow" else FOLLOWING


def _quoted(value: Any) -> str:
    text = clean(value) if isinstance(value, str) else json.dumps(value)
    return json.dumps(text, ensure_ascii=False) if " " in text or '"' in text else text


def clean(text: object) -> str:
    """A text without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


# ---------------------------------------------------------------------------- tables


def health_table(report: Report, title: str, now: float) -> RenderableType:
    """The state of every circuit, those that need attention first, and above them why they do."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "circuit", "fleet", "shadow", "since", "next probe", "window"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "circuit")
    lost = bool(report["store"]["problem"])
    order = {"unhealthy": 0, "degraded": 1}
    circuits = sorted(
        report["circuit_breakers"].items(), key=lambda c: (order.get(c[1]["status"], 2), c[0])
    )
    for name, circuit in circuits:
        table.add_row(*_row(name, circuit, lost, now))
    reasons = [_reason(name, circuit) for name, circuit in circuits if circuit["status"] in order]
    return Group(_headline(report, title), *reasons, table)


def _row(name: str, circuit: Report, lost: bool, now: float) -> list[Text]:
    state = _shown_state(circuit)
    symbol, style = STYLES[state]
    shadow = _shadow(circuit, lost)
    window = circuit["window"]
    calls = f"{window['failures']}/{window['calls']} failed" if window["calls"] else ""
    if circuit["state"] == "half_open":
        probes = circuit["probes"]
        calls = f"{probes['successes']}/{probes['needed']} probes, {probes['out']} out"
    never = not circuit["called"] and state in ("closed", "disabled")
    return [
        Text(symbol),
        Text(clean(name)),
        Text(state, style),
        Text(clean(shadow), "dim" if shadow == FOLLOWING else "yellow"),
        Text("never called" if never else ago(circuit["since"], now), "dim" if never else ""),
        Text(_next(circuit, now)),
        Text(calls),
    ]


def _reason(name: str, circuit: Report) -> Text:
    cause = circuit["cause"] or ""
    seen = ", ".join(seen_by(circuit))
    parts = [CAUSES.get(cause, cause), said(circuit["detail"]), f"seen by {seen}" if seen else ""]
    return Text(clean(f"   {name}: {'; '.join(filter(None, parts))}"))


def _headline(report: Report, title: str) -> Text:
    symbol, style = STATUS_STYLES[report["overall_status"]]
    counts = ", ".join(f"{count} {name}" for name, count in report["summary"].items())
    line = Text.assemble(f"{symbol} ", (report["overall_status"], style), f"  {counts}", "  ")
    line.append(clean(title), "dim")
    if report["store"]["problem"]:
        problem = clean(report["store"]["problem"])
        line.append(f"\n{problem}: every process decides alone, by its shadow breaker", "bold red")
    return line


def metrics_table(report: Report) -> RenderableType:
    """Counts and response times of every circuit."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("circuit", overflow="fold")
    table.add_column("state")
    columns = ("total", "failed", "rejected", "slow")
    times = ("p50", "p95", "p99")
    for heading in [*columns, "failing", *times]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, circuit in report["circuit_breakers"].items():
        state = circuit["state"] if circuit["enabled"] else "disabled"
        table.add_row(
            Text(clean(name)),
            Text(state, STYLES[state][1]),
            *(f"{circuit[f'{key}_requests']:,}" for key in columns),
            f"{circuit['failure_rate']:.1%}",
            *(duration(circuit[f"{key}_response_time"]) for key in times),
        )
    return table


def finding_text(finding: Finding) -> Text:
    """One finding."""
    symbol, style = VERDICT_STYLES[finding.verdict]
    text = Text.assemble((symbol, style), f" {finding.check}: {clean(finding.found)}")
    if finding.advice:
        text.append(f"\n    {clean(finding.advice)}", "" if style != "green" else "dim")
    return text


def finding_lines(finding: Finding) -> Iterator[str]:
    """One finding in plain text."""
    yield f"{finding.verdict} {finding.check}: {clean(finding.found)}"
    if finding.advice:
        yield f"    {clean(finding.advice)}"


# ---------------------------------------------------------------------------- explanations


def explanation(name: str, circuit: Report, now: float) -> list[str]:
    """Sentences that say why a circuit is in its state and what comes next."""
    state = circuit["state"]
    if not circuit["enabled"]:
        return [f"{name} is switched off by the configuration: all calls pass, none is counted."]
    if circuit["cause"] == "unreadable":
        problem = f"The store's key of {name} cannot be read ({said(circuit['detail'])})"
        return [clean(f"{problem}: every process decides alone. Delete or mend it.")]
    if circuit["shared_state"] is None:
        return [f"{name} is closed: nobody has called it yet."]
    shown = circuit["state"].replace("_", " ")
    lines = [f"{name} is {shown} since {circuit['since']} ({ago(circuit['since'], now)})."]
    cause = circuit["cause"]
    if cause:
        detail = said(circuit["detail"])
        lines.append(
            f"Cause: {CAUSES.get(cause, cause)} ({cause}){f': {detail}' if detail else ''}."
        )
    if state != "closed":
        lines += _evidence(circuit["last_trip"])
    if circuit["suspects"]:
        lines.append(
            f"Only {', '.join(circuit['suspects'])} sees failures, so the fleet goes on; that "
            f"process has most likely put itself in quarantine."
        )
    lines.append(_outlook(circuit, now))
    return [clean(line) for line in lines]


def _evidence(trip: Report | None) -> list[str]:
    if trip is None:
        return []
    line = f"Last trip: {trip['time']}, {CAUSES.get(trip['cause'], trip['cause'])}"
    if trip["window"]:
        w = trip["window"]
        line += (
            f"; then {w['calls']} calls in the window, {w['failures']} failed, {w['slow']} slow, "
            f"{trip['run']} bad in a row, active processes: {trip['reporters']}"
        )
    detail = said(trip["detail"])
    return [f"{line}{f'; {detail}' if detail else ''}."]


def _outlook(circuit: Report, now: float) -> str:
    state, upcoming = circuit["state"], circuit["next_attempt_time"]
    probes = circuit["probes"]
    if state == "open":
        if upcoming is None:
            return "It stays open until an operator resets it: automatic recovery is off."
        if _seconds(upcoming) <= now:
            return "A probe is due: the next call, or the health check, makes it."
        return f"The next probe is allowed at {upcoming} ({_next(circuit, now)})."
    if state == "half_open":
        return (
            f"{probes['successes']} of {probes['needed']} probes have succeeded, {probes['out']} "
            f"are under way; one failure opens it again."
        )
    if state.startswith("forced"):
        if circuit["ends_at"] is None:
            return "It stays so until an operator releases it."
        return f"The override ends at {circuit['ends_at']}."
    window = circuit["window"]
    return (
        f"In the window: {window['calls']} calls, {window['failures']} failures; "
        f"{circuit['run']} bad outcomes in a row."
    )


def reporter_lines(circuit: Report) -> Iterator[str]:
    """One line for each process that has a share."""
    for r in circuit["reporters"]:
        yield clean(f"{r['id']}  bad={r['bad']} run={r['run']} last={r['last']}")


def history_lines(history: Sequence[Report]) -> Iterator[str]:
    """One line for each transition."""
    for entry in history:
        detail = said(entry["detail"])
        window = entry["window"]
        yield clean(
            f"{entry['time']}  {entry['from'] or '-'} -> {entry['to']}  {entry['cause']}"
            f"  calls={window['calls']} failures={window['failures']} slow={window['slow']}"
            f" run={entry['run']} reporters={entry['reporters']}"
            + (f"  {detail}" if detail else "")
        )


# ---------------------------------------------------------------------------- small parts


def seen_by(circuit: Report) -> list[str]:
    """Who saw the failures: those that have shares now, else the one whose outcome tripped it."""
    bad = [str(reporter["id"]) for reporter in circuit["reporters"] if reporter["bad"]]
    if not bad and circuit["state"] != "closed":
        last = (circuit["last_trip"] or {}).get("detail") or circuit["detail"]
        if last.get("reporter"):
            bad = [f"{last['reporter']}@{last.get('host', '')}"]
    return bad


def said(detail: Report) -> str:
    """What a transition's maker said of it: an error, or who and why."""
    if detail.get("error"):
        return f"{detail['error']}: {detail.get('message', '')}".removesuffix(": ")
    actor, reason = detail.get("actor", ""), detail.get("reason", "")
    return f"{actor}: {reason}" if actor and reason else str(actor or reason)


def _shown_state(circuit: Report) -> str:
    return str(circuit["state"]) if circuit["enabled"] else "disabled"


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def ago(iso: str | None, now: float) -> str:
    """How long ago a time was."""
    return "" if iso is None else f"{span(max(0.0, now - _seconds(iso)))} ago"


def _next(circuit: Report, now: float) -> str:
    upcoming = circuit["next_attempt_time"]
    if upcoming is None:
        return "on release" if circuit["state"] == "forced_open" else ""
    left = _seconds(upcoming) - now
    return f"in {span(left)}" if left > 0 else "due"


def span(seconds: float) -> str:
    """A duration in its two greatest units."""
    whole = int(seconds)
    for unit, size, below, smaller in (
        ("d", 86_400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{below}"
    return f"{whole}s"


def duration(seconds: float | None) -> str:
    """A response time."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
