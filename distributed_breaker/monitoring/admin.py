"""Who may step in over HTTP, how often, and what is kept of it."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..fleet import Done, Fleet
from .source import Alone, operate
from .view import View

TRIES, TRIES_IN = 10, 60.0  # wrong tokens that one address may give, and in how many s
STEPS, STEPS_IN = 60, 60.0  # requests that are carried out, and in how many s
ADDRESSES = 1_024  # of which wrong tries are remembered
SHORT = 16  # characters below which a token can be guessed
LONGEST_TTL = 31_536_000.0  # s
TEXTS = {"actor": 60, "reason": 200}  # characters that the store keeps
KEYS = ("circuit", "service", "reason", "actor", "ttl")

log = logging.getLogger("distributed_breaker.audit")


class RefusedError(Exception):
    """The request is not carried out.

    Attributes:
        status: HTTP's.
        wait: seconds after which it may be made again; 0.0: that would not help.
    """

    def __init__(self, status: int, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.wait = wait


class Limit:
    """At most so many in so many seconds: a bucket for each key, which fills up evenly."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count = count
        self._each = seconds / count
        self._free_at: OrderedDict[str, float] = OrderedDict()  # when the bucket is full again

    def wait(self, key: str) -> float:
        """Seconds until one more is allowed; 0.0: now."""
        ahead = self._free_at.get(key, 0.0) - time.monotonic()
        return max(0.0, ahead - (self._count - 1) * self._each)

    def take(self, key: str) -> None:
        """Count one."""
        now = time.monotonic()
        self._free_at[key] = max(now, self._free_at.pop(key, now)) + self._each
        while len(self._free_at) > ADDRESSES:
            self._free_at.popitem(last=False)


class Order(NamedTuple):
    """What somebody wants done, checked."""

    action: str
    circuits: Sequence[str]
    actor: str
    reason: str
    ttl: float | None


class Admin:
    """Checks who asks, carries out what they may, and writes down who did what and why.

    Args:
        token: what they must give; None or empty: nobody may do anything.
    """

    def __init__(self, token: str | None) -> None:
        self._digest = hashlib.sha256(token.encode()).digest() if token else None
        self._wrong = Limit(TRIES, TRIES_IN)
        self._steps = Limit(STEPS, STEPS_IN)
        if token and len(token) < SHORT:
            log.warning("the admin token is shorter than %d characters, and can be guessed", SHORT)

    @property
    def configured(self) -> bool:
        """Whether there is a token at all."""
        return self._digest is not None

    def check(self, authorization: str, address: str) -> None:
        """Raise RefusedError unless the header ``Authorization`` gives the token.

        An address that has given too many wrong ones must wait, even with the right one: else it
        could go on guessing.
        """
        if self._digest is None:
            raise RefusedError(
                403, "nobody may step in here: set CIRCUIT_BREAKER_ADMIN_TOKEN where this runs"
            )
        wait = self._wrong.wait(address)
        if wait:
            raise RefusedError(429, "too many wrong tokens from this address", wait)
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        if not hmac.compare_digest(digest, self._digest) or scheme.lower() != "bearer":
            self._wrong.take(address)
            log.warning("a wrong admin token from %s", address)
            raise RefusedError(
                401, "give the admin token, as the header 'Authorization: Bearer <token>'"
            )

    def carry_out(self, order: Order, view: View, fleet: Fleet | Alone, address: str) -> list[Done]:
        """Do it, and write it down.

        Raises:
            RefusedError: too much was done of late.
            StoreUnavailable: the store can't be asked.
        """
        wait = self._steps.wait("")
        if wait:
            raise RefusedError(429, "too many steps in the last minute", wait)
        self._steps.take("")
        policies = {
            name: view.configured[name].policy if name in view.configured else None
            for name in order.circuits
        }
        said: dict[str, Any] = {"actor": order.actor, "reason": order.reason}
        if order.ttl is not None:
            said["ttl"] = order.ttl
        about = {"action": order.action, **said, "address": address}
        try:
            done = operate(fleet, order.action, policies, **said)
        except Exception as error:
            self._note("failed", {**about, "circuits": list(policies), "error": str(error)})
            raise
        self._note("done", {**about, "circuits": [one._asdict() for one in done]})
        return done

    def _note(self, what: str, about: Mapping[str, Any]) -> None:
        # As JSON, so that no text that somebody gave can look like another line of the log.
        log.warning("admin action %s: %s", what, json.dumps(about), extra={"admin_action": about})


def order_of(action: str, body: bytes, view: View, address: str) -> Order:
    """Read what is wanted.

    Raises:
        RefusedError: it is not clear, or there is no such circuit.
    """
    asked = _object(body)
    forced = action.startswith("force")
    unknown = [key for key in asked if key not in KEYS or (key == "ttl" and not forced)]
    if unknown:
        known = ", ".join(KEYS if forced else KEYS[:-1])
        raise RefusedError(400, f"{unknown[0][:40]!r} is not a key of {action}: give {known}")
    texts = {key: _text(asked, key) for key in ("circuit", "service", "reason", "actor")}
    if bool(texts["circuit"]) == bool(texts["service"]):
        raise RefusedError(400, "give 'circuit' or 'service', one of them: the name of what to do")
    if forced and not texts["reason"].strip():
        raise RefusedError(400, f"{action} needs a 'reason', which the history keeps")
    return Order(
        action,
        _chosen(texts["circuit"], texts["service"], view),
        texts["actor"].strip()[: TEXTS["actor"]] or f"http@{address}",
        texts["reason"].strip()[: TEXTS["reason"]],
        _ttl(asked.get("ttl")),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise RefusedError(400, 'the body must be a JSON object, such as {"circuit": "a.cache"}')
    return asked


def _text(asked: Mapping[str, Any], key: str) -> str:
    value = asked.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RefusedError(400, f"{key!r} must be a text")
    return value


def _ttl(value: Any) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0.001 <= value <= LONGEST_TTL:
        raise RefusedError(400, f"'ttl' must be seconds between 0.001 and {LONGEST_TTL:.0f}")
    return float(value)


def _chosen(circuit: str, service: str, view: View) -> list[str]:
    known = {*view.snapshots, *view.configured}
    if circuit:
        if circuit not in known:
            raise RefusedError(404, f"there is no circuit {circuit[:128]!r}")
        return [circuit]
    # The dot keeps web_app_v2 apart from web_app.
    found = sorted(n for n in known if n == service or n.startswith(f"{service}."))
    if not found:
        raise RefusedError(404, f"no circuit belongs to a service {service[:128]!r}")
    return found
