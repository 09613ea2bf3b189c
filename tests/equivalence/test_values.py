"""What the twins hold before anything happens: their limits, an empty circuit, an empty step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distributed_breaker import model, store
from distributed_breaker.model import Circuit, Header, Known, Reply, Run, Step
from distributed_breaker.store import encode
from tests.equivalence.invariants import LEGAL
from tests.equivalence.small import NOON, numbers
from tests.equivalence.twins import Case, run_model

CONSTANT = r"^(?:local )?([A-Z_]+) = ([A-Z0-9_* ]+?)(?:  #.*)?$"
HEADER = "1 5 a closed 4 3 2 1 f 6"


def constants(source: str) -> dict[str, int]:
    """The numbers at the top of one of the twins, by name."""
    found: dict[str, int] = {}
    for name, text in re.findall(CONSTANT, source, re.MULTILINE):
        found[name] = eval(text, {}, found)
    return found


def test_the_twins_have_the_same_limits() -> None:
    """Every number that both name at their top is the same; not all are needed by both."""
    script = constants(store.script())
    mine = constants(Path(str(model.__file__)).read_text(encoding="utf-8"))
    assert {"SCHEMA", "BUCKETS", "WEEK", "ACTIVE", "MAX_TOKENS", "MAX_BAD", "MAX_SPAN"} <= set(mine)
    common = set(script) & set(mine)
    assert set(mine) - common <= {"DAY"}
    assert {name: script[name] for name in common} == {name: mine[name] for name in common}


def test_trips_are_the_causes_that_open_a_circuit() -> None:
    """An operator's word and a restored state are no trips."""
    opening = {cause for cause, moves in LEGAL.items() if {new for _, new in moves} == {"open"}}
    assert opening == model.TRIPS


def test_an_empty_circuit_is_written_as_nothing() -> None:
    """Numbers are 0 and lists empty, as lua/README.md says of fields that are absent."""
    assert model.dump(Circuit(0, "-")) == {
        "h": "1 0 - closed 0 0 0 0 - 0 -",
        "w": "0 0 0 0 0",
        "r": "0",
        "s": "",
        "p": "",
        "t": " ".join("0" * 32),
        "x": "",
        "e": "0",
    }
    assert model.load(model.dump(Circuit(0, "-"))) == Circuit(0, "-")
    assert model.load({"h": "1 0 - closed 0 0 0 0 - 0"}) == Circuit(0, "-")
    assert model.load({}) is None
    assert model.load({"w": "1 1"}) is None


def test_a_step_says_nothing_that_it_was_not_told() -> None:
    """No knowledge, no policy offered, no outcomes, no reporter and no token."""
    end = [numbers().text(), "0"]
    common = ["", "0123abcd", "channel", "c", "0 - closed 0 0", *end]
    own = {
        "report": ["0 -", "-", "", "", ""],
        "acquire": ["-"],
        "settle": ["0 -", "-", "i", "0", "", ""],
        "cancel": ["-"],
        "override": ["i", "-1", ""],
        "release": [""],
        "reset": [""],
    }
    for op, arguments in own.items():
        step = Step(op, "0123abcd", numbers())
        assert encode(step, "channel", "c", None) == [op, *common, *arguments], op
    assert Known() == Known(0, "-", "closed", 0, 0) == model.NOTHING
    assert Run("s") == Run("s", 1, 0, -1)


def test_a_reply_of_the_model_names_no_refusals() -> None:
    """After-effects are the store's; the model has none that could fail."""
    assert run_model(Case(None, Step("report", "0123abcd", numbers()), NOON)).reply.failed == ""
    assert Reply("", 0, 0, "", "", "", 0, "").failed == ""


def test_no_clock_makes_a_timer_longer_than_it_is() -> None:
    """S12: what is left lies between nothing and the whole duration, whatever the clock says."""
    for state in ("open", "forced_open", "forced_closed"):
        left = [model.remaining(state, 100, 50, now) for now in (0, 99, 100, 101, 149, 150, 900)]
        assert left == [50, 50, 50, 49, 1, 0, 0], state
        assert model.remaining(state, 100, -1, 900) == -1
    for state in ("closed", "half_open"):
        assert model.remaining(state, 100, 50, 100) == 0


@pytest.mark.parametrize(
    ("more", "cause"), [("", "-"), (" reset", "reset"), (" reset and more", "reset"), (" -", "-")]
)
def test_a_header_may_lack_its_cause(more: str, cause: str) -> None:
    """An older script wrote none; what follows it is ignored."""
    wanted = Header(5, "a", "closed", 4, 3, 2, 1, True, 6, cause)
    assert model.load_header(HEADER + more) == wanted
    assert Header(*wanted[:9]).cause == "-"


@pytest.mark.parametrize(
    ("reason", "cause"), [("", "-"), ("reset", "reset"), ("reset 5 by hand", "reset"), (" x", "-")]
)
def test_a_circuits_header_is_what_is_written(reason: str, cause: str) -> None:
    """Mirrors follow the header of a circuit, whether it came as a text or as the circuit."""
    c = Circuit(5, "a", "closed", 4, 3, 2, 1, True, 6, reason=reason)
    assert c.header == model.load_header(model.dump_header(c))
    assert c.header.cause == cause
