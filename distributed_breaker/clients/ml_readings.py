"""How much of the host, of its container and of its GPUs is in use: one look at a time.

Where a container allows less than the host has, the container's share counts: of its quota of the
processors, and of its memory without the files that are only cached in it.  Nothing is imported for
a look but psutil; PyTorch is asked if it is in use already, and NVML only about a model on a GPU.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

AVERAGED = 5  # looks over which the use of the processors is averaged; one model is a short peak


class Limits(NamedTuple):
    """Percent beyond which calls are put off; None: however much."""

    cpu: float | None = None
    memory: float | None = None
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Usage:
    """What is in use.

    Attributes:
        cpu: percent of the processors that this process may use.
        memory: percent of the memory, of the host or the container, whichever is closer to its end.
        gpu_memory: percent of the memory of the GPU that has the least left among those in use.
        rss: bytes of this process that are in memory.
        at: monotonic seconds.
        problems: why something is unknown (None), in sentences.
    """

    cpu: float | None = None
    memory: float | None = None
    gpu_memory: float | None = None
    rss: int | None = None
    at: float = 0.0
    problems: tuple[str, ...] = ()

    def over(self, limits: Limits) -> str | None:
        """What is beyond its limit, in words; what is unknown never is."""
        for what, used, most, key in (
            ("the processors", self.cpu, limits.cpu, "max_cpu_usage"),
            ("the memory", self.memory, limits.memory, "max_memory_usage"),
            ("the GPU's memory", self.gpu_memory, limits.gpu_memory, "max_gpu_memory_usage"),
        ):
            if used is not None and most is not None and used > most:
                return f"{used:.1f} % of {what} is in use, and {key} is {most:g} %"
        return None


class Readings:
    """Looks at what is in use.

    Args:
        root: where /proc and /sys are.
        clock: monotonic seconds.
        psutil: its module, or another one with the same functions; None: it is imported.
        nvml: the same of pynvml.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "/",
        clock: Callable[[], float] = time.monotonic,
        psutil: Any = None,
        nvml: Any = None,
    ) -> None:
        self._cgroups = _Cgroups(Path(root))
        self._clock = clock
        self._psutil = psutil
        self._nvml = nvml
        self._rates: dict[object, _Rate] = {}

    def look(self, devices: Collection[str] = ()) -> Usage:
        """What is in use now; it never raises.

        Args:
            devices: where models are, as PyTorch names them.
        """
        problems: list[str] = []

        def tried(what: str, read: Callable[[], Any]) -> Any:
            try:
                return read()
            except Exception as error:
                problems.append(f"{what}: {str(error) or type(error).__name__}")
                return None

        host = tried("the host is not watched", self._host) or (None, None, None)
        cpu = tried("the container's processors are not watched", self._container_cpu)
        memory = tried("the container's memory is not watched", self._cgroups.memory)
        gpus = [one for one in devices if one.startswith("cuda")]
        gpu = tried("the GPU is not watched", lambda: self._gpu_memory(gpus)) if gpus else None
        return Usage(
            _higher(host[0], cpu), _higher(host[1], memory), gpu, host[2],
            self._clock(), tuple(problems),
        )  # fmt: skip

    def _host(self) -> tuple[float | None, float, int]:
        if self._psutil is None:
            try:
                self._psutil = importlib.import_module("psutil")
            except ImportError:
                raise RuntimeError("pip install psutil") from None
        psutil = self._psutil
        allowed = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        times = [
            one
            for number, one in enumerate(psutil.cpu_times(percpu=True))
            if allowed is None or number in allowed
        ]
        busy = sum(map(_busy, times))
        cpu = self._percent((allowed, len(times)), busy, len(times))
        return cpu, psutil.virtual_memory().percent, psutil.Process().memory_info().rss

    def _container_cpu(self) -> float | None:
        shares = [self._percent(*each) for each in self._cgroups.processors()]
        return _higher(*shares)

    def _percent(self, key: object, used: float, most: float) -> float | None:
        """Percent of so many processors, whose time in use (s) has only ever grown."""
        rate = self._rates.setdefault(key, _Rate()).of(used, self._clock())
        return None if rate is None or most <= 0 else min(100.0, max(0.0, 100.0 * rate / most))

    def _gpu_memory(self, gpus: list[str]) -> float | None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return max(_with_torch(torch.cuda, gpu) for gpu in gpus)
        # This process uses none; one that works for it may.
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError:
                raise RuntimeError("pip install nvidia-ml-py") from None
        self._nvml.nvmlInit()
        try:
            return max(_with_nvml(self._nvml, gpu) for gpu in gpus)
        finally:
            self._nvml.nvmlShutdown()


def _higher(*shares: float | None) -> float | None:
    return max((one for one in shares if one is not None), default=None)


def _busy(times: Any) -> float:
    """Seconds in which a processor was not idle; what guests use is in "user" as well."""
    idle = times.idle + sum(getattr(times, each, 0.0) for each in ("iowait", "guest", "guest_nice"))
    return float(sum(times) - idle)


class _Rate:
    """How fast a counter has grown over the last looks."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=AVERAGED + 1)

    def of(self, value: float, now: float) -> float | None:
        self._seen.append((value, now))
        before, then = self._seen[0]
        return (value - before) / (now - then) if now > then else None


def _with_torch(cuda: Any, gpu: str) -> float:
    free, total = cuda.mem_get_info(gpu)
    # What PyTorch has set aside and does not use is there for the next prediction.
    free += cuda.memory_reserved(gpu) - cuda.memory_allocated(gpu)
    return float(100.0 * (total - free) / total)


def _with_nvml(nvml: Any, gpu: str) -> float:
    number = gpu.partition(":")[2] or "0"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        number = visible.split(",")[int(number)].strip()
    if number.isdigit():
        handle = nvml.nvmlDeviceGetHandleByIndex(int(number))
    else:
        handle = nvml.nvmlDeviceGetHandleByUUID(number)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return float(100.0 * memory.used / memory.total)


# ---------------------------------------------------------------------------- control groups


class _Cgroups:
    """What Linux allows this process's control groups, of version 1 or 2.

    A limit may have been set on any group above its own, so all that can be seen are looked at.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def memory(self) -> float | None:
        """Percent of the allowed memory that is in use; None: there is no limit."""
        shares = []
        for folder, first in self._folders("memory"):
            limit = _number(folder / ("memory.limit_in_bytes" if first else "memory.max"))
            used = _number(folder / ("memory.usage_in_bytes" if first else "memory.current"))
            if limit and used is not None:
                cached = _entry(folder / "memory.stat", "total_inactive_file" if first
                                else "inactive_file")  # fmt: skip
                shares.append(min(100.0, 100.0 * max(0.0, used - cached) / limit))
        return max(shares, default=None)

    def processors(self) -> Iterator[tuple[str, float, float]]:
        """For each quota: its name, seconds that were used so far, and how many processors' worth
        may be used at once."""
        for folder, first in self._folders("cpu"):
            if first:
                quota = _number(folder / "cpu.cfs_quota_us")
                period = _number(folder / "cpu.cfs_period_us")
            else:
                quota, period = _numbers(folder / "cpu.max")
            used = self._used(folder, first)
            if quota and quota > 0 and period and used is not None:
                yield str(folder), used, quota / period

    def _used(self, folder: Path, first: bool) -> float | None:
        if not first:
            return _entry(folder / "cpu.stat", "usage_usec") / 1e6
        # The times are counted by another controller, for the same group.
        inside = folder.relative_to(self._root / "sys/fs/cgroup/cpu")
        nanoseconds = _number(self._root / "sys/fs/cgroup/cpuacct" / inside / "cpuacct.usage")
        return None if nanoseconds is None else nanoseconds / 1e9

    def _folders(self, controller: str) -> Iterator[tuple[Path, bool]]:
        """The group's folder and those above it, and whether they are of version 1."""
        base, inside, first = self._root / "sys/fs/cgroup", "/", False
        for line in (_text(self._root / "proc/self/cgroup") or "").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controller in controllers.split(","):
                inside, first = path, True
                break
            if not controllers:
                inside = path
        if first:
            base = base / controller
        folder = base / inside.strip("/")
        # A container may see its own group as the root, and be told its path on the host.
        while True:
            yield folder, first
            if folder == base or base not in folder.parents:
                return
            folder = folder.parent


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> tuple[float | None, float | None]:
    """The two of a line such as ``100000 max``; None instead of a word."""
    words = [*(_text(path) or "").split()[:2], "", ""]
    first, second = (float(one) if one.lstrip("-").isdigit() else None for one in words[:2])
    return first, second


def _number(path: Path) -> float | None:
    return _numbers(path)[0]


def _entry(path: Path, name: str) -> float:
    """The number behind a name in a file of names and numbers; 0 if it is not there."""
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return float(value)
    return 0.0
