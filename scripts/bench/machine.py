"""What a run ran on."""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
import time
from contextlib import closing
from pathlib import Path

from scripts.servers import Server

from .subjects import version


def describe(kind: str) -> dict[str, str]:
    """The machine, the interpreter and the server, in a few words each."""
    cores = len(os.sched_getaffinity(0))
    optimised = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
    build = "" if optimised else ", built without optimizations"
    parser = (
        f"hiredis {version('hiredis')}" if importlib.util.find_spec("hiredis") else "no hiredis"
    )
    return {
        "machine": f"{cores} cores of {_cpu()}",
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}{build}",
        "server": f"{_server(kind)} on a unix socket of the same machine",
        "client": f"redis-py {version('redis')}, {parser}",
        "date": time.strftime("%Y-%m-%d"),
        "load": f"load {os.getloadavg()[0]:.2f} at the start",
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _server(kind: str) -> str:
    with Server.start(kind) as server, closing(server.client(decode_responses=True)) as client:
        info = client.info("server")
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"
