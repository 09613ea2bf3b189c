"""A process of an exploration: what it knows and waits for, and what the rules let it do.

It is a value.  Decisions and the mirror are those of the real ``Shadow``, which is made anew from
the value for each move; the rest is the rules of ``lua/README.md``, section 13, in the plainest
form.  The probe's call takes no thread: it begins, and it ends well or badly.  The local machine is
left out (it stays closed, so nobody is quarantined or degraded): that is for the simulation.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

from distributed_breaker import model
from distributed_breaker.model import Header, Known, Reply, Run, Step
from distributed_breaker.shadow import Shadow
from tests.exploration.bounds import LEASE, MARGIN, OPEN, TICK, Bounds, ms

NAMES = "AB"
SERIAL = "acquire settle cancel report sync late reset forced_open forced_closed release".split()
OPERATIONS = {
    "sync": "report",
    "late": "report",
    "forced_open": "override",
    "forced_closed": "override",
}
NO_ERA = (0, "-")


class Mirror(NamedTuple):
    """What this process knows of the circuit; nothing, where ``header`` is empty."""

    header: str = ""
    deadline: int | None = 0
    wait_until: int = 0
    synced: bool = False


class Ask(NamedTuple):
    """An acquire under way (R3: one)."""

    token: str
    sent: int  # tick


class Probe(NamedTuple):
    """A permit, and the call that it began."""

    token: str
    sent: int  # tick at which the acquire was sent
    began: int
    era: tuple[int, str]


class Settle(NamedTuple):
    """A probe's outcome that the store has not acknowledged."""

    token: str
    kind: str
    sent: int  # tick at which the acquire was sent
    era: tuple[int, str]
    attempt: int = 0


class Client(NamedTuple):
    """One process."""

    index: int
    acquires: int
    syncs: int
    reports: int
    mirror: Mirror = Mirror()
    ask: Ask | None = None
    probe: Probe | None = None
    settle: Settle | None = None
    life: int = 0

    @property
    def generation(self) -> tuple[int, str]:
        """The generation that it knows."""
        if not self.mirror.header:
            return NO_ERA
        _, v, nonce, _ = self.mirror.header.split(" ", 3)
        return int(v), nonce


class Request(NamedTuple):
    """A step on its way to the store.  An ``echo`` is the network's second copy of one that was
    carried out already; its answer goes to nobody."""

    client: int
    life: int
    attempt: int
    what: str
    step: Step
    sent: int
    echo: bool = False


class Answer(NamedTuple):
    """A reply on its way back."""

    client: int
    what: str
    attempt: int
    token: str
    known: Known
    sent: int
    reply: Reply


class Push(NamedTuple):
    """A header on its way to one process."""

    client: int
    header: str


class Done(NamedTuple):
    """One move of a process: what became of it, what it sends, broken rules, notes."""

    word: str
    client: Client
    sends: tuple[Request, ...] = ()
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Credulous(Shadow):
    """A mirror that believes every fresh header: R12 taken away."""

    def _guarding(self, now: int) -> bool:
        return False


class Forgetful(Shadow):
    """A mirror that takes the last header it heard for the newest: C1 taken away."""

    def hear(
        self,
        header: Header,
        remaining: int,
        now: int,
        answering: Known | None = None,
        store_now: int | None = None,
    ) -> bool:
        self._take(header, remaining, now, 0)
        return False


SHADOWS = {"R12": Credulous, "C1": Forgetful}


class Rules:
    """What processes may do.

    ``without`` names the rule that they do not keep: ``R1``, ``R5`` (``stale`` to a repeated settle
    is taken for the first one's), ``R6`` (calls may last as long as a lease), ``R12`` or ``C1``.
    """

    def __init__(self, bounds: Bounds, without: str = "") -> None:
        self.bounds = bounds
        self.without = without
        kind = SHADOWS.get(without, Shadow)
        self._shadows = [
            kind(bounds.numbers, name, str, float, ms(0), explicit=False) for name in NAMES
        ]
        # R6: a call that begins as late as R1 allows ends before its lease does.
        self.timeout = LEASE if without == "R6" else MARGIN

    # ------------------------------------------------------------------ mirror

    def shadow(self, c: Client) -> Shadow:
        """The real one, with what this process knows."""
        shadow, m = copy(self._shadows[c.index]), c.mirror
        shadow.header = model.load_header(m.header) if m.header else None
        shadow.synced = m.synced
        shadow.deadline, shadow.wait_until = m.deadline, m.wait_until
        shadow.asking = c.ask is not None
        return shadow

    def seen(self, c: Client, shadow: Shadow, tick: int) -> Client:
        """What it knows after that; deadlines that have passed are all alike."""
        h = shadow.header
        deadline: int | None = 0
        if h is not None and h.state not in ("closed", "half_open"):
            deadline = None if shadow.deadline is None else max(shadow.deadline, ms(tick))
        wait = shadow.wait_until if shadow.wait_until > ms(tick) else 0
        return c._replace(mirror=Mirror(text(h), deadline, wait, shadow.synced))

    # ------------------------------------------------------------------ sending

    def request(
        self, c: Client, tick: int, what: str, number: int, attempt: int = 0, **arguments: object
    ) -> Request:
        """A request of this process; its nonce is like no other's."""
        step = Step(
            OPERATIONS.get(what, what),
            f"{c.index:x}{SERIAL.index(what):x}{c.life:x}0{number:04x}",
            self.bounds.numbers,
            self.shadow(c).known(ms(tick)),
            reporter=NAMES[c.index],
            **arguments,  # type: ignore[arg-type]
        )
        return Request(c.index, c.life, attempt, what, step, tick)

    def syncing(self, c: Client, tick: int) -> tuple[Client, tuple[Request, ...]]:
        """A sync, if one is left."""
        if c.syncs == 0:
            return c, ()
        sync = self.request(c, tick, "sync", c.syncs)
        return c._replace(syncs=c.syncs - 1), (sync,)

    def moves(self, c: Client, tick: int) -> tuple[Done, ...]:
        """All that it may do by itself."""
        done = [*self._probing(c, tick), *self._repeating(c, tick)]
        action = self.shadow(c).decide(ms(tick)).action
        if action == "ask" and c.acquires and c.probe is None:
            token = f"{NAMES[c.index]}{c.life}{c.acquires:x}"
            send = self.request(c, tick, "acquire", c.acquires, token=token)
            after = c._replace(acquires=c.acquires - 1, ask=Ask(token, tick))
            done.append(Done("asks for a permit", after, (send,)))
        if action == "admit" and c.reports:
            send = self.request(
                c, tick, "report", c.reports, era=self.shadow(c).generation,
                batch=(Run("f"),), token=f"{NAMES[c.index]}{c.life}r{c.reports}",
            )  # fmt: skip
            done.append(Done("reports a failed call", c._replace(reports=c.reports - 1), (send,)))
        if c.syncs:
            after, sends = self.syncing(c, tick)
            done.append(Done("sends a sync", after, sends))
        if c.ask is not None and tick > c.ask.sent:
            done.append(self.giving_up(c, tick))
        return tuple(done)

    def giving_up(self, c: Client, tick: int) -> Done:
        """R2: an acquire without an answer is a rejection, followed by a cancel."""
        assert c.ask is not None
        number = int(c.ask.token[2:], 16)
        cancel = self.request(c, tick, "cancel", number, token=c.ask.token)
        return Done("gives up waiting and cancels (R2)", c._replace(ask=None), (cancel,))

    def _probing(self, c: Client, tick: int) -> list[Done]:
        """R5: the outcome is sent at once."""
        done: list[Done] = []
        if c.probe is None:
            return done
        for kind in self.bounds.kinds:
            settle = Settle(c.probe.token, kind, c.probe.sent, c.probe.era)
            after = c._replace(probe=None, settle=settle)
            end = {"s": "succeeds", "f": "fails", "i": "is cancelled"}[kind]
            done.append(Done(f"sees its probe end: it {end}", after, (self.settling(after, tick),)))
        return done

    def _repeating(self, c: Client, tick: int) -> list[Done]:
        """R5: without an answer, the settle is sent again until the lease is over."""
        if c.settle is None or c.settle.attempt >= self.bounds.repeats:
            return []
        after = c._replace(settle=c.settle._replace(attempt=c.settle.attempt + 1))
        word = "gets no answer and settles again (R5)"
        return [Done(word, after, (self.settling(after, tick),))]

    def settling(self, c: Client, tick: int) -> Request:
        """The settle of the outcome that waits for it."""
        s = c.settle
        assert s is not None
        number = 16 * int(s.token[2:], 16) + s.attempt
        return self.request(
            c, tick, "settle", number, s.attempt, era=s.era, token=s.token, kind=s.kind
        )

    def operating(self, c: Client, tick: int, what: str) -> Done:
        """A person's step, by way of this process."""
        ttl = OPEN * TICK if what.startswith("forced") else -1
        kind = what if what.startswith("forced") else "i"
        send = self.request(c, tick, what, 1, kind=kind, ttl=ttl)
        return Done(f"carries an operator's {what}", c, (send,))

    def later(self, c: Client, tick: int) -> Client | None:
        """What it is a tick later; None where its call must end first, as its timeout wants."""
        if c.probe is not None and tick > c.probe.began + self.timeout:
            return None
        if c.settle is not None and tick >= c.settle.sent + LEASE - MARGIN:
            c = c._replace(settle=None)  # The lease is over: given up, and counted as dropped.
        return self.seen(c, self.shadow(c), tick)

    # ------------------------------------------------------------------ hearing

    def hear(self, c: Client, header: str, left: int, tick: int) -> Done:
        """A push has arrived, or (in peace) a poll."""
        shadow = self.shadow(c)
        again = shadow.hear(model.load_header(header), left, ms(tick))
        return self._heard(c, shadow, tick, again, f"hears of {header.split(' ')[3]}")

    def grows(self, c: Client, message: Answer | Push) -> bool:
        """Whether the mirror is as new as the message, and what is as old stays so (C1)."""
        header = message.header if isinstance(message, Push) else message.reply.header
        _, v, nonce, _ = header.split(" ", 3)
        mine = c.generation
        return self.without != "C1" and (int(v) < mine[0] or (int(v), nonce) == mine)

    def awaited(self, c: Client, answer: Answer) -> bool:
        """Answers to what was given up or sent again are never read: the connection is gone."""
        if answer.what == "acquire":
            return c.ask is not None and c.ask.token == answer.token
        if answer.what == "settle":
            wanted = c.settle and (c.settle.token, c.settle.attempt)
            return wanted == (answer.token, answer.attempt)
        return True

    def answered(self, c: Client, answer: Answer, tick: int) -> Done:
        """An answer has arrived."""
        shadow, reply, what = self.shadow(c), answer.reply, answer.what
        if what == "acquire":
            shadow.asking = False
            if reply.verdict == "deny":
                shadow.wait_until = ms(tick) + reply.value
        step = Step("report", "00000000", self.bounds.numbers, answer.known)
        again = shadow.answered(step, reply, ms(tick))
        word = f"gets the answer to its {what}: {reply.verdict}"
        done = self._heard(c, shadow, tick, again, word)
        if model.load_header(reply.header).v < answer.known.v:
            broken = (*done.broken, "C8: the store's v is below the one that its client knew")
            done = done._replace(broken=broken)
        if what == "acquire":
            return self._granted(done, answer, tick)
        if what == "settle":
            return self._settled(done, answer, tick)
        return done

    def _heard(self, c: Client, shadow: Shadow, tick: int, again: bool, word: str) -> Done:
        """C1, and that no blank circuit takes the place of a protective one."""
        after, sends = self.seen(c, shadow, tick), ()
        broken, notes = [], []
        if after.generation[0] < c.generation[0]:
            broken.append("C1: a mirror's v fell")
        state = c.mirror.header.split(" ")[3] if c.mirror.header else ""
        left = c.mirror.deadline is None or c.mirror.deadline > ms(tick)
        protective = state in ("open", "forced_open") and left
        h = shadow.header
        if protective and h is not None and h.cause == "created":
            broken.append(f"R12: an unexpired {state} mirror gave way to a blank circuit")
        if again:
            after, sends = self.syncing(after, tick)
            notes.append("a mirror guards its state" if protective else "a mirror doubts")
        return Done(word, after, sends, tuple(broken), tuple(notes))

    def _granted(self, done: Done, answer: Answer, tick: int) -> Done:
        """R1: a grant that was delayed is dead on arrival."""
        c, reply = done.client._replace(ask=None), answer.reply
        if reply.verdict != "grant":
            return done._replace(client=c)
        if self.without != "R1" and tick - answer.sent >= reply.value // TICK - MARGIN:
            cancel = self.request(c, tick, "cancel", int(answer.token[2:], 16), token=answer.token)
            word = f"{done.word}, but too late (R1), so it cancels"
            notes = (*done.notes, "a grant is dead on arrival")
            return Done(word, c, (*done.sends, cancel), done.broken, notes)
        h = model.load_header(reply.header)
        c = c._replace(probe=Probe(answer.token, answer.sent, tick, (h.v, h.nonce)), settle=None)
        return done._replace(word=f"{done.word}, and begins a probe", client=c)

    def _settled(self, done: Done, answer: Answer, tick: int) -> Done:
        """R5: a first settle that is stale has not been counted, so it is reported as late."""
        c, s = done.client, done.client.settle
        assert s is not None
        c = c._replace(settle=None)
        if answer.reply.verdict != "stale":
            return done._replace(client=c)
        if s.attempt and self.without != "R5":
            notes = (*done.notes, "nobody knows whether a settle counted")
            return done._replace(client=c, notes=notes)
        late = self.request(
            c, tick, "late", int(s.token[2:], 16), batch=(Run(s.kind),), token=s.token
        )
        word = f"{done.word}, and reports it as late"
        notes = (*done.notes, "a late settle is reported")
        return Done(word, c, (*done.sends, late), done.broken, notes)


def text(h: Header | None) -> str:
    """A header as it is stored."""
    if h is None:
        return ""
    flags = "f" if h.fresh else "-"
    return (
        f"{model.SCHEMA} {h.v} {h.nonce} {h.state} {h.since} {h.duration} {h.attempt} "
        f"{h.successes} {flags} {h.n} {h.cause}"
    )


def newcomer(index: int, bounds: Bounds, life: int = 0) -> Client:
    """A process that has just begun and knows nothing; its first sync is its own."""
    syncs = bounds.syncs + (1 if life else 0)
    return Client(index, bounds.acquires, syncs, bounds.reports, life=life)
