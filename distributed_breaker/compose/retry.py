"""Whether and when an attempt that has failed is followed by another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..clients.budget import RetryBudget
from ..deadline import DeadlineExceeded, remaining
from ..errors import CircuitBreakerOpenException
from ..policy import Outcome, Policy, check_number
from .bulkhead import BulkheadFull

if TYPE_CHECKING:
    from ..breaker import CircuitBreaker

# None of these comes from the dependency, and another attempt would end alike.
NEVER = (CircuitBreakerOpenException, BulkheadFull, DeadlineExceeded)


class Retry:
    """Try again what the circuit counts as a failure, while it is closed and the budget lasts.

    Only for calls that may be made twice: nobody but their author knows which those are.  Waits
    are exponential with full jitter.

    Args:
        attempts: of one call, the first included: 2 to 100.
        first_wait: seconds, the bound of the wait before the second attempt; each further bound is
            twice as long.
        longest_wait: seconds, the bound of all waits.
        on: which errors, of those that the circuit's policy counts as failures.
        budget: share of calls that may be tried again in this process, or a budget that several
            pipelines share; None: no bound but ``attempts``.

    Raises:
        ValueError, TypeError: a number is out of range.
        ImportError: tenacity is missing, which the waits need.
    """

    def __init__(
        self,
        attempts: int = 3,
        *,
        first_wait: float = 0.1,
        longest_wait: float = 5.0,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
        budget: RetryBudget | float | None = 0.1,
    ) -> None:
        self.attempts = int(check_number("attempts", attempts, 2, 100))
        self.first_wait = check_number("first_wait", first_wait, 0.0, 3_600.0)
        self.longest_wait = check_number("longest_wait", longest_wait, 0.0, 3_600.0)
        self.on = on
        self.budget = RetryBudget(budget) if isinstance(budget, int | float) else budget
        try:
            from ..clients.backoff import backoff
        except ImportError as error:
            raise ImportError(
                "retries need the package tenacity: install distributed-breaker[http]"
            ) from error
        self._backoff = backoff

    def called(self) -> None:
        """A call begins, which earns its share of a retry."""
        if self.budget is not None:
            self.budget.called()

    def wait_before(self, attempt: int, error: Exception, breaker: CircuitBreaker) -> float | None:
        """Seconds to wait before another attempt; None: there is none.

        Args:
            attempt: how many there have been.
            error: how the last of them ended.
            breaker: the circuit that they went through.
        """
        if attempt >= self.attempts or not self._may_be_repeated(error, breaker.policy):
            return None
        wait = self._backoff(attempt, self.first_wait, self.longest_wait)
        left = remaining()
        if left is not None and wait >= left:
            return None
        if breaker.refusing or (self.budget is not None and not self.budget.take()):
            return None
        return wait

    def _may_be_repeated(self, error: Exception, policy: Policy) -> bool:
        if isinstance(error, NEVER) or not isinstance(error, self.on):
            return False
        return policy.outcome_of(error) is Outcome.FAILURE
