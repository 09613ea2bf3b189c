"""One circuit for each key (a host, a tenant, a region), and never more than so many of them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict

from ..breaker import CircuitBreaker
from ..policy import Policy, check_circuit, check_number
from ..process import OwnLock, follow_process
from ..registry import CircuitBreakerRegistry

MOST = 1_000
LOOKS = 8  # circuits that are looked at for one that can be forgotten


class KeyedCircuits:
    """Circuits named ``<name>.<key>``, made when their key is first asked for.

    Of ``most`` circuits those are forgotten first that were not asked for longest, and only closed
    ones with nothing left to report: the store keeps what it knows of them.  When none can be
    forgotten, further keys share the circuit ``<name>``, so that keys from outside (a header, a
    host name) cannot make this process or the store grow.

    Args:
        registry: where the circuits come from.
        name: what all their names begin with.
        policy: of each of them; None: what the store holds, or the defaults.
        most: circuits that are held here at once, 1 to 9,000.

    Raises:
        ValueError, TypeError: name or bound are not allowed.
    """

    _lock = OwnLock()

    def __init__(
        self,
        registry: CircuitBreakerRegistry,
        name: str,
        policy: Policy | None = None,
        *,
        most: int = MOST,
    ) -> None:
        self.name = check_circuit(name)
        self.policy = policy
        self.most = int(check_number("most", most, 1, 9_000))
        self._registry = registry
        self._breakers: OrderedDict[str, CircuitBreaker] = OrderedDict()
        follow_process(self)

    def __repr__(self) -> str:
        return f"<KeyedCircuits {self.name!r}, {len(self)} of at most {self.most}>"

    def __len__(self) -> int:
        return len(self._breakers)

    def breaker(self, key: str) -> CircuitBreaker:
        """The circuit of one key.  Don't keep it: what is held elsewhere is not forgotten.

        Raises:
            ValueError: ``<name>.<key>`` is no name of a circuit.
        """
        found = self._breakers.get(key)
        if found is None:
            return self._make(key)
        with contextlib.suppress(KeyError):  # another thread has just forgotten it
            self._breakers.move_to_end(key)
        return found

    def _make(self, key: str) -> CircuitBreaker:
        name = check_circuit(f"{self.name}.{key}")
        with self._lock:
            found = self._breakers.get(key)
            if found is not None:
                return found
            if len(self._breakers) >= self.most and not self._forget_one():
                return self._registry.breaker(self.name, self.policy)
            made = self._breakers[key] = self._registry.breaker(name, self.policy)
            return made

    def _forget_one(self) -> bool:
        for _ in range(LOOKS):
            try:
                key = next(iter(self._breakers))
            except RuntimeError:  # another thread has just asked for a circuit
                continue
            name = f"{self.name}.{key}"
            del self._breakers[key]
            if self._registry.forget(name):
                return True
            self._breakers[key] = self._registry.breaker(name)
        return False

    def close(self) -> None:
        """The registry closes its circuits."""

    def forked(self) -> None:
        """A child makes a lock of its own."""
        vars(self).pop("_lock", None)
