"""One process of a fleet that shares a cache: writes what it has counted, and reads it back.

It prints a line for each thing that its parent waits for, and at the end what it has written last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import redis

from distributed_breaker.services import Services


def main() -> None:
    file, name = Path(sys.argv[1]), sys.argv[2]
    stop, down = Path(sys.argv[3]), Path(sys.argv[4])
    services = Services(file, environ={})
    client = services.client("cache", "api")
    counts = {"rounds": 0, "wrong": 0, "raised": 0}
    written: dict[str, int] = {}
    added = 0
    print("ready", flush=True)
    while not stop.exists():
        counts["rounds"] += 1
        is_down = down.exists()
        for key in (f"{name}.a", f"{name}.b"):
            try:
                client.set(key, counts["rounds"])  # type: ignore[attr-defined]
                written[key] = counts["rounds"]
                # What this process has written is never seen older.
                seen = client.get(key)  # type: ignore[attr-defined]
                counts["wrong"] += seen != written[key]
                if is_down:
                    down.with_suffix(f".{name}").touch()
            except redis.RedisError:
                counts["raised"] += 1
        try:
            client.increment("total")  # type: ignore[attr-defined]
            added += 1
        except redis.RedisError:
            counts["raised"] += 1
    services.close()
    print(json.dumps({"written": written, "added": added, **counts}), flush=True)


if __name__ == "__main__":
    main()
