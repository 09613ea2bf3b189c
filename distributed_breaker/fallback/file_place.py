"""Where a private file lies: its folder, its lock, and how it comes, goes and is moved aside.

Nothing here opens it.  Closing any handle of it would take SQLite's locks away from the connections
of this process, so the lock has a file of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from .file_errors import Identity, Refused, Written

MOST_DAMAGED = 3  # damaged files that may stand beside the file
LOG = ("-wal", "-shm")  # what SQLite keeps beside it


class Place:
    """One path, and what lies there.

    Args:
        path: the file.
        busy: seconds that one waits for another process that is opening the file, or moving it.
        own_folder: others may not write in its folder; else one in which they may will do.
    """

    def __init__(self, path: str | os.PathLike[str], busy: float, own_folder: bool) -> None:
        # SQLite follows links to find its log, and a later chdir must change nothing.
        self.path = os.path.realpath(os.fspath(path))
        self._folder = os.path.dirname(self.path)
        self._busy = busy
        self._own_folder = own_folder

    def identity(self) -> Identity | None:
        """Which file is there; None: none."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def written(self) -> Written | None:
        """What changes with each write, by whomever; None: nothing has been written of late."""
        try:
            log = os.stat(self.path + LOG[0])
        except OSError:
            return None
        return log.st_mtime_ns, log.st_size, log.st_ino

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else opens or moves the file, or begins to write, meanwhile."""
        self._see_to_folder()
        handle = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            end = time.monotonic() + self._busy
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise Refused(
                            f"was not free for {self._busy:g} s",
                            "use it from fewer processes at once",
                        ) from None
                    time.sleep(0.002)
            try:
                yield
            finally:
                # A child that was forked just now shares the handle, and with it the lock.
                fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def _see_to_folder(self) -> None:
        try:
            found = os.stat(self._folder)
        except FileNotFoundError:
            self._make_folder()
            found = os.stat(self._folder)
        if self._own_folder and found.st_mode & 0o022:
            raise Refused(
                f"lies where others may write (mode {stat.S_IMODE(found.st_mode):o})",
                f"take that right away (chmod go-w {self._folder}), or name another folder",
            )

    def _make_folder(self) -> None:
        folder, missing = self._folder, []
        while not os.path.exists(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            _sync(os.path.dirname(folder))

    def make(self) -> None:
        """Make the file if there is none, for this user alone; refuse one that is not his.

        SQLite would make it readable for all, as the umask says; its log takes the file's mode.
        """
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            # Somebody removed a file and left its log, which must not be taken for the new one's.
            self.remove(LOG)
            _sync(self._folder)
        found = os.lstat(self.path)
        # Root may look after what a service has left.
        if not stat.S_ISREG(found.st_mode) or os.geteuid() not in (found.st_uid, 0):
            raise Refused(
                "cannot be read or written (it is no file of this user)",
                "remove it, or name another file",
            )

    def remove(self, ends: tuple[str, ...] = (*LOG, "")) -> None:
        """Remove the file with its log."""
        for end in ends:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + end)

    def damaged(self) -> list[str]:
        """The damaged files that stand beside it, by their paths, oldest first."""
        begin = os.path.basename(self.path) + ".damaged-"
        try:
            names = os.listdir(self._folder)
        except OSError:
            return []
        ours = (name for name in names if name.startswith(begin) and not name.endswith(LOG))
        return [os.path.join(self._folder, name) for name in sorted(ours)]

    def move_aside(self) -> str:
        """Rename the file with its log and return its new path; a bounded number of times.

        Nothing is ever deleted: it is work that nobody has done.
        """
        kept = self.damaged()
        if len(kept) >= MOST_DAMAGED:
            raise Refused(f"is damaged, and so are {len(kept)} before it", f"save {kept[0]}, …")
        aside = self.path + time.strftime(".damaged-%Y%m%dT%H%M%SZ", time.gmtime())
        while os.path.exists(aside):
            aside += "+"
        # The log goes first: should this process die in between, the damaged file loses its log,
        # while a new file that found this log would take it for its own.
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path + "-wal", aside + "-wal")
        self.remove(("-shm",))
        os.rename(self.path, aside)
        _sync(self._folder)
        return aside


def _sync(folder: str) -> None:
    """Make the names in a folder durable, where its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
