"""S13: whatever goes wrong at whichever command, a step is carried out wholly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import redis

from distributed_breaker import model
from distributed_breaker.model import Step
from distributed_breaker.policy import Policy
from distributed_breaker.store import code_of, encode, key_of, script
from scripts.servers import Server
from tests.equivalence.small import NOON
from tests.equivalence.twins import KEPT, Case, Living, Script, differing, model_answer, run_model
from tests.equivalence.walks import lives

OwnServer = Callable[..., Server]
POLICY = Policy().numbers
NONCE = "0123abcd"

# Stands before the script and makes its command number {number} fail.
INJECT = """
local server, commands = redis, 0
local redis = {{error_reply = server.error_reply}}
function redis.pcall(...)
  commands = commands + 1
  if commands == {number} then return {{err = '{error}'}} end
  return server.pcall(...)
end
function redis.call(...)
  local result = redis.pcall(...)
  if type(result) == 'table' and result.err then error(result) end
  return result
end
"""


def varied(cases: list[Case]) -> Iterator[Case]:
    """One case of each kind of operation, number of moves and expiry."""
    seen = set()
    for case in cases:
        stepped = run_model(case)
        kind = (case.step.op, len(stepped.events), stepped.expiry, stepped.dirty, not case.before)
        if kind not in seen:
            seen.add(kind)
            yield case


def commands_of(case: Case) -> list[str]:
    """The commands that the script sends for a case, in this order."""
    stepped = run_model(case)
    if not stepped.dirty:
        return ["hmget"]
    expire = {True: ["pexpire"] * 2, False: []}[stepped.expiry > 0]
    expire += ["persist", "pexpire"] if stepped.expiry < 0 else []
    moves = len(stepped.events)
    return ["hmget", "hset", *["xadd"] * moves, *expire, *["publish"] * min(1, moves)]


@pytest.mark.servers("valkey", "redis8", "redis")
def test_an_error_at_any_command_leaves_a_whole_step_or_none(
    client: redis.Redis, namespace: str
) -> None:
    """Up to HSET an error undoes the step, and its code is the answer.  After it the step stands:
    the hash is written whole, and ``failed`` names the command with the error's code."""
    cases = list(varied(lives(number=6, steps=300)))
    longest = max(len(commands_of(case)) for case in cases)
    assert longest >= 7
    for number in range(1, longest + 2):
        text = INJECT.format(number=number, error="INJECTED by the test") + script()
        with closing(Script(client, namespace, text)) as broken:
            for case, got in zip(cases, broken.answers(cases), strict=True):
                sent, wanted = commands_of(case), model_answer(case)
                if number > len(sent):
                    assert differing(wanted, got) == [], case
                elif sent[number - 1] in ("hmget", "hset"):
                    assert got.reply[0] == "INJECTED", (case, got)
                    untouched = (case.before or {}, [], KEPT if case.before else -2, [])
                    assert (got.fields, got.log, got.pushed) == (untouched[0], [], []), case
                else:
                    assert got.reply[:8] == wanted.reply[:8], case
                    assert got.reply[8] == f"{sent[number - 1]}=INJECTED", case
                    assert got.fields == wanted.fields, case


# Errors as servers word them: what the script answers when HSET fails with one, and the code that
# it names when PUBLISH does.
WORDINGS = {
    "ODD and unheard of": ("ODD and unheard of", "ODD"),
    "-OOM too much": ("OOM too much", "OOM"),
    "@user_script: 12: -WRONGTYPE no hash": ("WRONGTYPE no hash", "WRONGTYPE"),
    "@user_script: 12: READONLY a replica": ("READONLY a replica", "READONLY"),
    "ERR no such right": ("CBREFUSED no such right", "CBREFUSED"),
    "-ERR no such right": ("CBREFUSED no such right", "CBREFUSED"),
    "NOERR a-b @c: 1: d": ("NOERR a-b @c: 1: d", "NOERR"),
    "a Word of ITS own": ("a Word of ITS own", "ERR"),
    "BAD-ERR @c: 1: x": ("BAD-ERR @c: 1: x", "BAD"),
}


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("error", WORDINGS)
def test_an_error_keeps_its_code_however_a_server_words_it(
    error: str, client: redis.Redis, namespace: str
) -> None:
    """Redis 6.2 puts the script's name before an error, and a missing right has no code there."""
    case = next(case for case in varied(lives(number=6, steps=300)) if run_model(case).events)
    sent = commands_of(case)
    answer, code = WORDINGS[error]
    for command in ("hmget", "hset", "publish"):
        text = INJECT.format(number=sent.index(command) + 1, error=error) + script()
        with closing(Script(client, namespace, text)) as broken:
            (got,) = broken.answers([case])
        if command == "publish":
            assert got.reply[8] == f"publish={code}"
        else:
            # redis-py leaves out some of the codes that it knows.
            assert got.reply[1] in (answer, answer.partition(" ")[2])


@pytest.mark.servers("valkey")
def test_the_log_keeps_the_last_moves(client: redis.Redis, namespace: str) -> None:
    """50 entries, no more and no fewer, the newest ones."""
    living = Living(client, namespace)
    for number in range(55):
        step = Step("override", f"{number:08x}", POLICY, kind="forced_open", detail=str(number))
        living.step(step, NOON + number)
    entries = client.xrange(key_of(namespace, "c") + ":log")
    assert [entry["detail"] for _, entry in entries] == [str(number) for number in range(5, 55)]
    living.finish()


# ---------------------------------------------------------------------------- rights

# What lua/README.md asks for.
RIGHTS = (
    "evalsha script|load hmget hset time publish xadd pexpire persist hget hgetall sadd smembers "
    "xrevrange subscribe ping"
).split()
BEFORE_WRITING, AFTER_WRITING = ("hmget", "time", "hset"), ("xadd", "pexpire", "persist", "publish")


def limited(
    server: Server, admin: redis.Redis, missing: str, keys: str = "~cb:*", channels: str = "&cb:*"
) -> redis.Redis:
    """A client whose user has all rights that the library asks for, but one."""
    rights = [f"+{right}" for right in RIGHTS if right != missing]
    rules = [
        "reset",
        "on",
        ">secret",
        "resetkeys",
        *keys.split(),
        "resetchannels",
        *channels.split(),
    ]
    admin.execute_command("ACL", "SETUSER", "breaker", *rules, "-@all", *rights)
    return server.client(username="breaker", password="secret", decode_responses=True)


class Stage:
    """A server of our own with one circuit, and two steps that move it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.admin = server.client(decode_responses=True)
        self.sha = self.admin.script_load(script())
        self.key = key_of("n", "c")
        self.fields = model.dump(run_model(Case(None, Step("report", NONCE, POLICY), NOON)).circuit)
        self.log = self.key + ":log"

    def reset(self) -> None:
        """The circuit as it was, without a log."""
        self.admin.delete(self.key, self.log)
        self.admin.hset(self.key, mapping=self.fields)

    def run(self, client: redis.Redis, step: Step, now: int | None = None) -> list[str] | str:
        """The reply, or the error's code; without ``now`` the script asks for the time."""
        arguments = encode(step, "cb:0:n", "c", now)
        try:
            return client.execute_command("EVALSHA", self.sha, 2, self.key, self.log, *arguments)
        except redis.ResponseError as error:
            return code_of(error)


STEPS = (
    Step("override", NONCE, POLICY, kind="forced_open", ttl=-1),
    Step("reset", NONCE, POLICY),
)


@pytest.fixture
def stage(own_server: OwnServer) -> Iterator[Stage]:
    it = Stage(own_server())
    yield it
    it.admin.close()


def test_rights_that_are_missing_before_the_write_prevent_the_step(stage: Stage) -> None:
    """Without hmget, time or hset a step is answered with CBREFUSED and writes nothing."""
    for right in BEFORE_WRITING:
        with closing(limited(stage.server, stage.admin, right)) as client:
            for step in STEPS:
                stage.reset()
                assert stage.run(client, step) == "CBREFUSED", (right, step)
                assert stage.admin.hgetall(stage.key) == stage.fields
                assert not stage.admin.exists(stage.log)


def test_rights_that_are_missing_after_the_write_are_named(stage: Stage) -> None:
    """Without xadd, pexpire, persist or publish the step stands whole, and ``failed`` says so."""
    named = set()
    for right in AFTER_WRITING:
        with closing(limited(stage.server, stage.admin, right)) as client:
            for step in STEPS:
                stage.reset()
                reply = stage.run(client, step, NOON + 5)
                wanted = model_answer(Case(stage.fields, step, NOON + 5))
                assert tuple(reply[:8]) == wanted.reply[:8]
                assert stage.admin.hgetall(stage.key) == wanted.fields
                failures = reply[8].split()
                assert set(failures) <= {f"{right}=CBREFUSED"}
                named.update(failures)
    assert named == {f"{right}=CBREFUSED" for right in AFTER_WRITING}


def test_keys_and_channels_out_of_reach_are_named(stage: Stage) -> None:
    """A user who may not touch the log or the channel still carries the step out."""
    for keys, channels, wanted in (
        (f"~{stage.key}", "&cb:*", {"xadd=CBREFUSED", "pexpire=CBREFUSED"}),
        ("~cb:*", "", {"publish=CBREFUSED"}),
    ):
        with closing(limited(stage.server, stage.admin, "", keys, channels)) as client:
            stage.reset()
            # A client that names a key it may not touch is refused before the script runs.
            reply = stage.run(client, STEPS[1], NOON + 5)
            if reply == "NOPERM":
                assert stage.admin.hgetall(stage.key) == stage.fields
            else:
                assert set(reply[8].split()) == wanted
                answer = model_answer(Case(stage.fields, STEPS[1], NOON + 5))
                assert stage.admin.hgetall(stage.key) == answer.fields


def test_all_rights_together_are_enough(stage: Stage) -> None:
    """The rights that the documentation asks for suffice for every operation."""
    with closing(limited(stage.server, stage.admin, "")) as client:
        for case in varied(lives(number=3, steps=200)):
            stage.admin.delete(stage.key, stage.log)
            if case.before is not None:
                stage.admin.hset(stage.key, mapping=case.before)
            reply = stage.run(client, case.step, case.now)
            assert tuple(reply) == model_answer(case).reply


# ---------------------------------------------------------------------------- the server's troubles


def test_a_server_without_memory_refuses_the_step(stage: Stage) -> None:
    """OOM is answered with its own code, and nothing is written."""
    stage.reset()
    stage.admin.config_set("maxmemory", 1)
    for step in STEPS:
        assert stage.run(stage.admin, step) == "OOM"
        assert stage.admin.hgetall(stage.key) == stage.fields
    stage.admin.config_set("maxmemory", 0)
    assert stage.run(stage.admin, STEPS[0])[8] == ""


def test_a_replica_refuses_the_step(stage: Stage) -> None:
    """READONLY is answered with its own code, and nothing is written."""
    stage.reset()
    stage.admin.replicaof("127.0.0.1", "1")
    for step in STEPS:
        assert stage.run(stage.admin, step) == "READONLY"
        assert stage.admin.hgetall(stage.key) == stage.fields


def test_a_log_of_another_type_is_named(stage: Stage) -> None:
    """A log key that somebody has put something else into costs the log entry and nothing more."""
    stage.reset()
    stage.admin.set(stage.log, "x")
    reply = stage.run(stage.admin, STEPS[1], NOON + 5)
    answer = model_answer(Case(stage.fields, STEPS[1], NOON + 5))
    assert tuple(reply[:8]) == answer.reply[:8]
    assert reply[8] == "xadd=WRONGTYPE"
    assert stage.admin.hgetall(stage.key) == answer.fields


def test_the_time_is_the_servers(stage: Stage) -> None:
    """Without an argument for it, now is the server's TIME in whole milliseconds."""

    def time() -> int:
        seconds, micros = stage.admin.time()
        return seconds * 1000 + micros // 1000

    for step in STEPS:
        earliest = time()
        reply = stage.run(stage.admin, step)
        now = int(reply[1])
        assert earliest <= now <= time()
        assert model.load_header(reply[0]).since == now
