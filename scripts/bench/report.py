"""What the benchmarks print: the machine, and tables of figures beside their targets."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from scripts.servers import Server

MISSING = "–"
WIDTH = 46  # of the first column


@dataclass(frozen=True)
class Setting:
    """How to measure: which server, and whether a rough answer in seconds is enough."""

    server: str
    quick: bool


@dataclass(frozen=True)
class Row:
    """One line of a table; ``figures`` stand under the table's columns."""

    name: str
    figures: tuple[str, ...]
    target: str = ""
    note: str = ""


@dataclass
class Table:
    """The figures of one topic."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what was left out, and why

    def text(self) -> str:
        lines = [self.title, _line("", self.columns, "target", "")]
        lines += [_line(r.name, r.figures, r.target, r.note) for r in self.rows]
        lines += [f"  ({remark})" for remark in self.remarks]
        return "\n".join(lines)


def _line(name: str, figures: Sequence[str], target: str, note: str) -> str:
    columns = "".join(f"{figure:>10}" for figure in figures)
    return f"  {name:<{WIDTH}}{columns}   {target:<19}{note}".rstrip()


def describe(setting: Setting) -> str:
    """The machine, the interpreter and the server, in a few lines."""
    load = os.getloadavg()[0]
    optimised = "--enable-optimizations" in str(sysconfig.get_config_var("CONFIG_ARGS"))
    build = "optimised build" if optimised else "build without --enable-optimizations"
    parser = "hiredis" if importlib.util.find_spec("hiredis") else "no hiredis"
    return "\n".join(
        [
            f"machine  {_cpu()}, {len(os.sched_getaffinity(0))} cores, load {load:.2f}",
            f"python   {platform.python_implementation()} {platform.python_version()}, {build}",
            f"server   {_server(setting.server)} on a unix socket; redis-py {version('redis')}, "
            f"{parser}",
        ]
    )


def version(package: str) -> str:
    """The installed version of a package, or a dash."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


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
