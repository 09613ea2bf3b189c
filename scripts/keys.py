"""``python -m scripts.keys``: writes what the configuration's models say of themselves.

That is the JSON Schema beside the shipped file, and the tables of keys in docs/configuration.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed_breaker.alert_keys import Alerts, Channel, Rule
from distributed_breaker.sections import SECTIONS, Circuit, Settings, schema
from scripts.marks import between, marks

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "config" / "circuit_breakers.schema.json"
DOCUMENT = ROOT / "docs" / "configuration.md"
MARKS = marks("keys")


def schema_text() -> str:
    """The JSON Schema as it is shipped."""
    return json.dumps(schema(), indent=2) + "\n"


def tables() -> str:
    """One table for each section, with the circuit's own numbers said once."""
    sections: list[tuple[str, Any]] = [
        ("`settings`", Settings),
        ("`settings.alerts`", Alerts),
        ("`settings.alerts.channels.<name>`", Channel),
        ("`settings.alerts.rules.<name>`", Rule),
    ]
    sections.append(("every section: the circuit's numbers (see `Policy`)", Circuit))
    sections += [(f"`{kind}`", model) for kind, model in SECTIONS.items()]
    return "\n".join(_table(title, model) for title, model in sections)


def _table(title: str, model: Any) -> str:
    known = Circuit.model_fields if model in SECTIONS.values() else {}
    lines = [f"### {title}", "", "| key | default | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in known:
            continue
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            shown = "required"
        elif isinstance(default, Alerts) or name == "rules":
            shown = "see below"
        else:
            shown = f"`{json.dumps(default)}`"
        lines.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join([*lines, ""])


def document_text(text: str) -> str:
    """The document with its tables as they must be."""
    return between(text, tables(), MARKS)


def main() -> None:
    """Write both."""
    SCHEMA.write_text(schema_text(), "utf-8")
    DOCUMENT.write_text(document_text(DOCUMENT.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
