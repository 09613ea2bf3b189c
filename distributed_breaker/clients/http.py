"""A service's HTTP calls under its circuit: requests for threads, httpx for event loops.

Both libraries' requests go through the same rules (``http_rules.py``), which lie in an adapter or
transport of theirs; what a call returns is the library's own response.  Its ``stale`` is True for
a stored answer, and its ``fallback`` names what has answered instead of the service: ``stale``,
``default``, ``queued``, or nothing.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import requests

from ..breaker import CircuitBreaker
from ..errors import CircuitBreakerOpenException
from ..fallback.outbox import Entry, Outbox, Parked, Replayed
from ..policy import Outcome, check_number
from .driving import Rules
from .http_answers import InvalidRequest, check_request, is_secret, origin_of
from .http_base import MISSING, Act, Call, Options
from .http_requests import (
    CircuitBreakerAdapter,
    HttpOpenException,
    InvalidResponse,
    RequestsWire,
    Session,
)
from .http_rules import BadStatus, HttpRules, drop_of
from .http_stored import MOST_ITEMS, SAFE, came_back

__all__ = ["HttpClient", "HttpOpenException", "InvalidRequest", "InvalidResponse"]

_OURS = frozenset(
    {"timeout", "total_timeout", "stream", "retry", "queue", "idempotency_key", "default",
     "fallback", "cache", "validate", "validate_request", "expected_statuses", "content_types",
     "max_response_size", "allow_redirects"}
)  # fmt: skip


class _Plain(NamedTuple):
    """A request that was made of nothing but its URL and what all requests have."""

    call: Call
    breaker: CircuitBreaker
    who: tuple[Any, ...]


class HttpClient(HttpRules):
    """HTTP calls to one kind of service.

    ``get``, ``post``, ``put``, ``patch``, ``delete``, ``head``, ``options`` and ``request`` take
    what requests' functions of these names take, and those ending in ``_async`` what httpx's take;
    ``timeout`` means the same there (a number, or connect and read).  Beside that all of them take:

    Args:
        url: a path below ``base_url``, or a whole URL.
        total_timeout: seconds for the request with its redirects, retries and body.
        stream: leave the body to the caller; the outcome comes with its end.
        retry: False: one attempt only.
        queue: have it wait on disk when the service cannot take it now, if the section's
            ``enable_request_queue`` is on; the answer has status 202 then.
        idempotency_key: makes it one that may be tried again; sent as ``Idempotency-Key``.
        default: JSON that is the answer while the circuit is open, instead of the section's.
        fallback: called with the refusal while the circuit is open and nothing is stored; what it
            returns is returned.
        cache: False: neither store the answer nor take a stored one.
        validate: a JSON Schema, a pydantic model, or a function, that the answer must satisfy.
        validate_request: the same for ``json``.
        expected_statuses: the valid ones of this request.
        content_types: those that the answer may have.
        max_response_size: bytes, instead of the section's.
        allow_redirects: False: a redirect is the answer.

    Raises:
        CircuitBreakerOpenException: refused, and nothing could answer instead.  It is also
            requests' or httpx's error for a connection that cannot be made.
        InvalidRequest: ``validate_request`` refused it; it was not sent.
        InvalidResponse: the answer is not valid; also an error of the library's.
        ValueError: a relative path, and there is no base_url.
        Exception: what requests or httpx raise.
    """

    def _begin(self) -> None:
        super()._begin()
        self.session = requests.Session()
        """requests' session; its ``proxies``, ``verify`` and ``cert`` may be set."""
        self.mount(self.session)
        self._hops = Session(self.session)
        self._maker = RequestsWire(self.adapter())
        self._plain: dict[tuple[str, str], _Plain] = {}
        self._asyncs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._health_problem = ""
        self._check_health()

    # ------------------------------------------------------------------ sessions of the user's

    def adapter(self) -> CircuitBreakerAdapter:
        """An adapter for requests' sessions."""
        return CircuitBreakerAdapter(self)

    def mount(self, session: requests.Session) -> requests.Session:
        """Put a session under the client's rules; returns it."""
        adapter = self.adapter()
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        return session

    def transport(self, **arguments: Any) -> Any:
        """A transport for ``httpx.Client``; for arguments see ``httpx.HTTPTransport``."""
        from .http_httpx import CircuitBreakerTransport

        return CircuitBreakerTransport(self, **arguments)

    def async_transport(self, **arguments: Any) -> Any:
        """The same for ``httpx.AsyncClient``."""
        from .http_httpx import AsyncCircuitBreakerTransport

        return AsyncCircuitBreakerTransport(self, **arguments)

    # ------------------------------------------------------------------ requests

    def request(self, method: str, url: str, **kwargs: Any) -> requests.Response:
        """Send a request; see the class."""
        plain = not kwargs and method in SAFE and self.section.enable_cached_response_fallback
        known = None
        if plain:
            known = self._plain.get((method, url))
            if known is not None and known.breaker.refusing:
                found = self._kept_at_once(known)
                if found is not None:
                    return found
                known = None
        options, fallback, native = self._prepare(kwargs)
        session = self.session
        # Made anew each time, since the session's own headers and cookies may have changed.
        request = requests.Request(method.upper(), self._url_of(url), **native)
        prepared = session.prepare_request(request)
        if plain and known is None:
            self._remember(method, url, prepared)
        wire = self._hops
        if fallback is None:
            response: requests.Response = wire._drive(self._follow(prepared, options))
            return response
        try:
            return cast(requests.Response, wire._drive(self._follow(prepared, options)))
        except CircuitBreakerOpenException as refused:
            self.fell_back("fallbacks", self.circuit_of(request.url))
            return cast(requests.Response, fallback(refused))

    def _kept_at_once(self, known: _Plain) -> requests.Response | None:
        """A stored answer without making the request first, which takes requests ten times as long
        as all the rest; None: there is none for who asks now."""
        if known.who != self._who():
            return None
        found: requests.Response | None = self._kept(self._maker, known.call, known.breaker)
        if found is not None:
            known.breaker.count_rejection()
            self.counts.add("requests")
        return found

    def _remember(self, method: str, url: str, prepared: requests.PreparedRequest) -> None:
        who = self._who()
        if who is None:
            return
        if len(self._plain) >= MOST_ITEMS:
            self._plain.clear()
        where = prepared.url or ""
        headers = self._maker.headers_of(prepared)
        call = Call(prepared, method, where, headers, None, True, Options())
        self._plain[method, url] = _Plain(call, self.circuit_of(where), who)

    def _who(self) -> tuple[Any, ...] | None:
        """All that a plain request is made of beside its URL; None: it is none."""
        session = self.session
        if session.cookies or session.params or session.hooks["response"]:
            return None
        # What requests' own mapping shows, in a tenth of the time; a plain one may be there, too.
        shown = getattr(session.headers, "_store", session.headers)
        headers = tuple(shown.items()), tuple(self.headers.items())
        return *headers, session.auth, self.auth, self.base_url

    def get(self, url: str, **kwargs: Any) -> requests.Response:
        """GET; see the class."""
        return self.request("GET", url, **kwargs)

    def post(self, url: str, **kwargs: Any) -> requests.Response:
        """POST; see the class."""
        return self.request("POST", url, **kwargs)

    def put(self, url: str, **kwargs: Any) -> requests.Response:
        """PUT; see the class."""
        return self.request("PUT", url, **kwargs)

    def patch(self, url: str, **kwargs: Any) -> requests.Response:
        """PATCH; see the class."""
        return self.request("PATCH", url, **kwargs)

    def delete(self, url: str, **kwargs: Any) -> requests.Response:
        """DELETE; see the class."""
        return self.request("DELETE", url, **kwargs)

    def head(self, url: str, **kwargs: Any) -> requests.Response:
        """HEAD; see the class.  As in requests, redirects are not followed."""
        return self.request("HEAD", url, **{"allow_redirects": False, **kwargs})

    def options(self, url: str, **kwargs: Any) -> requests.Response:
        """OPTIONS; see the class."""
        return self.request("OPTIONS", url, **kwargs)

    async def request_async(self, method: str, url: str, **kwargs: Any) -> Any:
        """As ``request``, with httpx; ``fallback`` may be a coroutine function."""
        options, fallback, native = self._prepare(kwargs)
        wire = self._async_session()
        auth = native.pop("auth", None)
        request = wire.request(method.upper(), self._url_of(url), native)
        try:
            return await wire._drive_async(self._follow(request, options, auth))
        except CircuitBreakerOpenException as refused:
            if fallback is None:
                raise
            self.fell_back("fallbacks", self.circuit_of(str(request.url)))
            found = fallback(refused)
            return await found if inspect.isawaitable(found) else found

    async def get_async(self, url: str, **kwargs: Any) -> Any:
        """As ``get``, with httpx."""
        return await self.request_async("GET", url, **kwargs)

    async def post_async(self, url: str, **kwargs: Any) -> Any:
        """As ``post``, with httpx."""
        return await self.request_async("POST", url, **kwargs)

    async def put_async(self, url: str, **kwargs: Any) -> Any:
        """As ``put``, with httpx."""
        return await self.request_async("PUT", url, **kwargs)

    async def patch_async(self, url: str, **kwargs: Any) -> Any:
        """As ``patch``, with httpx."""
        return await self.request_async("PATCH", url, **kwargs)

    async def delete_async(self, url: str, **kwargs: Any) -> Any:
        """As ``delete``, with httpx."""
        return await self.request_async("DELETE", url, **kwargs)

    async def head_async(self, url: str, **kwargs: Any) -> Any:
        """As ``head``, with httpx."""
        return await self.request_async("HEAD", url, **{"allow_redirects": False, **kwargs})

    async def options_async(self, url: str, **kwargs: Any) -> Any:
        """As ``options``, with httpx."""
        return await self.request_async("OPTIONS", url, **kwargs)

    # ------------------------------------------------------------------ what they have in common

    def _prepare(
        self, kwargs: dict[str, Any]
    ) -> tuple[Options, Callable[..., Any] | None, dict[str, Any]]:
        """What is ours among the arguments, and what is the library's."""
        if self._waiting is None and self.section.enable_request_queue:
            self._queue.care()  # something may wait since an earlier life of the process
        if not (kwargs or self.headers or self.auth):
            return Options(None, None, time.monotonic() + self.section.total_timeout), None, {}
        native = {name: value for name, value in kwargs.items() if name not in _OURS}
        own = kwargs.get
        if own("validate_request") is not None:
            check_request(kwargs["validate_request"], native.get("json"))
        total = own("total_timeout")
        total = self.section.total_timeout if total is None else total
        check_number("total_timeout", total, 0.001, 86_400.0)
        timeout = own("timeout")
        connect, read = timeout if isinstance(timeout, tuple) else (timeout, timeout)
        fallback = own("fallback")
        options = Options(
            connect, read, time.monotonic() + total, streamed=own("stream", False),
            retry=own("retry", True), queue=own("queue", False),
            default=own("default", MISSING), use_default=fallback is None,
            cache=own("cache", True), validate=own("validate"),
            expected=own("expected_statuses"), content_types=own("content_types", ()),
            max_size=own("max_response_size"), redirects=own("allow_redirects", True),
        )  # fmt: skip
        key = own("idempotency_key")
        if self.headers or key is not None:
            native["headers"] = {**self.headers, **(native.get("headers") or {})}
        if key is not None:
            native["headers"]["Idempotency-Key"] = key
        if self.auth is not None:
            native.setdefault("auth", self.auth)
        return options, fallback, native

    def _follow(self, request: Any, options: Options, auth: Any = None) -> Rules[Any]:
        """A request, and the redirects that it leads to; credentials stay with their host."""
        history: list[Any] = []
        while True:
            response = yield Act(_hop(request, options, auth))
            following = _next_of(response)
            if following is None or not options.redirects:
                response.history = history
                return response
            yield Act(drop_of(response))
            history.append(response)
            if len(history) > self.section.max_redirects:
                raise _too_many(request, self.section.max_redirects)
            if origin_of(str(following.url)) != origin_of(str(request.url)):
                auth = None
                for name in [n for n in following.headers if is_secret(n)]:
                    del following.headers[name]
            request = following

    def _async_session(self) -> Any:
        """The client of the running event loop."""
        from .http_httpx import Session

        loop = asyncio.get_running_loop()
        found = self._asyncs.get(loop)
        if found is None:
            found = self._asyncs[loop] = Session(self)
        return found

    # ------------------------------------------------------------------ health

    def _check_health(self) -> None:
        if self.section.health_check_url is None:
            self._main.check = None
        else:
            self._main.health_check(self._ask_for_health, self.section.health_check_interval)

    def _ask_for_health(self) -> None:
        section = self.section
        seconds = section.health_check_timeout
        end = time.monotonic() + seconds
        options = Options(
            connect=seconds, read=seconds, deadline=end, plain=True, cache=False, redirects=True,
            of_client=True,
        )  # fmt: skip
        headers = {"User-Agent": "distributed-breaker health check", **self.headers}
        url = self._url_of(section.health_check_url or "")
        request = requests.Request("GET", url, headers, auth=self.auth)
        try:
            prepared = self.session.prepare_request(request)
            response = self._hops._drive(self._follow(prepared, options))
            if response.status_code >= 400:
                raise BadStatus(f"the health check was answered {response.status_code}")
        except Exception as error:
            self._health_problem = type(error).__name__
            raise
        self._health_problem = ""

    # ------------------------------------------------------------------ what waits

    def replay(self) -> Replayed:
        """Send what waits, as far as the service takes it; done by itself."""
        return self._queue.replay()

    @property
    def outbox(self) -> Outbox:
        """Where requests wait."""
        return self._queue.outbox

    def _deliver(self, entry: Entry) -> None:
        try:
            method, url, headers, body = came_back(cast(dict[str, Any], entry.payload))
            request = requests.Request(
                method, url, {**self.headers, **headers}, data=body or None, auth=self.auth
            )
            prepared = self.session.prepare_request(request)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Parked(f"it is no request: {type(error).__name__}") from error
        end = time.monotonic() + self.section.total_timeout
        options = Options(deadline=end, plain=True, cache=False, redirects=False)
        try:
            response = self._hops.hop(prepared, options)
        except CircuitBreakerOpenException:
            raise
        except (requests.ConnectionError, requests.Timeout) as error:
            # The service is away, which is held against no request, however long it lasts.
            raise HttpOpenException(self._main.name, 0.0, "open", "shared", "it fails") from error
        status = response.status_code
        if self._outcome(status, None) is not Outcome.SUCCESS:
            if self._main.refusing:
                raise HttpOpenException(self._main.name, 0.0, "open", "shared", "it is limited")
            raise BadStatus(f"it was answered {status}")
        if status >= 400:
            raise Parked(f"it was answered {status}")
        self.counts.add("delivered")

    # ------------------------------------------------------------------ the rest

    def problems(self) -> list[str]:
        """What is wrong beside the circuit: the health check, single hosts, the queue."""
        found = super().problems()
        if self._health_problem:
            found.insert(0, f"the health check fails: {self._health_problem}")
        return found

    def close(self) -> None:
        """Let go of connections and files; what waits stays on disk."""
        super().close()
        self.session.close()

    async def aclose(self) -> None:
        """Let go of the running event loop's connections, before the loop ends."""
        found = self._asyncs.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found.client.aclose()

    def forked(self) -> None:
        """A child makes connections of its own."""
        super().forked()
        for adapter in self.session.adapters.values():
            if isinstance(adapter, CircuitBreakerAdapter):
                adapter.forget()
        self._asyncs = weakref.WeakKeyDictionary()


def _hop(request: Any, options: Options, auth: Any) -> Callable[[Any], Any]:
    return lambda wire: wire.hop(request, options, auth)


def _next_of(response: Any) -> Any:
    if isinstance(response, requests.Response):
        return response.next
    return response.next_request


def _too_many(request: Any, most: int) -> Exception:
    message = f"more than {most} redirects (max_redirects)"
    if isinstance(request, requests.PreparedRequest):
        return requests.TooManyRedirects(message, request=request)
    import httpx

    return httpx.TooManyRedirects(message, request=request)
