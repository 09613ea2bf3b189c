"""Web sessions in a protected cache: they outlive the outage, and the process that they were in.

What is saved is on this host's disk as well, before ``save`` returns.  While Redis is away it is
read from there, and what is saved waits in the outbox.
"""

from __future__ import annotations

import logging
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

import redis

from .cache import CacheClient

PREFIX = "session:"
LIFETIME = 31 * 86_400.0  # s, as long as Flask's permanent sessions
TOKEN = 32  # bytes that an id is made of, which nobody can guess

log = logging.getLogger("distributed_breaker")


class SessionStore:
    """Sessions by their ids.

    Args:
        cache: where they are kept; see ``get_cache_circuit_breaker``.
        prefix: what their keys begin with, after the cache's own prefix.
        lifetime: seconds for which a session lives from its last ``save`` on.

    Raises, from all methods, what the cache raises: nobody is logged out because Redis and this
    host's disk do not know them at the moment.
    """

    def __init__(
        self, cache: CacheClient, *, prefix: str = PREFIX, lifetime: float = LIFETIME
    ) -> None:
        self._cache = cache
        self._prefix = prefix
        self._lifetime = lifetime

    @staticmethod
    def new_id() -> str:
        """An id for a new session."""
        return secrets.token_urlsafe(TOKEN)

    def load(self, session_id: str) -> Any:
        """What was saved under an id; None: nothing, or it is over."""
        return self._cache.get(self._prefix + session_id)

    def save(self, session_id: str, values: Any, lifetime: float | None = None) -> bool:
        """Save a session.

        Args:
            session_id: from ``new_id``.
            values: anything that JSON gives back.
            lifetime: seconds, instead of the store's.

        Returns:
            True when Redis has it; False when it waits on disk for Redis to return.
        """
        ttl = self._lifetime if lifetime is None else lifetime
        return self._cache.set(self._prefix + session_id, values, ttl, durable=True)

    def touch(self, session_id: str, lifetime: float | None = None) -> bool:
        """Let a session live on as if it had just been saved; False: there is none, or it waits."""
        ttl = self._lifetime if lifetime is None else lifetime
        return self._cache.expire(self._prefix + session_id, ttl)

    def delete(self, session_id: str) -> bool:
        """End a session, at once on this host."""
        return self._cache.delete(self._prefix + session_id)


def flask_sessions(app: Any, cache: CacheClient, *, prefix: str = PREFIX) -> Any:
    """Keep a Flask application's sessions in a protected cache.

    The cookie holds an id that cannot be guessed, and nothing else.  Names, lifetimes and flags are
    the application's (``SESSION_COOKIE_…``, ``PERMANENT_SESSION_LIFETIME``).  When neither Redis
    nor this host's disk can say what a session holds, the request sees an empty one whose
    ``unavailable`` is True; nothing of it is saved, and the cookie stays as it is.

    Args:
        app: the application.
        cache: where sessions are kept.
        prefix: what their keys begin with.

    Returns:
        The session interface, which the application has from now on.
    """
    from flask.json.tag import TaggedJSONSerializer
    from flask.sessions import SessionInterface, SessionMixin

    store, serializer = SessionStore(cache, prefix=prefix), TaggedJSONSerializer()

    class Session(dict[str, Any], SessionMixin):
        """A dictionary that knows whether it was changed."""

        session_id = ""
        new = True
        modified = False
        accessed = False
        unavailable = False

        def __getitem__(self, key: str) -> Any:
            self.accessed = True
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            self.accessed = True
            return super().get(key, default)

    def changing(name: str) -> Any:
        method = getattr(dict, name)

        def change(self: Session, *args: Any, **kwargs: Any) -> Any:
            self.accessed = self.modified = True
            return method(self, *args, **kwargs)

        return change

    names = ("__setitem__", "__delitem__", "clear", "pop", "popitem", "setdefault", "update")
    for name in (*names, "__ior__"):
        setattr(Session, name, changing(name))

    class Sessions(SessionInterface):
        """Opens and saves them; ``regenerate`` after a login, so that no old id is worth having."""

        def open_session(self, app: Any, request: Any) -> Session:
            session_id = request.cookies.get(self.get_cookie_name(app), "")
            session = Session()
            if session_id:
                try:
                    text = store.load(session_id)
                except redis.RedisError as error:
                    log.warning("a session cannot be read: %s", type(error).__name__)
                    session.session_id, session.unavailable = session_id, True
                    return session
                if isinstance(text, str):
                    dict.update(session, serializer.loads(text))
                    session.session_id, session.new = session_id, False
            # An id that was not given out here is not taken over.
            session.session_id = session.session_id or store.new_id()
            return session

        def regenerate(self, session: Session) -> None:
            """Give a session another id."""
            if not session.new:
                store.delete(session.session_id)
            session.session_id, session.modified = store.new_id(), True

        def save_session(self, app: Any, session: Any, response: Any) -> None:
            if session.accessed:
                response.vary.add("Cookie")
            if session.unavailable:
                return
            place = {
                "domain": self.get_cookie_domain(app),
                "path": self.get_cookie_path(app),
                "secure": self.get_cookie_secure(app),
                "httponly": self.get_cookie_httponly(app),
                "samesite": self.get_cookie_samesite(app),
                "partitioned": self.get_cookie_partitioned(app),
            }
            cookie = self.get_cookie_name(app)
            if not session:
                if session.modified and not session.new:
                    store.delete(session.session_id)
                    response.delete_cookie(cookie, **place)
                    response.vary.add("Cookie")
                return
            if not self.should_set_cookie(app, session):
                return
            life: timedelta = app.permanent_session_lifetime
            if session.modified:
                store.save(
                    session.session_id, serializer.dumps(dict(session)), life.total_seconds()
                )
            else:
                store.touch(session.session_id, life.total_seconds())
            expires = datetime.now(UTC) + life if session.permanent else None
            response.set_cookie(cookie, session.session_id, expires=expires, **place)
            response.vary.add("Cookie")

    app.session_interface = Sessions()
    return app.session_interface
