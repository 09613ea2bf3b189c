"""The exceptions: what they say, and that they survive a trip through pickle."""

from __future__ import annotations

import copy
import pickle

import pytest
import redis

from distributed_breaker import CircuitBreakerOpenException, StoreUnavailable
from distributed_breaker.errors import StoreError


class RefusedCache(CircuitBreakerOpenException, redis.ConnectionError):
    """What a client raises: also the native error of its library."""


def test_a_rejection_says_what_when_and_who() -> None:
    error = CircuitBreakerOpenException("pay", 12.345, "half_open", "quarantine", "a probe failed")
    assert (error.circuit, error.retry_after, error.state, error.source, error.reason) == (
        "pay", 12.345, "half_open", "quarantine", "a probe failed",
    )  # fmt: skip
    assert str(error) == (
        "circuit 'pay' is half_open (quarantine): a probe failed; retry in 12.3 s"
    )


def test_a_rejection_leaves_out_what_is_not_known() -> None:
    assert str(CircuitBreakerOpenException("pay")) == "circuit 'pay' is open (shared)"


@pytest.mark.parametrize("kind", [CircuitBreakerOpenException, RefusedCache])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_rejection_pickles(kind: type[CircuitBreakerOpenException], protocol: int) -> None:
    error = kind("pay", 3.5, "open", "shared", "too many failures in a row")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error)


def test_a_rejection_can_be_copied() -> None:
    error = RefusedCache("pay", 3.5, "open", "shared", "why")
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is RefusedCache
        assert vars(again) == vars(error)


def test_clients_errors_are_caught_as_both() -> None:
    with pytest.raises(redis.ConnectionError):
        raise RefusedCache("pay")
    with pytest.raises(CircuitBreakerOpenException):
        raise RefusedCache("pay")


def test_a_rejection_is_an_ordinary_exception() -> None:
    """So that ``except Exception`` keeps a program alive, and ``finally`` is not needed."""
    assert issubclass(CircuitBreakerOpenException, Exception)
    assert not issubclass(StoreUnavailable, CircuitBreakerOpenException)


@pytest.mark.parametrize(
    "error", [StoreUnavailable("gone"), StoreError("WRONGTYPE Operation against a key")]
)
def test_errors_of_the_store_pickle(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_a_store_error_knows_its_code() -> None:
    assert StoreError("CBSCHEMA the circuit has schema 2").code == "CBSCHEMA"
    assert StoreError("OOM").code == "OOM"
