"""How long to wait before something is tried again."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, wait_random_exponential

# tenacity says how long to wait; who waits, and whether, is said by the clients' rules.
_RETRYING = Retrying()


def backoff(attempt: int, factor: float, most: float) -> float:
    """Seconds before the next attempt: exponential, with full jitter.

    Args:
        attempt: how many there have been.
        factor: the bound of the first wait, in seconds; each further bound is twice as long.
        most: the bound of all waits, in seconds.
    """
    state = RetryCallState(_RETRYING, None, (), {})
    state.attempt_number = attempt
    return wait_random_exponential(factor, max=most)(state)
