"""One step in both twins, and what must be equal afterwards.

A ``Case`` is one step on one stored circuit at one moment.  ``model_answer`` carries it out in
``distributed_breaker/model.py`` and ``Script.answers`` in ``lua/breaker.lua`` on a server; both
give an ``Answer``: the reply, the whole hash, the new entries of the log, the expiry of both keys
and what was pushed.  ``compare`` says in words where two answers differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import redis

from distributed_breaker import model
from distributed_breaker.model import Circuit, Step, Stepped
from distributed_breaker.store import code_of, encode, key_of, script

CIRCUIT = "c"
# The expiry that a stored circuit has before the step; no step ever sets this one.
KEPT = 400 * model.DAY
# By how much a time to live may have run down between the step and the look at it.
SLACK = 10 * 60_000
# By how much it may seem longer: a script sees the time of its start as the server last kept it.
LAG = 10
# How many cases travel in one pipeline.
PIPELINE = 200

Fields = dict[str, str]
# One look at all that a step may have changed costs this side a quarter of four commands.
LOOK = """return {
  redis.call('HGETALL', KEYS[1]), redis.call('XRANGE', KEYS[2], '-', '+'),
  redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2])}"""
LOGGED = ("old", "new", "v", "at", "cause", "evidence", "detail")


class Case(NamedTuple):
    """One step on a stored circuit (None: there is no key) at ``now``, in milliseconds."""

    before: Fields | None
    step: Step
    now: int


class Answer(NamedTuple):
    """All that can be seen of a step.  ``ttl`` is in ms: -1 for none, -2 where there is no key."""

    reply: tuple[str, ...]
    fields: Fields
    log: list[tuple[str, ...]]
    ttl: int
    log_ttl: int
    pushed: list[str]


class Difference(NamedTuple):
    """A case on which the twins differ, with both answers."""

    case: Case
    wanted: Answer
    got: Answer

    def __str__(self) -> str:
        lines = [f"the twins differ in {', '.join(differing(self.wanted, self.got))}"]
        lines += [f"  {name:6} {value!r}" for name, value in self.case._asdict().items()]
        for name in differing(self.wanted, self.got):
            lines += [
                f"  model's {name:8} {getattr(self.wanted, name)!r}",
                f"  script's {name:7} {getattr(self.got, name)!r}",
            ]
        return "\n".join(lines)


# ---------------------------------------------------------------------------- the model


def run_model(case: Case, machine: Any = model) -> Stepped:
    """Carry out the step in the model, or in a machine that is much like it."""
    circuit = None if case.before is None else machine.load(case.before)
    stepped: Stepped = machine.step(circuit, case.step, case.now)
    return stepped


def model_answer(case: Case, stepped: Stepped | None = None, machine: Any = model) -> Answer:
    """What the script must answer; ``stepped`` is the model's result where it is known already."""
    if stepped is None:
        stepped = run_model(case, machine)
    circuit, reply, events, expiry, dirty = stepped
    kept = KEPT if case.before is not None else -1
    log = [(e.old, e.new, str(e.v), str(case.now), e.cause, e.evidence, e.detail) for e in events]
    return Answer(
        reply=tuple(map(str, reply)),
        fields=machine.dump(circuit) if dirty else case.before or {},
        log=log,
        ttl=expiry or kept,
        log_ttl=(machine.WEEK if expiry < 0 else expiry or -1) if log else -2,
        pushed=[f"{CIRCUIT} {reply.header}"] if log else [],
    )


# ---------------------------------------------------------------------------- the script


class Script:
    """The script on one server, under keys of its own; ``text`` replaces the shipped script."""

    def __init__(self, client: redis.Redis, namespace: str, text: str = "") -> None:
        self._client = client
        self._namespace = namespace
        self._channel = f"cb:0:{namespace}"
        self._sha: str = client.script_load(text or script())
        self._look: str = client.script_load(LOOK)
        self._pushes: Any = client.pubsub()
        self._pushes.psubscribe(f"{self._channel}.*")
        assert self._next_push()["type"] == "psubscribe"

    def close(self) -> None:
        """Give back the connection that hears the pushes."""
        self._pushes.close()

    def answers(self, cases: Sequence[Case]) -> list[Answer]:
        """Carry out the cases in one pipeline, each under keys and a channel of its own."""
        pipe = self._client.pipeline(transaction=False)
        send = pipe.execute_command
        base = key_of(self._namespace, "base")
        last: Fields | None = None
        keys, positions = [base], []
        for number, (before, step, now) in enumerate(cases):
            key = key_of(self._namespace, str(number))
            log, channel = key + ":log", f"{self._channel}.{number}"
            keys += [key, log]
            if before is not None:
                # Many cases in a row begin with the same circuit: it is sent once.
                if before is not last:
                    send("DEL", base)
                    send("HSET", base, *chain.from_iterable(before.items()))
                    send("PEXPIRE", base, KEPT)
                    last = before
                send("COPY", base, key)
            positions.append(len(pipe))
            send("EVALSHA", self._sha, 2, key, log, *encode(step, channel, CIRCUIT, now))
            send("EVALSHA", self._look, 2, key, log)
        send("DEL", *keys)
        send("PUBLISH", f"{self._channel}.end", "")
        results = pipe.execute(raise_on_error=False)
        pushed = self._heard()
        answers = []
        for number, position in enumerate(positions):
            reply, (fields, entries, ttl, log_ttl) = results[position : position + 2]
            if isinstance(reply, redis.RedisError):
                reply = (code_of(reply), str(reply))
            written = [paired(words) for _, words in entries]
            log = [tuple(entry.get(name, "") for name in LOGGED) for entry in written]
            heard = pushed.get(str(number), [])
            answers.append(Answer(tuple(reply), paired(fields), log, ttl, log_ttl, heard))
        return answers

    def _heard(self) -> dict[str, list[str]]:
        """What was pushed, by the last part of the channel, up to the mark after all cases."""
        heard: dict[str, list[str]] = {}
        while "end" not in heard:
            message = self._next_push()
            number = message["channel"].removeprefix(f"{self._channel}.")
            heard.setdefault(number, []).append(message["data"])
        return heard

    def _next_push(self) -> dict[str, Any]:
        message = self._pushes.get_message(timeout=30.0)
        assert message is not None, "a push did not arrive"
        return message


def paired(words: list[str]) -> Fields:
    """Names and values, which a script gives in one row."""
    return dict(zip(words[::2], words[1::2], strict=True))


# ---------------------------------------------------------------------------- the comparison


def differing(wanted: Answer, got: Answer) -> list[str]:
    """The names of what differs.  Times to live may have run down by ``SLACK`` meanwhile."""
    names = []
    for name, mine, theirs in zip(Answer._fields, wanted, got, strict=True):
        same = mine == theirs
        if name in ("ttl", "log_ttl") and mine > 0:
            same = mine - SLACK <= theirs <= mine + LAG
        if not same:
            names.append(name)
    return names


def differences(
    script: Script, cases: Iterable[tuple[Case, Stepped | None]], pipeline: int = PIPELINE
) -> Iterator[Difference]:
    """Carry out every case in both twins and yield those on which they differ."""
    cases = iter(cases)
    while some := list(islice(cases, pipeline)):
        answers = script.answers([case for case, _ in some])
        for (case, stepped), got in zip(some, answers, strict=True):
            wanted = model_answer(case, stepped)
            if differing(wanted, got):
                yield Difference(case, wanted, got)


class Living:
    """One circuit that lives on in both twins, with nothing put back between its steps.

    ``step`` compares at once, ``finish`` what has gathered in the log and on the channel.
    """

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self.circuit: Circuit | None = None
        self._client = client
        self._key = key_of(namespace, CIRCUIT)
        self._channel = f"cb:0:{namespace}"
        self._sha: str = client.script_load(script())
        self._log: list[tuple[str, ...]] = []
        self._expires = False
        self._pushes = client.pubsub()
        self._pushes.subscribe(self._channel)
        self._expected: list[str] = []

    def fields(self) -> Fields | None:
        """What is stored now."""
        return None if self.circuit is None else model.dump(self.circuit)

    def step(self, step: Step, now: int) -> Stepped:
        """Carry out one step in both twins."""
        case = Case(self.fields(), step, now)
        stepped = run_model(case)
        wanted = model_answer(case, stepped)
        with self._client.pipeline(transaction=False) as pipe:
            arguments = encode(step, self._channel, CIRCUIT, now)
            pipe.execute_command("EVALSHA", self._sha, 2, self._key, self._key + ":log", *arguments)
            pipe.execute_command("HGETALL", self._key)
            pipe.execute_command("PTTL", self._key)
            reply, fields, ttl = pipe.execute()
        self.circuit = stepped.circuit
        self._log += wanted.log
        self._expected += wanted.pushed
        if stepped.expiry != 0:
            self._expires = stepped.expiry > 0
        assert (tuple(reply), fields) == (wanted.reply, wanted.fields), case
        assert (ttl > 0) == self._expires, (case, ttl)
        return stepped

    def put(self, fields: Fields | None) -> None:
        """The store forgets the circuit, or an older one comes back from a stale replica."""
        self._client.delete(self._key)
        if fields is not None:
            self._client.hset(self._key, mapping=fields)
        self.circuit = None if fields is None else model.load(fields)
        self._expires = False

    def finish(self) -> None:
        """Compare the log's last 50 entries and all that was pushed, and remove the keys."""
        entries = self._client.xrange(self._key + ":log")
        log = [tuple(entry.get(name, "") for name in LOGGED) for _, entry in entries]
        assert log == self._log[-50:]
        self._client.publish(self._channel, "end")
        heard: list[str] = []
        while "end" not in heard:
            message = self._pushes.get_message(timeout=30.0)
            assert message is not None, "a push did not arrive"
            if message["type"] == "message":
                heard.append(message["data"])
        assert heard[:-1] == self._expected
        self._client.delete(self._key, self._key + ":log")
        self._pushes.close()
