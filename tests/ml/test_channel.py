"""What passes between an application and its worker, and that nothing else does."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from distributed_breaker.clients import ml_channel, ml_remote
from distributed_breaker.clients.ml_channel import _SEALS, SMALLEST, Broken, Channel, Gone, Late
from distributed_breaker.clients.ml_models import ModelProblem
from distributed_breaker.clients.ml_process import InferenceTimeout, ModelSpec, WorkerDied
from distributed_breaker.clients.ml_remote import Worker

MANY = 10.0


def soon() -> float:
    return time.monotonic() + MANY


def memory(content: bytes = b"", size: int = SMALLEST, seals: int = _SEALS) -> int:
    """A descriptor such as the other side passes along."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 8)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and what an enemy holds in his hands."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(MANY)
    channel = Channel(ours)
    with theirs:
        yield channel, theirs
    channel.close()


def test_frames_and_trees_go_there_and_back(ends: tuple[Channel, socket.socket]) -> None:
    one, sock = ends
    other = Channel(sock)
    assert one.marked() is None
    one.mark(5)  # which nobody can see yet
    for size in (0, 1000, 3, 10**6, 0):
        given = {"x": torch.arange(size), "y": "text"}
        one.send({"a": size}, soon(), given)
        frame, tree = other.receive(soon())
        assert frame["a"] == size
        assert torch.equal(tree["x"], given["x"])
    one.mark(7)
    assert other.marked() == 7
    other.send({"b": 1}, soon())
    assert one.receive(soon()) == ({"b": 1}, None)


def test_memory_is_reused_but_not_if_it_is_large(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, sock = ends
    other = Channel(sock)
    monkeypatch.setattr(ml_channel, "KEPT", 2**20)
    made = []
    for size in (10, 1000, 10**6, 10):
        one.send({}, soon(), b"x" * size)
        assert other.receive(soon())[1] == b"x" * size
        made.append((one._out, other._in))
    assert made[0] == made[1] != made[3]
    assert None not in made[0]
    one.send({}, soon(), b"x" * 2**21)
    assert one._out is None
    other.receive(soon())
    assert other._in is None
    one.send({}, soon(), b"y")
    assert other.receive(soon())[1] == b"y"


def test_nothing_waits_for_ever(ends: tuple[Channel, socket.socket]) -> None:
    channel, sock = ends
    with pytest.raises(Late):
        channel.receive(time.monotonic() + 0.01)
    with pytest.raises(Late):
        channel.send({}, time.monotonic())
    with pytest.raises(Late):
        _send_until_no_more_fits_in(channel)
    assert channel.alive()
    thread = threading.Timer(0.01, channel.hang_up)
    thread.start()
    with pytest.raises(Gone):
        channel.receive(soon())
    thread.join()
    assert not channel.alive()
    assert sock.recv(10) == b"{}"


def _send_until_no_more_fits_in(channel: Channel) -> None:
    for _ in range(100_000):
        channel.send({}, time.monotonic() + 0.01)


def test_the_other_side_goes(ends: tuple[Channel, socket.socket]) -> None:
    channel, sock = ends
    sock.close()
    assert not channel.alive()
    for act in (lambda: channel.receive(soon()), lambda: channel.send({}, soon())):
        with pytest.raises(Gone):
            act()
    channel.close()
    channel.close()
    assert not channel.alive()
    with pytest.raises(Gone):
        channel.send({}, soon())


def test_what_is_refused_leaves_the_channel_as_it_was(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, sock = ends
    other = Channel(sock)
    with pytest.raises(TypeError, match="a set cannot be sent"):
        one.send({}, soon(), {1})
    monkeypatch.setattr(ml_channel, "MOST_BYTES", 10**6)
    with pytest.raises(ValueError, match=r"1000001 bytes of tensors .* are too much"):
        one.send({}, soon(), b"x" * (10**6 + 1))
    with pytest.raises(ValueError, match="a frame of"):
        one.send({"long": "x" * 70_000}, soon(), b"x")
    with pytest.raises(Late):
        one.send({}, 0.0, b"x" * 100_000)
    one.send({}, soon(), b"x")
    assert other.receive(soon())[1] == b"x"


@pytest.mark.parametrize(
    ("data", "make"),
    [
        (b"", None),
        (b"\xff", None),
        (b"[]", None),
        (b"{}" + b" " * 70_000, None),
        (b"[" * 60_000, None),
        (b'{"tree": [0, 0]}', None),  # without any memory
        (b'{"tree": [1, 0]}', lambda: memory(b"1", seals=fcntl.F_SEAL_GROW)),
        (b'{"tree": [1, 0]}', lambda: memory(b"1", size=100)),
        (b'{"tree": [1, 0]}', lambda: memory(b"1", size=2**40)),
        (b'{"tree": [1, 0]}', lambda: os.open(os.devnull, os.O_RDWR)),
        (b'{"tree": [1, 0]}', lambda: os.eventfd(0)),
        (b'{"tree": [0, 0]}', memory),
        (b'{"tree": [2, 1]}', lambda: memory(b"1 ")),
        (b'{"tree": [-1, 1]}', lambda: memory(b"1")),
        (b'{"tree": [1, -1]}', lambda: memory(b"1")),
        (b'{"tree": [1.0, 0]}', lambda: memory(b"1")),
        (b'{"tree": [1]}', lambda: memory(b"1")),
        (b'{"tree": {}}', lambda: memory(b"1")),
        (b'{"tree": null}', lambda: memory(b"1")),
        (b'{"tree": [16, 65513]}', lambda: memory(b'["bytes", 65512]')),  # a byte too many
        (b'{"tree": [100000000, 0]}', lambda: memory(b"1")),
        (b'{"tree": [1, 9999999999999999999]}', lambda: memory(b"1")),
        (b'{"tree": [5, 0]}', lambda: memory(b"]\x00\xff[x")),
        (b'{"tree": [50000, 0]}', lambda: memory(b"[" * 50_000)),
        (b'{"tree": [27, 8]}', lambda: memory(b'["torch", "float32", [1000]]')),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, bytes) else "",
)
def test_nothing_that_comes_is_trusted(
    ends: tuple[Channel, socket.socket], data: bytes, make: Callable[[], int] | None
) -> None:
    channel, sock = ends
    fds = [make()] if make is not None else []
    before = len(os.listdir("/proc/self/fd"))
    if data:
        socket.send_fds(sock, [data], fds)
    else:
        sock.close()
    with pytest.raises((Broken, Gone)):
        channel.receive(soon())
    channel.close()
    assert len(os.listdir("/proc/self/fd")) < before
    for fd in fds:
        os.close(fd)


def test_more_descriptors_than_one_are_refused(ends: tuple[Channel, socket.socket]) -> None:
    channel, sock = ends
    fds = [memory(b"1") for _ in range(3)]
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(sock, [b'{"tree": [1, 0]}'], fds)
    with pytest.raises(Broken, match="too long"):
        channel.receive(soon())
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)


def test_the_other_side_cannot_take_memory_away(ends: tuple[Channel, socket.socket]) -> None:
    channel, sock = ends
    channel.send({}, soon(), b"x")
    _, fds, _, _ = socket.recv_fds(sock, 1000, 1)
    with pytest.raises(PermissionError):
        os.ftruncate(fds[0], 0)
    with mmap.mmap(fds[0], SMALLEST, prot=mmap.PROT_READ) as seen:
        assert seen[8:].startswith(b'["bytes", 1]x')
    os.close(fds[0])


ABOUT = b'["dict", ["version"], ["1"]]'
GREETING = json.dumps({"pid": 7, "tree": [len(ABOUT), 0]}).encode()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Worker, socket.socket]]:
    """A worker that is an enemy's, which has greeted already."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(ml_remote, "connect", lambda model, most_bytes: ours)
    worker = Worker(ModelSpec("model.pt"), True, None)
    with theirs:
        yield worker, theirs
    worker.kill()
    worker.retire()


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"pid": 7}',
        b'{"pid": "7", "tree": [1, 0]}',
        b'{"problem": 5}',
        b'{"problem": ["a", "b"]}',
        b"",
        b"\0",
    ],
)
def test_a_worker_that_does_not_greet(worker: tuple[Worker, socket.socket], answer: bytes) -> None:
    engine, enemy = worker
    enemy.send(answer) if answer else enemy.close()
    with pytest.raises(WorkerDied, match=r"no greeting|has ended|breaks the rules"):
        engine.load()


def test_a_worker_that_has_no_model(worker: tuple[Worker, socket.socket]) -> None:
    engine, enemy = worker
    enemy.send(b'{"problem": ["model.pt", "is broken", "mend it"]}')
    with pytest.raises(ModelProblem, match=r"model\.pt is broken: mend it"):
        engine.load()


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"call": 2, "retires": false}',
        b'{"call": 1}',
        b'{"call": 1, "retires": 5}',
        b'{"call": 1, "retires": false, "tree": [9999999, 0]}',
        b"",
    ],
)
def test_a_worker_that_answers_something_else(
    worker: tuple[Worker, socket.socket], answer: bytes
) -> None:
    engine, enemy = worker
    _greet(enemy)
    engine.load()
    assert (engine.pid, engine.about) == (7, {"version": "1"})
    enemy.send(answer) if answer else enemy.close()
    with pytest.raises(WorkerDied):
        engine.call(1, MANY)
    assert not engine.usable


def _greet(enemy: socket.socket) -> None:
    fd = memory(ABOUT)
    socket.send_fds(enemy, [GREETING], [fd])
    os.close(fd)


def test_whether_a_call_has_begun_is_seen_after_the_end(
    worker: tuple[Worker, socket.socket],
) -> None:
    engine, enemy = worker
    _greet(enemy)
    engine.load()
    enemy.close()
    with pytest.raises(WorkerDied) as caught:
        engine.call(1, MANY)
    assert not caught.value.begun


def test_a_call_that_is_late_makes_a_worker_useless(
    worker: tuple[Worker, socket.socket],
) -> None:
    engine, enemy = worker
    _greet(enemy)
    engine.load()
    with pytest.raises(InferenceTimeout):
        engine.call(1, -1.0)
    assert (engine.usable, engine.overran) == (True, False)
    with pytest.raises(InferenceTimeout):
        engine.call(1, 0.01)
    assert (engine.usable, engine.overran) == (False, True)
