"""One process of a fleet with a database: prints what came of each line that it is asked."""

from __future__ import annotations

import json
import sys
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from distributed_breaker.errors import CircuitBreakerOpenException
from distributed_breaker.services import Services


def main() -> None:
    services = Services(sys.argv[1], environ={})
    client: Any = services.client("database", "api")
    for circuit in client.circuits.values():
        circuit.call(int)  # it knows the fleet's state from here on
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        told: Any
        try:
            if line.startswith("read"):
                rows = client.execute_query("SELECT count(*) AS n FROM cats", read_only=True)
                told = {"n": rows[0]["n"], "stale": rows.stale}
            else:
                told = client.execute_query(line)
        except CircuitBreakerOpenException:
            told = "open"
        except SQLAlchemyError as error:
            told = type(error).__name__
        print(json.dumps(told), flush=True)
    services.close()


if __name__ == "__main__":
    main()
