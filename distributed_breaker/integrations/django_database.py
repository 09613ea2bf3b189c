"""What guards a Django database, whichever it is: connecting, each statement, and the commit.

The backends beside this module are Django's own with this on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.utils import OperationalError

from ..clients.database_errors import verdict
from ..errors import CircuitBreakerOpenException
from ..policy import Outcome
from ..services import current


class DatabaseOpenException(CircuitBreakerOpenException, OperationalError):  # type: ignore[misc]
    """A refusal that is also Django's OperationalError."""


class GuardedDatabase:
    """Goes before a ``DatabaseWrapper``.  The circuit's name stands in the database's settings, as
    ``CIRCUIT``; roll-backs are never refused."""

    settings_dict: dict[str, Any]
    execute_wrappers: list[Callable[..., Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._circuit = self.settings_dict.get("CIRCUIT")
        if not isinstance(self._circuit, str):
            raise ImproperlyConfigured(
                'DATABASES: name the circuit of this database: "CIRCUIT": "web_app.database.write"'
            )
        self.execute_wrappers.append(self._execute)

    def get_new_connection(self, params: Any) -> Any:
        """Connect."""
        with self._guarded():
            return super().get_new_connection(params)  # type: ignore[misc]

    def _commit(self) -> None:
        with self._guarded():
            super()._commit()  # type: ignore[misc]

    def _execute(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        with self._guarded():
            return execute(sql, params, many, context)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with current().circuit(str(self._circuit)).guard() as call:
                try:
                    yield
                except Exception as error:
                    # Django's errors have the driver's as their cause.
                    outcome = verdict(error.__cause__ or error).outcome
                    if outcome is Outcome.FAILURE:
                        call.failure(error)
                    elif outcome is Outcome.SUCCESS:
                        call.success()
                    else:
                        call.ignore()
                    raise
        except CircuitBreakerOpenException as refusal:
            raise DatabaseOpenException(*refusal.__reduce__()[1]) from None
