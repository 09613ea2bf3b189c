"""What stands around a circuit: time limits, retries, bulkheads, fallbacks, circuits by key.

Names only; docs/composition.md shows how they go together.
"""

from ..clients.budget import RetryBudget
from ..deadline import DeadlineExceeded, check, deadline, remaining
from .bulkhead import Bulkhead, BulkheadFull
from .keyed import KeyedCircuits
from .pipeline import CallTimeout, Pipeline
from .retry import Retry

__all__ = [
    "Bulkhead",
    "BulkheadFull",
    "CallTimeout",
    "DeadlineExceeded",
    "KeyedCircuits",
    "Pipeline",
    "Retry",
    "RetryBudget",
    "check",
    "deadline",
    "remaining",
]
