"""What all clients are: one part of a service, its circuits, and its section of the file."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ..breaker import CircuitBreaker
from ..permit import Guard
from ..policy import Policy
from ..sections import Circuit

P = ParamSpec("P")
T = TypeVar("T")


def users_folder(variable: str, otherwise: str) -> Path:
    """The folder of this user's files of one kind: by XDG's variable, or below their home."""
    base = os.environ.get(variable) or Path.home() / otherwise
    return Path(base) / "distributed_breaker"


class Client:
    """Guards calls to one dependency of one service.

    Made by ``Services.client``; the same object for the same part of a service.

    Args:
        name: ``<service>.<kind>`` or ``<service>.<kind>.<part>``.
        circuits: its circuits, by the last part of their names; the last of them guards what is
            not known to be of another.
        section: what the file says.
        explicit: what the caller of the getter says itself, which beats the file.
    """

    def __init__(
        self,
        name: str,
        circuits: Mapping[str, CircuitBreaker],
        section: Circuit,
        explicit: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.circuits = dict(circuits)
        self.section = section
        self.explicit: dict[str, Any] = {}
        self.use(**explicit)
        self._begin()

    def _begin(self) -> None:
        """Make what a client of this kind has beside its circuits; the fields above are there."""

    def __repr__(self) -> str:
        states = ", ".join(f"{name} {c.state}" for name, c in self.circuits.items())
        return f"<{type(self).__name__} {states}>"

    @staticmethod
    def policy(policy: Policy) -> Policy:
        """The policy of its circuits, with the errors that count for its kind of dependency."""
        return policy

    def use(self, **explicit: Any) -> None:
        """Take what a later caller of the getter says; None says nothing."""
        self.explicit |= {name: value for name, value in explicit.items() if value is not None}

    def configure(self, section: Circuit) -> None:
        """The file has changed: go by its new section from the next call on."""
        self.section = section

    def problems(self) -> list[str]:
        """What is wrong with this process's client beside its circuits, in sentences."""
        return []

    def stats(self) -> dict[str, Any]:
        """Counts of this process's client, and what it holds: dictionaries, texts and numbers."""
        return {}

    def close(self) -> None:
        """Let go of what it holds beside its circuits.  Safe to call twice."""

    @property
    def breaker(self) -> CircuitBreaker:
        """The circuit that guards what is not known to be of another."""
        return next(reversed(self.circuits.values()))

    def guard(self) -> Guard:
        """A guarded block, for ``with`` and ``async with``."""
        return self.breaker.guard()

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``function`` under the circuit and return what it returns.

        Raises:
            CircuitBreakerOpenException: the circuit does not admit the call.
        """
        return self.breaker.call(function, *args, **kwargs)

    async def call_async(
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The same for a coroutine function."""
        return await self.breaker.call_async(function, *args, **kwargs)


class ManyHosts(Client):
    """A client that talks to many hosts, each of which may have a circuit of its own.

    Attributes:
        further: makes the circuit of one of them, from its name; None: all share the client's.
    """

    further: Callable[[str], CircuitBreaker] | None = None
