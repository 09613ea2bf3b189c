"""What an alert says: its fields, and the texts that people read.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any, NamedTuple

from ..alert_keys import FIELDS, Rule
from .alert_rules import Event, Incident
from .report import iso, service_of

MOST_TEXT = 2_000  # characters of a title or text

SEVERITY = {
    "open": "critical",
    "store_lost": "critical",
    "forced_open": "warning",
    "forced_closed": "warning",
    "stuck_half_open": "warning",
    "fallback_share": "warning",
    "policy_mismatch": "warning",
    "half_open": "info",
}

TITLES = {
    "open": "circuit $circuit is open",
    "half_open": "circuit $circuit is half open",
    "forced_open": "circuit $circuit is forced open",
    "forced_closed": "circuit $circuit is forced closed, without protection",
    "stuck_half_open": "circuit $circuit does not get out of half_open",
    "fallback_share": "circuit $circuit: $value of the requests are answered by fallbacks",
    "policy_mismatch": "circuit $circuit: processes go by different policies",
    "store_lost": "host $host: the circuit breakers' Redis is lost",
}
OVER_TITLES = {
    "open": "circuit $circuit is closed again",
    "forced_open": "circuit $circuit is no longer forced open",
    "forced_closed": "circuit $circuit is no longer forced closed",
    "stuck_half_open": "circuit $circuit has left half_open",
    "fallback_share": "circuit $circuit: few requests are answered by fallbacks again",
    "policy_mismatch": "circuit $circuit: all processes go by the fleet's policy again",
    "store_lost": "host $host: the circuit breakers' Redis is back",
}
TEXT = "$summary [$environment, $namespace, $at]"


class Setting(NamedTuple):
    """Where the circuits are, and who tells it."""

    namespace: str
    environment: str
    host: str


def document(event: Event, rule_name: str, rule: Rule, setting: Setting) -> dict[str, Any]:
    """An alert, as it is posted; its ``id`` and ``sent_at`` come with the delivery."""
    about = {key: value for key, value in event.about.items() if value not in ("", None)}
    began = event.incident or Incident(event.number, event.at)
    found: dict[str, Any] = {
        "kind": event.kind,
        "event": "resolved" if event.over else "firing",
        "severity": SEVERITY[event.kind],
        "circuit": event.circuit,
        "service": service_of(event.circuit),
        **setting._asdict(),
        "state": "",
        "incident": f"{setting.namespace}/{event.kind}/{event.circuit or setting.host}/"
        f"{began.number}",
        "number": event.number,
        "at": iso(event.at),
        "began_at": iso(began.at),
        "duration": round(max(0.0, event.at - began.at), 3) if event.over else None,
        "rule": rule_name,
        **about,
    }
    found["summary"] = _summary(event, found)
    fields = {name: _text(found.get(name)) for name in FIELDS}
    titles = OVER_TITLES if event.over else TITLES
    for part, own, usual in (("title", rule.title, titles[event.kind]), ("text", rule.text, TEXT)):
        text = Template(own or usual).safe_substitute(fields)[:MOST_TEXT]
        found[part] = text.encode(errors="replace").decode()
    return found


def trial(setting: Setting, now: float) -> dict[str, Any]:
    """An alert that only shows that alerts arrive."""
    return {
        **_about_nothing("test", "info", setting, now),
        "title": "this is a test of the circuit breakers' alerts",
        "text": f"Nothing is wrong [{setting.environment}, {setting.namespace}, {iso(now)}]",
    }


def _about_nothing(kind: str, severity: str, setting: Setting, now: float) -> dict[str, Any]:
    """The fields of an alert that is not about one event."""
    return {
        **dict.fromkeys(("circuit", "service", "state", "incident", "summary", "rule"), ""),
        "kind": kind,
        "event": "firing",
        "severity": severity,
        **setting._asdict(),
        "number": 0,
        "at": iso(now),
        "began_at": iso(now),
        "duration": None,
    }


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary(event: Event, found: Mapping[str, Any]) -> str:
    """One or two sentences with what is known beside the title."""
    if event.over:
        return f"It lasted {found['duration']:.0f} s."
    said = []
    if event.kind == "store_lost":
        said.append("Each process decides alone until it is back; calls go on.")
    if found.get("cause"):
        evidence = found.get("evidence")
        counted = (
            f": {evidence['failures']} of {evidence['calls']} calls failed, {evidence['run']} "
            f"bad ones in a row, {evidence['reporters']} processes"
            if evidence and event.kind == "open" else ""
        )  # fmt: skip
        said.append(f"Cause {found['cause']}{counted}.")
    for name, words in (
        ("error", "Last error: {}."),
        ("actor", "By {}."),
        ("reason", "Reason: {}."),
        ("processes", "Not of the fleet's policy: {}."),
    ):
        if found.get(name):
            value = found[name]
            said.append(words.format(", ".join(value) if isinstance(value, list) else value))
    if event.kind == "stuck_half_open":
        said.append(f"Half open for {found['value']}, {found['probes']} probes are out.")
    return " ".join(said)


def digest(
    rule: str, held: Counter[str], titles: Sequence[str], since: str, setting: Setting, now: float
) -> dict[str, Any]:
    """An alert that stands for many.

    Args:
        rule: the name of the rule that has held them back.
        held: how many of each kind.
        titles: of the first ones.
        since: when the first one was held back.
        setting: where the circuits are.
        now: seconds since 1970.
    """
    count = held.total()
    kinds = ", ".join(f"{n} {what}" for what, n in held.most_common())
    more = count - len(titles)
    named = "; ".join(titles) + (f"; and {more} more" if more else "")
    return {
        **_about_nothing("digest", "warning", setting, now),
        "began_at": since,
        "rule": rule,
        "count": count,
        "counts": dict(held),
        "title": f"{count} more alerts by the rule {rule}",
        "text": f"Held back so as not to flood you ({kinds}): {named}"[:MOST_TEXT],
    }
