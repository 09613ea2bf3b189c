"""Breadth first through all states of a world, to the shortest way in which a rule breaks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.exploration.world import Move, State, World

MOST = 5_000_000  # states: more take more memory than a test should


@dataclass
class Found:
    """What a search has come to.  ``broken`` is empty where all rules hold in all states."""

    world: World
    states: int = 0
    moves: int = 0
    seconds: float = 0.0
    broken: str = ""
    way: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = (
            f"{self.world.bounds.name}: {self.states:,} states, {self.moves:,} moves, "
            f"{self.seconds:.1f} s"
        )
        return "\n".join([head, *([self.broken, *self.way] if self.broken else [])])


class Broken(Exception):
    """A rule was broken on the way to a state, by its last move if there is one."""

    def __init__(self, rule: str, state: State, move: Move | None = None) -> None:
        super().__init__(rule)
        self.rule, self.state, self.move = rule, state, move


def search(
    world: World, rules: tuple[str, ...] = (), peace: Callable[[State], str] | None = None
) -> Found:
    """Go through all states until a rule breaks: any, or one whose message begins as in ``rules``.

    ``peace`` judges each state by what may follow it, and names the rule that is broken, or none.
    """
    found = Found(world)
    began = time.process_time()
    came: dict[State, State | None] = {world.start(): None}
    try:
        _go_through(world, came, rules, peace, found)
    except Broken as end:
        found.broken = end.rule
        found.way = way(world, came, end.state)
        if end.move is not None:
            found.way.append(f"  tick {end.state.tick}: {end.move.words}")
    found.states, found.seconds = len(came), time.process_time() - began
    return found


def _go_through(
    world: World,
    came: dict[State, State | None],
    rules: tuple[str, ...],
    peace: Callable[[State], str] | None,
    found: Found,
) -> None:
    frontier = list(came)
    while frontier:
        later: list[State] = []
        for state in frontier:
            for move in world.moves(state):
                found.moves += 1
                for rule in move.broken:
                    if not rules or rule.startswith(rules):
                        raise Broken(rule, state, move)
                if move.state not in came:
                    came[move.state] = state
                    later.append(move.state)
                    assert len(came) <= MOST, f"more than {MOST:,} states: {world.bounds}"
            if peace is not None:
                rule = peace(state)
                if rule and (not rules or rule.startswith(rules)):
                    raise Broken(rule, state)
        frontier = later


def way(world: World, came: dict[State, State | None], state: State) -> list[str]:
    """The way to a state, a line for each move."""
    lines: list[str] = []
    before = came[state]
    while before is not None:
        words = next(move.words for move in world.moves(before) if move.state == state)
        lines.append(f"  tick {before.tick}: {words}")
        state, before = before, came[before]
    return lines[::-1]
