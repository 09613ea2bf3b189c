"""What an answer says of a service, and whether it is one that the caller can use.

Nothing here knows requests or httpx: their requests and responses have the few attributes that are
needed under the same names.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Collection, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from json import dumps
from typing import Any
from urllib.parse import urlsplit

from ..policy import Outcome

# Of the statuses from 400 to 499, which are the caller's own mistake, these are not.
NOT_THE_CALLERS = frozenset({408, 425, 429})
# With Retry-After these close the door to the whole fleet for a while.
RATE_LIMITED = frozenset({429, 503})
LONGEST_WAIT = 86_400.0  # s; a Retry-After beyond it is cut

Judge = Callable[[int], Outcome | None]

_SECRET = re.compile(
    r"auth|cookie|token|secret|passw|credential|session|signature|api-?key|apikey|access-?key",
    re.IGNORECASE,
)


class InvalidAnswer(Exception):
    """An answer that the caller cannot use; it counts as a failure of the service.

    Attributes:
        response: the library's own response.
    """

    response: Any = None


class InvalidRequest(ValueError):
    """A request that its own validation refused.  It was not sent, and counts as nothing."""


class PrivateHost(ValueError):
    """A request to a host that is not a public one, where the section refuses these."""


def outcome_of(status: int, expected: Collection[int] | None = None) -> Outcome:
    """Which outcome an answer is.

    Args:
        status: its status.
        expected: the statuses of valid answers; None: all below 400.
    """
    if expected is not None and status in expected:
        return Outcome.SUCCESS
    if 400 <= status < 500 and status not in NOT_THE_CALLERS:
        # The service has answered, and what it says is about the request: it is well.
        return Outcome.SUCCESS
    if status >= 400:
        return Outcome.FAILURE
    if expected is None or 300 <= status < 400:
        return Outcome.SUCCESS
    return Outcome.FAILURE


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds for which a service asks to be left alone; None: it does not say.

    Args:
        headers: of an answer, by lower-case names.
    """
    text = headers.get("retry-after")
    if text is None:
        return None
    text = text.strip()
    if text.isdigit():
        seconds = float(text[:12])
    else:
        try:
            at = parsedate_to_datetime(text).timestamp()
            # By the service's own clock, if it tells it.
            now = headers.get("date")
            seconds = at - (parsedate_to_datetime(now).timestamp() if now else time.time())
        except (TypeError, ValueError, OverflowError):
            return None
    return min(seconds, LONGEST_WAIT) if seconds > 0 else None


# ---------------------------------------------------------------------------- validation


def check_answer(
    response: Any, validate: Any, *, json: bool, content_types: Collection[str] = ()
) -> str:
    """What is wrong with an answer, in words; empty: nothing.

    Args:
        response: whose body has been read.
        validate: a JSON Schema, a pydantic model, or a function of the response that raises, or
            returns False, when it is not valid; None: nothing of that.
        json: whether the body must be JSON.
        content_types: what it may be, such as ``application/json``; none: anything.
    """
    if content_types:
        found = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if found not in content_types:
            return f"its content type is {found or 'not given'}, not {', '.join(content_types)}"
    if validate is None and not json:
        return ""
    if response.status_code == 204 or not 200 <= response.status_code < 300:
        return ""  # what has no content, or tells of an error, is not what was asked for
    if validate is None or not _is_function(validate):
        try:
            value = response.json()
        except (ValueError, RecursionError):
            return "it is not JSON"
        return "" if validate is None else _fault(validate, value)
    return _fault(validate, response)


def check_request(validate: Any, value: Any) -> None:
    """Validate what is to be sent, in the same three ways.

    Raises:
        InvalidRequest: it is not valid.
    """
    fault = _fault(validate, value)
    if fault:
        raise InvalidRequest(f"the request is not valid: {fault}")


def _is_function(validate: Any) -> bool:
    return callable(validate) and not inspect.isclass(validate)


def _fault(validate: Any, value: Any) -> str:
    if isinstance(validate, Mapping):
        error = next(_schema(dumps(validate, sort_keys=True)).iter_errors(value), None)
        if error is None:
            return ""
        # Not the schema's own words: they have the value in them, which may be a person's.
        return f"{error.json_path} is against {error.validator!r} of the JSON Schema"
    if hasattr(validate, "model_validate"):
        from pydantic import ValidationError

        try:
            validate.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            return f"{'.'.join(map(str, first['loc'])) or 'the value'}: {first['msg']}"
        return ""
    if not _is_function(validate):
        raise TypeError(
            f"{validate!r} validates nothing: give a JSON Schema as a mapping, a pydantic model, "
            f"or a function"
        )
    try:
        verdict = validate(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "its validation says no" if verdict is False else ""


@lru_cache(64)
def _schema(text: str) -> Any:
    from json import loads

    try:
        from jsonschema.validators import validator_for
    except ImportError:
        raise ImportError(
            "a JSON Schema needs the package jsonschema: install distributed-breaker[jsonschema]"
        ) from None
    schema = loads(text)
    kind = validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


# ---------------------------------------------------------------------------- what leaks nothing


@lru_cache(1_000)
def is_secret(header: str) -> bool:
    """Whether a header carries what another host must not get."""
    return _SECRET.search(header) is not None


_AUTHORITY = re.compile(r"[^/?#]*//[^/?#]*")


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port."""
    found = _AUTHORITY.match(url)
    return _origin_of(url if found is None else found[0])


@lru_cache(1_000)
def _origin_of(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


def shown(url: str) -> str:
    """A URL for logs and messages: without user, password, query and fragment."""
    scheme, host, port = origin_of(url)
    return f"{scheme}://{host}:{port}{urlsplit(url).path}"
