"""A circuit breaker whose circuits are shared by a whole fleet of processes."""

from .breaker import CircuitBreaker
from .errors import CircuitBreakerOpenException, StoreUnavailable
from .permit import Guard, Permit
from .policy import Outcome, Policy, State
from .registry import CircuitBreakerRegistry
from .snapshot import Snapshot
from .transitions import Transition

__all__ = [
    "CircuitBreaker",
    "CircuitBreakerOpenException",
    "CircuitBreakerRegistry",
    "Guard",
    "Outcome",
    "Permit",
    "Policy",
    "Snapshot",
    "State",
    "StoreUnavailable",
    "Transition",
]
