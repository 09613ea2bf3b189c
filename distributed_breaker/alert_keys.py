"""The keys of ``settings.alerts``: their types, bounds and defaults, and nothing else."""

from __future__ import annotations

import re
from string import Template
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, model_validator

from .keys import DAY, STRICT, Name, Seconds, Share, Text

Kind = Literal[
    "open",
    "half_open",
    "forced_open",
    "forced_closed",
    "stuck_half_open",
    "fallback_share",
    "policy_mismatch",
    "store_lost",
]

# What templates may name, each a text; docs/alerts.md says what they are.
FIELDS = (
    "kind event severity circuit service environment namespace host state previous cause error "
    "value at duration number incident summary"
).split()

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
MOST = 32  # channels, and rules


def _template(text: str) -> str:
    template = Template(text)
    if not template.is_valid():
        raise ValueError("a $ begins no field: write $name or ${name}, and $$ for the sign itself")
    unknown = [name for name in template.get_identifiers() if name not in FIELDS]
    if unknown:
        raise ValueError(f"has no field ${unknown[0]}: there are {', '.join(FIELDS)}")
    return text


def _url(url: str) -> str:
    """It may be that of a variable as a whole, or hold variables."""
    parts = urlsplit(VARIABLE.sub("https://host", url, count=1) if url[:2] == "${" else url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https:// and name a host, or be ${VARIABLE}")
    if parts.username is not None:
        raise ValueError("holds a user: write an Authorization header instead")
    return url


Words = Annotated[str, Field(min_length=1, max_length=2_000), AfterValidator(_template)]
Url = Annotated[str, Field(max_length=2_000), AfterValidator(_url)]
Header = Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}$")]
HeaderValue = Annotated[str, Field(pattern=r"^[\x20-\x7e]{0,2000}$")]


class _Part(BaseModel):
    model_config = STRICT


class Channel(_Part):
    """One way in which people are told."""

    type: Literal["webhook", "slack", "log", "command"]
    """What it is: a JSON POST, a POST that Slack understands, a line in the log, or a program."""
    url: Url | None = Field(default=None, repr=False)
    """Of webhook and slack; ${NAME} stands for a variable of the environment."""
    headers: dict[Header, HeaderValue] = Field(default={}, repr=False, max_length=20)
    """More headers of webhook and slack; ${NAME} as above."""
    command: list[Text] | None = Field(default=None, min_length=1, max_length=64)
    """Of command: a program and its arguments, given the alert as JSON on standard input."""
    timeout: float = Field(default=5.0, gt=0, le=30)
    """Seconds that a delivery may take."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        posts = self.type in ("webhook", "slack")
        if posts and self.url is None:
            raise ValueError(f"a channel of type {self.type} needs a url")
        if not posts and (self.url is not None or self.headers):
            raise ValueError(f"a channel of type {self.type} has no url and no headers")
        if (self.type == "command") is (self.command is None):
            has = "needs a" if self.command is None else "has no"
            raise ValueError(f"a channel of type {self.type} {has} command")
        return self


class Rule(_Part):
    """Which alerts go to which channels."""

    on: list[Kind] = [
        "open",
        "forced_open",
        "forced_closed",
        "stuck_half_open",
        "fallback_share",
        "policy_mismatch",
        "store_lost",
    ]
    """Which kinds of alerts."""
    circuits: list[Text] = ["*"]
    """Names of circuits, in which * stands for anything."""
    channels: list[Name] | None = None
    """Where they go; null: to all."""
    recovery: bool = True
    """Whether it is told as well when it is over."""
    limit: int = Field(default=10, ge=1, le=1_000)
    """How many of them each channel gets within ``per``; the rest comes as one digest."""
    per: Seconds = 300.0
    """Seconds."""
    title: Words | None = None
    """The alert's first line, with $fields; null: the kind's own."""
    text: Words | None = None
    """What follows, with $fields; null: the kind's own."""


class Alerts(_Part):
    """Who is told when something is wrong."""

    channels: dict[Name, Channel] = Field(default={}, max_length=MOST)
    """By a name of your choice; without any there are no alerts."""
    rules: dict[Name, Rule] = Field(default={"all": Rule()}, max_length=MOST)
    """By a name of your choice; an alert that several rules want goes out once for each."""
    evaluate_every: float = Field(default=5.0, ge=0.1, le=60)
    """Seconds between looks at the fleet's circuits, which one process of the fleet makes."""
    store_lost_after: float = Field(default=10.0, ge=0, le=DAY)
    """Seconds without the store that are told."""
    stuck_half_open_after: Seconds = 300.0
    """Seconds in half_open that are told."""
    mismatch_after: float = Field(default=120.0, ge=0, le=DAY)
    """Seconds for which processes go by another policy than the fleet's that are told."""
    fallback_share: Share = 0.5
    """Share of a minute's requests that fallbacks answered which is told."""
    fallback_minimum: int = Field(default=20, ge=1, le=1_000_000)
    """Requests in a minute below which that is not looked at."""
    expire_after: Seconds = 3_600.0
    """Seconds after which an alert that could not be delivered is dropped."""
    outbox_path: Text | None = None
    """The file in which alerts wait for their channels; unset: one of this user's."""

    @model_validator(mode="after")
    def _rules_name_channels(self) -> Self:
        for name, rule in self.rules.items():
            for channel in rule.channels or ():
                if channel not in self.channels:
                    known = ", ".join(self.channels) or "none"
                    raise ValueError(
                        f"rules.{name}.channels names {channel!r}, which is no channel: "
                        f"there are {known}"
                    )
        return self
