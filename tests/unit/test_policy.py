"""The numbers of one circuit: validated with the value in the message, kept as whole numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributed_breaker import CircuitBreakerOpenException, Outcome, Policy, State
from distributed_breaker.policy import LIMITS, Numbers, check_circuit, check_namespace
from tests.unit.clock import Boom

NAN, INF = math.nan, math.inf


def test_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(Policy()) == {
        "failure_threshold": 5,
        "failure_rate": 0.5,
        "window": 60.0,
        "minimum_calls": 10,
        "slow_call_duration": None,
        "slow_call_rate": 0.5,
        "open_interval": 60.0,
        "open_interval_max": None,
        "backoff_multiplier": 2.0,
        "jitter": 0.1,
        "success_threshold": 3,
        "half_open_permits": None,
        "permit_lease": 30.0,
        "quorum": 2,
        "version": 0,
        "record": (Exception,),
        "ignore": (),
        "record_result": None,
        "measure": True,
        "auto_recovery": True,
    }


def test_the_words_are_the_documented_ones() -> None:
    assert [str(state) for state in State] == [
        "closed", "open", "half_open", "forced_open", "forced_closed",
    ]  # fmt: skip
    assert [str(outcome) for outcome in Outcome] == ["success", "failure", "ignored"]


# ---------------------------------------------------------------------------- validation

WHOLE = ["failure_threshold", "minimum_calls", "success_threshold", "half_open_permits"]
BAD: list[tuple[str, Any]] = [
    *[(name, value) for name in [*WHOLE, "quorum"] for value in (0, -1, 2.0, "3", True, NAN)],
    ("failure_threshold", 1_000_001),
    ("minimum_calls", 1_000_001),
    ("success_threshold", 1_001),
    ("half_open_permits", 17),
    ("quorum", 9),
    ("quorum", None),
    *[("version", value) for value in (-1, 1.5, "1", None, True, 2**63)],
    *[("failure_rate", value) for value in (0, 0.0, -0.1, 1.01, 50, NAN, INF, "0.5", True)],
    *[("slow_call_rate", value) for value in (0, -0.1, 1.01, NAN, INF, None, "0.5")],
    *[("window", value) for value in (0, -1, 0.01, 86_401, NAN, INF, None, "60", True)],
    *[("slow_call_duration", value) for value in (0, -1.0, NAN, INF, 86_401, "2")],
    *[("open_interval", value) for value in (0, -1, NAN, INF, 2_592_001, None, "60")],
    *[("open_interval_max", value) for value in (0, -1, 59.9, NAN, INF, 2_592_001, "60")],
    *[("backoff_multiplier", value) for value in (0, 0.99, -2, 101, NAN, INF, None, "2")],
    *[("jitter", value) for value in (-0.01, 1.01, NAN, INF, None, "0.1")],
    *[("permit_lease", value) for value in (0, -1, NAN, INF, 86_401, None, "30")],
    *[("record", value) for value in (5, None, "Exception", (5,), (Boom("an instance"),), [int])],
    *[("ignore", value) for value in (5, None, "Exception", (5,), (Boom("an instance"),), [int])],
    *[("record_result", value) for value in (5, "lambda", True)],
    *[("measure", value) for value in (0, 1, None, "yes")],
    *[("auto_recovery", value) for value in (0, 1, None, "yes")],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_bad_value_is_refused_and_named(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        Policy(**{name: value})
    shown = value[0] if isinstance(value, tuple | list) else value
    assert f"Policy.{name}" in str(caught.value)
    assert repr(shown) in str(caught.value)


GOOD: list[dict[str, Any]] = [
    {name: bound}
    for name in ("failure_threshold", "minimum_calls", "quorum", "version")
    for bound in LIMITS[name]
] + [
    {"success_threshold": 1},
    {"success_threshold": 1_000},
    {"success_threshold": 16, "half_open_permits": 16},
    {"failure_rate": None},
    {"failure_rate": 1},
    {"failure_rate": 0.0001},
    {"window": 0.1},
    {"window": 86_400},
    {"open_interval": 0.001},
    {"open_interval": 2_592_000},
    {"open_interval": 5, "open_interval_max": 5},
    {"open_interval_max": 2_592_000},
    {"backoff_multiplier": 1},
    {"backoff_multiplier": 100},
    {"jitter": 0},
    {"jitter": 1},
    {"permit_lease": 0.01},
    {"slow_call_duration": 0.000001},
    {"record": Boom},
    {"record": [Boom, KeyError], "ignore": ()},
    {"record": ()},
    {"ignore": Boom},
    {"record_result": bool},
    {"measure": False},
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_bounds_are_allowed_and_stay_within_what_the_store_takes(values: dict[str, Any]) -> None:
    numbers = Policy(**values).numbers
    assert Numbers.parse(numbers.text()) == numbers


def test_more_permits_than_successes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"half_open_permits=4 .*success_threshold=3"):
        Policy(half_open_permits=4)


def test_a_slow_rule_needs_durations() -> None:
    with pytest.raises(ValueError, match="measure=False"):
        Policy(measure=False, slow_call_duration=1.0)


def test_a_policy_is_frozen() -> None:
    policy = Policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.window = 1.0  # type: ignore[misc]


def test_equal_policies_are_equal_and_pickle() -> None:
    policy = Policy(record=[Boom], ignore=KeyError, record_result=bool, half_open_permits=2)
    assert policy == Policy(
        record=(Boom,), ignore=(KeyError,), record_result=bool, half_open_permits=2
    )
    assert policy != Policy()
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    assert pickle.loads(pickle.dumps(policy)) == policy


# ---------------------------------------------------------------------------- what the store keeps


def test_numbers_are_milliseconds_basis_points_and_percent() -> None:
    policy = Policy(
        failure_threshold=7,
        failure_rate=0.25,
        window=1.5,
        minimum_calls=20,
        slow_call_rate=0.125,
        open_interval=0.25,
        open_interval_max=30,
        backoff_multiplier=1.5,
        jitter=0.05,
        success_threshold=2,
        half_open_permits=1,
        permit_lease=12.5,
        quorum=3,
        version=9,
    )
    assert policy.numbers.text() == "9 7 2500 1500 20 1250 250 30000 150 500 2 1 12500 3"


def test_absent_rules_are_zeros() -> None:
    numbers = Policy(failure_rate=None).numbers
    assert (numbers.failure_rate, numbers.open_interval_max) == (0, 0)


@pytest.mark.parametrize(("successes", "permits"), [(1, 1), (3, 3), (16, 16), (17, 16), (900, 16)])
def test_permits_are_as_many_as_can_be_used(successes: int, permits: int) -> None:
    assert Policy(success_threshold=successes).numbers.half_open_permits == permits


def stored_numbers() -> st.SearchStrategy[Numbers]:
    """Everything that the script takes, from whichever client."""
    return st.builds(
        Numbers, **{name: st.integers(least, most) for name, (least, most) in LIMITS.items()}
    )


def texts() -> st.SearchStrategy[str]:
    return stored_numbers().map(Numbers.text)


@given(stored_numbers())
def test_a_stored_text_reads_back(numbers: Numbers) -> None:
    assert Numbers.parse(numbers.text()) == numbers
    # A newer library may append numbers of its own.
    assert Numbers.parse(numbers.text() + " 17 x") == numbers


@given(stored_numbers())
def test_any_stored_policy_can_be_shown(numbers: Numbers) -> None:
    """It may come from a client with other bounds, and a snapshot must not fail for it."""
    shown = Policy(record=(Boom,), slow_call_duration=2.0).with_numbers(numbers)
    assert shown.record == (Boom,)
    assert shown.slow_call_duration == 2.0
    assert shown.quorum == numbers.quorum
    assert shown.window == numbers.window / 1000


@given(stored_numbers())
def test_a_policy_and_its_numbers_agree(numbers: Numbers) -> None:
    """What could have been made by a Policy comes back from one unchanged."""
    own = numbers._replace(
        window=max(100, numbers.window),
        permit_lease=max(10, numbers.permit_lease),
        half_open_permits=min(numbers.half_open_permits, numbers.success_threshold),
        open_interval_max=max(numbers.open_interval, numbers.open_interval_max)
        if numbers.open_interval_max
        else 0,
    )
    assert Policy().with_numbers(own).numbers == own


@pytest.mark.parametrize(
    "text",
    ["", "1", "0 5 5000 60000 10 5000 60000 0 200 1000 3 3 30000", "x" * 40, "-1" + " 1" * 13,
     "0 0 5000 60000 10 5000 60000 0 200 1000 3 3 30000 2",
     "0 5 5000 60000 10 5000 60000 0 200 1000 3 17 30000 2",
     "0 5 5000 60000 10 5000 60000 0 99 1000 3 3 30000 2",
     "0 5 5000 60000 10 5000 60000 0 200 1000 3 3 30000 9",
     "0  5 5000 60000 10 5000 60000 0 200 1000 3 3 30000 2",
     "² 5 5000 60000 10 5000 60000 0 200 1000 3 3 30000 2",
     "9" * 5000 + " 5 5000 60000 10 5000 60000 0 200 1000 3 3 30000 2",
     "0.5 5 5000 60000 10 5000 60000 0 200 1000 3 3 30000 2"],
)  # fmt: skip
def test_a_text_that_is_no_policy_is_none(text: str) -> None:
    assert Numbers.parse(text) is None


# ---------------------------------------------------------------------------- outcomes


class OwnRejection(CircuitBreakerOpenException):
    pass


REJECTION = CircuitBreakerOpenException("another")


@pytest.mark.parametrize(
    ("policy", "error", "outcome"),
    [
        (Policy(), Boom(), "failure"),
        (Policy(), KeyboardInterrupt(), "ignored"),
        (Policy(), SystemExit(), "ignored"),
        (Policy(), GeneratorExit(), "ignored"),
        (Policy(record=(BaseException,)), KeyboardInterrupt(), "ignored"),
        (Policy(ignore=(LookupError,)), KeyError(), "ignored"),
        (Policy(ignore=(KeyError,)), LookupError(), "failure"),
        # Both lists name it: ignore has the last word.
        (Policy(record=(Boom,), ignore=(Boom,)), Boom(), "ignored"),
        (Policy(record=(Boom,)), ValueError(), "ignored"),
        (Policy(record=(Boom,)), Boom(), "failure"),
        (Policy(record=()), Boom(), "ignored"),
        (Policy(), REJECTION, "ignored"),
        (Policy(), OwnRejection("another"), "ignored"),
        (Policy(record=(Exception, CircuitBreakerOpenException)), REJECTION, "failure"),
        (Policy(record=(Exception, OwnRejection)), REJECTION, "ignored"),
        (Policy(record=(Exception, OwnRejection)), OwnRejection("another"), "failure"),
        (
            Policy(record=(CircuitBreakerOpenException,), ignore=(OwnRejection,)),
            OwnRejection("another"),
            "ignored",
        ),
    ],
    ids=str,
)
def test_which_errors_are_failures(policy: Policy, error: BaseException, outcome: str) -> None:
    assert policy.outcome_of(error) == outcome


# ---------------------------------------------------------------------------- JSON


def test_from_json_takes_the_documented_names() -> None:
    text = json.dumps({"failure_threshold": 3, "open_interval": 5, "failure_rate": None})
    assert Policy.from_json(text) == Policy(
        failure_threshold=3, open_interval=5.0, failure_rate=None
    )
    assert Policy.from_json("{}") == Policy()


def test_every_number_can_stand_in_json() -> None:
    values = {
        name: value
        for name, value in dataclasses.asdict(Policy()).items()
        if name not in ("record", "ignore", "record_result")
    }
    assert Policy.from_json(json.dumps(values)) == Policy()


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("failure_treshold", "failure_threshold"),
        ("failureThreshold", "failure_threshold"),
        ("open_intervall", "open_interval"),
        ("half_open_permit", "half_open_permits"),
        ("windows", "window"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r}.*did you mean {suggestion!r}"):
        Policy.from_mapping({name: 3})


def test_an_unknown_name_unlike_any_gets_the_list() -> None:
    with pytest.raises(ValueError, match=r"'zzz'.*failure_threshold.*quorum"):
        Policy.from_mapping({"zzz": 3})


@pytest.mark.parametrize("name", ["record", "ignore", "record_result"])
def test_code_cannot_come_from_json(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Policy.from_mapping({name: "Exception"})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"', '{"window": }'])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Policy.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"window": "60"}', r"Policy\.window='60'"),
        ('{"window": NaN}', r"Policy\.window=nan"),
        ('{"failure_threshold": 5.0}', r"Policy\.failure_threshold=5\.0"),
        ('{"failure_threshold": true}', r"Policy\.failure_threshold=True"),
        ('{"quorum": null}', r"Policy\.quorum=None"),
        ('{"window": [60]}', r"Policy\.window=\[60\]"),
    ],
)
def test_json_values_are_validated(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Policy.from_json(text)


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["a", "_", "7", "web_app.database.read", "payments.eu-west:1", "http/api@v1", "A" * 128,
     "a.", "a-", "a/b", "a@b", "a:b"],
)  # fmt: skip
def test_good_circuit_names(name: str) -> None:
    assert check_circuit(name) == name


BAD_NAMES: list[Any] = [
    "", ".a", "-a", "/a", ":a", "@a", " a", "a ", "a b", "a\n", "\na", "a\0", "a{b}", "{a}", "}",
    "é", "aé", "\uff41", "٣", "a,b", "a;b", "a*", "a?", "a[1]", "a\\b", "a'b", 'a"b', "a+b", "a=b",
    "a#b", "a%b", "a&b", "a(b)", "a|b", "a~b", "a`b", "a^b", "a$b", "a!b", "a<b>", "a\tb",
    "A" * 129, None, 5, b"a", ["a"], ("a",),
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_bad_circuit_names(name: Any) -> None:
    with pytest.raises(ValueError, match=r"circuit name .* is not allowed") as caught:
        check_circuit(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "nightscan", "default", "A" * 64, "a.b-c_d", "_", "0"])
def test_good_namespaces(name: str) -> None:
    assert check_namespace(name) == name


@pytest.mark.parametrize("name", [*BAD_NAMES, "a:b", "a/b", "a@b", "A" * 65], ids=repr)
def test_bad_namespaces(name: Any) -> None:
    """No colon: otherwise ``a:b`` and ``c`` would share a key with ``a`` and ``b:c``."""
    with pytest.raises(ValueError, match=r"namespace name .* is not allowed"):
        check_namespace(name)
