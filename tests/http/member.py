"""One process of a fleet that calls a service: prints what came of its calls, one a line asked."""

from __future__ import annotations

import sys

from distributed_breaker.errors import CircuitBreakerOpenException
from distributed_breaker.services import Services


def main() -> None:
    services = Services(sys.argv[1], environ={})
    client = services.client("http", "api")
    client.breaker.call(int)  # it knows the fleet's state from here on
    print("ready", flush=True)
    for path in map(str.strip, sys.stdin):
        try:
            told = str(client.get(path).status_code)  # type: ignore[attr-defined]
        except CircuitBreakerOpenException as refused:
            told = f"open {refused.retry_after:.0f}"
        print(told, flush=True)
    services.close()


if __name__ == "__main__":
    main()
