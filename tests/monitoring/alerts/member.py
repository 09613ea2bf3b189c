"""One process of a fleet with alerts: ``python -m tests.monitoring.alerts.member <file>``.

It does what it is told, a word a line, and answers each with a line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import circuit_breaker_config as guide
from distributed_breaker.services import current


def _fail() -> None:
    raise ConnectionError("no answer")


def main() -> None:
    guide.initialize_circuit_breakers(Path(sys.argv[1]))
    breaker = guide.get_http_circuit_breaker("api").breaker
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "fail":
            with contextlib.suppress(Exception):
                breaker.call(_fail)
        elif word == "reset":
            breaker.reset()
        elif word == "flush":
            current().registry.flush()
        elif word == "fork":
            child = os.fork()
            if not child:
                signal.pause()
            print(child, flush=True)
            continue
        print(breaker.state.value, flush=True)


if __name__ == "__main__":
    main()
