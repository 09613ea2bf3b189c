"""A process of a fleet that prints, whenever a line comes, what it would export."""

from __future__ import annotations

import json
import sys

from distributed_breaker.monitoring.exposition import exposition, look
from distributed_breaker.services import Services


def main() -> None:
    services = Services(sys.argv[1], environ={})
    services.client("database", "api").breaker.call(int)  # it knows the fleet from here on
    services.registry.flush(10.0)
    print("ready", flush=True)
    for accept in map(str.strip, sys.stdin):
        kind, body = exposition(accept, look(services))
        print(json.dumps([kind, body.decode()]), flush=True)
    services.close()


if __name__ == "__main__":
    main()
