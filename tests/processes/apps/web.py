"""Web applications: each path is a command, and its query the options."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from tests.processes.apps.usage import carry_out, use_before_forks

if "PRELOADED" in os.environ:
    use_before_forks()


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    options = dict(parse_qsl(environ["QUERY_STRING"]))
    body = json.dumps(carry_out(environ["PATH_INFO"].strip("/"), options)).encode()
    start_response("200 OK", [("Content-Type", "application/json"),
                              ("Content-Length", str(len(body)))])  # fmt: skip
    return [body]
