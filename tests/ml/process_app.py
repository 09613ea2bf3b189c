"""An application whose model runs in another process: does what its standard input says.

One line each: JSON in, JSON out.  It needs no torch itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from distributed_breaker.clients.ml_process import ModelSpec, ProcessEngine


def child(engine: ProcessEngine) -> Any:
    """What a forked child is answered."""
    here, there = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            answer = engine.run({"do": "pid"}, 20.0) if engine.wait_ready(60) else engine.problem
            os.write(there, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(there)
    with open(here) as answers:
        answer = json.loads(answers.read() or "null")
    os.waitpid(pid, 0)
    return answer


def main(path: str, shared: str) -> None:
    engine = ProcessEngine(
        ModelSpec(path, "cpu", "tests.ml.process_models:Net"), shared=shared == "shared"
    )
    for line in sys.stdin:
        command, *given = json.loads(line)
        answer: Any = None
        if command == "run":
            answer = engine.run(*given) if engine.wait_ready(60) else engine.problem
        elif command == "begin":
            engine.wait_ready(60)
            threading.Thread(target=engine.run, args=given, daemon=True).start()
        elif command == "pid":
            answer = engine.stats()["pid"]
        elif command == "fork":
            answer = child(engine)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
