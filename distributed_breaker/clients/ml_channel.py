"""How an application and the process that runs its model talk: small frames, and shared memory.

A frame is one packet of JSON on a Unix socket.  Trees of tensors (``ml_tensors``) lie in memory
that both sides have mapped: each side makes the memory that it writes, grows it when needed, and
passes it along.  It is sealed, so that it cannot shrink under its reader's hands.  Nothing that
comes from the other side is trusted, and nothing waits without a deadline.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import time
from typing import Any

from .ml_tensors import decode, encode, size_of

LONGEST_FRAME = 64 * 1024
LONGEST_HEADER = 16 * 2**20
MOST_BYTES = 2 * 2**30  # of one tree
KEPT = 32 * 2**20  # memory that is kept for the next tree
SMALLEST = 64 * 1024
_MARK = struct.Struct("<Q")  # with which each memory begins
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Gone(Exception):
    """The other side has closed the connection."""


class Late(Exception):
    """The deadline has passed."""


class Broken(Exception):
    """The other side does not keep to the rules; the message says to which."""


class Channel:
    """One end of a connection, which takes turns: a frame is answered before the next is sent.

    Deadlines are in seconds of ``time.monotonic``, which is the same in all processes of a host.

    Args:
        sock: of the type SOCK_SEQPACKET; it belongs to the channel from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._out: mmap.mmap | None = None
        self._in: mmap.mmap | None = None

    def fileno(self) -> int:
        """The socket's, for ``select``."""
        return self._socket.fileno()

    def send(self, frame: dict[str, Any], deadline: float, *tree: Any) -> None:
        """Send a frame, and a tree if there is one.

        Raises:
            TypeError: the tree holds something that cannot be sent.
            ValueError: it is too large.
            Gone, Late.
        """
        fds: list[int] = []
        try:
            if tree:
                frame = {**frame, "tree": self._write(tree[0], fds)}
            data = json.dumps(frame).encode()
            if len(data) > LONGEST_FRAME:
                raise ValueError(f"a frame of {len(data)} bytes; at most {LONGEST_FRAME} are sent")
            self._until(deadline)
            try:
                socket.send_fds(self._socket, [data], fds)
            except TimeoutError as error:
                raise Late from error
            except OSError as error:
                raise Gone from error
        except BaseException:
            self._out = None  # the other side may never hear of it
            raise
        finally:
            for fd in fds:
                os.close(fd)
        if self._out is not None and len(self._out) > KEPT:
            self._out = None  # the reader holds it until it has read it

    def receive(self, deadline: float) -> tuple[dict[str, Any], Any]:
        """The next frame and its tree, None if it has none.

        Raises:
            Broken, Gone, Late.
        """
        self._until(deadline)
        cloexec = socket.MSG_CMSG_CLOEXEC
        try:
            data, fds, flags, _ = socket.recv_fds(self._socket, LONGEST_FRAME, 1, cloexec)
        except TimeoutError as error:
            raise Late from error
        except OSError as error:
            raise Gone from error
        try:
            if not data:
                raise Gone
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise Broken("a frame is too long")
            if fds:
                self._in = _mapped(fds[0])
        finally:
            for fd in fds:
                os.close(fd)
        try:
            frame = json.loads(data)
            if type(frame) is not dict:
                raise ValueError("a frame is no object")
            return frame, self._read(frame["tree"]) if "tree" in frame else None
        except (ValueError, RecursionError, ImportError) as error:
            raise Broken(str(error)[:300]) from error

    def mark(self, number: int) -> None:
        """Show a number to the other side, which sees it also when this process dies right now."""
        if self._out is not None:
            _MARK.pack_into(self._out, 0, number % 2**64)

    def marked(self) -> int | None:
        """The number that the other side has shown last; None: it could not show any."""
        return None if self._in is None else int(_MARK.unpack_from(self._in)[0])

    def alive(self) -> bool:
        """Whether the other side is there still, as far as is known without waiting."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLRDHUP)
            return not poll.poll(0)
        except (OSError, ValueError):
            return False

    def hang_up(self) -> None:
        """End the connection, also while another thread waits here: that one gets Gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and let go of what it holds.  Safe to call twice."""
        self.hang_up()
        self.abandon()

    def abandon(self) -> None:
        """Close it here alone: the process that this one was forked from goes on with it."""
        self._socket.close()
        self._out = self._in = None

    def _until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Late
        try:
            self._socket.settimeout(left)
        except OSError as error:
            raise Gone from error

    def _write(self, tree: Any, fds: list[int]) -> list[int]:
        """Put a tree into the memory, and add what was made for it to the descriptors."""
        structure, parts = encode(tree)
        header = json.dumps(structure).encode()
        size = size_of(parts)
        if len(header) > LONGEST_HEADER or size > MOST_BYTES:
            raise ValueError(
                f"{size} bytes of tensors and {len(header)} of structure are too much; at most "
                f"{MOST_BYTES} and {LONGEST_HEADER} are sent at once"
            )
        at = _MARK.size
        out = self._out
        if out is None or len(out) < at + len(header) + size:
            out = self._out = _made(at + len(header) + size, fds)
        for part in (header, *parts):
            out[at : at + len(part)] = part
            at += len(part)
        return [len(header), size]

    def _read(self, sizes: Any) -> Any:
        memory = self._in
        match sizes:
            case [int(header), int(size)] if memory is not None and header >= 0 and size >= 0:
                begin = _MARK.size + header
                if header > LONGEST_HEADER or begin + size > len(memory):
                    raise ValueError("a tree is larger than its memory")
            case _:
                raise ValueError("no sizes of a tree")
        # A copy, as whoever wrote it could change it while it is looked at.
        structure = json.loads(memory[_MARK.size : begin])
        with memoryview(memory) as whole, whole[begin : begin + size] as part:
            tree = decode(structure, part)
        if len(memory) > KEPT:
            self._in = None
        return tree


def _made(size: int, fds: list[int]) -> mmap.mmap:
    """New memory.  Its pages come into being when they are written, so it may well be too large."""
    size = max(SMALLEST, 1 << (size - 1).bit_length())
    fd = os.memfd_create("distributed_breaker", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fds.append(fd)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return mmap.mmap(fd, size)


def _mapped(fd: int) -> mmap.mmap:
    """What the other side has made.

    Raises:
        Broken: it could shrink while it is read, which would kill this process.
    """
    try:
        seals, size = fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
        if not seals & fcntl.F_SEAL_SHRINK:
            raise Broken("its memory is not sealed")
        if not SMALLEST <= size <= 2 * (MOST_BYTES + LONGEST_HEADER):
            raise Broken(f"its memory has {size} bytes")
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)
    except OSError as error:
        raise Broken("it sends something else than memory") from error
