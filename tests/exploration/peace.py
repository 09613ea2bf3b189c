"""What follows when faults end: the rules of liveness, from any state of an exploration.

From now on nothing is lost or late, calls come in all the time, probes succeed at once, and every
process polls at every tick.  What was under way is lost; or it all arrives first, the oldest first.
Then both mirrors must come to hold what the store holds (L4), and the circuit must come to closed
(L1, L2, L3, L5), whatever happened before.
"""

from __future__ import annotations

from tests.exploration.bounds import LEASE, OPEN, ms
from tests.exploration.client import Client, Done, Request
from tests.exploration.store import Stored
from tests.exploration.world import State, World

# Ticks after which all must be well: what may be left of a forced state, of an open interval and of
# a lease, one tick for each probe, and the time for which a circuit that was made anew is fresh.
PATIENCE = 2 * OPEN + LEASE + 3 + 11
PLENTY = 0x100  # sends with numbers that no process came to before

Scene = tuple[int, int, int, int]  # tick, store, both processes


class Peace:
    """Judges states by what follows; ``scenes`` counts those that were played to their end."""

    def __init__(self, world: World, rules: tuple[str, ...] = ("",)) -> None:
        self.world = world
        self.looked_for = rules  # how the messages of the rules begin that are judged on the way
        self.rules = world.rules
        self.scenes = 0
        bounds = world.bounds
        self._acquires_are_copied = bounds.duplicates > 0 and "acquire" in bounds.duplicated
        self._well: set[Scene] = set()
        self._judged: set[tuple[Scene, tuple[int, ...]]] = set()
        self._calm: dict[int, int] = {}
        self._broken = ""

    def __call__(self, s: State) -> str:
        """The rule that is broken from here on, or nothing."""
        key = (self._scene(s), s.flight)
        if key in self._judged:
            return ""
        self._judged.add(key)
        scenes = {key[0]: None, self._scene(self._all_arrived(s)): None}
        return next(filter(None, map(self._ends_well, scenes)), "")

    def _scene(self, s: State) -> Scene:
        """Without what processes may still send: from now on they may send all that they want."""
        a, b = (self._calm.get(c, -1) for c in s.clients)
        if a < 0 or b < 0:
            numbers, things = self.world.clients.number, self.world.clients.things
            self._calm.update({c: numbers(_spent(things[c])) for c in s.clients})
            return self._scene(s)
        return (s.tick, s.store, a, b)

    def _all_arrived(self, s: State) -> State:
        """Everything under way arrives, and what follows from it, the oldest first."""
        world = self.world
        while s.flight:
            message = min(s.flight)
            thing = world.messages.things[message]
            if isinstance(thing, Request):
                s = next(world._execute(s, message, thing)).state
            else:
                act = world.delivered(s.clients[thing.client], message, s.tick)
                s = world._act(s, thing.client, act, message).state
        return s

    def _ends_well(self, scene: Scene) -> str:
        way: list[Scene] = []
        until = scene[0] + PATIENCE
        while scene not in self._well:
            way.append(scene)
            self._broken = ""
            scene, well = self._play(scene)
            if self._broken:
                return f"{self._broken} (after the faults)"
            if well:
                break
            if scene[0] > until:
                return self._complaint(scene)
        self.scenes += len(way)
        self._well.update(way)
        return ""

    def _complaint(self, scene: Scene) -> str:
        things = self.world.clients.things
        stored: Stored = self.world.stores.things[scene[1]]
        if any(things[c].generation != stored.generation for c in scene[2:]):
            return "L4: mirrors and store never come to agree"
        return f"L5: the dependency is well, but the circuit stays {stored.state}"

    # ------------------------------------------------------------------ one tick of peace

    def _play(self, scene: Scene) -> tuple[Scene, bool]:
        """One tick; and whether all was well at its end."""
        tick, store, *numbers = scene
        world = self.world
        stored: Stored = world.stores.things[store]
        clients = [world.clients.things[c] for c in numbers]
        for i in (0, 1):
            stored, clients[i] = self._turn(stored, self._supplied(clients[i], tick), tick)
        well = stored.state == "closed" and all(
            c.generation == stored.generation and self._action(c, tick) == "admit" for c in clients
        )
        later = [self.rules.later(_spent(c), tick + 1) for c in clients]
        assert all(later), "a process that takes part leaves nothing undone"
        a, b = map(world.clients.number, later)
        return (tick + 1, world.stores.number(stored), a, b), well

    def _supplied(self, c: Client, tick: int) -> Client:
        """As much to send as it needs, under numbers that tell what was sent at which tick."""
        plenty = PLENTY * (2 + tick)
        return c._replace(acquires=plenty, syncs=plenty, reports=0)

    def _turn(self, stored: Stored, c: Client, tick: int) -> tuple[Stored, Client]:
        """What one process does in a tick: it ends what it has begun, polls, and makes calls."""
        if c.ask is not None:
            done = self.rules.giving_up(c, tick)
            stored, c = self._talk(stored, done, tick)
        stored, c = self._finish(stored, c, tick)
        if stored.header:
            circuit = self.world.machine.circuit(stored)
            left = self.world.machine.machine.remaining(
                circuit.state, circuit.since, circuit.duration, ms(tick)
            )
            done = self.rules.hear(c, stored.header, left, tick)
            stored, c = self._talk(stored, done, tick)
        if not c.mirror.synced or not stored.header:
            stored, c = self._sync(stored, c, tick)
        state, left = c.mirror.header.split(" ")[3], c.mirror.deadline
        if state.startswith("forced") and left is not None and left <= ms(tick):
            stored, c = self._sync(stored, c, tick)
        for _ in range(2):
            if self._action(c, tick) == "ask":
                done = next(d for d in self.rules.moves(c, tick) if d.client.ask is not None)
                stored, c = self._talk(stored, done, tick)
                stored, c = self._finish(stored, c, tick)
        return stored, c

    def _sync(self, stored: Stored, c: Client, tick: int) -> tuple[Stored, Client]:
        after, sends = self.rules.syncing(c, tick)
        return self._talk(stored, Done("", after, sends), tick)

    def _finish(self, stored: Stored, c: Client, tick: int) -> tuple[Stored, Client]:
        """Its probe succeeds, and what it has not settled is settled."""
        if c.probe is not None:
            done = next(d for d in self.rules.moves(c, tick) if d.client.probe is None)
            return self._talk(stored, done, tick)
        if c.settle is not None and self._acquires_are_copied:
            # Then a settle must not be sent again; test_exploration.py shows what would come of it.
            return stored, c._replace(settle=None)
        if c.settle is not None:
            c = c._replace(settle=c.settle._replace(attempt=c.settle.attempt + 1))
            return self._talk(stored, Done("", c, (self.rules.settling(c, tick),)), tick)
        return stored, c

    def _talk(self, stored: Stored, done: Done, tick: int) -> tuple[Stored, Client]:
        """All that was sent is carried out and answered, and so is what follows from that."""
        world, c = self.world, done.client
        waiting = list(done.sends)
        for _ in range(8):
            if not waiting:
                return stored, c
            request = waiting.pop(0)
            message = world.messages.number(request)
            _, after, answer, effect = world.executed(world.stores.number(stored), message, tick)
            stored = world.stores.things[after]
            self._break(effect.broken)
            heard = world.messages.things[answer]
            if request.what != "cancel" and self.rules.awaited(c, heard):
                _, number, sends, broken = world.delivered(world.clients.number(c), answer, tick)
                self._break(broken)
                c = world.clients.things[number]
                waiting += [world.messages.things[m] for m in sends]
        self._broken = "L6: process and store talk without end"
        return stored, c

    def _break(self, broken: tuple[str, ...]) -> None:
        looked_for = [rule for rule in broken if rule.startswith(self.looked_for)]
        self._broken = self._broken or "".join(looked_for[:1])

    def _action(self, c: Client, tick: int) -> str:
        return self.rules.shadow(c).decide(ms(tick)).action


def _spent(c: Client) -> Client:
    """So that processes that know the same are the same."""
    return c._replace(acquires=0, syncs=0, reports=0)
