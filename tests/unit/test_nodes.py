"""Which server gets a command, on stubs: what Sentinels and nodes say, and what is sent again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from distributed_breaker import address, nodes
from distributed_breaker.cluster import REDIRECTS
from distributed_breaker.errors import StoreDown
from distributed_breaker.store import RedisStore, key_of
from tests.unit.stub import ANSWER, OK, REPLY, Stub, array, bulk, down, error, run_one, sync

LOW, HIGH = "b", "a"  # circuits of the first and of the second half of the slots
HALF = 8_192


@pytest.fixture
def stubs(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], list[Stub]]]:
    """Make stubs that answer steps and TIME."""
    monkeypatch.setattr(address, "READ_TIMEOUT", patience)
    with contextlib.ExitStack() as stack:

        def make(count: int) -> list[Stub]:
            made = []
            for _ in range(count):
                stub = stack.enter_context(contextlib.closing(Stub()))
                stub.answers["EVALSHA"] = array(*ANSWER)
                stub.answers["TIME"] = array("1764000012", "345000")
                stub.answers["ASKING"] = OK
                stub.answers["SCRIPT"] = bulk("loaded")
                made.append(stub)
            return made

        yield make


@pytest.fixture
def opened() -> Iterator[Callable[[str], RedisStore]]:
    with contextlib.ExitStack() as stack:
        yield lambda url: stack.enter_context(contextlib.closing(RedisStore(url, "ns")))


def keys(stub: Stub) -> list[str]:
    """The keys of the steps that came."""
    return [command[3] for command in stub.commands if command[0] == "EVALSHA"]


def asked(stub: Stub) -> int:
    """How often a Sentinel or a node was asked where things are."""
    return len(stub.seen("SENTINEL", "CLUSTER"))


# ---------------------------------------------------------------------------- Sentinel


def names(stub: Stub) -> bytes:
    return array("127.0.0.1", str(stub.port))


@pytest.fixture
def watched(stubs: Callable[[int], list[Stub]]) -> list[Stub]:
    """Two Sentinels and two servers; the first is the primary."""
    first, second, primary, other = stubs(4)
    first.answers["SENTINEL"] = second.answers["SENTINEL"] = names(primary)
    return [first, second, primary, other]


def sentinel_url(watched: list[Stub]) -> str:
    return f"redis+sentinel://127.0.0.1:{watched[0].port},127.0.0.1:{watched[1].port}/mymaster/0"


def test_sentinels_are_asked_once(watched: list[Stub], opened: Callable[[str], RedisStore]) -> None:
    store = opened(sentinel_url(watched))
    assert [run_one(store), run_one(store)] == [REPLY, REPLY]
    assert watched[0].commands == [["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"]]
    assert watched[1].commands == watched[3].commands == []


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"*-1\r\n",
        error("NOAUTH Authentication required."),
        error("ERR no"),
        bulk("nonsense"),
        array("127.0.0.1", "a port"),
    ],
)
def test_a_sentinel_that_is_of_no_use_is_passed_over(
    watched: list[Stub], opened: Callable[[str], RedisStore], answer: bytes
) -> None:
    watched[0].answers["SENTINEL"] = answer
    assert run_one(opened(sentinel_url(watched))) == REPLY


def test_a_name_that_no_sentinel_knows_is_said_loudly(
    watched: list[Stub], opened: Callable[[str], RedisStore]
) -> None:
    watched[0].answers["SENTINEL"] = watched[1].answers["SENTINEL"] = b"*-1\r\n"
    failure = down(lambda: run_one(opened(sentinel_url(watched))))
    assert failure.loud
    assert "mymaster" in str(failure)


def test_no_sentinel_is_asked_after_the_bound(
    watched: list[Stub], opened: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "LONGEST_SEARCH", -1.0)
    watched[0].answers["SENTINEL"] = b""
    assert down(lambda: run_one(opened(sentinel_url(watched)))).code == "CONNECTION"
    assert asked(watched[1]) == 0
    # The next search begins where this one has ended.
    store = opened(sentinel_url(watched))
    down(lambda: run_one(store))
    assert run_one(store) == REPLY


@pytest.mark.parametrize("answer", [error("READONLY no"), error("LOADING wait"), b""])
def test_a_primary_that_is_none_is_looked_for_again(
    watched: list[Stub], opened: Callable[[str], RedisStore], answer: bytes
) -> None:
    """The step is not sent again, and the next question goes to another Sentinel: the first may be
    cut off from the others."""
    first, second, primary, other = watched
    store = opened(sentinel_url(watched))
    assert run_one(store) == REPLY
    primary.answers["EVALSHA"] = answer
    second.answers["SENTINEL"] = names(other)
    down(lambda: run_one(store))
    assert other.commands == []
    assert run_one(store) == REPLY
    assert len(keys(other)) == 1
    assert (asked(first), asked(second)) == (1, 1)


def test_a_failover_by_hand_is_noticed(
    watched: list[Stub], opened: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old primary goes on, and nothing goes wrong."""
    first, _, primary, other = watched
    store = opened(sentinel_url(watched))
    for stub in (primary, other):
        stub.answers["SUBSCRIBE"] = array("subscribe", "cb:0:ns", "1")
    subscription = store.subscribe()
    assert subscription.get(0.01) is None
    assert asked(first) == 1
    monkeypatch.setattr(nodes, "RENEWAL", -1.0)
    assert subscription.get(0.01) is None
    first.answers["SENTINEL"] = names(other)
    assert down(lambda: subscription.get(0.01)).code == "CONNECTION"
    subscription.close()
    assert run_one(store) == REPLY
    assert (len(keys(primary)), len(keys(other))) == (0, 1)
    store.subscribe().close()
    assert other.seen("SUBSCRIBE")


def test_a_known_primary_needs_no_sentinel(
    watched: list[Stub], opened: Callable[[str], RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(sentinel_url(watched))
    watched[2].answers["SUBSCRIBE"] = array("subscribe", "cb:0:ns", "1")
    subscription = store.subscribe()
    monkeypatch.setattr(nodes, "RENEWAL", -1.0)
    watched[0].answers["SENTINEL"] = watched[1].answers["SENTINEL"] = b""
    assert subscription.get(0.01) is None
    assert run_one(store) == REPLY
    subscription.close()


@pytest.mark.parametrize(
    ("query", "authenticated"),
    [("", []), ("?sentinel_username=eve&sentinel_password=x%40y", ["AUTH", "eve", "x@y"])],
)
def test_sentinels_have_passwords_of_their_own(
    watched: list[Stub], opened: Callable[[str], RedisStore], query: str, authenticated: list[str]
) -> None:
    for stub in watched:
        stub.answers["AUTH"] = OK
    url = sentinel_url(watched).replace("://", "://ann:secret@") + query
    assert run_one(opened(url)) == REPLY
    assert [c for c in watched[0].commands if c[0] == "AUTH"] == [authenticated][: len(query)]
    assert watched[2].commands[0] == ["AUTH", "ann", "secret"]


# ---------------------------------------------------------------------------- cluster


def slots(*rows: tuple[int, int, str, int]) -> bytes:
    """An answer to CLUSTER SLOTS, without replicas."""
    said = b"*%d\r\n" % len(rows)
    for first, last, host, port in rows:
        said += b"*3\r\n:%d\r\n:%d\r\n*3\r\n%s:%d\r\n%s" % (
            first,
            last,
            bulk(host),
            port,
            bulk("id"),
        )
    return said


def halves(low: Stub, high: Stub) -> bytes:
    return slots((0, HALF - 1, "127.0.0.1", low.port), (HALF, 16_383, "127.0.0.1", high.port))


@pytest.fixture
def cluster(
    stubs: Callable[[int], list[Stub]], opened: Callable[[str], RedisStore]
) -> tuple[Stub, Stub, RedisStore]:
    """Two nodes, of which the first is named in the URL."""
    low, high = stubs(2)
    low.answers["CLUSTER"] = high.answers["CLUSTER"] = halves(low, high)
    return low, high, opened(f"redis+cluster://127.0.0.1:{low.port}")


Cluster = tuple[Stub, Stub, RedisStore]
LOW_KEY, HIGH_KEY = key_of("ns", LOW), key_of("ns", HIGH)


def of(circuit: str) -> tuple[str, str, str, str, str, str, str, str, str]:
    """An answer that can be told from others."""
    return (*ANSWER[:7], circuit, "")


def by_key(command: list[str]) -> bytes:
    return array(*of(command[3]))


def test_each_node_gets_its_own_steps_and_answers_keep_their_places(cluster: Cluster) -> None:
    low, high, store = cluster
    low.answers["EVALSHA"] = high.answers["EVALSHA"] = by_key
    replies = store.run([(c, sync()) for c in (LOW, HIGH, LOW, HIGH)])
    assert [r.policy for r in replies] == [LOW_KEY, HIGH_KEY, LOW_KEY, HIGH_KEY]
    assert keys(low) == [LOW_KEY] * 2
    assert keys(high) == [HIGH_KEY] * 2
    assert asked(low) + asked(high) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_moved_is_followed_and_asked_about(cluster: Cluster, host: str) -> None:
    """A node that does not know its own address leaves it out."""
    low, high, store = cluster
    assert run_one(store) == REPLY
    low.answers["EVALSHA"] = error(f"MOVED 42 {host}:{high.port}")
    low.answers["CLUSTER"] = high.answers["CLUSTER"] = slots((0, 16_383, "127.0.0.1", high.port))
    assert run_one(store) == REPLY
    assert run_one(store) == REPLY
    assert keys(low) == [LOW_KEY] * 2
    assert keys(high) == [LOW_KEY] * 2
    assert asked(low) + asked(high) == 2


def test_ask_is_followed_this_once(cluster: Cluster) -> None:
    low, high, store = cluster
    low.answers["EVALSHA"] = error(f"ASK 42 127.0.0.1:{high.port}")
    assert [run_one(store), run_one(store)] == [REPLY, REPLY]
    assert keys(low) == [LOW_KEY] * 2
    assert high.seen("ASKING", "EVALSHA") == ["ASKING", "EVALSHA"] * 2
    assert asked(low) + asked(high) == 1


def test_a_step_goes_without_its_log_while_that_is_elsewhere(cluster: Cluster) -> None:
    low, _, store = cluster

    def answer(command: list[str]) -> bytes:
        if command[2] == "2":
            return error("TRYAGAIN Multiple keys request during rehashing of slot")
        return array(*ANSWER[:8], "xadd=ERR pexpire=CBREFUSED publish=NOPERM")

    low.answers["EVALSHA"] = answer
    assert run_one(store) == REPLY._replace(failed="publish=NOPERM")
    whole, alone = (c for c in low.commands if c[0] == "EVALSHA")
    assert whole[3:5] == [LOW_KEY, LOW_KEY + ":log"]
    assert alone[3:] == [LOW_KEY, *whole[5:]]


def test_directions_are_not_followed_for_ever(cluster: Cluster) -> None:
    low, high, store = cluster
    low.answers["EVALSHA"] = error(f"MOVED 42 127.0.0.1:{high.port}")
    high.answers["EVALSHA"] = error(f"MOVED 42 127.0.0.1:{low.port}")
    failure = down(lambda: run_one(store))
    assert (failure.code, failure.loud) == ("MOVED", False)
    assert len(keys(low) + keys(high)) == 1 + REDIRECTS


@pytest.mark.parametrize("patience", [0.5])
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (None, "TIMEOUT"),
        (b"", "CONNECTION"),
        (error("CLUSTERDOWN The cluster is down"), "CLUSTERDOWN"),
    ],
)
def test_what_may_have_been_carried_out_is_not_sent_again(
    cluster: Cluster, answer: bytes | None, code: str
) -> None:
    """But the nodes are asked again who holds what, before the next step."""
    low, high, store = cluster
    assert run_one(store) == REPLY
    low.answers["EVALSHA"] = answer
    assert down(lambda: run_one(store)).code == code
    assert keys(high) == []
    low.answers["CLUSTER"] = high.answers["CLUSTER"] = halves(high, low)
    assert run_one(store) == REPLY
    assert (keys(low), keys(high)) == ([LOW_KEY] * 2, [LOW_KEY])


def test_the_script_is_loaded_where_it_is_not_known(cluster: Cluster) -> None:
    """Also on a node that is only just being given the slot."""
    low, high, store = cluster
    answers = iter([error("NOSCRIPT No matching script."), array(*ANSWER)])
    low.answers["EVALSHA"] = error(f"ASK 42 127.0.0.1:{high.port}")
    high.answers["EVALSHA"] = lambda _: next(answers)
    assert run_one(store) == REPLY
    assert low.seen("SCRIPT") == []
    seen = high.seen("ASKING", "EVALSHA", "SCRIPT")
    assert seen == ["ASKING", "EVALSHA", "SCRIPT", "ASKING", "EVALSHA"]


def test_a_poll_takes_the_time_of_the_nodes_that_it_reads(cluster: Cluster) -> None:
    """The last clock counts, so that what is left of a deadline is not taken for less."""
    low, high, store = cluster
    low.answers["HGET"] = bulk("low")
    high.answers["HGET"] = bulk("high")
    high.answers["TIME"] = array("1764000010", "0")
    assert store.poll([LOW]) == (1764000012345, ["low"])
    assert store.poll([HIGH]) == (1764000010000, ["high"])
    assert store.poll([HIGH, LOW]) == (1764000010000, ["high", "low"])
    assert store.poll([LOW, HIGH]) == (1764000010000, ["low", "high"])
    assert store.poll([])[1] == []


def test_a_node_without_a_name_for_itself_or_others(cluster: Cluster) -> None:
    low, high, store = cluster
    low.answers["CLUSTER"] = slots((0, HALF - 1, "", low.port), (HALF, 16_383, "?", high.port))
    assert run_one(store) == REPLY
    assert down(lambda: store.run([(HIGH, sync())])).code == "CLUSTERDOWN"
    low.answers["CLUSTER"] = halves(low, high)
    assert store.run([(HIGH, sync())]) == [REPLY]


@pytest.mark.parametrize(
    ("answer", "loud"),
    [
        (b"*0\r\n", False),
        (error("ERR This instance has cluster support disabled"), True),
        (error("NOPERM this user has no permissions to run the 'cluster|slots' command"), True),
        (bulk("nonsense"), True),
    ],
)
def test_a_node_that_cannot_say_who_holds_what(cluster: Cluster, answer: bytes, loud: bool) -> None:
    low, _, store = cluster
    low.answers["CLUSTER"] = answer
    assert down(lambda: run_one(store)).loud == loud


def test_a_subscription_on_a_node_that_has_left(cluster: Cluster) -> None:
    low, high, store = cluster
    low.answers["SUBSCRIBE"] = high.answers["SUBSCRIBE"] = array("subscribe", "cb:0:ns", "1")
    subscription = store.subscribe()
    assert subscription.get(0.01) is None
    stays, leaves = (high, low) if low.seen("SUBSCRIBE") else (low, high)
    only = slots((0, 16_383, "127.0.0.1", stays.port))
    stays.answers["CLUSTER"] = leaves.answers["CLUSTER"] = only
    leaves.answers["EVALSHA"] = error(f"MOVED 42 127.0.0.1:{stays.port}")
    store.run([(LOW, sync()), (HIGH, sync())])
    run_one(store)
    with pytest.raises(StoreDown, match="left the group"):
        subscription.get(0.01)
    subscription.close()
