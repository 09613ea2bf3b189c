"""What the keys of the configuration file are made of: types with their bounds, and nothing else.

Every duration is in seconds.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field

from .address import address_of

DAY = 86_400.0


def _redis_url(url: str) -> str:
    address_of(url)
    return url


def _store_url(url: str) -> str:
    return url if url.startswith("memory://") else _redis_url(url)


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must begin with http:// or https:// and name a host")
    return url


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,39}", name):
        raise ValueError("a name has 1 to 40 letters, digits, _ and -, and begins with none of -")
    return name


def _importable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        raise ValueError("must be package.module:name")
    return name


Seconds = Annotated[float, Field(gt=0, le=DAY)]
Percent = Annotated[float, Field(gt=0, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]
Bytes = Annotated[int, Field(ge=1, le=2**40)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Status = Annotated[int, Field(ge=100, le=599)]
Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, Field(min_length=1, max_length=1_000)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
StoreUrl = Annotated[str, AfterValidator(_store_url)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
Importable = Annotated[str, AfterValidator(_importable)]


# A part of the file: unknown keys and wrong types are errors, and nothing is converted.
STRICT = ConfigDict(
    extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)
