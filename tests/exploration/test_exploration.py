"""All states of small worlds keep the rules; with any one rule taken away, they do not."""

from __future__ import annotations

import pytest

from tests.exploration.bounds import Bounds
from tests.exploration.explorations import ORDINARY, Exploration
from tests.exploration.peace import Peace
from tests.exploration.planted import REMOVALS, Removal
from tests.exploration.search import search
from tests.exploration.world import World

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("exploration", ORDINARY, ids=lambda e: e.bounds.name)
def test_the_rules_hold_in_all_states(exploration: Exploration) -> None:
    """No way leads to a broken rule, and from what was sampled all ends well in peace."""
    found = exploration.search()
    assert not found.broken, str(found)
    assert found.states >= exploration.bounds.least, str(found)
    missing = [what for what in exploration.situations if not found.world.notes[what]]
    assert missing == [], str(found)


@pytest.mark.parametrize("removal", REMOVALS, ids=lambda r: r.what)
def test_a_rule_that_is_taken_away_is_missed(removal: Removal) -> None:
    """The search finds the shortest way to what goes wrong without it."""
    world = World(removal.bounds, removal.machine(), removal.without)
    peace = Peace(world, removal.found) if removal.peace else None
    found = search(world, removal.found, peace)
    assert found.broken.startswith(removal.found), f"not found: {removal.what}\n{found}"
    assert found.way, "a rule that is broken at once says nothing"


@pytest.mark.parametrize("removal", REMOVALS, ids=lambda r: r.what)
def test_the_rule_holds_within_the_same_bounds(removal: Removal) -> None:
    """It is the removal that is found, and not something that the bounds bring with them."""
    world = World(removal.bounds)
    peace = Peace(world, removal.found) if removal.peace else None
    found = search(world, removal.found, peace)
    assert not found.broken, str(found)


def test_why_an_acquire_is_never_sent_again() -> None:
    """A copy of it that comes after the settle is granted anew, and a repeated settle counts again:
    lua/README.md forbids it, and this library does not do it."""
    bounds = Bounds("both repeated", 1, duplicates=1, duplicated=("acquire",), repeats=1)
    found = search(World(bounds), ("S6", "S10"))
    assert found.broken.startswith(("S6", "S10")), str(found)
