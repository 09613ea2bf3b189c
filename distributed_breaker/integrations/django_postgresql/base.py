"""Where Django looks for the backend."""

from __future__ import annotations

from django.db.backends.postgresql.base import DatabaseWrapper as Djangos

from ..django_database import GuardedDatabase


class DatabaseWrapper(GuardedDatabase, Djangos):  # type: ignore[misc]
    """Django's own, under a circuit."""
