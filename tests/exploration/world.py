"""The world of an exploration: one store, two processes, what is under way, and all their moves.

A state is a tuple of small numbers: every store, process and message that has come up is kept once
and named by its place in a list.  What a store or a process does in one of its states is worked
out once.  So a move of the world costs a few look-ups, though the real model and the real mirror
make it.

Messages under way are a bag: any of them may be the next to arrive.  None needs to be lost by a
move of its own, since any may stay under way for ever.  What the network doubles is carried out
twice, and answered once.

Left out, for there would be too many states: the processes' local machines (quarantine, a store
that is away for one of them), clocks that are set back, and more than one failure of the store.
The simulation has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from distributed_breaker import model
from distributed_breaker.model import Run, Step
from tests.exploration.bounds import LEASE, Bounds, ms
from tests.exploration.client import (
    NAMES,
    Answer,
    Client,
    Done,
    Mirror,
    Push,
    Request,
    Rules,
    newcomer,
)
from tests.exploration.store import Effect, Store, Stored

NEVER = -9
NO_REPLICA = -1


class State(NamedTuple):
    """One state of the world.

    ``replica`` is the store that a failover would bring; ``lost`` the tick of the failover, or of
    the loss of everything; the other numbers are what may still go wrong.
    """

    tick: int
    store: int
    replica: int
    clients: tuple[int, int]
    flight: tuple[int, ...]
    duplicates: int
    crashes: int
    operator: int
    lost: int = NEVER


class Move(NamedTuple):
    """One move: in words, the state after it, and the rules that it broke."""

    words: str
    state: State
    broken: tuple[str, ...] = ()


# What a process's move comes to: words, the process after it, what it sends, broken rules.
Act = tuple[str, int, tuple[int, ...], tuple[str, ...]]


class Names:
    """Things, each kept once and named by a number."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def number(self, thing: Hashable) -> int:
        """The number of a thing, a new one if it has not come up yet."""
        found = self._numbers.setdefault(thing, len(self.things))
        if found == len(self.things):
            self.things.append(thing)
        return found


class World:
    """All moves of all states, within bounds; ``machine`` and ``without`` plant errors.

    ``notes`` counts what has come up, by how many different ways of stores and processes to it.
    """

    def __init__(self, bounds: Bounds, machine: ModuleType = model, without: str = "") -> None:
        self.bounds = bounds
        self.rules = Rules(bounds, without)
        self.machine = Store(bounds.numbers, machine)
        self.stores, self.clients, self.messages = Names(), Names(), Names()
        self.notes: Counter[str] = Counter()
        self._executed: dict[tuple[int, int, int], tuple[str, int, int, Effect]] = {}
        self._delivered: dict[tuple[int, int, int], Act] = {}
        self._own: dict[tuple[int, int], tuple[Act, ...]] = {}
        self._later: dict[tuple[int, int], int] = {}
        self._vain: dict[tuple[int, int, int], bool] = {}

    # ------------------------------------------------------------------ the beginning

    def start(self) -> State:
        """Both processes know the circuit: closed for long, or open since a tick ago."""
        numbers = self.bounds.numbers
        stored = Stored()
        made = Step("report", "f0000001", numbers)
        stored = self.machine.execute(stored, made, -40).stored
        for i in range(self.bounds.past):
            stored = self.machine.execute(stored, Step("reset", f"e{i:07x}", numbers), -20).stored
        if self.bounds.start == "open":
            era = stored.generation
            failed = Step("report", "f0000003", numbers, era=era, batch=(Run("f"),), token="first")
            stored = self.machine.execute(stored, failed, -1).stored
        stored = stored._replace(counted=())
        h = model.load_header(stored.header)
        left = model.remaining(h.state, h.since, h.duration, ms(0))
        mirror = Mirror(stored.header, ms(0) + left if left else 0, 0, True)
        a, b = (newcomer(i, self.bounds)._replace(mirror=mirror) for i in (0, 1))
        bounds = self.bounds
        return State(
            0, self.stores.number(stored), NO_REPLICA,
            (self.clients.number(a), self.clients.number(b)), (),
            bounds.duplicates, bounds.crashes, int(bool(bounds.operator)),
        )  # fmt: skip

    # ------------------------------------------------------------------ all moves

    def moves(self, s: State) -> Iterator[Move]:
        """Everything that may happen next."""
        previous = -1
        for message in s.flight:
            if message == previous:
                continue  # The bag is sorted.
            previous = message
            thing = self.messages.things[message]
            if isinstance(thing, Request):
                yield from self._execute(s, message, thing)
            else:
                i = thing.client
                yield self._act(s, i, self.delivered(s.clients[i], message, s.tick), message)
        for i in (0, 1):
            for act in self.own(s.clients[i], s.tick):
                yield self._act(s, i, act)
        yield from self._disasters(s)
        if s.tick < self.bounds.horizon:
            later = self.pass_time(s)
            if later is not None:
                yield Move("a tick passes", later)

    # ------------------------------------------------------------------ the store

    def executed(self, store: int, message: int, tick: int) -> tuple[str, int, int, Effect]:
        """What a request does to a store: words, the store after it, its answer, and the rest."""
        key = (store, message, tick)
        found = self._executed.get(key)
        if found is None:
            r: Request = self.messages.things[message]
            before: Stored = self.stores.things[store]
            effect = self.machine.execute(before, r.step, tick)
            step, reply = r.step, effect.reply
            heard = Answer(r.client, r.what, r.attempt, step.token, step.known, r.sent, reply)
            answer = self.messages.number(heard)
            again = "the doubled " if r.echo else ""
            moved = f" ({effect.reply.cause})" if effect.reply.cause else ""
            words = (
                f"the store carries out {again}{r.what} of {NAMES[r.client]}: "
                f"{effect.reply.verdict}{moved}, now {effect.stored.state} "
                f"v {effect.stored.generation[0] - ms(0)} permits {effect.stored.slots or '-'}"
            )
            found = self._executed[key] = (words, self.stores.number(effect.stored), answer, effect)
            self._note_executed(before, r, effect, tick)
        return found

    def _note_executed(self, before: Stored, r: Request, effect: Effect, tick: int) -> None:
        self.notes.update(effect.notes)
        if r.echo:
            self.notes[f"a doubled {r.what} is carried out"] += 1
        if r.what == "settle" and effect.reply.verdict == "stale":
            word = "again" if r.step.token in before.counted else "late"
            self.notes[f"a settle comes {word}"] += 1
        if tick > r.sent:
            self.notes["a request was delayed"] += 1

    def _execute(self, s: State, message: int, request: Request) -> Iterator[Move]:
        words, store, answer, effect = self.executed(s.store, message, s.tick)
        flight = list(s.flight)
        flight.remove(message)
        life = self.clients.things[s.clients[request.client]].life
        if request.what != "cancel" and not request.echo and request.life == life:
            flight.append(answer)
        if request.life != life:
            self.notes["a request outlives its process"] += 1
        if effect.moved and self.bounds.pushes:
            # Its sender hears of it by the answer, or not at all.
            flight.append(self.messages.number(Push(1 - request.client, effect.stored.header)))
        after = s._replace(store=store, flight=self._bag(flight, s.clients, s.tick, store))
        yield Move(words, after, effect.broken)
        copied = s.duplicates and not request.echo and request.what in self.bounds.duplicated
        if copied and len(after.flight) < self.bounds.room:
            echo = self.messages.number(request._replace(echo=True))
            yield Move(
                f"{words}; the network keeps a copy",
                after._replace(
                    flight=tuple(sorted((*after.flight, echo))), duplicates=s.duplicates - 1
                ),
                effect.broken,
            )
        lags = self.bounds.failover and s.lost == NEVER and s.replica == NO_REPLICA
        if lags and store != s.store:
            behind = after._replace(replica=s.store)
            yield Move(f"{words}; its replica misses that", behind, effect.broken)

    def _bag(
        self, flight: list[int], clients: tuple[int, int], tick: int, store: int
    ) -> tuple[int, ...]:
        """The messages under way, without those that nobody can make anything of any more.

        More than there is room for cannot be under way: the last ones get lost.
        """
        things, kept = self.messages.things, []
        for message in flight:
            thing = things[message]
            if not isinstance(thing, Request):
                if not self._in_vain(clients[thing.client], message, tick):
                    kept.append(message)
            elif thing.what != "cancel" or self._may_free(thing, flight, store):
                kept.append(message)
        del kept[self.bounds.room :]
        kept.sort()
        return tuple(kept)

    def _may_free(self, cancel: Request, flight: list[int], store: int) -> bool:
        """Whether a cancel can find its token; else it only tells a store that has lost writes."""
        if self.bounds.failover or self.bounds.emptied:
            return True
        token = cancel.step.token
        if token in self.stores.things[store].slots:
            return True
        under_way = (self.messages.things[m] for m in flight)
        return any(
            isinstance(r, Request) and r.what == "acquire" and r.step.token == token
            for r in under_way
        )

    def _in_vain(self, client: int, message: int, tick: int) -> bool:
        """Whether a message can say nothing to this process, now and for ever.

        What is older than the mirror stays so; what is of the mirror's age must change nothing now.
        """
        key = (client, message, tick)
        found = self._vain.get(key)
        if found is None:
            thing, c = self.messages.things[message], self.clients.things[client]
            found = isinstance(thing, Answer) and not self.rules.awaited(c, thing)
            if not found and self.rules.grows(c, thing):
                _, after, sends, _ = self.delivered(client, message, tick)
                found = after == client and not sends
            self._vain[key] = found
        return found

    # ------------------------------------------------------------------ the processes

    def delivered(self, client: int, message: int, tick: int) -> Act:
        """What a process makes of a message."""
        key = (client, message, tick)
        found = self._delivered.get(key)
        if found is None:
            thing, c = self.messages.things[message], self.clients.things[client]
            if isinstance(thing, Push):
                h = model.load_header(thing.header)
                left = model.remaining(h.state, h.since, h.duration, h.since)
                done = self.rules.hear(c, thing.header, left, tick)
            else:
                done = self.rules.answered(c, thing, tick)
            found = self._delivered[key] = self.numbered(done, c)
        return found

    def own(self, client: int, tick: int) -> tuple[Act, ...]:
        """What a process may do by itself."""
        key = (client, tick)
        found = self._own.get(key)
        if found is None:
            c = self.clients.things[client]
            done = self.rules.moves(c, tick)
            found = self._own[key] = tuple(self.numbered(d, c) for d in done)
        return found

    def numbered(self, done: Done, c: Client) -> Act:
        """A process's move by numbers."""
        self.notes.update(done.notes)
        sends = tuple(map(self.messages.number, done.sends))
        return f"{NAMES[c.index]} {done.word}", self.clients.number(done.client), sends, done.broken

    def _act(self, s: State, i: int, act: Act, message: int | None = None) -> Move:
        words, client, sends, broken = act
        flight = list(s.flight)
        if message is not None:
            flight.remove(message)
            broken = (*broken, *self._acknowledged(s, message))
        flight += sends
        clients = (client, s.clients[1]) if i == 0 else (s.clients[0], client)
        after = s._replace(clients=clients, flight=self._bag(flight, clients, s.tick, s.store))
        if client != s.clients[i]:
            broken = (*broken, *self._probes(after))
        return Move(words, after, broken)

    def _acknowledged(self, s: State, message: int) -> tuple[str, ...]:
        """S10: what the store has acknowledged it has counted, unless it has lost writes since."""
        answer = self.messages.things[message]
        if isinstance(answer, Push) or answer.reply.verdict != "ok" or s.lost != NEVER:
            return ()
        counts = answer.what in ("settle", "report", "late")
        if not counts or answer.token in self.stores.things[s.store].counted:
            return ()
        return ("S10: an acknowledged outcome is not counted",)

    def _probes(self, s: State) -> tuple[str, ...]:
        """C2: probes ≤ permits × (1 + failovers within a lease).  An operator's step, too, ends a
        generation while its probes run."""
        a, b = (self.clients.things[c].probe for c in s.clients)
        if a is None or b is None:
            return ()
        self.notes["two probes run"] += 1
        failed_over = s.tick - s.lost <= LEASE
        operated = bool(self.bounds.operator) and not s.operator and a.era != b.era
        if self.bounds.permits >= 2 or failed_over or operated:
            return ()
        return (f"C2: 2 probes run at once on {self.bounds.permits} permit",)

    # ------------------------------------------------------------------ disasters and time

    def _disasters(self, s: State) -> Iterator[Move]:
        bounds = self.bounds
        if s.crashes:
            yield self._crash(s, 0)  # The processes are alike: the second one need not die, too.
        held: Stored = self.stores.things[s.store]
        if s.replica != NO_REPLICA:
            copy = self.stores.things[s.replica]._replace(lost=held.generation)
            self.notes[f"failover while {held.state}"] += 1
            store = self.stores.number(copy)
            after = s._replace(store=store, replica=NO_REPLICA, lost=s.tick)
            yield Move(f"failover: {copy.state} as before", after)
        if bounds.emptied and s.lost == NEVER:
            self.notes[f"emptied while {held.state}"] += 1
            empty = self.stores.number(Stored(lost=held.generation))
            yield Move("the store loses everything", s._replace(store=empty, lost=s.tick))
        if s.operator:
            c = self.clients.things[s.clients[0]]
            for what in bounds.operator:
                done = self.rules.operating(c, s.tick, what)
                act = self.numbered(done, c)
                yield self._act(s._replace(operator=0), 0, act)

    def _crash(self, s: State, i: int) -> Move:
        c: Client = self.clients.things[s.clients[i]]
        if c.probe is not None:
            self.notes["a process dies in its probe"] += 1
            if c.probe.token in self.stores.things[s.store].slots:
                self.notes["a process dies with a lease out"] += 1
        things = self.messages.things
        kept = [m for m in s.flight if isinstance(things[m], Request) or things[m].client != i]
        anew = self.clients.number(newcomer(i, self.bounds, c.life + 1))
        clients = (anew, s.clients[1]) if i == 0 else (s.clients[0], anew)
        after = s._replace(clients=clients, flight=tuple(kept), crashes=s.crashes - 1)
        return Move(f"{NAMES[i]} dies and begins anew with nothing", after)

    def pass_time(self, s: State) -> State | None:
        """A tick later, unless a call must end first."""
        a, b = (self._a_tick_later(c, s.tick + 1) for c in s.clients)
        if a < 0 or b < 0:
            return None
        flight = self._bag(list(s.flight), (a, b), s.tick + 1, s.store)
        return s._replace(tick=s.tick + 1, clients=(a, b), flight=flight)

    def _a_tick_later(self, client: int, tick: int) -> int:
        found = self._later.get((client, tick))
        if found is None:
            after = self.rules.later(self.clients.things[client], tick)
            found = self._later[client, tick] = -1 if after is None else self.clients.number(after)
        return found
