"""What the decorator and ``call`` make of functions, methods and other things to call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from distributed_breaker import CircuitBreaker, CircuitBreakerOpenException, CircuitBreakerRegistry
from tests.unit.clock import BRITTLE, Boom, boom
from tests.unit.ways import counts

# ---------------------------------------------------------------------------- call


def test_call_passes_all_arguments_on(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert breaker.call(function, 1, 2, self=3, function=4) == ((1, 2), {"self": 3, "function": 4})


def test_what_call_raises_for_wrong_arguments_is_the_users_own(
    registry: CircuitBreakerRegistry,
) -> None:
    breaker = registry.breaker("b")
    with pytest.raises(TypeError, match="argument"):
        breaker.call(lambda: None, 1)


# ---------------------------------------------------------------------------- decorator


def test_a_decorated_function_looks_like_itself(registry: CircuitBreakerRegistry) -> None:
    def function(a: int, b: str = "x") -> str:
        """What it does."""
        return b * a

    protected = registry.breaker("b")(function)
    assert protected(2, b="y") == "yy"
    assert protected.__name__ == "function"
    assert protected.__doc__ == "What it does."
    assert inspect.signature(protected) == inspect.signature(function)
    assert inspect.unwrap(protected) is function


def test_a_decorated_function_keeps_its_kind(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    async def coroutine() -> None: ...
    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> Any:
        yield 1

    assert inspect.iscoroutinefunction(breaker(coroutine))
    assert inspect.isgeneratorfunction(breaker(generator))
    assert inspect.isasyncgenfunction(breaker(async_generator))
    assert not inspect.iscoroutinefunction(breaker(lambda: None))


def test_static_and_class_methods_in_either_order(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    class Service:
        @staticmethod
        @breaker
        def static(value: int) -> int:
            return value

        @classmethod
        @breaker
        def of_class(cls, value: int) -> tuple[type, int]:
            return cls, value

        @breaker
        @staticmethod
        def static_inside(value: int) -> int:
            return value

        @breaker
        @classmethod
        def class_inside(cls, value: int) -> tuple[type, int]:
            return cls, value

    class Child(Service):
        pass

    for thing in (Service, Service(), Child, Child()):
        kind = thing if isinstance(thing, type) else type(thing)
        assert thing.static(1) == 1
        assert thing.static_inside(2) == 2
        assert thing.of_class(3) == (kind, 3)
        assert thing.class_inside(4) == (kind, 4)
    assert counts(breaker) == (16, 0)


def test_decorated_methods_share_one_circuit(brittle: CircuitBreaker) -> None:
    class Service:
        def __init__(self, name: str) -> None:
            self.name = name

        @brittle
        def work(self, well: bool) -> str:
            if not well:
                boom()
            return self.name

    one, two = Service("one"), Service("two")
    assert one.work(True) == "one"
    assert two.work(well=True) == "two"
    with pytest.raises(Boom):
        one.work(False)
    with pytest.raises(CircuitBreakerOpenException):
        two.work(True)


def test_callable_objects_and_partials_can_be_protected(registry: CircuitBreakerRegistry) -> None:
    breaker = registry.breaker("b")

    class Adder:
        def __call__(self, a: int, b: int) -> int:
            return a + b

    assert breaker(Adder())(1, 2) == 3
    assert breaker(functools.partial(Adder(), 1))(2) == 3
    assert breaker(max)(1, 2) == 2
    assert counts(breaker) == (3, 0)


@pytest.mark.parametrize("thing", [5, "text", None, object()])
def test_what_cannot_be_called_cannot_be_protected(
    registry: CircuitBreakerRegistry, thing: Any
) -> None:
    with pytest.raises(TypeError, match="cannot be called"):
        registry.breaker("b")(thing)


def test_one_function_under_two_circuits(
    registry: CircuitBreakerRegistry, brittle: CircuitBreaker
) -> None:
    other = registry.breaker("other", BRITTLE)
    protected = other(brittle(boom))
    with pytest.raises(Boom):
        protected()
    assert (brittle.state, other.state) == ("open", "open")
