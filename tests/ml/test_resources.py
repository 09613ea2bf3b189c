"""What is in use: of the host, of containers that never were, and of GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_breaker.clients import ml_resources
from distributed_breaker.clients.ml_readings import AVERAGED
from distributed_breaker.clients.ml_resources import STALE, Limits, Readings, Resources, Usage
from tests.unit.clock import FakeClock, wait_until

GB = 10**9


class Times(tuple[float, ...]):
    """A processor's times, as psutil gives them."""

    idle = property(lambda self: self[1])


class Host:
    """In place of psutil: two processors, half of whose memory is in use."""

    def __init__(self) -> None:
        self.busy = 0.0
        self.idle = 0.0

    def cpu_times(self, percpu: bool) -> list[Times]:
        assert percpu
        return [Times((self.busy, self.idle))] * (os.cpu_count() or 1)

    def virtual_memory(self) -> Any:
        return SimpleNamespace(percent=50.0)

    def Process(self) -> Any:  # noqa: N802 - as psutil calls it
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=123))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def host() -> Host:
    return Host()


def group(root: Path, folder: str, **contents: str) -> None:
    for name, content in contents.items():
        controller, _, rest = name.partition("_")
        path = root / "sys/fs/cgroup" / folder / f"{controller}.{rest}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def belongs(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------- one look


def test_this_host_can_be_read() -> None:
    usage = Readings().look()
    assert usage.problems == ()
    assert 0 < usage.memory < 100
    assert usage.rss > 2**20
    assert usage.cpu is None, "one look says nothing about a rate"
    assert usage.gpu_memory is None


def test_processors_are_averaged_over_some_looks(host: Host, clock: FakeClock) -> None:
    readings = Readings("/nowhere", clock, host)
    readings.look()
    for share in (1.0, 1.0, 0.0, 0.0):
        clock.advance(1.0)
        host.busy += share
        host.idle += 1 - share
        cpu = readings.look().cpu
    assert cpu == pytest.approx(50.0)
    for _ in range(AVERAGED):
        clock.advance(1.0)
        cpu = readings.look().cpu
    assert cpu == pytest.approx(0.0)


def test_memory_of_a_container(tmp_path: Path, host: Host) -> None:
    belongs(tmp_path, "0::/pod/app")
    readings = Readings(tmp_path, psutil=host)
    group(tmp_path, "", memory_stat="inactive_file 0\n")
    assert readings.look().memory == 50.0, "no limit is known, so the host's counts"
    stat = f"anon 5\ninactive_file {2 * GB}\nactive_file {GB}\n"
    group(tmp_path, "pod/app", memory_max="max", memory_current=f"{9 * GB}", memory_stat=stat)
    assert readings.look().memory == 50.0
    group(tmp_path, "pod/app", memory_max=f"{10 * GB}")
    assert readings.look().memory == pytest.approx(70.0), "cached files can be dropped"
    group(tmp_path, "pod", memory_max=f"{10 * GB}", memory_current=f"{9 * GB}")
    assert readings.look().memory == pytest.approx(90.0), "the group above is closer to its end"
    group(tmp_path, "pod", memory_max=f"{100 * GB}")
    group(tmp_path, "pod/app", memory_max=f"{100 * GB}")
    assert readings.look().memory == 50.0, "the host is closer to its end"


def test_memory_of_a_container_of_version_1(tmp_path: Path, host: Host) -> None:
    belongs(tmp_path, "5:cpuset:/x", "4:memory:/pod", "0::/")
    group(
        tmp_path, "memory/pod", memory_limit_in_bytes=str(10 * GB),
        memory_usage_in_bytes=str(9 * GB), memory_stat=f"inactive_file 1\ntotal_inactive_file {GB}",
    )  # fmt: skip
    group(
        tmp_path, "memory", memory_limit_in_bytes="9223372036854771712",
        memory_usage_in_bytes=str(99 * GB),
    )  # fmt: skip
    assert Readings(tmp_path, psutil=host).look().memory == pytest.approx(80.0)


def test_a_container_that_is_told_its_path_on_the_host(tmp_path: Path, host: Host) -> None:
    belongs(tmp_path, "0::/kubepods/pod7")
    group(tmp_path, "", memory_max=f"{GB}", memory_current=f"{GB}")
    assert Readings(tmp_path, psutil=host).look().memory == 100.0


def test_processors_are_those_of_the_quota(tmp_path: Path, host: Host, clock: FakeClock) -> None:
    belongs(tmp_path, "0::/")
    readings = Readings(tmp_path, clock, host)
    shares = []
    for number in range(3):
        group(tmp_path, "", cpu_max="50000 100000", cpu_stat=f"usage_usec {450_000 * number}\n")
        shares.append(readings.look().cpu)
        clock.advance(1.0)
    assert shares == [None, pytest.approx(90.0), pytest.approx(90.0)]
    group(tmp_path, "", cpu_max="max 100000")
    assert readings.look().cpu == pytest.approx(0.0), "without a quota the host's count"


def test_processors_of_version_1(tmp_path: Path, host: Host, clock: FakeClock) -> None:
    belongs(tmp_path, "2:cpu,cpuacct:/app")
    readings = Readings(tmp_path, clock, host)
    group(tmp_path, "cpu/app", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    group(tmp_path, "cpu", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    group(tmp_path, "cpuacct", cpuacct_usage="7")
    for used in (0, GB):
        group(tmp_path, "cpuacct/app", cpuacct_usage=str(used))
        usage = readings.look()
        clock.advance(1.0)
    assert usage.cpu == pytest.approx(50.0)


def test_without_psutil_the_host_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    usage = Readings("/nowhere").look()
    assert (usage.cpu, usage.memory, usage.rss) == (None, None, None)
    assert usage.problems == ("the host is not watched: pip install psutil",)
    assert usage.over(Limits(0.0, 0.0, 0.0)) is None


# ---------------------------------------------------------------------------- GPUs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 10 GB: 9 of the first and 2 of the second are in use; of these PyTorch has set
    aside 4 of the first, and uses 1."""
    used = {"cuda:0": (9, 4, 1), "cuda:1": (2, 0, 0)}
    for name, value in {
        "is_initialized": lambda: True,
        "mem_get_info": lambda gpu: ((10 - used[gpu][0]) * GB, 10 * GB),
        "memory_reserved": lambda gpu: used[gpu][1] * GB,
        "memory_allocated": lambda gpu: used[gpu][2] * GB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("cuda")
def test_gpu_memory_is_that_of_the_models_gpus(host: Host) -> None:
    readings = Readings("/nowhere", psutil=host)
    assert readings.look(["cpu"]).gpu_memory is None
    assert readings.look(["cuda:1"]).gpu_memory == pytest.approx(20.0)
    assert readings.look(["cuda:0", "cuda:1", "cpu"]).gpu_memory == pytest.approx(60.0)
    wrong = readings.look(["cuda:7"])
    assert wrong.gpu_memory is None
    assert wrong.memory == 50.0
    assert "GPU" in wrong.problems[0]


class Nvml:
    """In place of pynvml; a handle is the share that is in use."""

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 - as pynvml calls it
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return 10 * index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        assert uuid == "GPU-1"
        return 75

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=handle, total=100)


def test_nvml_tells_of_a_gpu_that_only_another_process_uses(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()
    readings = Readings("/nowhere", psutil=host, nvml=nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert readings.look(["cuda:3"]).gpu_memory == pytest.approx(30.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-1")
    assert readings.look(["cuda"]).gpu_memory == pytest.approx(50.0)
    assert readings.look(["cuda:1"]).gpu_memory == pytest.approx(75.0)
    assert readings.look(["cuda:2"]).problems
    assert nvml.open == 0


def test_a_gpu_that_nothing_can_tell_of(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    usage = Readings("/nowhere", psutil=host).look(["cuda:0"])
    assert usage.problems == ("the GPU is not watched: pip install nvidia-ml-py",)


# ---------------------------------------------------------------------------- limits


def test_the_first_limit_that_is_exceeded_is_named() -> None:
    usage = Usage(cpu=91.26, memory=86.0, gpu_memory=5.0)
    said = usage.over(Limits(90.0, 85.0, 90.0))
    assert said == "91.3 % of the processors is in use, and max_cpu_usage is 90 %"
    assert "max_memory_usage" in usage.over(Limits(95.0, 85.0, 1.0))
    assert "max_gpu_memory_usage" in usage.over(Limits(None, None, 4.9))
    assert usage.over(Limits(91.26, 86.0, 5.0)) is None
    assert Usage().over(Limits(0.0, 0.0, 0.0)) is None


# ---------------------------------------------------------------------------- in the background


def lookers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "circuit-breaker-resources"]


@pytest.fixture
def resources(host: Host, clock: FakeClock) -> Iterator[Resources]:
    resources = Resources(lambda: Readings("/nowhere", clock, host), 0.005, clock)
    yield resources
    resources.close()
    assert not lookers()


def test_one_thread_looks_for_all_while_somebody_has_joined(resources: Resources) -> None:
    assert resources.usage == Usage()
    assert not lookers()
    for _ in range(3):
        resources.join()
    wait_until(lambda: resources.usage.memory == 50.0)
    assert len(lookers()) == 1
    resources.leave()
    resources.leave()
    assert len(lookers()) == 1
    resources.leave()
    assert not lookers()
    assert resources.usage == Usage()
    resources.join()
    wait_until(lambda: resources.usage.memory == 50.0)


def test_the_devices_of_all_are_looked_at(resources: Resources, cuda: None) -> None:
    resources.join("cuda:1")
    wait_until(lambda: resources.usage.gpu_memory == pytest.approx(20.0))
    resources.join("cuda:0")
    wait_until(lambda: resources.usage.gpu_memory == pytest.approx(60.0))
    resources.leave("cuda:0")
    wait_until(lambda: resources.usage.gpu_memory == pytest.approx(20.0))


def test_a_look_that_hangs_is_not_believed_for_ever(
    resources: Resources, host: Host, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def hang() -> Any:
        hangs.set()
        go_on.wait(10)
        return SimpleNamespace(percent=99.0)

    resources.join()
    wait_until(lambda: resources.usage.memory == 50.0)
    monkeypatch.setattr(host, "virtual_memory", hang)
    assert hangs.wait(10)
    clock.advance(STALE + 1)
    assert resources.usage.memory is None
    assert "has not been seen for 6 s" in resources.usage.problems[0]
    assert len(lookers()) == 1
    go_on.set()
    wait_until(lambda: resources.usage.memory == 99.0)


def test_a_defect_does_not_end_the_thread(
    host: Host, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Readings:
        if not caplog.records:
            raise ValueError("a defect")
        return Readings("/nowhere", clock, host)

    resources = Resources(make, 0.005, clock)
    resources.join()
    wait_until(lambda: resources.usage.memory == 50.0)
    resources.leave()


def test_anything_can_be_pretended(resources: Resources, clock: FakeClock) -> None:
    resources.join()
    wait_until(lambda: resources.usage.memory == 50.0)
    resources.pretend(Usage(memory=99.0))
    resources.look()
    clock.advance(1_000)
    assert resources.usage == Usage(memory=99.0)
    resources.pretend(None)
    wait_until(lambda: resources.usage.memory == 50.0)


def test_where_no_thread_runs_who_reads_looks_now_and_then(
    host: Host, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ml_resources, "uwsgi_without_threads", lambda: True)
    looks = 0

    class Counting(Readings):
        def look(self, devices: Any = ()) -> Usage:
            nonlocal looks
            looks += 1
            return super().look(devices)

    resources = Resources(lambda: Counting("/nowhere", clock, host), 1.0, clock)
    resources.join()
    for _ in range(10):
        assert resources.usage.memory == 50.0
    assert looks == 1
    assert not lookers()
    clock.advance(1.0)
    assert resources.usage.memory == 50.0
    assert looks == 2


FORKS = """
import os, threading, time
from distributed_breaker.clients.ml_resources import Resources

def seen(resources):
    deadline = time.monotonic() + 10
    while resources.usage.rss is None or resources.usage.at < began:
        assert time.monotonic() < deadline, resources.usage
        time.sleep(0.005)

import distributed_breaker.clients.ml_resources as module
module.STALE = 0.05
resources = Resources(interval=0.01)
resources.join()
began = time.monotonic()
seen(resources)
child = os.fork()
began = time.monotonic()
seen(resources)
assert threading.active_count() == 2
if not child:
    resources.leave()
    assert threading.active_count() == 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_the_child_of_a_fork_has_a_thread_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], check=True, timeout=60)
