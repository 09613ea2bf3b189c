"""The guide's import path: what an application needs, and nothing that is defined here.

``get_…_circuit_breaker`` give the protected clients of a service; the configuration is loaded when
the first of them is wanted, or by ``initialize_circuit_breakers``.
"""

from distributed_breaker.errors import CircuitBreakerOpenException
from distributed_breaker.monitoring.served import circuit_breaker_health, circuit_breaker_metrics
from distributed_breaker.services import (
    UnknownService,
    get_cache_circuit_breaker,
    get_database_circuit_breaker,
    get_http_circuit_breaker,
    get_ml_circuit_breaker,
    get_task_queue,
)
from distributed_breaker.services import initialize as initialize_circuit_breakers

__all__ = [
    "CircuitBreakerOpenException",
    "UnknownService",
    "circuit_breaker_health",
    "circuit_breaker_metrics",
    "get_cache_circuit_breaker",
    "get_database_circuit_breaker",
    "get_http_circuit_breaker",
    "get_ml_circuit_breaker",
    "get_task_queue",
    "initialize_circuit_breakers",
]
