"""How an alert reaches people: a webhook, Slack, the log, a program."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ..alert_keys import VARIABLE, Channel

LEVELS = {"critical": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}
COLOURS = {"critical": "#d92d20", "warning": "#f79009", "info": "#2e90fa", "resolved": "#12b76a"}
# The fields of an alert that a command finds in its environment, too.
VARIABLES = "id kind event severity circuit service environment namespace state incident".split()
MOST_TEXT = 2_000  # characters of a title or text

log = logging.getLogger("distributed_breaker.alerts")

Document = Mapping[str, Any]
Send = Callable[[Document], None]


class DeliveryError(Exception):
    """An alert did not reach its channel.  The message names neither URL nor headers."""


class ChannelError(ValueError):
    """A channel can't be used as it is configured here."""


def sender(name: str, channel: Channel, environ: Mapping[str, str] | None = None) -> Send:
    """What sends an alert to a channel, or raises DeliveryError.

    Args:
        name: the channel's.
        channel: what the configuration says.
        environ: the variables that ``${NAME}`` stands for; None: the process's.

    Raises:
        ChannelError: a variable is not set, or makes no URL.
    """
    variables = os.environ if environ is None else environ
    place = f"settings.alerts.channels.{name}"
    if channel.type == "log":
        return _write
    if channel.type == "command":
        assert channel.command is not None
        return _Command(channel.command, channel.timeout)
    assert channel.url is not None
    url = _filled(channel.url, f"{place}.url", variables)
    headers = {
        key: _filled(value, f"{place}.headers.{key}", variables)
        for key, value in channel.headers.items()
    }
    return _Post(_target(url, place), headers, channel.timeout, _SHAPES[channel.type])


def _filled(text: str, place: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        found = variables.get(match[1], "")
        if not found:
            raise ChannelError(f"{place}: the variable {match[1]} is not set: set it, or write "
                               f"the value itself")  # fmt: skip
        return found

    return VARIABLE.sub(value, text)


def _target(url: str, place: str) -> SplitResult:
    message = f"{place}.url: the variables in it make no URL that begins with http:// or https://"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and parts.username is None  # see headers
    except ValueError:
        raise ChannelError(message) from None
    if not usable or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise ChannelError(message)
    return parts


# ---------------------------------------------------------------------------- the log


def _write(alert: Document) -> None:
    level = logging.INFO if alert["event"] == "resolved" else LEVELS[alert["severity"]]
    fields = {name: alert[name] for name in (*VARIABLES[1:], "title")}
    log.log(level, "%s: %s", alert["title"], alert["text"], extra=fields)


# ---------------------------------------------------------------------------- POSTs


def _generic(alert: Document) -> Document:
    return alert


def _slack(alert: Document) -> Document:
    """Slack's incoming webhook, which Mattermost, Rocket.Chat and Discord's /slack take as well."""
    colour = COLOURS["resolved" if alert["event"] == "resolved" else alert["severity"]]
    title, text = _slack_text(alert["title"]), _slack_text(alert["text"])
    attachment = {"color": colour, "text": text, "fallback": text, "ts": round(alert["sent_at"])}
    return {"text": f"*{title}*", "attachments": [attachment]}


def _slack_text(text: str) -> str:
    """Slack reads commands between < and >."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_SHAPES: dict[str, Callable[[Document], Document]] = {"webhook": _generic, "slack": _slack}


class _Post:
    """A JSON POST on a connection of its own; redirects are not followed.

    Args:
        url: where to.
        headers: more of them.
        timeout: seconds for all of it, but for the look-up of the host, which the system bounds.
        shape: what is sent of an alert.
    """

    def __init__(
        self,
        url: SplitResult,
        headers: Mapping[str, str],
        timeout: float,
        shape: Callable[[Document], Document],
    ) -> None:
        self._url = url
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": "distributed-breaker",
            **headers,
        }
        self._timeout = timeout
        self._shape = shape

    def __call__(self, alert: Document) -> None:
        body = json.dumps(self._shape(alert), ensure_ascii=False).encode(errors="replace")
        target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        key = {"Idempotency-Key": alert["id"]}
        try:
            with self._connected() as connection:
                connection.request("POST", target, body, {**key, **self._headers})
                status = connection.getresponse().status
        except TimeoutError:
            raise DeliveryError(f"no answer within {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # An error's text may hold the path, which in Slack's URLs is the secret.
            said = getattr(error, "strerror", None) or type(error).__name__
            raise DeliveryError(f"cannot be reached: {said}") from None
        if not 200 <= status < 300:
            raise DeliveryError(f"answered {status}")

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        """A connection whose use as a whole is bounded: a receiver may send a byte at a time."""
        kinds: dict[str, type[http.client.HTTPConnection]] = {
            "http": http.client.HTTPConnection,
            "https": http.client.HTTPSConnection,
        }
        host = self._url.hostname or ""
        connection = kinds[self._url.scheme](host, self._url.port, timeout=self._timeout)
        late = threading.Event()

        def cut() -> None:
            late.set()
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            if late.is_set():
                raise TimeoutError
            yield connection
        except Exception:
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            connection.close()


# ---------------------------------------------------------------------------- programs


class _Command:
    """A program without a shell: the alert is JSON on its standard input, and in variables.

    It and what it has started are killed when the time is over.  What it prints is thrown away.
    """

    def __init__(self, command: list[str], timeout: float) -> None:
        self._command = command
        self._timeout = timeout

    def __call__(self, alert: Document) -> None:
        told = {f"CIRCUIT_BREAKER_ALERT_{k.upper()}": str(alert[k]) for k in (*VARIABLES, "title")}
        environment = os.environ | {name: text.replace("\0", "") for name, text in told.items()}
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or type(error).__name__
            raise DeliveryError(f"cannot be started: {said}") from None
        with process:
            try:
                process.communicate(json.dumps(alert).encode(), self._timeout)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise DeliveryError(f"has not ended within {self._timeout:g} s") from None
                raise
        if process.returncode != 0:
            raise DeliveryError(f"ended with {process.returncode}")
